"""What a model's file makes of sizes by `int`, `float` and `len` is computed when the graph runs, at every size."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable

import numpy
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fxgrow


class Net(nn.Module):
    """A layer, `between` on its output and the input, another layer."""

    def __init__(self, between: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.a, self.between, self.b = nn.Linear(3, 6), between, nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.between(self.a(x), x))


def padded_to_a_multiple(h: Tensor, x: Tensor) -> Tensor:
    missing = -int(x.shape[1]) % 80
    return F.pad(h, (0, 0, 0, missing)).cumsum(1)


def valid_length(length: float) -> int:
    return int(max(1, math.ceil((length - 8) / 4) + 1))


def rounded(h: Tensor, x: Tensor) -> Tensor:
    return h * valid_length(x.shape[1])


def kinds(h: Tensor, x: Tensor) -> Tensor:
    n = int(x.shape[1] / 2)
    assert isinstance(n, int) and isinstance(float(n), float) and not isinstance(n, (str, float))
    return h * (n + float(x.shape[1]) + sum(map(int, x.shape)))


AT_ALL_SIZES = [padded_to_a_multiple, rounded, kinds]
OTHERS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "remainder of a number of samples": lambda h, x: h * (len(x) % 3),
    "smaller of two": lambda h, x: h * torch.arange(int(min(x.shape[1], 1000))).to(h).sum() / len(x),
    "truth": lambda h, x: h * int(x.shape[1] > 20),
    "by number": lambda h, x: torch.stack([h.mean((0, 1))] * len(x)),
    "NumPy": lambda h, x: h * float(numpy.arange(int(x.shape[0])).sum()),
    "heads": lambda h, x: h.unflatten(-1, (2, int(h.shape[-1]) // 2)).softmax(-1).flatten(-2),
}


@pytest.mark.parametrize(
    "between", [*AT_ALL_SIZES, *OTHERS.values()], ids=[f.__name__ for f in AT_ALL_SIZES] + [*OTHERS]
)
def test_numbers_follow_the_sizes(between: Callable[[Tensor, Tensor], Tensor]) -> None:
    net = Net(between).double()
    gm = fxgrow.capture(net, (torch.randn(2, 16, 3, dtype=torch.float64),))
    for batch, n in [(2, 16), (2, 15), (2, 160), (2, 170), (7, 16)]:
        x = torch.randn(batch, n, 3, dtype=torch.float64)
        try:
            found = gm(x)
        except fxgrow.CaptureError:
            assert batch == 7 and between in (OTHERS["by number"], OTHERS["NumPy"])
        else:
            torch.testing.assert_close(found, net(x), rtol=0, atol=1e-12)
    wider = fxgrow.widen(net, (x,), {"a": fxgrow.widths(gm)[0].step})
    torch.testing.assert_close(wider(x), net(x), rtol=0, atol=1e-12)


def test_a_condition_on_a_number_is_guarded() -> None:
    gm = fxgrow.capture(Net(lambda h, x: h * 2 if int(x.shape[1]) > 40 else h), (torch.randn(2, 16, 3),))
    gm(torch.randn(2, 40, 3))
    with pytest.raises(fxgrow.CaptureError, match=r"int\(x.shape\[1\]\) > 40"):
        gm(torch.randn(2, 41, 3))


def test_names_of_the_file_are_as_before() -> None:
    fxgrow.capture(Net(rounded), (torch.randn(2, 16, 3),))
    assert not {"int", "float", "len"} & vars(sys.modules[__name__]).keys()
