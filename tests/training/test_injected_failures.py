"""A growth that fails at any instant leaves everything as it was, and the next one does what it would have done."""

from __future__ import annotations

import builtins
import linecache
import random
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxgrow
from fxgrow.initialisers.registry import method_names

LIBRARY = str(Path(fxgrow.__file__).parent)
Trace = Callable[[FrameType, str, Any], Any]


class Injected(Exception):
    """Raised by the tests."""


class Block(nn.Module):
    """A norm, dropout and a branch: what capture, profile and growth patch or lend is in use."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.hidden, self.out = nn.Linear(4, 5), nn.Linear(5, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(self.conv(x)).relu().mean((2, 3))
        if self.training:
            h = nn.functional.dropout(h, 0.1)
        return self.out(torch.tanh(self.hidden(h)))


class Loader:
    """Batches in a random order; raises at the read that is asked for."""

    def __init__(self) -> None:
        g = torch.Generator().manual_seed(0)
        self.x = torch.randn(6, 16, 2, 5, 5, generator=g)
        self.y = self.x[:, :, 0].mean((2, 3)).sin()[..., None]
        self.reads, self.fail_at = 0, -1

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for i in torch.randperm(len(self.x)).tolist():
            self.reads += 1
            if self.reads == self.fail_at:
                raise Injected
            yield self.x[i], self.y[i]


class Run:
    """A Grower after some steps of training, whose next step grows."""

    def __init__(self, method: str = "default") -> None:
        torch.manual_seed(0)
        self.loader, self.model = Loader(), Block()
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=1e-3)
        self.scheduler = torch.optim.lr_scheduler.StepLR(self.optimizer, 2)
        self.average = torch.optim.swa_utils.AveragedModel(self.model)
        self.grower = fxgrow.Grower(
            self.model, self.optimizer, fxgrow.OnPlateau(every=4, patience=1), dataloader=self.loader, neurons=2,
            method=method, ema=self.average, lr_scheduler=self.scheduler, loss_fn=nn.functional.mse_loss,
        )  # fmt: skip
        for x, y in zip(self.loader.x[:4], self.loader.y[:4], strict=True):
            self.optimizer.zero_grad()
            nn.functional.mse_loss(self.model(x), y).backward()
            self.optimizer.step()
        for _ in range(7):
            assert not self.grower.step(1.0)
        self.loader.reads = 0

    def seen(self) -> dict[str, Any]:
        """All that a failed growth could leave in another state, copied."""
        model = self.grower.model
        tensors = {f"gradient of {n}": p.grad for n, p in model.named_parameters()}
        for i, state in enumerate(self.optimizer.state.values()):
            tensors |= {f"{key} {i}": value for key, value in state.items()}
        tensors |= model.state_dict() | {f"average {n}": t for n, t in self.average.state_dict().items()}
        state = self.grower.state_dict()
        return {
            "model": (id(model), id(self.model), self.grower.ema is self.average, self.grower.growth),
            "modules": [(n, id(m), m.training, sorted(vars(m))) for n, m in model.named_modules()],
            "hooks": [len(v) for m in model.modules() for k, v in vars(m).items() if "hooks" in k and v is not None],
            "parameters": [(id(p), p.requires_grad, p._version) for p in model.parameters()],
            "groups": [(len(g["params"]), [id(p) for p in g["params"]]) for g in self.optimizer.param_groups],
            "tensors": {name: None if t is None else t.clone() for name, t in tensors.items()},
            "grower": {key: value for key, value in state.items() if key not in ("steps", "losses")},
            "random": (torch.get_rng_state(), random.getstate()),
            "process": (
                torch.is_grad_enabled(), torch.get_default_dtype(), torch.is_inference_mode_enabled(),
                list(warnings.filters), builtins.isinstance is isinstance, nn.Module.__call__, nn.Module.__getattr__,
                threading.active_count(), torch.nn.functional.linear, torch.overrides._get_current_function_mode(),
            ),
        }  # fmt: skip


def same(found: Any, expected: Any) -> bool:
    if isinstance(expected, Tensor):
        return isinstance(found, Tensor) and torch.equal(found, expected)
    if isinstance(expected, dict):
        return found.keys() == expected.keys() and all(same(found[k], v) for k, v in expected.items())
    return bool(found == expected) if not isinstance(expected, tuple) else all(map(same, found, expected))


def differences(run: Run, before: dict[str, Any]) -> list[str]:
    now = run.seen()
    return [key for key, value in before.items() if not same(now[key], value)]


def lines_of(call: Callable[[], Any], fail_at: int = -1, error: type[BaseException] = Injected) -> int:
    """Counts the lines of the library that a call runs; raises at one of them, as an interrupt does."""
    count = 0

    def line(frame: FrameType, event: str, arg: Any) -> Trace:
        nonlocal count
        # at the end of a `with` block Python does not promise to call `__exit__` (bpo-29988)
        source = linecache.getline(frame.f_code.co_filename, frame.f_lineno).lstrip()
        if event == "line" and not source.startswith("with "):
            count += 1
            if count == fail_at:
                raise error
        return line

    def start(frame: FrameType, event: str, arg: Any) -> Trace | None:
        return line if frame.f_code.co_filename.startswith(LIBRARY) else None

    before = sys.gettrace()
    sys.settrace(start)
    try:
        call()
    finally:
        sys.settrace(before)
    return count


def again(run: Run) -> None:
    """Makes the next step the one that grows, once more."""
    run.grower.steps = 7
    run.grower._losses.pop()
    run.grower._ask_at = 0


def check_failures(instants: int, seed: int) -> None:
    Run().grower.step(1.0)  # fills caches of the process
    whole = Run()
    total = lines_of(lambda: whole.grower.step(1.0))
    assert whole.grower.history.growths == 1 and total > 10_000
    expected = whole.grower.model.state_dict()
    run = Run()
    before = run.seen()
    for i, instant in enumerate(random.Random(seed).sample(range(1, total - 100), instants)):
        error: type[BaseException] = (Injected, KeyboardInterrupt, MemoryError)[i % 3]
        try:
            lines_of(lambda: run.grower.step(1.0), instant, error)  # noqa: B023
        except (error, fxgrow.FxgrowError):
            again(run)
            assert differences(run, before) == [], f"line {instant} of {total}"
        else:  # an operator or a mode that raises is one that growth does without; an interrupt never is
            assert error is not KeyboardInterrupt
            run = Run()
            before = run.seen()
    assert run.grower.step(1.0)
    assert same(run.grower.model.state_dict(), expected)


def test_a_growth_that_fails_leaves_everything_as_it_was() -> None:
    check_failures(instants=8, seed=0)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 6))
def test_a_growth_that_fails_at_one_of_many_instants_leaves_everything_as_it_was(seed: int) -> None:
    check_failures(instants=100, seed=seed)


def check_reads(method: str, stride: int) -> None:
    whole = Run(method)
    whole.grower.step(1.0)
    reads, expected = whole.loader.reads, whole.grower.model.state_dict()
    assert reads > len(whole.loader.x)
    run = Run(method)
    before = run.seen()
    for read in range(1, reads + 1, stride):
        run.loader.reads, run.loader.fail_at = 0, read
        with pytest.raises((Injected, fxgrow.FxgrowError)):
            run.grower.step(1.0)
        again(run)
        assert differences(run, before) == [], f"read {read} of {reads}"
    run.loader.fail_at = -1
    run.grower.step(1.0)
    assert same(run.grower.model.state_dict(), expected)


@pytest.mark.parametrize("method", ["default", "tiny"])
def test_a_loader_that_fails_leaves_everything_as_it_was(method: str) -> None:
    check_reads(method, stride=7)


@pytest.mark.slow
@pytest.mark.parametrize("method", method_names())
def test_a_loader_that_fails_at_any_batch_leaves_everything_as_it_was(method: str) -> None:
    check_reads(method, stride=1)
