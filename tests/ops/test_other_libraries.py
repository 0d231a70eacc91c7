"""Layers of timm and transformers that have a rule by name: one node each, and exact."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxgrow
from fxgrow.integrations._torchvision import import_torchvision
from tests.ops.table import Net


def _import(name: str) -> Any:
    pytest.importorskip("torchvision")
    import_torchvision()  # both import it
    pytest.importorskip(name.partition(".")[0])
    return importlib.import_module(name)


class Centred(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x - x.mean(1, keepdim=True)


def _net(act: type[nn.Module], drop: type[nn.Module] | None = None) -> nn.Module:
    layers = _import("timm.layers")
    torch.manual_seed(0)
    parts = {
        "a": nn.Conv2d(3, 8, 3),
        "n": layers.BatchNormAct2d(8, act_layer=act, drop_layer=drop),
        "d": layers.DropPath(0.4),
        "out": nn.Conv2d(8, 2, 1),
    }
    return Net(lambda m, x: m.out(m.d(m.n(m.a(x)))), parts).double()


@pytest.mark.parametrize("act", [nn.ReLU, nn.SiLU, nn.Identity, nn.GELU])
def test_batch_norm_with_an_activation(act: type[nn.Module]) -> None:
    model, x = _net(act), torch.randn(4, 3, 6, 6, dtype=torch.float64)
    nn.init.uniform_(model.n.weight, 0.5, 1.5)
    nn.init.normal_(model.n.running_mean)
    gm = fxgrow.capture(model, (x,))
    assert [n.target for n in gm.graph.nodes if n.op == "call_module"] == ["a", "n", "d", "out"]
    width = fxgrow.widths(gm)[0]
    assert width.pinned is None and width.followers == ("n",)
    wide = fxgrow.widen(gm, None, {"a": 3})
    assert wide.get_submodule("n").num_features == 11
    for training in (False, True):
        torch.manual_seed(1)
        expected = model.train(training)(x)
        torch.manual_seed(1)
        assert torch.allclose(wide.train(training)(x), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(("act", "drop"), [(Centred, None), (nn.PReLU, None), (nn.ReLU, Centred)])
def test_what_else_it_may_hold_pins(act: type[nn.Module], drop: type[nn.Module] | None) -> None:
    model = _net(act, drop)
    why = fxgrow.widths(fxgrow.capture(model, (torch.randn(4, 3, 6, 6, dtype=torch.float64),)))[0].pinned
    assert why is not None and why.code == "norm" and (drop or act).__name__ in why.message


def test_linear_layers_stored_the_other_way_round() -> None:
    conv = _import("transformers.pytorch_utils").Conv1D
    torch.manual_seed(0)
    model = nn.Sequential(conv(8, 6), nn.GELU(), conv(3, 8)).double()
    x = torch.randn(2, 5, 6, dtype=torch.float64)
    assert fxgrow.widths(fxgrow.capture(model, (x,)))[0].pinned is None
    wide = fxgrow.widen(model, (x,), {"0": 4})
    inner = wide.get_submodule("0"), wide.get_submodule("2")
    assert (inner[0].nf, inner[1].nx, inner[0].weight.shape, inner[1].weight.shape) == (12, 12, (6, 12), (12, 3))
    assert torch.allclose(wide(x), model(x), rtol=1e-10, atol=1e-12)
    batches = [(torch.randn(16, 5, 6).double(), torch.randn(16, 5, 3).double()) for _ in range(4)]
    assert fxgrow.grow(model, batches, method="random", neurons=2, progress=False).get_submodule("0").nf in (8, 10)
