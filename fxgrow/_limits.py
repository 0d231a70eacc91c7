"""Schedules made of schedules: either of several, and one with an end."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

from fxgrow._errors import ScheduleError
from fxgrow._schedule import Memory, Request, Schedule, Seen, check_positive


@dataclass(frozen=True)
class Either(Schedule):
    """Grows when any of its schedules says so; the first one that does decides what."""

    schedules: tuple[Schedule, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "schedules", tuple(self.schedules))
        if not self.schedules or not all(isinstance(s, Schedule) for s in self.schedules):
            raise ScheduleError(f"Either(schedules={self.schedules!r}): give one schedule or more.")

    def ask(self, seen: Seen, memory: Memory) -> Request | None:
        # all are asked: each has its own readings to remember
        found = [s.ask(seen, memory.setdefault(str(i), {})) for i, s in enumerate(self.schedules)]
        return next((request for request in found if request is not None), None)

    def next_step(self, seen: Seen, memory: Memory) -> int | None:
        steps = (s.next_step(seen, memory.setdefault(str(i), {})) for i, s in enumerate(self.schedules))
        return min((step for step in steps if step is not None), default=None)


@dataclass(frozen=True)
class Until(Schedule):
    """A schedule with an end: the first limit that is reached ends it.

    Args:
        schedule: what ends.
        total: what all growths together may add: a number of `cost`, or a share of the network at its first growth
            such as `"+100%"`. The last growth gets what is left.
        cost: of the total: `parameters`, `multiply-adds` of a sample, or `latency` (measured seconds).
        growths: so many of them.
        declines: so many growths in a row that found nothing worth adding.
        steps: no growth after this step.
        epochs: no growth after this epoch.

    Raises:
        ScheduleError: there is no limit, or one is out of range.

    Example:
        >>> import fxgrow
        >>> fxgrow.Every(epochs=2).until(total="+100%", declines=2)  # doctest: +ELLIPSIS
        Until(schedule=Every(steps=None, epochs=2), total='+100%', cost='parameters', ...
    """

    schedule: Schedule
    total: str | float | None = None
    cost: str = "parameters"
    growths: int | None = None
    declines: int | None = None
    steps: int | None = None
    epochs: int | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.schedule, Schedule):
            raise ScheduleError(f"Until(schedule={self.schedule!r}): give a schedule.")
        names = "growths", "declines", "steps", "epochs"
        if self.total is None and all(getattr(self, name) is None for name in names):
            raise ScheduleError("Until has no limit: give total, growths, declines, steps or epochs.")
        check_positive(self, *(name for name in names if getattr(self, name) is not None))
        if self.cost not in ("parameters", "multiply-adds", "latency"):
            raise ScheduleError(f"cost={self.cost!r}: choose 'parameters', 'multiply-adds' or 'latency'.")
        if self.total is not None:
            self.allowed(1.0)

    def allowed(self, start: float) -> float:
        """What may be added to a network that costs so much."""
        try:
            if isinstance(self.total, str) and self.total.strip().endswith("%"):
                limit = float(self.total.strip().removesuffix("%")) / 100 * start
            else:
                limit = float(self.total)  # type: ignore[arg-type]
        except (TypeError, ValueError) as error:
            raise ScheduleError(f"total={self.total!r}: give a number, or a share such as '+100%'.") from error
        if not 0 < limit < math.inf:
            raise ScheduleError(f"total={self.total!r}: give a positive number, or a share such as '+100%'.")
        return limit

    def ended(self, seen: Seen) -> bool:
        """Whether a limit other than the total is reached."""
        reached = (
            (self.growths, seen.growths),
            (self.declines, seen.declines),
            (self.steps, seen.steps - 1),
            (self.epochs, seen.epochs - 1),
        )
        return any(limit is not None and now >= limit for limit, now in reached)

    def ask(self, seen: Seen, memory: Memory) -> Request | None:
        if memory.get("spent") or self.ended(seen):
            return None
        found = self.schedule.ask(seen, memory.setdefault("of", {}))
        if found is None or self.total is None:
            return found
        spent, start = seen.spent(self.cost)
        left = self.allowed(start) - spent
        if left <= 0:
            memory["spent"] = True
            return None
        if found.limit is not None and found.cost != self.cost:
            raise ScheduleError(f"Two totals, in {found.cost} and in {self.cost}: a growth can keep to one of them.")
        left = left if found.limit is None else min(left, found.limit)
        return dataclasses.replace(found, limit=left, cost=self.cost)

    def next_step(self, seen: Seen, memory: Memory) -> int | None:
        if memory.get("spent") or self.ended(seen):
            return None
        return self.schedule.next_step(seen, memory.setdefault("of", {}))
