"""When to grow: plain data, to JSON and back.

A schedule is asked at a step or at the end of an epoch, with what training looks like then, and answers what to grow,
if anything. It is frozen; what it must remember between two questions is a dict of numbers that `fxgrow.Grower` keeps.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from fxgrow._errors import ScheduleError


@dataclass
class Seen:
    """What a schedule is shown.

    Attributes:
        steps: optimiser steps so far.
        epochs: epochs that have ended.
        epoch_end: whether one has just ended; else this is a step.
        readings: values of a metric that came in since the last question.
        losses: those of the steps since then, where they were given.
        growths: growths so far, those that declined left out.
        declines: growths that declined since the last one that did not.
        shares: per width, the bottleneck's share of what the loss asks for; reads data.
        sizes: per free width, its size now and the least that can be added to it.
        spent: of a cost, what all growths have added so far, and how much there was before the first.
    """

    steps: int
    epochs: int
    epoch_end: bool
    readings: list[float]
    losses: list[float]
    growths: int
    declines: int
    shares: Callable[[int | None], Mapping[str, float]]
    sizes: Callable[[], Mapping[str, tuple[int, int]]]
    spent: Callable[[str], tuple[float, float]]


@dataclass(frozen=True)
class Request:
    """What to grow.

    Attributes:
        reason: why now, for the log.
        neurons: units per width, or None for what the Grower was told.
        limit: the most that may be added, in units of `cost`, or None.
        cost: of the limit.
    """

    reason: str
    neurons: Mapping[str, int] | None = None
    limit: float | None = None
    cost: str = "parameters"


Memory = dict[str, Any]
#: schedules by name, as JSON has them
KINDS: dict[str, type[Schedule]] = {}


@dataclass(frozen=True)
class Schedule:
    """Base of all schedules: `a | b` grows when either says so, `a.until(growths=3)` ends."""

    def __init_subclass__(cls) -> None:
        KINDS[cls.__name__] = cls

    def ask(self, seen: Seen, memory: Memory) -> Request | None:
        """What to grow now, or None."""
        raise NotImplementedError

    def next_step(self, seen: Seen, memory: Memory) -> int | None:
        """The step at which to ask next; None: at ends of epochs alone."""
        return None

    def __or__(self, other: Schedule) -> Schedule:
        from fxgrow._limits import Either

        return Either((self, other))

    def until(self, **limits: Any) -> Schedule:
        """The same schedule with an end; takes what `fxgrow.Until` takes."""
        from fxgrow._limits import Until

        return Until(self, **limits)

    def to_json(self) -> str:
        """The schedule as JSON text.

        Example:
            >>> import fxgrow
            >>> fxgrow.Every(steps=100).to_json()
            '{"kind": "Every", "steps": 100}'
            >>> fxgrow.Schedule.from_json('{"kind": "Every", "epochs": 2}')
            Every(steps=None, epochs=2)
        """
        return json.dumps(_plain(self))

    @staticmethod
    def from_json(text: str) -> Schedule:
        """Reads what `to_json` wrote.

        Raises:
            ScheduleError: the text is no schedule.
        """
        try:
            found = _schedule(json.loads(text))
        except (TypeError, ValueError, KeyError) as error:
            raise ScheduleError(f"This text is not a schedule of fxgrow: {error}.") from error
        if not isinstance(found, Schedule):
            raise ScheduleError("This text is not a schedule of fxgrow: it has no 'kind' that names one.")
        return found


def _plain(value: Any) -> Any:
    if isinstance(value, Schedule):
        fields = [(f.name, getattr(value, f.name), f.default) for f in dataclasses.fields(value)]
        return {"kind": type(value).__name__, **{name: _plain(v) for name, v, usual in fields if v != usual}}
    if isinstance(value, Mapping):
        return dict(value)
    return [_plain(v) for v in value] if isinstance(value, tuple) else value


def _schedule(value: Any) -> Any:
    if isinstance(value, dict) and isinstance(value.get("kind"), str):
        name, fields = value["kind"], {k: _schedule(v) for k, v in value.items() if k != "kind"}
        if name not in KINDS:
            raise ScheduleError(f"There is no schedule named {name!r}; there are: {', '.join(KINDS)}.")
        return KINDS[name](**fields)
    return tuple(_schedule(v) for v in value) if isinstance(value, list) else value


def check_one(schedule: Schedule, *names: str) -> None:
    given = [name for name in names if getattr(schedule, name) is not None]
    if len(given) != 1:
        raise ScheduleError(f"{type(schedule).__name__} takes {' or '.join(names)}: give one of them.")
    check_positive(schedule, *given)


def check_positive(schedule: Schedule, *names: str) -> None:
    for name in names:
        value = getattr(schedule, name)
        if type(value) is not int or value < 1:
            raise ScheduleError(f"{type(schedule).__name__}({name}={value!r}): give a positive whole number.")


def turn(seen: Seen, steps: int | None, epochs: int | None) -> Request | None:
    if steps is not None and not seen.epoch_end and seen.steps % steps == 0:
        return Request(f"step {seen.steps:,}")
    if epochs is not None and seen.epoch_end and seen.epochs % epochs == 0:
        return Request(f"epoch {seen.epochs:,}")
    return None


def next_turn(seen: Seen, steps: int | None) -> int | None:
    return None if steps is None else (seen.steps // steps + 1) * steps
