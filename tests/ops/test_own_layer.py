"""A user's own layer, described through the same door as ours: it stays one node, grows and is profiled."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import fxgrow
from fxgrow.axes.axes import Dims
from fxgrow.ops.context import Context
from fxgrow.ops.registry import _RULES
from tests.ops.own_functions import swirl


class Affine(nn.Module):
    """A linear layer of the user's own; its code reads the weight in a way no rule describes."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(outputs, inputs))
        self.shift = nn.Parameter(torch.zeros(outputs))

    def forward(self, x: Tensor) -> Tensor:
        return (x[..., None, :] * self.kernel).sum(-1) + self.shift


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(Affine(4, 6), nn.ReLU(), Affine(6, 2))


@pytest.fixture
def described():
    @fxgrow.op(Affine)
    def affine(ctx: Context, x: Dims) -> Dims:
        kernel = ctx.parameter("kernel")
        ctx.same(x[-1], kernel[1])
        ctx.project(kernel, ctx.parameter("shift"), kernel[0])
        return Dims((*x[:-1], kernel[0]))

    yield
    del _RULES[Affine]


def test_pinned_without_a_rule():
    assert all(w.pinned for w in fxgrow.widths(fxgrow.capture(net(), (torch.randn(2, 4),))))


def test_grows_with_a_rule(described):
    model, x = net(), torch.randn(64, 4)
    gm = fxgrow.capture(model, (x,))
    assert [n.target for n in gm.graph.nodes if n.op == "call_module"] == ["0", "1", "2"]
    first = fxgrow.widths(gm)[0]
    assert (first.name, first.size, first.consumers, first.pinned) == ("0", 6, ("2",), None)
    wide = fxgrow.widen(model, (x,), {"0": 3})
    assert torch.allclose(wide(x), model(x), atol=1e-5)
    batches = [(torch.randn(64, 4), torch.randint(0, 2, (64,))) for _ in range(4)]
    grown = fxgrow.grow(model, batches, neurons=2, progress=False)
    assert grown.get_parameter("0.kernel").shape == (8, 4) and len(fxgrow.profile(model, batches, progress=False)) == 1


class Swirl(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.full((8,), 2.0))

    def forward(self, x: Tensor) -> Tensor:
        return swirl(x, self.gain)


def test_a_function_with_a_rule_is_one_node_wherever_it_is_imported() -> None:
    @fxgrow.op(swirl)
    def rule(ctx: Context, x: Dims, gain: Dims) -> Dims:
        ctx.same(x[1], gain[0])
        ctx.fill(gain, 1.0)
        return x

    net, x = nn.Sequential(nn.Conv2d(3, 8, 3), Swirl(), nn.Conv2d(8, 4, 3)), torch.randn(2, 3, 8, 8)
    try:
        assert swirl in [node.target for node in fxgrow.capture(net, (x,)).graph.nodes]
        wider = fxgrow.widen(net, (x,), {"0": 3})
    finally:
        del _RULES[swirl]
    assert torch.equal(wider.state_dict()["1.gain"][8:], torch.ones(3))
    assert torch.allclose(wider(x), net(x), atol=1e-6)
    assert swirl not in [node.target for node in fxgrow.capture(net, (x,)).graph.nodes]
