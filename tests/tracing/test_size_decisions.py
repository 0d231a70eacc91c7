"""Decisions of the model's code on sizes: taken the way that is right at all sizes, where there is one."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fxgrow


class Net(nn.Module):
    """A hidden layer, `between` on its output, and what `between` keeps on the module."""

    def __init__(self, between: Callable[[Net, Tensor], Tensor]) -> None:
        super().__init__()
        self.between = between
        self.a, self.b, self.also, self.gate = nn.Linear(3, 6), nn.Linear(6, 2), nn.Linear(6, 6), nn.Parameter(0 * _X)
        self.size, self.table, self.length = None, None, 0
        self.register_buffer("rows", torch.zeros(64, 6))
        self.slopes = nn.Parameter(torch.linspace(0.1, 1, 6), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.between(self, self.a(x)).tanh())


_X = torch.ones(1)


def positions(n: int) -> Tensor:
    return torch.arange(n, dtype=torch.float64).unsqueeze(1)


def cached_by_size(net: Net, h: Tensor) -> Tensor:
    if net.size != h.shape[1]:
        net.size, net.table = h.shape[1], positions(h.shape[1]) * net.slopes
    return h + net.table


def cached_by_shape(net: Net, h: Tensor) -> Tensor:
    if net.table is None or net.size != h.shape[:2]:
        net.table, net.size = positions(h.shape[1]).expand(h.shape[0], -1, -1), h.shape[:2]
    return h * net.table


def filled_with_an_entry(net: Net, h: Tensor) -> Tensor:
    if net.size != h.shape:
        net.size = h.shape
        scales = [h.new_full((1, 6), s, dtype=h.dtype) for s in net.slopes[:2]] + [torch.full((1, 6), net.slopes[2])]
        net.table = torch.stack(scales).sum(0) + torch.full_like(h[:1], net.slopes[3])
    return h * net.table


def longest_so_far(net: Net, h: Tensor) -> Tensor:
    n = h.size(1)
    if n > net.length:
        net.length, net.table = n, (positions(n) * net.slopes).cos()
    return h * net.table[:n]


def longest_so_far_in_a_buffer(net: Net, h: Tensor) -> Tensor:
    n = h.size(1)
    if n < 64 and n <= net.length:
        return h * net.rows[:n]
    rows = (positions(n) * net.slopes).cos()
    net.rows[:n] = rows.detach()
    net.length = n
    return h * rows


def padded(net: Net, h: Tensor) -> Tensor:
    n = h.shape[1]
    missing = (4 - n % 4) % 4
    if missing > 0:
        h = F.pad(h, (0, 0, 0, missing))
    return h.unflatten(1, (-1, 4)).cumsum(2).flatten(1, 2)[:, :n]


def with_a_mask_of_one_size(net: Net, h: Tensor) -> Tensor:
    length = (h.shape[1],)
    return h + (net.table if length == net.size else positions(*length)).to(h)


def both_ways_differ(net: Net, h: Tensor) -> Tensor:
    return h * 2 if h.shape[1] == 8 else h


def both_ways_differ_behind_a_gate(net: Net, h: Tensor) -> Tensor:
    return h + net.gate * (net.also(h) if h.shape[1] == 8 else h)


def _net(between: Callable[[Net, Tensor], Tensor]) -> Net:
    net = Net(between).double()
    if between is with_a_mask_of_one_size:
        net.size, net.table = (8,), positions(8)
    return net


@pytest.mark.parametrize("run_before", [False, 8, 10, 4])
@pytest.mark.parametrize(
    "between",
    [
        cached_by_size,
        cached_by_shape,
        filled_with_an_entry,
        longest_so_far,
        longest_so_far_in_a_buffer,
        padded,
        with_a_mask_of_one_size,
    ],
    ids=lambda f: f.__name__,
)
def test_other_sizes(between: Callable[[Net, Tensor], Tensor], run_before: int) -> None:
    net = _net(between)
    x = torch.randn(3, 8, 3, dtype=torch.float64)
    if run_before:
        net(torch.randn(3, run_before, 3, dtype=torch.float64))
    state = dict(vars(net))
    values = {name: p.clone() for name, p in net.named_parameters()}
    gm = fxgrow.capture(net, (x,))
    assert {k: id(v) for k, v in vars(net).items()} == {k: id(v) for k, v in state.items()}
    assert all(torch.equal(p, values[name]) for name, p in net.named_parameters())
    for batch, n in [(3, 8), (2, 8), (3, 12), (1, 5), (4, 9), (3, 10), (3, 4), (3, 8)]:
        y = torch.randn(batch, n, 3, dtype=torch.float64)
        torch.testing.assert_close(gm(y), net(y), rtol=0, atol=1e-12)


@pytest.mark.parametrize("between", [both_ways_differ, both_ways_differ_behind_a_gate], ids=lambda f: f.__name__)
def test_ways_that_differ_for_some_weights_are_guarded(between: Callable[[Net, Tensor], Tensor]) -> None:
    net = _net(between)
    gm = fxgrow.capture(net, (torch.randn(3, 8, 3, dtype=torch.float64),))
    with pytest.raises(fxgrow.CaptureError, match=r"h.shape\[1\] == 8"):
        gm(torch.randn(3, 9, 3, dtype=torch.float64))


def test_sizes_beyond_the_one_that_both_ways_were_compared_at() -> None:
    net = _net(lambda net, h: h[:, :8] if h.shape[1] > 8 else h)
    gm = fxgrow.capture(net, (torch.randn(3, 8, 3, dtype=torch.float64),))
    x = torch.randn(3, 11, 3, dtype=torch.float64)
    torch.testing.assert_close(gm(x), net(x), rtol=0, atol=1e-12)
    with pytest.raises(fxgrow.CaptureError, match="not beyond"):
        gm(x[:, :5])


def test_a_pending_backward_pass_is_not_disturbed() -> None:
    net, x = _net(cached_by_size), torch.randn(3, 8, 3, dtype=torch.float64)
    loss = net(x).square().sum()
    fxgrow.capture(net, (x,))
    loss.backward()
    assert all(p.grad is not None for p in (net.a.weight, net.b.weight))
