"""What a model and its hooks keep of forward passes is the user's: growth leaves it as it was."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxgrow

SEEN: list[Any] = []


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.out = nn.Linear(6, 8), nn.Linear(8, 7), nn.Linear(7, 3)
        self.register_buffer("steps", torch.tensor(0))
        self.seen: dict[str, Any] = {}

    def forward(self, x: Tensor) -> Tensor:
        self.steps += 1
        return self.out(self.b(self.a(x).relu()).tanh())


class Collector:
    def __init__(self) -> None:
        self.features: list[Tensor] = []

    def __call__(self, module: nn.Module, args: Any, out: Tensor) -> None:
        self.features.append(out)

    def remember(self, module: nn.Module, args: Any, out: Tensor) -> None:
        self.features[:] = [out]


def store(seen: dict[str, Any], module: nn.Module, args: Any, out: Tensor) -> None:
    seen["a"] = out


def in_closure() -> tuple[Callable[..., Any], Any]:
    seen: list[Tensor] = []
    return lambda module, args, out: seen.append(out), seen


def hooked(kind: str) -> tuple[Net, Any]:
    """A net with a hook that collects, and what it collects into."""
    m, collector = Net(), Collector()
    closure, seen = in_closure()
    hook, collection = {
        "partial": (functools.partial(store, m.seen), m.seen),
        "object": (collector, collector.features),
        "method": (collector.remember, collector.features),
        "closure": (closure, seen),
        "global": (lambda module, args, out: SEEN.append(out), SEEN),
    }[kind]
    m.a.register_forward_hook(hook)
    SEEN.clear()
    m(torch.randn(4, 6)).sum().backward()
    m.zero_grad()
    return m, collection


@pytest.mark.parametrize("kind", ["partial", "object", "method", "closure", "global"])
def test_growth_leaves_what_hooks_have_collected(kind: str) -> None:
    m, collection = hooked(kind)
    before = list(collection.values()) if isinstance(collection, dict) else list(collection)
    assert before and not before[0].is_leaf
    batches = [(torch.randn(16, 6), torch.randn(16, 3)) for _ in range(4)]
    grown = fxgrow.grow(m, batches, neurons=2, progress=False)
    fxgrow.widen(m, batches[0][0], {"a": 2}, optimizer=torch.optim.SGD(m.parameters(), lr=0.1))
    after = list(collection.values()) if isinstance(collection, dict) else list(collection)
    assert len(after) == len(before) and all(a is b for a, b in zip(after, before, strict=True))
    assert grown.get_submodule("a").out_features == 10


def test_profiles_and_growth_move_no_counter_of_the_model() -> None:
    m = Net()
    m(torch.randn(4, 6))
    batches = [(torch.randn(16, 6), torch.randn(16, 3)) for _ in range(4)]
    gm = fxgrow.capture(m, batches[0][0])
    fxgrow.profile(gm, batches, progress=False)
    fxgrow.grow(m, batches, neurons=2, progress=False)
    assert int(m.steps) == 1


class Counts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(5, 6), nn.Linear(6, 3)
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.b(self.a(x).relu() * (1 + self.calls))


@pytest.mark.parametrize("training", [False, True])
def test_a_counter_is_as_before_in_the_grown_model_too(training: bool) -> None:
    net, data = Counts().train(training), [(torch.randn(16, 5), torch.randn(16, 3))] * 4
    net(data[0][0])
    grown = fxgrow.grow(net, data, neurons={"a": 1}, progress=False)
    assert int(net.calls) == int(grown.get_buffer("calls")) == 1
