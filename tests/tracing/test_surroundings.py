"""What a graph cannot see may be asked, and may not matter: random numbers of Python, counters, the gradient mode."""

from __future__ import annotations

import copy
import itertools
import random
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import fxgrow


class Looks(nn.Module):
    def __init__(self, use: Callable[[Looks, Tensor, Tensor], Tensor], only_in_training: bool = False) -> None:
        super().__init__()
        self.a, self.b, self.use, self.only_in_training = nn.Linear(4, 6), nn.Linear(6, 2), use, only_in_training
        self.calls, self.generator, self.before = 0, random.Random(0), None

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x).relu()
        return self.b(h if self.only_in_training and not self.training else self.use(self, x, h))


def counted(m: Looks, x: Tensor, h: Tensor) -> Tensor:
    m.calls += 1
    return h * 2 if m.calls > 1000 else h


def kept(m: Looks, x: Tensor, h: Tensor) -> Tensor:
    before, m.before = m.before, h.detach()  # type: ignore[assignment]
    return h if before is None else h + before


NUMBERS = itertools.count(1)
REFUSED = {
    "python": (lambda m, x, h: h * random.uniform(1, 2), "draws from Python"),
    "rarely": (lambda m, x, h: h if random.random() > 0.05 else h * 0, "draws from Python"),
    "numpy": (lambda m, x, h: h if np.random.rand() > 0.1 else h * 0, "draws from Python"),
    "own generator": (lambda m, x, h: h * m.generator.random(), "draws from Python"),
    "counter": (counted, r"Looks\.calls, which each call changes"),
    "kept": (kept, "keeps from one call to the next"),
    "requires_grad": (lambda m, x, h: h * 2 if h.requires_grad else h, "gradients are recorded"),
    "grad_fn": (lambda m, x, h: h * 2 if h.grad_fn is not None else h, "gradients are recorded"),
    "is_grad_enabled": (lambda m, x, h: h * 2 if torch.is_grad_enabled() else h, "gradients are recorded"),
    "inference": (lambda m, x, h: h * 2 if torch.is_inference_mode_enabled() else h, "inference mode"),
    "time": (lambda m, x, h: h * time.time(), "the time"),
    "clock": (lambda m, x, h: h if time.perf_counter() % 2e7 < 1e7 else -h, "the time"),
    "anything else": (lambda m, x, h: h * next(NUMBERS), "another result each time"),
    "contiguous": (lambda m, x, h: h * 2 if x.is_contiguous() else h, "contiguous"),
}


@pytest.mark.parametrize("only_in_training", [False, True])
@pytest.mark.parametrize("name", REFUSED)
def test_what_would_be_frozen_is_refused_by_name(name: str, only_in_training: bool) -> None:
    if only_in_training and name in ("python", "rarely", "numpy"):
        pytest.skip("followed: see test_random_branches.py")
    use, reason = REFUSED[name]
    net = Looks(use, only_in_training).eval()
    states = random.getstate(), net.generator.getstate(), np.random.get_state()[2]
    with pytest.raises(fxgrow.CaptureError, match=reason):
        fxgrow.capture(net, (torch.randn(3, 4),))
    assert (random.getstate(), net.generator.getstate(), np.random.get_state()[2]) == states
    assert net.calls == 0 and net.before is None


def logged(m: Looks, x: Tensor, h: Tensor) -> Tensor:
    m.calls += 1
    time.perf_counter()
    m.before = h  # type: ignore[assignment]
    if m.calls % 3 == 0 or random.random() > 0.5:
        str(m.calls)
    return h.contiguous() if not h.is_contiguous() or h.requires_grad else h


def test_what_makes_no_difference_is_captured() -> None:
    net, x = Looks(logged), torch.randn(3, 4)
    gm = fxgrow.capture(net, (x,))
    assert torch.equal(gm(x), net(x))
    with torch.no_grad():
        assert torch.equal(gm(x), net(x))


class OwnGenerator(nn.Module):
    def __init__(self, owner: str) -> None:
        super().__init__()
        self.a, self.out, self.noise = nn.Linear(6, 8), nn.Linear(8, 3), nn.Identity()
        self.owner = owner
        self.holder().generator = torch.Generator().manual_seed(3)

    def holder(self) -> Any:
        return self if self.owner == "model" else self.noise

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x).relu()
        if self.training:
            h = h * torch.rand(len(x), 1, generator=self.holder().generator)
            h = h + torch.empty_like(h).normal_(generator=self.holder().generator) * 0.1
        return self.out(h)


@pytest.mark.parametrize("owner", ["model", "submodule"])
def test_a_generator_of_the_model_is_that_of_the_graph(owner: str) -> None:
    m, x = OwnGenerator(owner).train(), torch.randn(8, 6)
    generator = m.holder().generator
    state = generator.get_state()
    gm = fxgrow.capture(m, (x,))
    grown = fxgrow.grow(m, [(x, torch.randn(8, 3)) for _ in range(4)], neurons=1, progress=False)
    copied = copy.deepcopy(grown)
    for net in (grown, copied):  # has a generator of its own
        assert net.train()(x).isfinite().all() and torch.equal(generator.get_state(), state)
    expected = m(x)
    generator.set_state(state)
    assert torch.allclose(gm.train()(x), expected, atol=1e-6) and not torch.equal(gm(x), expected)
