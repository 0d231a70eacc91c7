"""One arm pair: train, then train on as it is and grown, on the same batches."""

from __future__ import annotations

import copy
import itertools
import math
import time
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

import fxgrow
from benchmarks.harmless.trials import Batch, Trial, batches
from fxgrow.pipeline.growth_record import Growth

#: steps before growth
STEPS = {"warm": 24, "cold": 3}
#: masks of dropout over which the loss in train mode is a mean
MASKS = 3


@dataclass(frozen=True)
class Setting:
    """How a network is trained and when it grows.

    Attributes:
        optimizer: sgd (momentum .9, weight decay) or adamw.
        stage: warm or cold, see `STEPS`; half for as many steps as after growth.
        samples: to train on and to grow on.
        after: steps after growth.
        seed: of weights, data and order.
        cosine: whether the learning rate falls to zero over all steps.
        tries: learning rates, each a fifth of the one before, until the run that does not grow is stable.
    """

    optimizer: str = "sgd"
    stage: str = "warm"
    samples: int = 64
    after: int = 16
    seed: int = 0
    cosine: bool = False
    tries: int = 3

    @property
    def before(self) -> int:
        return STEPS.get(self.stage, self.after)

    def __str__(self) -> str:
        return f"{self.optimizer} {self.stage} {self.samples}" + f" seed {self.seed}" * bool(self.seed)


