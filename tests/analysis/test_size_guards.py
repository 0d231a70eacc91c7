"""Decisions on sizes that the model's code makes: free, by steps, following the width, or pinned with the line."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import fxgrow


class Net(nn.Module):
    def __init__(self, look: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.look, self.channels = look, 8
        self.a, self.b, self.out = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 6, 1), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.b(self.look(self, self.a(x).relu())).mean((2, 3)))


def stored(m: nn.Module, h: Tensor) -> Tensor:
    assert h.shape[1] == m.channels, "channels"
    return h


def of_a_layer(m: nn.Module, h: Tensor) -> Tensor:
    if h.size(1) != m.b.in_channels:
        raise ValueError(h.size(1))
    return h


def by_function(m: nn.Module, h: Tensor) -> Tensor:
    torch._assert(h.size(2) == h.size(3) and h.size(1) == m.channels, "sizes")
    torch._check(h.shape[1] == m.channels, message=lambda: "channels")
    return h


def divisible(m: nn.Module, h: Tensor) -> Tensor:
    if h.shape[1] % 4 or h.shape[1] % 2:
        raise ValueError(h.shape[1])
    return h


def unpacked(m: nn.Module, h: Tensor) -> Tensor:
    n, c, *_ = h.shape
    assert c // 2 * 2 == c and n > 0
    return h


def reached(m: nn.Module, h: Tensor) -> Tensor:
    return h * 2 if h.shape[1] < 9 else h


def this_size(m: nn.Module, h: Tensor) -> Tensor:
    return h * 2 if h.shape[1] == 8 else h


FREE = {
    "stored": (stored, 1), "of-a-layer": (of_a_layer, 1), "by-function": (by_function, 1),
    "divisible": (divisible, 4), "unpacked": (unpacked, 2),
}  # fmt: skip


@pytest.mark.parametrize(("look", "step"), FREE.values(), ids=FREE)
def test_checks_go_on_holding(look: Callable[[nn.Module, Tensor], Tensor], step: int) -> None:
    net, x = Net(look).double(), torch.randn(2, 3, 6, 6, dtype=torch.float64)
    width = fxgrow.widths(fxgrow.capture(net, (x,)))[0]
    assert (width.name, width.size, width.step, width.pinned) == ("a", 8, step, None)
    wider = fxgrow.widen(net, (x,), {"a": 2 * step})
    assert torch.allclose(wider(x), net(x), rtol=0, atol=1e-12)
    again = fxgrow.widen(wider, (x,), {"a": step})
    assert torch.allclose(again(x), net(x), rtol=0, atol=1e-12)


@pytest.mark.parametrize("look", [reached, this_size])
def test_another_outcome_pins_with_the_line(look: Callable[[nn.Module, Tensor], Tensor]) -> None:
    width = fxgrow.widths(fxgrow.capture(Net(look), (torch.randn(2, 3, 6, 6),)))[0]
    assert width.pinned is not None and width.pinned.code == "branch"
    assert "return h * 2 if h.shape[1]" in width.pinned.message


def test_a_stored_size_follows_into_the_model() -> None:
    net, x = Net(stored), torch.randn(2, 3, 6, 6)
    wider = fxgrow.widen(net, (x,), {"a": 3}, into="module")
    assert isinstance(wider, Net) and wider.channels == 11
    assert torch.allclose(wider(x), net(x), atol=1e-6)


def test_a_decision_that_cannot_be_made_at_some_size_pins() -> None:
    def look(m: nn.Module, h: Tensor) -> Tensor:
        return h * 2 if 72 // (12 - h.shape[1]) > 1 else h  # no number of channels may be 12

    width = fxgrow.widths(fxgrow.capture(Net(look), (torch.randn(2, 3, 6, 6),)))[0]
    assert width.pinned is not None and width.pinned.code == "branch"
