"""One graph for train and eval mode, whatever the model does in one of them alone."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree

import fxgrow


class Net(nn.Module):
    """Two hidden layers with `between` on what the first one returns, and `last` on what the model returns."""

    def __init__(self, between: Callable[[nn.Module, Tensor], Tensor], last: Callable[..., Any] | None = None) -> None:
        super().__init__()
        self.between, self.last = between, last
        self.a, self.b, self.out, self.extra = nn.Linear(6, 8), nn.Linear(8, 7), nn.Linear(7, 3), nn.Linear(7, 2)
        self.register_buffer("mean", torch.zeros(8))

    def forward(self, x: Tensor) -> Any:
        h = self.b(self.between(self, self.a(x).relu())).tanh()
        return self.out(h) if self.last is None else self.last(self, h)


def sampled(m: nn.Module, h: Tensor) -> Tensor:
    return h + torch.randn_like(h.mean(1, keepdim=True)) * 0.1 if m.training else h


def mixed(m: nn.Module, h: Tensor) -> Tensor:
    if m.training:
        order = torch.randperm(len(h))
        return 0.7 * h + 0.3 * h[order]
    return h


def averaged(m: nn.Module, h: Tensor) -> Tensor:
    if m.training:
        m.mean = 0.9 * m.mean + 0.1 * h.detach().mean(0)
    return h - m.mean


def moved(m: nn.Module, h: Tensor) -> Tensor:
    if m.training:
        with torch.no_grad():
            m.mean.lerp_(h.mean(0), 0.1)
    return h - m.mean


def quite_different(m: nn.Module, h: Tensor) -> Tensor:
    if m.training:
        return F.gelu(h * 2).clamp(max=1).exp().log1p()
    return torch.cat([h.sin(), h.cos()], 1).unflatten(1, (2, -1)).sum(1)


def normed(m: nn.Module, h: Tensor) -> Tensor:
    return F.batch_norm(h, m.mean, torch.ones_like(m.mean), training=True) if m.training else h


def two_heads(m: nn.Module, h: Tensor) -> Any:
    return {"out": m.out(h), "extra": m.extra(h)} if m.training else m.out(h)


BETWEEN = [sampled, mixed, averaged, moved, quite_different, normed]


def same(gm: nn.Module, net: nn.Module, x: Tensor) -> None:
    """Equal outputs and buffers, and as many random numbers drawn, in both modes."""
    for training in (False, True, True, False):
        gm.train(training), net.train(training)
        states = []
        results = []
        for module in (gm, net):
            torch.manual_seed(1)
            results.append([t for t in pytree.tree_leaves(module(x)) if isinstance(t, Tensor)])
            states.append(torch.get_rng_state())
        assert all(torch.allclose(a, b, rtol=0, atol=1e-12) for a, b in zip(*results, strict=True))
        assert torch.equal(*states)
        for name, buffer in net.named_buffers():
            assert torch.allclose(gm.get_buffer(name)[: len(buffer)], buffer, rtol=0, atol=1e-12)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("between", BETWEEN, ids=lambda f: f.__name__)
def test_one_mode_does_more(between: Callable[[nn.Module, Tensor], Tensor], training: bool) -> None:
    net = Net(between).double().train(training)
    x = torch.randn(4, 6, dtype=torch.float64)
    gm = fxgrow.capture(net, (x,))
    same(copy.deepcopy(gm), copy.deepcopy(net), x)
    same(copy.deepcopy(gm), copy.deepcopy(net), x[:3])


@pytest.mark.parametrize("between", BETWEEN, ids=lambda f: f.__name__)
def test_widened(between: Callable[[nn.Module, Tensor], Tensor]) -> None:
    net, x = Net(between).double(), torch.randn(4, 6, dtype=torch.float64)
    free = [w.name for w in fxgrow.widths(fxgrow.capture(net, (x,))) if w.pinned is None]
    assert "b" in free and ("a" in free or between is sampled)
    same(fxgrow.widen(net, (x,), dict.fromkeys(free, 2)), net, x)


def test_a_head_that_training_alone_has() -> None:
    net, x = Net(mixed, two_heads).double(), torch.randn(4, 6, dtype=torch.float64)
    gm = fxgrow.capture(net, (x,))
    same(gm, copy.deepcopy(net), x)
    assert [w.consumers for w in fxgrow.widths(gm) if w.name == "b"] == [("out", "extra")]
    batches = [(torch.randn(16, 6), torch.randn(16, 3)) for _ in range(4)]

    def loss_fn(output: Any, target: Tensor) -> Tensor:
        return F.mse_loss(output["out"] if isinstance(output, dict) else output, target)

    grown = fxgrow.grow(net.float(), batches, loss_fn=loss_fn, neurons=2, progress=False)
    assert grown.get_submodule("extra").weight.shape == (2, 9)


class Frozen(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.noise, self.out = Net(sampled), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.noise(x) + (torch.rand(1) if self.training else 0))


def test_modules_in_different_modes() -> None:
    net, x = Frozen().double().train(), torch.randn(4, 6, dtype=torch.float64)
    net.noise.eval()
    gm = fxgrow.capture(net, (x,))
    for flags in [(True, False), (True, True), (False, True), (False, False)]:
        results = []
        for module in (gm, net):
            module.train(flags[0])
            module.get_submodule("noise").train(flags[1])
            torch.manual_seed(0)
            results.append(module(x))
        assert torch.equal(*results)


class PartialConv(nn.Module):
    """A part of the channels is convolved: in place for inference, as a new tensor in training."""

    def __init__(self, channels: int = 3) -> None:
        super().__init__()
        self.conv, self.n = nn.Conv1d(channels, channels, 3, padding=1), channels

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            first, rest = torch.split(x, [self.n, x.size(1) - self.n], dim=1)
            return torch.cat([self.conv(first), rest], dim=1)
        x[:, : self.n] = self.conv(x[:, : self.n])
        return x


class Blocks(nn.Module):
    def __init__(self, inner: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv1d(2, 6, 1), nn.Conv1d(6, 6, 1), nn.Conv1d(6, 2, 1)
        self.first, self.second = inner(), inner()

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.second(self.b(self.first(self.a(x))).relu()) * (1.5 if self.training else 1))


class Noise(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.rand(1))

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.randn_like(x) * self.scale if self.training else x


@pytest.mark.parametrize("inner", [PartialConv, Noise])
def test_several_modules_branch(inner: Callable[[], nn.Module]) -> None:
    net, x = Blocks(inner).double().eval(), torch.randn(4, 2, 5, dtype=torch.float64)
    gm = fxgrow.capture(net, (x,))
    same(copy.deepcopy(gm), copy.deepcopy(net), x)
    for root, first, second in itertools.product((False, True), repeat=3):
        results = []
        for module in (gm, net):
            module.train(root)
            module.get_submodule("first").train(first)
            module.get_submodule("second").train(second)
            torch.manual_seed(0)
            results.append(module(x))
        assert torch.equal(*results)


class Reader(nn.Module):
    """Reads in training what its submodule adds in training."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.a = Noise(), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = self.inner(self.a(x))
        return h * torch.rand_like(h) if self.training else h


def test_modes_that_were_not_seen_together_are_refused() -> None:
    net, x = Reader().double().eval(), torch.randn(4, 4, dtype=torch.float64)
    gm = fxgrow.capture(net, (x,))
    same(copy.deepcopy(gm), copy.deepcopy(net), x)
    gm.train().get_submodule("inner").eval()
    with pytest.raises(fxgrow.CaptureError, match=r"inner.training == training"):
        gm(x)


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("batch_first", [False, True])
def test_dropout_after_attention_draws_what_it_draws_in_the_model(batch_first: bool, norm_first: bool) -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=batch_first, norm_first=norm_first).double().train()
    x = torch.randn(3, 5, 8, dtype=torch.float64)
    same(fxgrow.capture(layer, (x,)), copy.deepcopy(layer), x)


def test_other_passes_over_conditional_nodes() -> None:
    net, x = Net(mixed).double().train(), torch.randn(4, 6, dtype=torch.float64)
    gm = fxgrow.capture(net, (x,))
    gm.recompile()
    same(copy.deepcopy(copy.deepcopy(gm)), net, x)
    assert "if not" in gm.code or "if training" in gm.code
