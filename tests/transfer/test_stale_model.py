"""A model that was grown is not trained in place of the grown one without a word, and nothing is left on it."""

from __future__ import annotations

import copy
import gc
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.optim import Optimizer
from torch.optim import optimizer as torch_optimizer

import fxgrow
from fxgrow.training.in_place import GrowerInPlace
from fxgrow.transfer import stale_model

X = torch.randn(64, 6, generator=torch.Generator().manual_seed(0))
pytestmark = pytest.mark.filterwarnings("error::fxgrow.StaleModelWarning")
BATCHES = [(x, (x[:, :2] * x[:, 2:4]).sum(1, keepdim=True)) for x in X.split(16)]


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 3), nn.Tanh(), nn.Linear(3, 1))


def adam(*models: nn.Module) -> Optimizer:
    return torch.optim.Adam([p for model in models for p in model.parameters()], 1e-2)


def grow(model: nn.Module, **options: Any) -> nn.Module:
    return fxgrow.grow(model, BATCHES, neurons=1, method="random", progress=False, **options)


def backward(model: nn.Module) -> None:
    F.mse_loss(model(X), X[:, :1]).backward()


def train(model: nn.Module, optimizer: Optimizer, steps: int = 2) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        backward(model)
        optimizer.step()


@pytest.fixture(autouse=True)
def no_hook_is_left() -> Iterator[None]:
    """Old models are gone with the test; the next step of any optimiser takes the hook away."""
    watched = list(stale_model._watches)  # models of other tests, which a fixture keeps
    yield
    gc.collect()
    other = net()
    train(other, adam(other), 1)
    assert all(watch in watched for watch in stale_model._watches)
    assert stale_model._watches or not torch_optimizer._global_optimizer_post_hooks


def result_dropped() -> None:
    model = net()
    optimizer = adam(model)
    train(model, optimizer)
    grow(model, optimizer=optimizer)
    train(model, optimizer)


def result_and_optimizer_dropped() -> None:
    model = net()
    optimizer = adam(model)
    grow(model)
    train(model, optimizer)


def result_dropped_where_growth_declined() -> None:
    model = net()
    optimizer = adam(model)
    learned = [(x, model(x).detach()) for x, _ in BATCHES]
    assert fxgrow.grow(model, learned, budget="+99%", optimizer=optimizer, progress=False).meta["fxgrow"].declined
    train(model, optimizer)


def optimizer_left_behind() -> None:
    model = net()
    optimizer = adam(model)
    train(model, optimizer)
    model = grow(model)
    train(model, optimizer)


def optimizer_left_behind_with_old_gradients() -> None:
    model: nn.Module = net()
    optimizer = adam(model)
    train(model, optimizer)
    old, model = model, grow(model, into="module")
    for _ in range(2):
        model.zero_grad()
        backward(model)
        optimizer.step()
    assert old is not model


def optimizer_of_two_models_left_behind() -> None:
    first, second = net(), net()
    optimizer = adam(first, second)
    grown = grow(first)
    for _ in range(2):
        optimizer.zero_grad()
        backward(grown)
        backward(second)
        optimizer.step()


def model_of_a_grower_kept() -> None:
    model = net()
    optimizer = adam(model)
    grower = fxgrow.Grower(model, optimizer, fxgrow.Every(steps=2), dataloader=BATCHES, neurons=1, method="random")
    for _ in range(4):
        train(model, optimizer, 1)
        grower.step()


@pytest.mark.parametrize(
    ("slip", "remedy"),
    [
        (result_dropped, "model = fxgrow.grow"),
        (result_and_optimizer_dropped, "Keep it: model = fxgrow.grow"),
        (result_dropped_where_growth_declined, "model = fxgrow.grow"),
        (optimizer_left_behind, "optimizer=optimizer"),
        (optimizer_left_behind_with_old_gradients, "optimizer=optimizer"),
        (optimizer_of_two_models_left_behind, "optimizer=optimizer"),
        (model_of_a_grower_kept, "grower.model"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_training_that_changes_nothing_is_warned_of_once(slip: Callable[[], None], remedy: str) -> None:
    with pytest.warns(fxgrow.StaleModelWarning, match=remedy) as seen:
        slip()
    assert [w.filename for w in seen] == [__file__]


def test_both_are_trained_or_compared() -> None:
    old = net()
    optimizer = adam(old)
    train(old, optimizer)
    grown, again = grow(old), grow(old)
    assert F.mse_loss(old.eval()(X), X[:, :1]) > 0 and grown.eval()(X).shape == again(X).shape
    optimizers = adam(grown), adam(again)
    for model, each in ((old, optimizer), (grown, optimizers[0]), (again, optimizers[1])):
        train(model, each)
    for model in (old, grown):
        backward(model)
    optimizer.step()
    optimizers[0].step()


def test_gradients_of_both_at_once() -> None:
    old = net()
    optimizer = adam(old)
    grown = grow(old)
    other = adam(grown)
    for _ in range(3):
        backward(grown)
        backward(old)
        for each in (other, optimizer):
            each.step()
            each.zero_grad()


def test_the_grown_one_is_trained_by_a_part_of_an_optimizer() -> None:
    first, second = net(), net()
    optimizer = adam(first, second)
    grown = grow(first)
    other = adam(grown)
    for _ in range(3):
        backward(grown)
        backward(second)
        for each in (optimizer, other):
            each.step()
            each.zero_grad()


def test_the_record_alone_was_wanted() -> None:
    model = net()
    record = grow(model).meta["fxgrow"]
    train(model, adam(model))
    assert record.plan.units == {"0": 1}


@pytest.mark.parametrize("kind", [fxgrow.Grower, GrowerInPlace])
def test_growers_as_they_are_meant(kind: Any) -> None:
    model = net()
    optimizer = adam(model)
    grower = kind(model, optimizer, fxgrow.Every(steps=2), dataloader=BATCHES, neurons=1, method="random")
    for _ in range(5):
        train(grower.model, optimizer, 1)
        grower.step()
    assert grower.history.growths == 2


def test_optimizer_as_it_is_meant() -> None:
    model: nn.Module = net()
    optimizer = adam(model)
    for _ in range(2):
        train(model, optimizer)
        model = grow(model, optimizer=optimizer)
    train(model, optimizer)


def test_the_old_model_is_as_it_was() -> None:
    model = net()
    before = copy.deepcopy(vars(model)), [set(vars(p)) for p in model.parameters()]
    grown = grow(model)
    assert repr(vars(model)) == repr(before[0]) and [set(vars(p)) for p in model.parameters()] == before[1]
    assert grown(X).shape == (64, 1)
    for same in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.compile(model, backend="eager")):
        assert torch.equal(same(X), model(X))


def test_one_of_two_optimizers_was_not_passed() -> None:
    model = net()
    first, last = (torch.optim.SGD(layer.parameters(), 0.1) for layer in (model[0], model[2]))
    grown = grow(model, optimizer=first)
    with pytest.warns(fxgrow.StaleModelWarning, match="the optimizer holds parameters of a model before growth"):
        for _ in range(2):
            backward(grown)
            first.step()
            last.step()
