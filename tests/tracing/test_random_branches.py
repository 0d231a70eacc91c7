"""Layer drop and other branches on random numbers, in training: one graph follows every outcome."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fxgrow
from fxgrow.graph.node_functions import holds


class Net(nn.Module):
    """Residual layers, and a way to run them."""

    def __init__(self, run: Callable[[Net, Tensor], Tensor], p: float = 0.5) -> None:
        super().__init__()
        self.run, self.p, self.head, self.out, self.norm = run, p, nn.Linear(6, 8), nn.Linear(8, 3), nn.BatchNorm1d(8)
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(8, 5 + i), nn.Tanh(), nn.Linear(5 + i, 8)) for i in (0, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.run(self, self.head(x)))


def keeps(m: Net, h: Tensor) -> Tensor:
    for layer in m.layers:
        if not m.training or torch.rand(1).item() > m.p:
            h = (h + layer(h)).relu()
    return h


def skips(m: Net, h: Tensor) -> Tensor:
    for layer in m.layers:
        chance = torch.rand([])
        if chance < m.p and m.training:
            continue
        h = h + layer(h)
    return h


def drawn_before(m: Net, h: Tensor) -> Tensor:
    chances = torch.empty(len(m.layers)).uniform_()
    for i, layer in enumerate(m.layers):
        if not m.training or chances[i] > m.p:
            h = h + layer(h) / (1 if not m.training else m.p)
    return h


def by_python_and_numpy(m: Net, h: Tensor) -> Tensor:
    if m.training and random.random() < m.p:
        h = m.norm(h)
    if m.training and np.random.uniform(0, 1) < m.p:
        return h.flip(0) * np.random.beta(0.4, 0.4)
    return h * 2


def two_ways(m: Net, h: Tensor) -> Tensor:
    for i in range(3):
        h = h * 2 if m.training and torch.bernoulli(torch.tensor(m.p)).item() else h.sin() + torch.ones(1) * i
    return h


def checkpointed(m: Net, h: Tensor) -> Tensor:
    for layer in m.layers:
        if m.training and random.uniform(0, 1) < m.p:
            continue
        h = h + checkpoint(layer, h, use_reentrant=False)
    return h


def seeded(net: nn.Module, x: Tensor, seed: int) -> tuple[Tensor, float, float, float]:
    """The output, and what each generator gives next."""
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)
    return net(x), torch.rand(1).item(), random.random(), np.random.rand()


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("run", [keeps, skips, drawn_before, by_python_and_numpy, two_ways, checkpointed])
def test_every_outcome_of_every_branch(run: Callable[[Net, Tensor], Tensor], training: bool) -> None:
    net, x = Net(run).double().train(training), torch.randn(4, 6).double()
    gm = fxgrow.capture(net, (x,))
    wider = fxgrow.widen(gm, (x,), {w.name: w.step for w in fxgrow.widths(gm) if w.pinned is None})
    assert {w.name for w in fxgrow.widths(gm) if w.pinned is None} >= {"head"}
    for mode in (True, False):
        reference, graph, grown = (copy.deepcopy(m).train(mode) for m in (net, gm, wider))
        for seed in range(20):
            expected, *following = seeded(reference, x, seed)
            for m in (graph, grown):
                found, *after = seeded(m, x, seed)
                torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
                assert after == following
        for name, buffer in reference.named_buffers():
            torch.testing.assert_close(graph.get_buffer(name), buffer)


def test_gradients_and_growth() -> None:
    net, x = Net(skips).double(), torch.randn(16, 6).double()
    gm = fxgrow.capture(net, (x,))
    for seed in range(8):
        grads = [torch.autograd.grad(seeded(m, x, seed)[0].sum(), m.head.weight)[0] for m in (net, gm)]
        torch.testing.assert_close(*grads, rtol=1e-10, atol=1e-10)
    grown = fxgrow.grow(net, [(x, torch.randn(16, 3).double())] * 4, neurons={"layers.0.0": 2}, progress=False)
    assert grown.get_submodule("layers.0.0").weight.shape == (7, 8)


def test_a_chance_of_zero_is_no_branch() -> None:
    gm = fxgrow.capture(Net(skips, p=0), (torch.randn(4, 6),))
    assert not gm.graph.find_nodes(op="call_function", target=holds)


def one_leads_to_another(m: Net, h: Tensor) -> Tensor:
    while m.training and torch.rand(1) < m.p:
        h = h.tanh()
    return h


def returns_early(m: Net, h: Tensor) -> Tensor:
    for layer in m.layers:
        if m.training and torch.rand(1) < m.p:
            return h
        h = h + layer(h)
    return h


@pytest.mark.parametrize("run", [one_leads_to_another, returns_early])
def test_branches_that_depend_on_each_other_are_refused_in_training(run: Callable[[Net, Tensor], Tensor]) -> None:
    net, x = Net(run).eval(), torch.randn(4, 6)
    gm = fxgrow.capture(net, (x,))
    assert torch.equal(gm(x), net(x))
    with pytest.raises(fxgrow.CaptureError, match="captured in eval mode"):
        gm.train()(x)
