"""Schedules: at regular intervals, on a plateau, on a bottleneck, layer by layer."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from fxgrow.data.argument_checks import shown
from fxgrow.errors import ScheduleError
from fxgrow.storage import schema
from fxgrow.training.schedule import (
    Request,
    Schedule,
    ScheduleState,
    TrainingStatus,
    check_number,
    check_one,
    check_positive,
    next_multiple,
    periodic_request,
)

_reading = schema.real(finite=False)


@dataclass(frozen=True)
class Every(Schedule):
    """Grows every so many optimiser steps, or every so many epochs (`Grower.epoch_end` counts them).

    Raises:
        ScheduleError: not exactly one of them is given, or it is not positive.

    Example:
        >>> import fxgrow
        >>> fxgrow.Every(steps=500) | fxgrow.Every(epochs=3)
        Either(schedules=(Every(steps=500, epochs=None), Every(steps=None, epochs=3)))
    """

    _memory = {}

    steps: int | None = None
    epochs: int | None = None

    def __post_init__(self) -> None:
        check_one(self, "steps", "epochs")

    def ask(self, seen: TrainingStatus, memory: ScheduleState) -> Request | None:
        return periodic_request(seen, self.steps, self.epochs)

    def next_step(self, seen: TrainingStatus, memory: ScheduleState) -> int | None:
        return next_multiple(seen, self.steps)


@dataclass(frozen=True)
class OnPlateau(Schedule):
    """Grows when the loss has stopped falling.

    A reading is the argument of `Grower.observe(value)` or `Grower.epoch_end(value)`, or the mean of the losses that
    `Grower.step(loss=...)` got in `every` steps (read in one transfer, so that no step waits for the GPU).

    Args:
        patience: readings in a row without an improvement before a growth, and between two growths.
        min_delta: an improvement is more than this.
        every: steps per reading.
        largest: whether larger values of the metric are better.

    Raises:
        ScheduleError: a number is out of range.
    """

    _memory = {"best": _reading, "waited": schema.integer(), "sum": _reading, "count": schema.integer()}

    patience: int = 5
    min_delta: float = 0.0
    every: int = 100
    largest: bool = False

    def __post_init__(self) -> None:
        check_positive(self, "patience", "every")
        check_number(self, "min_delta", "a number")
        if not isinstance(self.largest, bool):
            raise ScheduleError(f"OnPlateau(largest={shown(self.largest)}): give True or False.")

    def ask(self, seen: TrainingStatus, memory: ScheduleState) -> Request | None:
        readings = [*seen.readings, *self._mean(seen, memory)]
        for value in readings:
            best = memory.get("best")
            score = value if self.largest else -value
            if best is None or score > best + self.min_delta:
                memory.update(best=score, waited=0)
            elif not math.isnan(score):
                memory["waited"] = memory.get("waited", 0) + 1
        if memory.get("waited", 0) < self.patience:
            return None
        memory["waited"] = 0
        return Request(f"no improvement of more than {self.min_delta:g} in {self.patience} readings")

    def _mean(self, seen: TrainingStatus, memory: ScheduleState) -> list[float]:
        memory["sum"] = memory.get("sum", 0.0) + sum(seen.losses)
        memory["count"] = memory.get("count", 0) + len(seen.losses)
        if periodic_request(seen, self.every, None) is None or not memory["count"]:
            return []
        mean = memory["sum"] / memory["count"]
        memory.update(sum=0.0, count=0)
        return [mean]

    def next_step(self, seen: TrainingStatus, memory: ScheduleState) -> int | None:
        return next_multiple(seen, self.every)


@dataclass(frozen=True)
class OnBottleneck(Schedule):
    """Grows when new units of some width would lower the loss by a part of it.

    What counts are units that a held-out test accepts, and the decrease of the loss that is predicted for them
    (`Bottleneck.share`): nothing at a network that is large enough, whatever the state of its training. Psi itself is
    no sign, since at a stationary point it is all of the gradient energy. Each check is a profile of `samples`, so
    checks should be rare.

    Args:
        share: the least part of the loss, between 0 and 1.
        every: steps between two checks.
        epochs: instead, epochs between two checks.
        samples: read per check; None for those of a growth.

    Raises:
        ScheduleError: a number is out of range.
    """

    share: float = 0.01
    every: int | None = None
    epochs: int | None = None
    samples: int | None = 1024

    def __post_init__(self) -> None:
        check_one(self, "every", "epochs")
        check_number(self, "share", "a share between 0 and 1", 0, 1)
        if self.samples is not None:
            check_positive(self, "samples")

    def ask(self, seen: TrainingStatus, memory: ScheduleState) -> Request | None:
        if periodic_request(seen, self.every, self.epochs) is None:
            return None
        shares = seen.shares(self.samples)
        name = max(shares, key=lambda n: shares[n], default=None)
        if name is None or shares[name] < self.share:
            return None
        return Request(f"what units would gain at {name} is {shares[name]:.1%} of the loss")

    def next_step(self, seen: TrainingStatus, memory: ScheduleState) -> int | None:
        return next_multiple(seen, self.every)


@dataclass(frozen=True)
class LayerByLayer(Schedule):
    """Grows one width at a time to a target architecture, in the order of `target`, as the paper does.

    Each width grows from the size it has at the first growth in rounds of equal factors, all widths in turn
    (Verbockhaven et al. 2024, section 5). Widths that have their target size are skipped.

    Args:
        target: per width, its size at the end.
        steps: optimiser steps between two growths.
        epochs: instead, epochs between two growths.
        factor: a growth multiplies the size of a width at most by this.

    Raises:
        ScheduleError: a number is out of range, or `target` is empty.

    Example:
        >>> import fxgrow
        >>> fxgrow.LayerByLayer({"a": 16, "b": 8}, epochs=1, factor=2).turns({"a": 4, "b": 4})
        [('a', 8), ('b', 6), ('a', 16), ('b', 8)]
    """

    _memory = {"done": schema.boolean, "turn": schema.integer(), "start": schema.mapping(schema.integer(1))}

    target: Mapping[str, int]
    steps: int | None = None
    epochs: int | None = None
    factor: float = 8.0

    def __post_init__(self) -> None:
        check_one(self, "steps", "epochs")
        sizes = self.target.items() if isinstance(self.target, Mapping) else ()
        if not sizes or any(type(size) is not int or size < 1 or not isinstance(name, str) for name, size in sizes):
            raise ScheduleError(f"LayerByLayer(target={shown(self.target)}): give a size for each width to grow.")
        check_number(self, "factor", "a factor above 1", math.nextafter(1, 2))

    def turns(self, start: Mapping[str, int]) -> list[tuple[str, int]]:
        """Returns the growths in order: a width, and its size after the growth."""
        ratio = max(size / start[name] for name, size in self.target.items())
        rounds = max(1, math.ceil(math.log(max(1.0, ratio), self.factor) - 1e-9))
        sizes, out = dict(start), []
        for n in range(1, rounds + 1):
            for name, size in self.target.items():
                wanted = round(start[name] * (size / start[name]) ** (n / rounds))
                if wanted > sizes[name]:
                    sizes[name] = wanted
                    out.append((name, wanted))
        return out

    def ask(self, seen: TrainingStatus, memory: ScheduleState) -> Request | None:
        if memory.get("done") or periodic_request(seen, self.steps, self.epochs) is None:
            return None
        sizes = seen.sizes()
        missing = [name for name in self.target if name not in sizes]
        if missing:
            raise ScheduleError(
                f"LayerByLayer has a target for {missing[0]!r}, which is no free width of this model; those are: "
                f"{', '.join(sizes) or 'none'}."
            )
        start = memory.setdefault("start", {name: sizes[name][0] for name in self.target})
        if start.keys() != self.target.keys():
            raise ScheduleError("LayerByLayer has a state of other widths than its target's.")
        turns = self.turns(start)
        while (at := memory.setdefault("turn", 0)) < len(turns):
            memory["turn"] += 1
            name, wanted = turns[at]
            size, step = sizes[name]
            if size < wanted:
                units = math.ceil((wanted - size) / step) * step
                return Request(f"turn {at + 1} of {len(turns)}", {name: units})
        memory["done"] = True
        return None

    def next_step(self, seen: TrainingStatus, memory: ScheduleState) -> int | None:
        return None if memory.get("done") else next_multiple(seen, self.steps)
