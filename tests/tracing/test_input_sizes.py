"""Numbers that Python code made of the inputs' sizes are nodes of the graph, or guarded with the line.

This file uses `int` for more than calls, so that a trace gets plain numbers: see also test_numbers_of_sizes.py.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxgrow


def is_a_number(value: Any) -> bool:
    return type(value) in (int, float) or value is len


class Net(nn.Module):
    """A convolution, `join` on its output, a linear layer."""

    def __init__(self, join: Callable[[Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.join, self.conv, self.out = join, nn.Conv2d(3, 8, 3), nn.Linear(8 * 36, 4)

    def forward(self, x: Tensor) -> Any:
        return self.out(self.join(self.conv(x).relu(), x))


def by_key(h: Tensor, x: Tensor) -> Tensor:
    scales = {n: float(n) for n in (x.shape[0],)}
    return (h * scales[x.shape[0]]).flatten(1)


SYMBOLIC: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "len": lambda h, x: h.view(len(h), -1),
    "len of the input": lambda h, x: h.view(len(x), -1),
    "int": lambda h, x: h.reshape(int(x.shape[0]), -1),
    "int of a quotient": lambda h, x: h.view(int(x.numel() / (3 * 64)), -1),
    "tuple of ints": lambda h, x: h.view(tuple(int(s) for s in h.shape)).flatten(1),
    "product of a list": lambda h, x: h.view(math.prod([int(h.shape[0]), 1]), -1),
    "twice and half": lambda h, x: torch.cat([h, h]).view(2 * len(h), -1)[: len(h)],
    "keyword": lambda h, x: torch.reshape(h, shape=(len(h), -1)),
    "a size as a float": lambda h, x: (h / float(x.shape[0])).flatten(1),
    "a key": by_key,
    "truth of a size": lambda h, x: h.flatten(1) if x.shape[0] else h,
    "truth of a shape": lambda h, x: h.flatten(1) if x.shape else h,
}


@pytest.mark.parametrize("join", SYMBOLIC.values(), ids=SYMBOLIC)
@pytest.mark.parametrize("batch", [1, 2, 5, 12])
def test_other_batch_sizes(join: Callable[[Tensor, Tensor], Any], batch: int) -> None:
    net = Net(join)
    gm = fxgrow.capture(net, (torch.randn(4, 3, 8, 8),))
    x = torch.randn(batch, 3, 8, 8)
    assert torch.equal(gm(x), net(x))
    assert [w.pinned for w in fxgrow.widths(gm)][0] is None


def test_what_is_computed_of_a_size_in_other_ways_is_guarded_with_its_line() -> None:
    gm = fxgrow.capture(Net(lambda h, x: (h * (len(x) % 3)).flatten(1)), (torch.randn(4, 3, 8, 8),))
    assert torch.equal(gm(torch.ones(4, 3, 8, 8)), gm(torch.ones(4, 3, 8, 8)))
    with pytest.raises(fxgrow.CaptureError, match=r"len\(x\) % 3"):
        gm(torch.randn(5, 3, 8, 8))


def test_a_loop_over_the_batch_is_guarded_with_its_line() -> None:
    gm = fxgrow.capture(
        Net(lambda h, x: torch.stack([h[i].flatten() for i in range(len(h))])), (torch.randn(2, 3, 8, 8),)
    )
    with pytest.raises(fxgrow.CaptureError, match=r"for i in range\(len\(h\)\)"):
        gm(torch.randn(3, 3, 8, 8))


class Lengths(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.out = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        positions = torch.arange(int(x.shape[1])).to(x) / len(x[0])
        return self.out(self.embed(x) * positions[:, None].expand(int(x.size(1)), 8))


@pytest.mark.parametrize("shape", [(2, 5), (3, 5), (2, 9), (1, 4)])
def test_other_lengths(shape: tuple[int, int]) -> None:
    net = Lengths()
    gm = fxgrow.capture(net, (torch.randn(2, 5, 6),))
    x = torch.randn(*shape, 6)
    assert torch.equal(gm(x), net(x))


def test_a_size_that_a_layer_fixes_is_guarded_where_it_enters() -> None:
    net = Net(lambda h, x: h.view(-1, int(h.shape[1]) * int(h.shape[2]) * int(h.shape[3])))
    gm = fxgrow.capture(net, (torch.randn(4, 3, 8, 8),))
    x = torch.randn(2, 3, 8, 8)
    assert torch.equal(gm(x), net(x))
    with pytest.raises(fxgrow.CaptureError):
        gm(torch.randn(2, 3, 9, 8))
    wider = fxgrow.widen(net, (x,), {"conv": 1})
    assert torch.allclose(wider(x), net(x), atol=1e-6)


def test_a_constant_that_depends_on_the_batch_is_guarded() -> None:
    def join(h: Tensor, x: Tensor) -> Tensor:
        return (h * torch.frombuffer(bytearray(range(1, len(x) + 1)), dtype=torch.uint8).view(-1, 1, 1, 1)).flatten(1)

    gm = fxgrow.capture(Net(join), (torch.randn(2, 3, 8, 8),))
    with pytest.raises(fxgrow.CaptureError):
        gm(torch.randn(3, 3, 8, 8))


def test_numpy_of_sizes_is_plain_arithmetic_in_the_graph() -> None:
    numpy = pytest.importorskip("numpy")

    def join(h: Tensor, x: Tensor) -> Tensor:
        scaled = h / numpy.sqrt(h.shape[1]) * numpy.float32(2.0) + numpy.log(2 * numpy.pi)
        return scaled.view(-1, int(numpy.prod(h.shape[1:]))) * numpy.maximum(numpy.sqrt(4.0), 1)

    net, x = Net(join), torch.randn(3, 3, 8, 8)
    gm = fxgrow.capture(net, (torch.randn(4, 3, 8, 8),))
    assert not any(type(a).__module__ == "numpy" for node in gm.graph.nodes for a in node.args)
    assert "guard" not in [getattr(node.target, "__name__", "") for node in gm.graph.nodes if node.args[1:2] == (4,)]
    assert torch.equal(gm(x), net(x))
    wider = fxgrow.widen(net, (x,), {"conv": 2})
    assert torch.allclose(wider(x), net(x), atol=1e-5)


class HalvesTwice(nn.Module):
    """Takes lengths that 4 divides; an unpacked list of chunks, whose number the code asks for."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.down, self.c = nn.Conv1d(3, 6, 1), nn.Conv1d(6, 6, 4, 4), nn.Conv1d(9, 2, 1)
        self.up = nn.ConvTranspose1d(6, 3, 4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.a(x)
        parts = list(h.chunk(2, 1))
        parts.append(self.up(self.down(h)))
        return self.c(torch.cat(parts, 1))


def test_sizes_that_must_be_multiples() -> None:
    net = HalvesTwice().double()
    gm = fxgrow.capture(net, (torch.randn(2, 3, 16, dtype=torch.float64),))
    for batch, n in [(3, 16), (2, 8), (5, 28)]:
        x = torch.randn(batch, 3, n, dtype=torch.float64)
        torch.testing.assert_close(gm(x), net(x), rtol=0, atol=1e-12)


@functools.lru_cache(maxsize=8)
def _split_shape(shape: tuple[int, ...], heads: int) -> tuple[int, ...]:
    return (*shape[:-1], heads, shape[-1] // heads)


class AsksItsCache(nn.Module):
    """Sizes are looked up in a cache, except such that have no hash, as in einops."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(3, 8), nn.Linear(8, 8), nn.Linear(8, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.a(x)
        try:
            shape = _split_shape(tuple(h.shape), 2)
        except TypeError:
            shape = _split_shape.__wrapped__(tuple(h.shape), 2)
        h = h.reshape(shape).softmax(-1).flatten(-2)
        steps = torch.arange(int(x.shape[1] // 3), dtype=x.dtype)  # a size that is a number to the code
        return self.c(self.b(h) + steps.sum())


def test_sizes_in_a_cache() -> None:
    net = AsksItsCache().double()
    _split_shape.cache_clear()
    gm = fxgrow.capture(net, (torch.randn(2, 6, 3, dtype=torch.float64),))
    assert not any("_split_shape(tuple" in str(node.args) for node in gm.graph.nodes)
    x = torch.randn(5, 6, 3, dtype=torch.float64)
    torch.testing.assert_close(gm(x), net(x), rtol=0, atol=1e-12)
    wider = fxgrow.widen(net, (x,), {w.name: w.step for w in fxgrow.widths(gm) if w.pinned is None})
    assert wider.get_submodule("a").weight.shape == (12, 3)
    torch.testing.assert_close(wider(x), net(x), rtol=0, atol=1e-12)


class RoundsUp(nn.Module):
    """Pads to a multiple of 16 by a number that is the same for many lengths."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv1d(3, 6, 1), nn.Conv1d(6, 2, 16, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        length = int(math.ceil(x.shape[-1] / 16) * 16)
        h = self.a(x)
        return self.b(nn.functional.pad(h, (0, length - h.shape[-1])))


def test_numbers_that_change_in_steps() -> None:
    net = RoundsUp().double()
    gm = fxgrow.capture(net, (torch.randn(2, 3, 20, dtype=torch.float64),))
    for n in (20, 21, 32):
        x = torch.randn(3, 3, n, dtype=torch.float64)
        torch.testing.assert_close(gm(x), net(x), rtol=0, atol=1e-12)
    for n in (16, 40):
        with pytest.raises(fxgrow.CaptureError, match=r"int\(math.ceil"):
            gm(torch.randn(3, 3, n, dtype=torch.float64))


class BatchAndLength(nn.Module):
    """Numbers of the batch size and of a length, each of which the code asks for."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 6), nn.Linear(6, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.a(x)
        windows = h.unflatten(1, (-1, 2)).flatten(0, 1)
        batch = int(windows.shape[0] / (h.shape[1] / 2))
        return self.b(windows.reshape(batch, -1, 6) + torch.arange(float(x.shape[1])).to(h).unsqueeze(1))


def test_two_numbers_of_different_dimensions() -> None:
    net = BatchAndLength().double()
    gm = fxgrow.capture(net, (torch.randn(2, 8, 3, dtype=torch.float64),))
    for batch, n in [(3, 8), (2, 10), (5, 6)]:
        x = torch.randn(batch, n, 3, dtype=torch.float64)
        torch.testing.assert_close(gm(x), net(x), rtol=0, atol=1e-12)


def square(h: Tensor) -> Tensor:
    assert h.shape[2] == h.shape[3]
    return nn.functional.avg_pool2d(h, int(h.shape[3]))


OF_TWO_SIZES: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "twice": (lambda h: nn.functional.interpolate(h, [int(s * 2) for s in h.shape[2:]]), "both"),
    "scaled": (lambda h: h * float(h.shape[3]) ** -0.5 + 0.25 * float(h.shape[2]) + 1 / len(h), "both"),
    "logarithm": (lambda h: h / (2.5 * math.log(float(h.shape[3]))) - float(h.shape[2]) ** 2, "both"),
    "square": (square, "equal"),
    "remainder": (lambda h: nn.functional.pad(h, (0, int(h.shape[3]) % 3, 0, int(h.shape[2]) % 3)), "example"),
    "sum": (lambda h: h * (1 / float(h.shape[2]) + 1 / float(h.shape[3])), "example"),
}


@pytest.mark.parametrize(("part", "right"), OF_TWO_SIZES.values(), ids=OF_TWO_SIZES)
def test_two_sizes_that_are_equal_in_the_example(part: Callable[[Tensor], Tensor], right: str) -> None:
    def join(h: Tensor, x: Tensor) -> Tensor:
        return part(h).mean((2, 3), keepdim=True).expand(-1, -1, 6, 6).flatten(1)

    net = Net(join).double()
    gm = fxgrow.capture(net, (torch.randn(4, 3, 8, 8, dtype=torch.float64),))
    for n, height, width in [(3, 8, 8), (4, 9, 9), (4, 6, 10), (2, 10, 7)]:
        x = torch.randn(n, 3, height, width, dtype=torch.float64)
        if right == "both" or (height == width and (right == "equal" or height == 8)):
            torch.testing.assert_close(gm(x), net(x), rtol=1e-12, atol=1e-12)
        else:
            with pytest.raises(fxgrow.CaptureError, match="was captured for inputs where"):
                gm(x)


#: equal to a line in one size near that of the example
FAR_FROM_A_LINE: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "remainder": lambda h, x: h * (int(x.shape[2]) % 80),
    "up to a multiple": lambda h, x: nn.functional.pad(h, (0, 0, 0, -int(x.shape[2]) % 64)),
    "condition": lambda h, x: h * (2 if int(x.shape[2]) > 40 else 1),
    "condition on a smaller size": lambda h, x: h * (2 if int(x.shape[2]) < 5 else 1),
    "smaller of two": lambda h, x: h * min(len(x), 16),
    "condition on the batch": lambda h, x: h * (2 if len(x) > 16 else 1),
}


@pytest.mark.parametrize("join", FAR_FROM_A_LINE.values(), ids=FAR_FROM_A_LINE)
def test_a_number_is_right_far_from_the_example_or_refused(join: Callable[[Tensor, Tensor], Any]) -> None:
    net = Net(lambda h, x: join(h, x).mean((2, 3), keepdim=True).expand(-1, -1, 6, 6).flatten(1)).double()
    gm = fxgrow.capture(net, (torch.randn(4, 3, 8, 8, dtype=torch.float64),))
    for shape in [(4, 3, 8, 8), (4, 3, 100, 8), (40, 3, 8, 8), (4, 3, 4, 8)]:
        x = torch.randn(shape, dtype=torch.float64)
        try:
            found = gm(x)
        except fxgrow.CaptureError:
            assert shape != (4, 3, 8, 8)
        else:
            torch.testing.assert_close(found, net(x), rtol=1e-12, atol=1e-12)


class TwoLengths(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 2), nn.Linear(4, 2)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.a(x).sum(1) / float(x.shape[1]) + self.b(y).sum(1) * int(y.shape[1])


def test_lengths_of_two_inputs_that_are_equal_in_the_example() -> None:
    net = TwoLengths().double()
    gm = fxgrow.capture(net, (torch.randn(2, 5, 3).double(), torch.randn(2, 5, 4).double()))
    x, y = torch.randn(2, 7, 3).double(), torch.randn(2, 6, 4).double()
    torch.testing.assert_close(gm(x, y), net(x, y), rtol=1e-12, atol=1e-12)
