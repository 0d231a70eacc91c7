"""Tracing patches torch; other threads do not notice, and nothing stays behind."""

from __future__ import annotations

import builtins
import functools
import math
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn, zeros

import fxgrow


class Ordinary(nn.Module):
    """Touches what tracing patches: factories, sizes, `training`, questions of type, calls of modules, buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm, self.b = nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 2)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        assert type(x) is Tensor and isinstance(self.a.weight, nn.Parameter) and not callable(x)
        h = self.norm(self.a(x).view(x.shape[0], -1)) * math.sqrt(x.shape[-1])
        if self.training:
            h = h + torch.randn(h.shape[0], 1).expand(-1, h.shape[1])
            self.calls = self.calls + 1
        return self.b(h.relu() + zeros(x.shape[0], h.shape[1]))


def names_and_values() -> dict[tuple[str, str], int]:
    owners: dict[str, Any] = {
        "torch": torch, "Tensor": Tensor, "Module": nn.Module, "F": nn.functional, "builtins": builtins, "math": math,
        "Function": torch.autograd.Function, "mha": torch.backends.mha, "fx": torch.fx._symbolic_trace,
        "here": __import__(__name__, fromlist=["_"]), "Graph": torch.fx.Graph, "Tracer": torch.fx.Tracer,
    }  # fmt: skip
    return {(o, name): id(value) for o, owner in owners.items() for name, value in list(vars(owner).items())}


def train(net: nn.Module, steps: int) -> None:
    optimizer = torch.optim.SGD(net.parameters(), 0.01)
    for _ in range(steps):
        out = net(torch.randn(8, 4))
        assert type(out) is Tensor and type(net(torch.zeros(8, 4)).detach()) is Tensor
        optimizer.zero_grad()
        out.square().mean().backward()
        optimizer.step()


def in_threads(*works: Callable[[], Any]) -> list[BaseException]:
    errors: list[BaseException] = []

    def guarded(work: Callable[[], Any]) -> None:
        try:
            work()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(work,)) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return errors


def grow(times: int) -> None:
    net: nn.Module = Ordinary()
    data = [(torch.randn(8, 4), torch.randn(8, 2)) for _ in range(2)]
    for _ in range(times):
        fxgrow.grow(net, data, neurons={"a": 1}, progress=False)


@pytest.mark.parametrize("times", [2, pytest.param(60, marks=pytest.mark.slow)])
def test_a_thread_that_trains_while_another_grows_notices_nothing(times: int) -> None:
    fxgrow.capture(Ordinary(), (torch.zeros(2, 4),))
    before = names_and_values()
    done = threading.Event()

    def train_on() -> None:
        net = Ordinary()
        while not done.is_set():
            train(net, 5)

    def grow_and_stop() -> None:
        try:
            grow(times)
        finally:
            done.set()

    assert in_threads(train_on, train_on, grow_and_stop) == []
    assert names_and_values() == before


def test_two_threads_capture_at_once() -> None:
    net, x = Ordinary().eval(), torch.randn(3, 4)
    before = names_and_values()

    def capture() -> None:
        for _ in range(5):
            assert torch.allclose(fxgrow.capture(net, (x,))(x), net(x))

    assert in_threads(capture, capture, functools.partial(train, Ordinary(), 20)) == []
    assert names_and_values() == before


def test_a_failing_capture_restores_everything() -> None:
    class Fails(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise KeyboardInterrupt

    before = names_and_values()
    with pytest.raises(KeyboardInterrupt):
        fxgrow.capture(Fails(), (torch.zeros(2, 4),))
    assert names_and_values() == before
