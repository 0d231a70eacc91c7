"""Captured graphs in files of pickle and torch.save: as data, with all that fxgrow knows of them."""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import fxgrow


class Straight(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:  # type: ignore[override]
        return x.round()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        return gradient


class Noisy(nn.Module):
    """With nodes of one mode alone, the call of an autograd function, a parameter, and an operator of `torch.ops`."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.scale = nn.Linear(4, 6), nn.Linear(6, 3), nn.Parameter(torch.randn(()))

    def forward(self, x: Tensor) -> Tensor:
        h = torch.ops.aten.relu.default(self.a(x)) * self.scale
        if self.training:
            h = h + torch.randn(h.shape[0], 1)
        return self.b(h).chunk(3, -1)[0] + Straight.apply(x.sum(-1, keepdim=True))


def pickled(module: nn.Module) -> Any:
    return pickle.loads(pickle.dumps(module))


def saved(module: nn.Module) -> Any:
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def outputs(module: nn.Module, x: Tensor) -> list[Tensor]:
    torch.manual_seed(0)
    return [module.train()(x), module.eval()(x)]


@pytest.mark.parametrize("send", [pickled, saved])
def test_a_graph_comes_back_as_it_was(send: Callable[[nn.Module], Any], tmp_path: Any) -> None:
    torch.manual_seed(0)
    net, x = Noisy(), torch.randn(5, 4)
    grown = fxgrow.widen(net, (x[:2],), {"a": 2})
    back = send(grown)
    assert type(back).__name__ == type(grown).__name__ and isinstance(back, fx.GraphModule)
    assert list(map(str, back.graph.nodes)) == list(map(str, grown.graph.nodes))
    assert [n.meta["val"] is None for n in back.graph.nodes] == [n.meta["val"] is None for n in grown.graph.nodes]
    for ours, theirs in zip(outputs(back, x), outputs(grown, x), strict=True):
        assert torch.equal(ours, theirs)
    assert fxgrow.Recipe.of(back) == fxgrow.Recipe.of(grown)
    fxgrow.save(back, tmp_path / "a.safetensors")
    again = fxgrow.load(Noisy(), tmp_path / "a.safetensors")
    assert torch.equal(again.eval()(x), grown.eval()(x))
    assert [w.name for w in fxgrow.widths(back) if w.pinned is None] == ["a"]
    wider = fxgrow.widen(back, (), {"a": 1})
    torch.testing.assert_close(wider.eval()(x), grown.eval()(x))


class FrozenNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm, self.b = nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 3)

    def train(self, mode: bool = True) -> FrozenNorm:
        super().train(mode)
        self.norm.eval()
        return self

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.norm(self.a(x)).relu())


@pytest.mark.parametrize("send", [lambda gm: gm, pickled])
def test_a_graph_follows_the_models_own_train(send: Callable[[nn.Module], Any]) -> None:
    net, x = FrozenNorm().double(), torch.randn(5, 4, dtype=torch.float64)
    grown = send(fxgrow.widen(net, (x,), {"a": 2})).eval().train()
    assert grown.training and not grown.norm.training
    torch.testing.assert_close(grown(x), net.train()(x))