class Arm:
    """A network in training, with its optimiser and what trains against it."""

    def __init__(self, trial: Trial, setting: Setting, rate: float) -> None:
        self.trial, self.model = trial, trial.model
        self.optimizer = _optimizer(self.model, setting.optimizer, rate)
        self.rate, self.steps = rate, 0
        self.horizon = setting.before + setting.after if setting.cosine else None

    def train(self, steps: int, seed: int) -> list[float]:
        """The loss of each step, until one is not finite."""
        torch.manual_seed(seed)
        losses: list[float] = []
        generator = torch.Generator().manual_seed(seed)
        self.model.train()
        for batch in _endless(self.trial, generator, round(steps * self.trial.pace)):
            self._schedule()
            if self.trial.other is not None:
                self.trial.other.step(self.model, batch)
            self.optimizer.zero_grad()
            loss = self.trial.loss(self.model, batch)
            loss.backward()
            self.optimizer.step()
            losses.append(float(loss.detach()))
            if not math.isfinite(losses[-1]):
                break
        return losses

    def _schedule(self) -> None:
        if self.horizon:
            rate = self.rate * 0.5 * (1 + math.cos(math.pi * self.steps / self.horizon))
            for group in self.optimizer.param_groups:
                group["lr"] = rate
        self.steps += 1

    def grow(self) -> Growth:
        """Replaces the model as a user does: all defaults, with the optimiser."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            options: dict[str, Any] = {"optimizer": self.optimizer, "progress": False}
            grown = fxgrow.grow(self.model, self.trial.loader(), loss_fn=self.trial.loss_fn, **options)
        self.model = grown
        return grown.meta["fxgrow"]

    @torch.no_grad()
    def loss(self, training: bool) -> float:
        """On held-out batches; buffers and random numbers stay as they are."""
        model = copy.deepcopy(self.model).train(training)
        data = batches(self.trial.held_out, self.trial.batch)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            losses = [float(self.trial.loss(model, b)) for _ in range(MASKS if training else 1) for b in data]
        return sum(losses) / len(losses)

    def largest(self) -> dict[str, float]:
        """The largest absolute parameter of each module that has its own."""
        found: dict[str, float] = {}
        for name, p in self.model.named_parameters():
            layer = name.rpartition(".")[0]
            size = float(p.detach().abs().max()) if p.numel() else 0.0
            found[layer] = _worst(found.get(layer, 0.0), size)
        return found


def _worst(*values: float) -> float:
    return math.inf if not all(map(math.isfinite, values)) else max(values)


def _optimizer(model: nn.Module, kind: str, rate: float) -> torch.optim.Optimizer:
    if kind == "sgd":
        return torch.optim.SGD(model.parameters(), rate, momentum=0.9, weight_decay=5e-4)
    return torch.optim.AdamW(model.parameters(), rate / 10)


def _endless(trial: Trial, generator: torch.Generator, steps: int) -> Iterator[Batch]:
    return itertools.islice(itertools.chain.from_iterable(trial.epoch(generator) for _ in itertools.count()), steps)


def compare(make: Any, setting: Setting) -> Iterator[dict[str, Any]]:
    """Yields what is found: of the run that does not grow, then of the one that does.

    Args:
        make: returns a `Trial` for a number of samples and a seed.
        setting: see `Setting`.
    """
    yield {"optimizer": setting.optimizer, "stage": setting.stage, "samples": setting.samples, "at": "train"}
    arm, other, rate, before, ungrown = _well_behaved(make, setting)
    old = arm.largest()
    start = {mode: arm.loss(mode == "train") for mode in ("eval", "train")}
    yield {
        "rate": rate, "before": before, "ungrown": ungrown, "losses": start, "side": _shape(arm.trial),
        "parameters": sum(p.numel() for p in arm.model.parameters()), "ungrown_final": _final(other), "at": "grow",
    }  # fmt: skip
    try:
        growth = arm.grow()
    except fxgrow.FxgrowError as error:
        yield {"declined": f"refused: {error}"[:300], "cpu": time.process_time()}
        return
    yield {
        "declined": growth.declined, "units": sum(growth.plan.units.values()), "gamma": growth.plan.scale,
        "reported": dict(growth.losses), "added": growth.plan.parameters,
        "losses_grown": {mode: arm.loss(mode == "train") for mode in start}, "at": "train on",
    }  # fmt: skip
    at_growth = _ratio(arm.largest(), old, {})
    grown = arm.train(setting.after, setting.seed + 1000)
    later = _ratio(arm.largest(), old, other.largest())
    yield {
        "at_growth": at_growth,
        "later": later,
        "grown": grown,
        "grown_final": _final(arm),
        "cpu": time.process_time(),
    }


def _well_behaved(make: Any, setting: Setting) -> tuple[Arm, Arm, float, list[float], list[float]]:
    """A trained arm, a copy that was trained on, the rate and the losses of both; rates that diverge are lowered."""
    rate: float | None = None
    for left in reversed(range(setting.tries)):
        torch.manual_seed(setting.seed)
        trial = make(setting.samples, setting.seed)
        rate = trial.rate if rate is None else rate / 5
        arm = Arm(trial, setting, rate)
        before = arm.train(setting.before, setting.seed)
        other = copy.deepcopy(arm)
        after = other.train(setting.after, setting.seed + 1000)
        if not left or max(after, key=_finite) < 1.5 * before[0]:
            break
    return arm, other, rate, before, after


def _finite(value: float) -> float:
    return value if math.isfinite(value) else math.inf


def _final(arm: Arm) -> dict[str, float]:
    return {mode: arm.loss(mode == "train") for mode in ("eval", "train")}


def _ratio(now: Mapping[str, float], old: Mapping[str, float], ungrown: Mapping[str, float]) -> tuple[str, float]:
    """The module whose largest parameter has grown most, against its old one and that of the run that did not grow."""
    ratios = {}
    for layer, size in now.items():
        # modules that were made for the growth have none
        known = max(old.get(layer, max(old.values())), _finite(ungrown.get(layer, 0.0)), SMALLEST)
        ratios[layer] = size / known
    worst = max(ratios, key=lambda layer: ratios[layer])
    return worst, ratios[worst]


def _shape(trial: Trial) -> list[int]:
    inputs = trial.train[0]
    return list((next(iter(inputs.values())) if isinstance(inputs, dict) else inputs[0]).shape[1:])


#: parameters below this are as good as zero: a layer that starts at 1e-6 moves by one step to a multiple of that
SMALLEST = 1e-2
