"""The base of all schedules, and the two that it returns: `Either` of several, and `Until` with an end."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from fxgrow.data.argument_checks import shown
from fxgrow.errors import ScheduleError
from fxgrow.storage import schema
from fxgrow.storage.schema import Reader, SchemaError, checked


@dataclass
class TrainingStatus:
    """What a schedule sees of a training run; readings of a metric and losses are those since it was last asked."""

    steps: int
    epochs: int
    #: whether an epoch has just ended; else this is a step
    epoch_end: bool
    readings: list[float]
    losses: list[float]
    #: growths so far that added something, and those that declined since the last of them
    growths: int
    declines: int
    #: per width, the predicted decrease by accepted units as a part of the loss, measured on so many samples
    shares: Callable[[int | None], Mapping[str, float]]
    #: per free width, its size and its step
    sizes: Callable[[], Mapping[str, tuple[int, int]]]
    #: of a kind of cost, what all growths have added so far, and the cost before the first
    spent: Callable[[str], tuple[float, float]]


@dataclass(frozen=True)
class Request:
    """What to grow, and why now."""

    reason: str
    #: units per width, or None for those given to the Grower
    neurons: Mapping[str, int] | None = None
    #: the most that may be added, in units of `cost`, or None
    limit: float | None = None
    cost: str = "parameters"


ScheduleState = dict[str, Any]
#: schedules by name, as JSON has them
KINDS: dict[str, type[Schedule]] = {}


@dataclass(frozen=True)
class Schedule:
    """Base of all schedules: `a | b` grows when either says so, `a.until(growths=3)` ends."""

    #: what it keeps between two calls; None: anything
    _memory: ClassVar[Mapping[str, Reader] | None] = None

    def __init_subclass__(cls) -> None:
        KINDS[cls.__name__] = cls

    def ask(self, seen: TrainingStatus, memory: ScheduleState) -> Request | None:
        """Returns what to grow now, or None."""
        raise NotImplementedError

    def next_step(self, seen: TrainingStatus, memory: ScheduleState) -> int | None:
        """Returns the step at which to ask next; None: only at the end of epochs."""
        return None

    def __or__(self, other: Schedule) -> Schedule:
        return Either((self, other))

    def until(self, **limits: Any) -> Schedule:
        """Returns the same schedule with an end; takes what `fxgrow.Until` takes."""
        return Until(self, **limits)

    def to_json(self) -> str:
        """Returns the schedule as JSON text.

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
            schedule = _schedule(schema.parse_json(text))
        except (TypeError, ValueError, KeyError, AttributeError) as error:
            raise ScheduleError(f"This text is not a schedule of fxgrow: {str(error)[:200]}.") from None
        if not isinstance(schedule, Schedule):
            raise ScheduleError("This text is not a schedule of fxgrow: it has no 'kind' that names one.")
        return schedule


@dataclass(frozen=True)
class Either(Schedule):
    """Grows when any of its schedules requests it; the first request counts."""

    _memory = {}

    schedules: tuple[Schedule, ...]

    def __post_init__(self) -> None:
        several = isinstance(self.schedules, (list, tuple)) and all(isinstance(s, Schedule) for s in self.schedules)
        if not several or not self.schedules:
            raise ScheduleError(f"Either(schedules={shown(self.schedules)}): give one schedule or more.")
        object.__setattr__(self, "schedules", tuple(self.schedules))

    def ask(self, seen: TrainingStatus, memory: ScheduleState) -> Request | None:
        # all are asked: each keeps a state of its own
        requests = [s.ask(seen, memory.setdefault(str(i), {})) for i, s in enumerate(self.schedules)]
        return next((request for request in requests if request is not None), None)

    def next_step(self, seen: TrainingStatus, memory: ScheduleState) -> int | None:
        steps = (s.next_step(seen, memory.setdefault(str(i), {})) for i, s in enumerate(self.schedules))
        return min((step for step in steps if step is not None), default=None)


