"""A model that grows and stays the same object."""

from __future__ import annotations

import copy
from types import MethodType

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fxgrow
from fxgrow.training.in_place import GrowerInPlace, adopt, recipe_of, without_forward_override


class Tagger(nn.Module):
    """An LSTM keeps its weights in a list too."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(5, 4, batch_first=True)
        self.norm = nn.BatchNorm1d(4)
        self.out = nn.Linear(4, 2)

    def forward(self, x):
        return self.out(self.norm(self.lstm(x)[0][:, -1]))


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 3), nn.ReLU(), nn.Linear(3, 1))


def batches(n: int = 4) -> list[tuple[torch.Tensor, torch.Tensor]]:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(32 * n, 6, generator=g)
    return list(zip(x.split(32), x.prod(1, keepdim=True).split(32), strict=True))


def grower_of(model: nn.Module, **options) -> GrowerInPlace:
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    return GrowerInPlace(model, optimizer, fxgrow.Every(steps=2), dataloader=batches(), neurons=2, **options)


def train(grower: GrowerInPlace, model: nn.Module, steps: int) -> None:
    for step in range(steps):
        x, y = batches()[step % 4]
        grower.optimizer.zero_grad()
        F.mse_loss(model(x), y).backward()
        grower.optimizer.step()
        grower.step()


def test_adopts_parameters_buffers_and_sizes() -> None:
    model = Tagger()
    x = torch.randn(7, 3, 5)
    wider = fxgrow.widen(model, (x,), {"lstm": 3}, into="module")
    expected = wider.eval()(x)
    adopt(model, wider)
    assert model.lstm.hidden_size == 7 and model.norm.num_features == 7 and model.out.in_features == 7
    assert all(a is b for a, b in zip(model.parameters(), wider.parameters(), strict=True))
    assert torch.equal(model.eval()(x), expected)
    model(x).sum().backward()  # through the list of the LSTM
    assert all(p.grad is not None for p in model.lstm.parameters())
    assert recipe_of(model).steps == recipe_of(wider).steps


def test_the_same_object_grows_as_grow_does() -> None:
    model = mlp()
    twin = copy.deepcopy(model)
    calls = []
    model[0].register_forward_hook(lambda *_: calls.append(1))
    layer = model[0]
    grower = grower_of(model)
    assert grower.grow_now()
    grown = fxgrow.grow(twin, batches(), neurons=2, progress=False)
    assert grower.model is model and model[0] is layer and layer.out_features == 5
    for name, value in model.state_dict().items():
        assert torch.equal(value, grown.state_dict()[name]), name
    calls.clear()
    model(batches()[0][0])
    assert calls == [1]
    owned = {id(p) for group in grower.optimizer.param_groups for p in group["params"]}
    assert owned == {id(p) for p in model.parameters()}


def test_trains_and_grows_again() -> None:
    model = mlp()
    grower = grower_of(model)
    train(grower, model, 5)
    assert [e.step for e in grower.history] == [2, 4] and model[0].out_features == 7
    assert len(recipe_of(model).steps) == 2 and model.meta["fxgrow"] is grower.growth


def test_forward_of_a_wrapper_is_put_aside() -> None:
    """As Accelerate does for mixed precision."""
    model = mlp()
    seen = []

    def wrapped(self, x):
        seen.append(type(self))
        return nn.Sequential.forward(self, x)

    model._original_forward = model.forward
    model.forward = MethodType(wrapped, model)
    with without_forward_override(model):
        assert "forward" not in vars(model)
    grower = grower_of(model)
    train(grower, model, 3)
    assert model[0].out_features == 5 and len(seen) == 3  # growth has not called it
    assert model.forward.__self__ is model


def test_resizes_in_both_directions() -> None:
    model = mlp()
    grower = grower_of(model)
    train(grower, model, 2)
    small = copy.deepcopy(model.state_dict())
    recipe = recipe_of(model)
    train(grower, model, 2)
    assert model[0].out_features == 7
    grower.resize(recipe)
    model.load_state_dict(small)
    assert model[0].out_features == 5
    owned = [p for group in grower.optimizer.param_groups for p in group["params"]]
    assert all(a is b for a, b in zip(owned, model.parameters(), strict=True)) and not grower.optimizer.state
    train(grower, model, 2)


def test_what_had_grown_before_cannot_be_resized() -> None:
    model = fxgrow.widen(mlp(), (torch.zeros(1, 6),), {"0": 1}, into="module")
    grower = grower_of(model)
    with pytest.raises(fxgrow.FileError, match="had grown before"):
        grower.resize(fxgrow.Recipe())


def test_averages_are_not_resized() -> None:
    model = mlp()
    grower = grower_of(model, ema=copy.deepcopy(model))
    grower.grow_now()
    with pytest.raises(fxgrow.FxgrowError, match="average"):
        grower.resize(fxgrow.Recipe())


def test_graphs_are_refused() -> None:
    with pytest.raises(fxgrow.FxgrowError, match='into="graph"'):
        grower_of(mlp(), into="graph")
