"""Schedules say when to grow, remember in plain data, and go to JSON and back."""

from __future__ import annotations

import json
from typing import Any

import pytest

import fxgrow
from fxgrow.errors import ScheduleError
from fxgrow.training.schedule import Request, TrainingStatus


def seen(**changes: Any) -> TrainingStatus:
    usual: dict[str, Any] = {
        "steps": 0,
        "epochs": 0,
        "epoch_end": False,
        "readings": [],
        "losses": [],
        "growths": 0,
        "declines": 0,
        "shares": lambda samples: {},
        "sizes": lambda: {},
        "spent": lambda kind: (0.0, 100.0),
    }
    return TrainingStatus(**{**usual, **changes})


def growths(schedule: fxgrow.Schedule, steps: int, epoch: int, **more: Any) -> list[tuple[int, int]]:
    """Where it wants to grow in a run of so many steps, asked at every one of them; memory goes through JSON."""
    memory: dict[str, Any] = {}
    out = []
    for step in range(1, steps + 1):
        for end in (False, True) if step % epoch == 0 else (False,):
            asked = schedule.ask(seen(steps=step, epochs=(step - (not end)) // epoch, epoch_end=end, **more), memory)
            memory = json.loads(json.dumps(memory))
            if asked is not None:
                out.append((step, int(end)))
    return out


def test_every_so_many_steps_or_epochs() -> None:
    assert growths(fxgrow.Every(steps=4), 13, 5) == [(4, 0), (8, 0), (12, 0)]
    assert growths(fxgrow.Every(epochs=2), 22, 5) == [(10, 1), (20, 1)]
    both = fxgrow.Every(steps=7) | fxgrow.Every(epochs=2)
    assert growths(both, 22, 5) == [(7, 0), (10, 1), (14, 0), (20, 1), (21, 0)]


@pytest.mark.parametrize("every", [1, 3, 10])
def test_the_next_step_is_the_first_at_which_it_may_grow(every: int) -> None:
    schedule = fxgrow.Every(steps=every)
    expected = [step for step, _ in growths(schedule, 40, 100)]
    found, step = [], 0
    while (step := schedule.next_step(seen(steps=step), {}) or 99) <= 40:
        found.append(step)
    assert found == expected
    assert fxgrow.Every(epochs=1).next_step(seen(steps=3), {}) is None
    assert (fxgrow.Every(steps=9) | fxgrow.Every(steps=5)).next_step(seen(steps=5), {}) == 9


def readings(schedule: fxgrow.Schedule, values: list[float]) -> list[int]:
    memory: dict[str, Any] = {}
    asked = [schedule.ask(seen(epochs=i, epoch_end=True, readings=[v]), memory) for i, v in enumerate(values)]
    return [i for i, request in enumerate(asked) if request is not None]


def test_a_plateau() -> None:
    nan = float("nan")
    assert readings(fxgrow.OnPlateau(patience=2), [3, 2, 1, 1, 0.9, 0.9, 0.95, 0.9, 1]) == [6, 8]
    assert readings(fxgrow.OnPlateau(patience=2, min_delta=0.5), [3, 2.8, 2.6, 2.4, 2.3, 2.2]) == [2, 5]
    assert readings(fxgrow.OnPlateau(patience=2, largest=True), [1, 2, 3, 3, 3]) == [4]
    assert readings(fxgrow.OnPlateau(patience=2), [1, nan, nan, 1, 1]) == [4]


def test_a_plateau_of_mean_losses() -> None:
    """Losses of ten steps are one reading: 2, then 1, then no better twice."""
    schedule, memory, found = fxgrow.OnPlateau(patience=2, every=10), {}, []
    for step in range(1, 51):
        loss = {0: 2.0, 1: 1.0}.get((step - 1) // 10, 1.0) + (0.5 if step % 2 else -0.5)
        if schedule.ask(seen(steps=step, losses=[loss]), memory) is not None:
            found.append(step)
    assert found == [40]


def test_a_bottleneck() -> None:
    looked: list[int | None] = []

    def shares(samples: int | None) -> dict[str, float]:
        looked.append(samples)
        return {"a": 0.3, "b": 0.1 * len(looked)}

    schedule = fxgrow.OnBottleneck(share=0.35, every=5, samples=64)
    assert growths(schedule, 21, 100, shares=shares) == [(20, 0)]
    assert looked == [64] * 4
    request = schedule.ask(seen(steps=25, shares=lambda n: {"a": 0.5, "b": 0.9}), {})
    assert request is not None and "b is 90.0%" in request.reason


def test_layer_by_layer() -> None:
    """From 2 and 4 to 16 and 16 by at most 4: two rounds, sizes along a geometric line, units in whole steps."""
    schedule = fxgrow.LayerByLayer({"a": 16, "b": 16}, steps=10, factor=4)
    sizes = {"a": (2, 1), "b": (4, 3), "c": (5, 1)}
    memory: dict[str, Any] = {}
    done = []
    for step in range(1, 101):
        request = schedule.ask(seen(steps=step, sizes=lambda: sizes), memory)
        if request is not None:
            assert request.neurons is not None
            ((name, units),) = request.neurons.items()
            sizes[name] = sizes[name][0] + units, sizes[name][1]
            done.append((step, name, units))
        memory = json.loads(json.dumps(memory))
    # sqrt(2 * 16) = 5.66, 2 -> 6 -> 16; sqrt(4 * 16) = 8, 4 -> 8 by steps of 3 -> 10, -> 16
    assert done == [(10, "a", 4), (20, "b", 6), (30, "a", 10), (40, "b", 6)]
    assert memory["done"]
    assert schedule.next_step(seen(steps=41), memory) is None
    with pytest.raises(ScheduleError, match="target for 'a', which is no free width of this model; those are: z"):
        schedule.ask(seen(steps=10, sizes=lambda: {"z": (1, 1)}), {})


def test_limits() -> None:
    every = fxgrow.Every(steps=4)
    assert growths(every.until(steps=8), 20, 100) == [(4, 0), (8, 0)]
    assert growths(fxgrow.Every(epochs=1).until(epochs=2), 20, 5) == [(5, 1), (10, 1)]
    for limits, more in (({"growths": 3}, {"growths": 3}), ({"declines": 2}, {"declines": 2})):
        assert growths(every.until(**limits), 20, 100, **more) == []
        assert growths(every.until(**limits), 5, 100, **{k: v - 1 for k, v in more.items()}) == [(4, 0)]


def test_a_total_leaves_what_is_left() -> None:
    schedule = fxgrow.Every(steps=1).until(total="+50%")
    at = seen(steps=1, spent=lambda kind: (30.0, 100.0))
    assert schedule.ask(at, {}) == Request("step 1", None, 20.0, "parameters")
    memory: dict[str, Any] = {}
    assert schedule.ask(seen(steps=2, spent=lambda kind: (50.0, 100.0)), memory) is None
    assert schedule.next_step(seen(steps=2), memory) is None  # for good
    tighter = schedule.until(total=5, growths=9)
    assert tighter.ask(seen(steps=1), {}) == Request("step 1", None, 5.0, "parameters")
    with pytest.raises(ScheduleError, match="Two totals, in parameters and in latency"):
        schedule.until(total=1.0, cost="latency").ask(seen(steps=1), {})


ALL = [
    fxgrow.Every(steps=3),
    fxgrow.Every(epochs=2),
    fxgrow.OnPlateau(patience=3, min_delta=1e-3, every=50, largest=True),
    fxgrow.OnBottleneck(share=0.5, every=100, samples=None),
    fxgrow.OnBottleneck(epochs=3),
    fxgrow.LayerByLayer({"layer1.0.conv1": 16, "kind": 8}, epochs=1, factor=2.0),
    fxgrow.Every(steps=3) | fxgrow.OnPlateau(),
    (fxgrow.Every(steps=3) | fxgrow.Every(epochs=1)).until(total="+100%", cost="latency", declines=2),
]


@pytest.mark.parametrize("schedule", ALL, ids=lambda s: type(s).__name__)
def test_json_both_ways(schedule: fxgrow.Schedule) -> None:
    assert fxgrow.Schedule.from_json(schedule.to_json()) == schedule


@pytest.mark.parametrize("text", ["", "[1]", '{"steps": 3}', '{"kind": "Never"}', '{"kind": "Every", "x": 1}'])
def test_json_that_is_no_schedule(text: str) -> None:
    with pytest.raises(ScheduleError):
        fxgrow.Schedule.from_json(text)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: fxgrow.Every(), "Every takes steps or epochs: give one"),
        (lambda: fxgrow.Every(steps=1, epochs=1), "give one"),
        (lambda: fxgrow.Every(steps=0), "positive whole number"),
        (lambda: fxgrow.Every(epochs=1.5), "positive whole number"),  # type: ignore[arg-type]
        (lambda: fxgrow.OnPlateau(patience=0), "patience=0"),
        (lambda: fxgrow.OnBottleneck(share=1.5, every=1), "between 0 and 1"),
        (lambda: fxgrow.OnBottleneck(share=0.5), "every or epochs"),
        (lambda: fxgrow.LayerByLayer({}, steps=1), "a size for each width"),
        (lambda: fxgrow.LayerByLayer({"a": 4}, steps=1, factor=1), "a factor above 1"),
        (lambda: fxgrow.Every(steps=1).until(), "no limit"),
        (lambda: fxgrow.Every(steps=1).until(growths=0), "growths=0"),
        (lambda: fxgrow.Every(steps=1).until(total="much"), "total='much'"),
        (lambda: fxgrow.Every(steps=1).until(total=-5), "positive number"),
        (lambda: fxgrow.Every(steps=1).until(total=5, cost="bytes"), "cost='bytes'"),
        (lambda: fxgrow.Either(()), "one schedule or more"),
        (lambda: fxgrow.Until("often", growths=1), "give a schedule"),  # type: ignore[arg-type]
    ],
)
def test_bad_numbers(make: Any, message: str) -> None:
    with pytest.raises(ScheduleError, match=message):
        make()
