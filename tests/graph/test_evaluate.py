"""Outputs in eval mode, and how far they are apart."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor, nn

from fxgrow.graph.evaluate import difference, eval_outputs, tensors_in


@dataclasses.dataclass
class Out:
    y: Tensor
    more: tuple[Tensor, ...] = ()


class Counting(nn.Module):
    """Writes into a buffer, draws random numbers, and returns a dataclass."""

    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros(1))
        self.drop = nn.Dropout()
        self.drop.eval()

    def forward(self, x: Tensor) -> Out:
        self.count += 1
        return Out(self.drop(x) + torch.rand(1), (self.count,))


@pytest.mark.parametrize("form", ["tensor", "tuple", "mapping"])
def test_outputs_leave_the_module_as_it_was(form: str) -> None:
    module, x = Counting(), torch.ones(3)
    inputs = {"tensor": x, "tuple": (x,), "mapping": {"x": x}}[form]
    state = torch.get_rng_state()
    first, second = eval_outputs(module, inputs), eval_outputs(module, inputs)
    assert torch.equal(first[0], second[0]) and first[1].item() == second[1].item() == 1
    assert module.count.item() == 0 and module.training and not module.drop.training
    assert torch.equal(torch.get_rng_state(), state)


def test_tensors_in_nested_values() -> None:
    a, b, c = torch.zeros(1), torch.ones(1), torch.ones(2)
    assert [id(t) for t in tensors_in({"n": (a, 3), "o": [Out(b, (c,))], "p": None})] == [id(a), id(b), id(c)]


def test_difference() -> None:
    nan, inf = float("nan"), float("inf")
    want = torch.tensor([1.0, -4.0, inf, nan])
    assert difference(want.clone(), want).relative == 0.0
    assert difference(torch.tensor([1.0, -3.0, inf, nan]), want) == (1.0, 4.0, 1e-4)
    assert difference(torch.tensor([1.0, -3.0, inf, nan]), want).relative == pytest.approx(0.25)
    assert difference(torch.tensor([1.0, nan, inf, nan]), want).relative == inf
    assert difference(torch.tensor([1.0, -4.0, 0.0, nan]), want).relative == inf
    assert difference(torch.tensor([1.0, -4.0, -inf, nan]), want).relative == inf
    assert difference(torch.zeros(2), torch.zeros(2)).relative == 0.0
    assert difference(torch.ones(2), torch.zeros(2)).relative > 1
    assert difference(torch.zeros(0), torch.zeros(0)).relative == 0.0
    assert str(difference(torch.tensor([1.5]), torch.tensor([2.0]))) == "0.5 (largest output 2)"


def test_what_rounding_explains() -> None:
    one = torch.ones(1)
    assert difference(one * (1 + 1e-5), one).is_rounding
    assert not difference(one.double() * (1 + 1e-5), one.double()).is_rounding
    assert difference(one.bfloat16() * 1.01, one.bfloat16()).is_rounding
    assert not difference(torch.tensor([10_000_001]), torch.tensor([10_000_000])).is_rounding
    assert difference(torch.tensor([1 + 1e-5j]), torch.tensor([1 + 0j])).is_rounding
