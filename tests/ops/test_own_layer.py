"""A user's own layer, described through the same door as ours: it stays one node, grows and is profiled."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import fxgrow
from fxgrow.axes.axes import Dims
from fxgrow.ops.context import Context
from fxgrow.ops.registry import _RULES


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