@dataclass(frozen=True)
class Until(Schedule):
    """A schedule with an end: the first limit that is reached ends it.

    Args:
        schedule: the one that ends.
        total: what all growths together may add: a number of `cost`, or a share of the network at its first growth
            such as `"+100%"`. The last growth gets what is left.
        cost: of the total: `parameters`, `multiply-adds` of a sample, or `latency` (measured seconds).
        growths: number of growths.
        declines: number of growths in a row that found nothing worth adding.
        steps: no growth after this step.
        epochs: no growth after this epoch.

    Raises:
        ScheduleError: there is no limit, or one is out of range.

    Example:
        >>> import fxgrow
        >>> fxgrow.Every(epochs=2).until(total="+100%", declines=2)  # doctest: +ELLIPSIS
        Until(schedule=Every(steps=None, epochs=2), total='+100%', cost='parameters', ...
    """

    _memory = {"spent": schema.boolean}

    schedule: Schedule
    total: str | float | None = None
    cost: str = "parameters"
    growths: int | None = None
    declines: int | None = None
    steps: int | None = None
    epochs: int | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.schedule, Schedule):
            raise ScheduleError(f"Until(schedule={shown(self.schedule)}): give a schedule.")
        names = "growths", "declines", "steps", "epochs"
        if self.total is None and all(getattr(self, name) is None for name in names):
            raise ScheduleError("Until has no limit: give total, growths, declines, steps or epochs.")
        check_positive(self, *(name for name in names if getattr(self, name) is not None))
        if self.cost not in ("parameters", "multiply-adds", "latency"):
            raise ScheduleError(f"cost={shown(self.cost)}: choose 'parameters', 'multiply-adds' or 'latency'.")
        if self.total is not None:
            self.allowed(1.0)

    def allowed(self, start: float) -> float:
        """Returns what may be added to a network of the given cost."""
        try:
            if isinstance(self.total, str) and self.total.strip().endswith("%"):
                limit = float(self.total.strip().removesuffix("%")) / 100 * start
            elif isinstance(self.total, (bool, bytes)):
                raise ValueError(self.total)
            else:
                limit = float(self.total)  # type: ignore[arg-type]
        except (TypeError, ValueError) as error:
            raise ScheduleError(f"total={shown(self.total)}: give a number, or a share such as '+100%'.") from error
        if not 0 < limit < math.inf:
            raise ScheduleError(f"total={shown(self.total)}: give a positive number, or a share such as '+100%'.")
        return limit

    def ended(self, seen: TrainingStatus) -> bool:
        """Returns whether a limit other than the total is reached."""
        limits = self.growths, self.declines, self.steps, self.epochs
        now = seen.growths, seen.declines, seen.steps - 1, seen.epochs - 1
        return any(limit is not None and n >= limit for limit, n in zip(limits, now, strict=True))

    def ask(self, seen: TrainingStatus, memory: ScheduleState) -> Request | None:
        if memory.get("spent") or self.ended(seen):
            return None
        request = self.schedule.ask(seen, memory.setdefault("of", {}))
        if request is None or self.total is None:
            return request
        spent, start = seen.spent(self.cost)
        left = self.allowed(start) - spent
        if left <= 0:
            memory["spent"] = True
            return None
        if request.limit is not None and request.cost != self.cost:
            raise ScheduleError(f"Two totals, in {request.cost} and in {self.cost}: a growth can keep to one.")
        left = left if request.limit is None else min(left, request.limit)
        return dataclasses.replace(request, limit=left, cost=self.cost)

    def next_step(self, seen: TrainingStatus, memory: ScheduleState) -> int | None:
        if memory.get("spent") or self.ended(seen):
            return None
        return self.schedule.next_step(seen, memory.setdefault("of", {}))


def _plain(value: Any) -> Any:
    if isinstance(value, Schedule):
        fields = [(f.name, getattr(value, f.name), f.default) for f in dataclasses.fields(value)]
        return {"kind": type(value).__name__, **{name: _plain(v) for name, v, default in fields if v != default}}
    if isinstance(value, Mapping):
        return dict(value)
    return [_plain(v) for v in value] if isinstance(value, tuple) else value


def _schedule(value: Any) -> Any:
    if isinstance(value, dict) and isinstance(value.get("kind"), str):
        name, fields = value["kind"], {k: _schedule(v) for k, v in value.items() if k != "kind"}
        if name not in KINDS:
            raise ScheduleError(f"There is no schedule named {schema.quoted(name)}; there are: {', '.join(KINDS)}.")
        return KINDS[name](**fields)
    return tuple(_schedule(v) for v in value) if isinstance(value, list) else value


def check_one(schedule: Schedule, *names: str) -> None:
    """Refuses a schedule without exactly one of these attributes."""
    given = [name for name in names if getattr(schedule, name) is not None]
    if len(given) != 1:
        raise ScheduleError(f"{type(schedule).__name__} takes {' or '.join(names)}: give one of them.")
    check_positive(schedule, *given)


def check_positive(schedule: Schedule, *names: str) -> None:
    """Refuses attributes that are not positive whole numbers."""
    for name in names:
        value = getattr(schedule, name)
        if type(value) is not int or value < 1:
            raise ScheduleError(f"{type(schedule).__name__}({name}={shown(value)}): give a positive whole number.")


def check_number(schedule: Schedule, name: str, wanted: str, low: float = -math.inf, high: float = math.inf) -> None:
    """Refuses an attribute that is no number from `low` to less than `high`."""
    value = getattr(schedule, name)
    if type(value) not in (int, float) or not low <= value < high:
        raise ScheduleError(f"{type(schedule).__name__}({name}={shown(value)}): give {wanted}.")


def periodic_request(seen: TrainingStatus, steps: int | None, epochs: int | None) -> Request | None:
    """Returns a request every so many steps, or every so many epochs."""
    if steps is not None and not seen.epoch_end and seen.steps % steps == 0:
        return Request(f"step {seen.steps:,}")
    if epochs is not None and seen.epoch_end and seen.epochs % epochs == 0:
        return Request(f"epoch {seen.epochs:,}")
    return None


def next_multiple(seen: TrainingStatus, steps: int | None) -> int | None:
    """Returns the next step that is a multiple of `steps`."""
    return None if steps is None else (seen.steps // steps + 1) * steps


def read_memory(schedule: Schedule, value: Any, where: str) -> ScheduleState:
    """Reads what a schedule has kept; `SchemaError` where it cannot have."""
    readers = schedule._memory
    inner = {str(i): s for i, s in enumerate(schedule.schedules)} if isinstance(schedule, Either) else {}
    inner |= {"of": schedule.schedule} if isinstance(schedule, Until) else {}
    memory: ScheduleState = schema.mapping(schema.anything)(value, where)
    if readers is None:
        return memory
    if unknown := memory.keys() - readers.keys() - inner.keys():
        raise SchemaError(f"{where} has {schema.quoted(min(unknown))}, which this schedule does not keep")
    return {
        key: read_memory(inner[key], v, f"{where}.{key}") if key in inner else readers[key](v, f"{where}.{key}")
        for key, v in memory.items()
    }


@dataclass(frozen=True)
class GrowerState:
    """What `Grower.state_dict` returns."""

    version: int = checked(schema.integer(1, 1))
    steps: int = checked(schema.integer())
    epochs: int = checked(schema.integer())
    schedule: str = checked(schema.string())
    memory: Any = checked(schema.anything)
    start: dict[str, float] = checked(schema.mapping(schema.real(0)))
    readings: tuple[float, ...] = checked(schema.array(schema.real(finite=False)))
    losses: tuple[float, ...] = checked(schema.array(schema.real(finite=False)))
    history: Any = checked(schema.array(schema.anything))
