"""A Grower in plain training loops: when it grows, what it leaves alone, what it reports."""

from __future__ import annotations

import copy
import gc
import logging
import random
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import fxgrow
from examples.data import digits
from fxgrow.errors import FxgrowError, PlanError, ProfileError, ScheduleError
from models.mlp import MLP

Batches = list[tuple[Tensor, Tensor]]


def some(count: int = 4, size: int = 32) -> Batches:
    data = digits()
    return [(data.x_train[i * size :][:size], data.y_train[i * size :][:size]) for i in range(count)]


def small() -> MLP:
    return MLP((64, 5, 5, 10))


def made(model: nn.Module, schedule: fxgrow.Schedule, **options: Any) -> fxgrow.Grower:
    optimizer = options.pop("optimizer", None) or torch.optim.Adam(model.parameters(), lr=3e-3)
    usual: dict[str, Any] = {"dataloader": some(), "neurons": 1, "method": "random"}
    if "budget" in options:
        del usual["neurons"]
    return fxgrow.Grower(model, optimizer, schedule, **{**usual, **options})


def train(grower: fxgrow.Grower, steps: int, batches: Batches | None = None) -> list[float]:
    batches = batches or some()
    losses = []
    for step in range(steps):
        x, y = batches[step % len(batches)]
        grower.optimizer.zero_grad()  # type: ignore[union-attr]
        loss = F.cross_entropy(grower.model(x), y)
        loss.backward()
        grower.optimizer.step()  # type: ignore[union-attr, call-arg]
        losses.append(loss.item())
        grower.step(loss)
    return losses


def sizes(model: nn.Module) -> list[int]:
    return [p.shape[0] for name, p in model.named_parameters() if name.endswith("bias")]


def test_it_grows_when_the_schedule_says_so() -> None:
    grower = made(small(), fxgrow.Every(steps=5).until(growths=3))
    seen = []
    for _ in range(30):
        before = grower.model
        train(grower, 1)
        if grower.model is not before:
            seen.append(grower.steps)
    assert seen == [5, 10, 15]
    assert sizes(grower.model) == [8, 8, 10]
    assert [e.step for e in grower.history] == seen
    assert all(torch.isfinite(p).all() for p in grower.parameters())


def test_training_goes_on_where_it_was() -> None:
    """Units that change nothing: with growth the loss of the next step is what it is without."""
    torch.manual_seed(1)
    plain = small()
    grower = made(copy.deepcopy(plain), fxgrow.Every(steps=3), method="net2wider", seed=3)
    quiet = made(plain, fxgrow.Every(steps=1000))
    ours, theirs = train(grower, 4), train(quiet, 4)
    assert len(grower.history) == 1 and not quiet.history
    assert ours == pytest.approx(theirs, rel=1e-5)


def test_digits_are_learnt_better_with_growth() -> None:
    data = digits()
    loader = DataLoader(TensorDataset(data.x_train, data.y_train), batch_size=128, shuffle=True)
    accuracy = []
    for schedule in (fxgrow.Every(epochs=2).until(growths=3), fxgrow.Every(epochs=99)):
        torch.manual_seed(2)
        model = MLP((64, 3, 10))
        grower = made(model, schedule, dataloader=loader, budget="+100%", method="default", samples=768)
        for _ in range(10):
            for x, y in loader:
                grower.optimizer.zero_grad()  # type: ignore[union-attr]
                F.cross_entropy(grower.model(x), y).backward()
                grower.optimizer.step()  # type: ignore[union-attr, call-arg]
                grower.step()
            grower.epoch_end()
        with torch.no_grad():
            accuracy.append(float((grower.model(data.x_test).argmax(1) == data.y_test).float().mean()))
    assert accuracy[0] > accuracy[1] + 0.05


def test_on_a_plateau_and_on_a_bottleneck() -> None:
    grower = made(small(), fxgrow.OnPlateau(patience=2, min_delta=100.0, every=3).until(growths=1))
    train(grower, 12)
    # the first mean is the best so far, two more are no better by a hundred
    assert [e.step for e in grower.history] == [9]
    grower = made(small(), fxgrow.OnPlateau(patience=1, min_delta=100.0))
    train(grower, 1)
    for value in (1.0, 1.0):
        grower.observe(value)
        train(grower, 1)
    assert [e.step for e in grower.history] == [3]
    assert not grower.epoch_end(-200.0) and grower.epoch_end(torch.tensor(-200.0))
    for share, growths in ((0.0, 1), (0.9999, 0)):
        grower = made(small(), fxgrow.OnBottleneck(share=share, every=2, samples=64))
        train(grower, 3)
        assert len(grower.history) == growths


def test_a_bottleneck_is_that_of_a_profile() -> None:
    model, batches = small(), some()
    found = fxgrow.profile(model, batches, progress=False)
    largest = max(b.share for b in found.values())
    for offset, growths in ((-0.001, 1), (0.001, 0)):
        grower = made(copy.deepcopy(model), fxgrow.OnBottleneck(share=largest + offset, every=1, samples=None))
        grower.step()
        assert len(grower.history) == growths


def test_layer_by_layer_reaches_its_target() -> None:
    target = {"layers.0": 9, "layers.1": 20}
    grower = made(small(), fxgrow.LayerByLayer(target, steps=2, factor=2))
    train(grower, 20)
    assert sizes(grower.model) == [9, 20, 10]
    # 20 is four times 5: two rounds, in each the first width before the second
    assert [dict(e.units) for e in grower.history] == [
        {"layers.0": 2}, {"layers.1": 5}, {"layers.0": 2}, {"layers.1": 10}
    ]  # fmt: skip


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("options", [{"budget": "+40%"}, {"budget": 100}, {"neurons": 1}])
def test_a_total_of_parameters_is_kept_to(options: dict[str, Any]) -> None:
    model = small()
    start = parameters(model)
    grower = made(model, fxgrow.Every(steps=1).until(total="+80%"), **options)
    train(grower, 9)
    added = parameters(grower.model) - start
    assert 0.6 * start < added <= 0.8 * start
    size = parameters(grower.model)
    train(grower, 3)
    assert parameters(grower.model) == size


def test_a_total_of_multiply_adds_and_of_latency() -> None:
    """In an MLP, one multiply-add of a sample for each weight."""
    model = small()
    start = sum(p.numel() for p in model.parameters() if p.dim() == 2)
    grower = made(model, fxgrow.Every(steps=1).until(total=300, cost="multiply-adds"), budget="+30%")
    train(grower, 6)
    assert 200 < sum(p.numel() for p in grower.parameters() if p.dim() == 2) - start <= 300
    grower = made(small(), fxgrow.Every(steps=1).until(total="+1%", cost="latency", growths=2), budget="+1%")
    train(grower, 2)
    with pytest.raises(ScheduleError, match="budget=100 is a number of parameters, the schedule's total one of mult"):
        made(small(), fxgrow.Every(steps=1).until(total=300, cost="multiply-adds"), budget=100).step()


def test_declines_end_it() -> None:
    """Constant inputs and targets that the net has: nothing is worth adding."""
    torch.manual_seed(0)
    model = MLP((4, 3, 2))
    x = torch.randn(64, 4)
    batches = [(part, model(part).detach()) for part in x.split(16)]
    grower = made(model, fxgrow.Every(steps=2).until(declines=2), dataloader=batches, budget="+50%", method="default")
    for _ in range(10):
        assert not grower.step()
    assert [e.step for e in grower.history] == [2, 4]
    assert all(e.declined for e in grower.history)
    assert grower.model is model and (grower.history.growths, grower.history.declines) == (0, 2)


def test_random_numbers_order_and_buffers_stay() -> None:
    """Growth in the middle of an epoch of a shuffling loader changes nothing that the loop draws or reads."""
    data = TensorDataset(torch.arange(40.0)[:, None].repeat(1, 64), torch.zeros(40, dtype=torch.long))

    def run(growing: bool) -> tuple[list[float], list[Any], Tensor]:
        torch.manual_seed(0)
        random.seed(0)
        np.random.seed(0)
        model = nn.Sequential(nn.Linear(64, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Dropout(0.1), nn.Linear(4, 10))
        norm = model[1]
        loader = DataLoader(data, batch_size=8, shuffle=True)
        grower = made(model, fxgrow.Every(steps=3), dataloader=loader)
        order, draws = [], []
        for x, _ in loader:
            order += x[:, 0].tolist()
            if growing:
                grower.step()
            draws += [float(torch.rand(1)), random.random(), np.random.rand()]
        assert len(grower.history) == growing
        return order, draws, norm.running_mean.clone()  # type: ignore[operator]

    quiet, loud = run(False), run(True)
    assert quiet[0] == loud[0] and quiet[1] == loud[1]
    assert torch.equal(quiet[2], loud[2])


def test_persistent_workers_are_not_wound_back() -> None:
    data = TensorDataset(torch.rand(48, 64), torch.arange(48) % 10)
    loader = DataLoader(data, batch_size=8, num_workers=1, persistent_workers=True)
    grower = made(small(), fxgrow.Every(steps=2), dataloader=loader)
    seen: list[int] = []
    for _, y in loader:
        seen += y.tolist()
        grower.step()
    assert seen == [i % 10 for i in range(48)]
    assert len(grower.history) == 3


def test_modes_stay() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 10))
    model[2].eval()
    grower = made(model, fxgrow.Every(steps=1))
    grower.step()
    assert grower.model is not model
    assert grower.model.training and not grower.model.get_submodule("2").training


def state_of(grower: fxgrow.Grower, model: nn.Module) -> list[Any]:
    optimizer = grower.optimizer
    assert isinstance(optimizer, torch.optim.Optimizer)
    return copy.deepcopy([
        model.state_dict(), [p.grad for p in model.parameters()], optimizer.state_dict(), torch.get_rng_state(),
        None if grower.ema is None else grower.ema.state_dict(), [m.training for m in model.modules()],
    ])  # fmt: skip


def test_a_loss_that_is_not_a_number_changes_nothing() -> None:
    model = small()
    ema = torch.optim.swa_utils.AveragedModel(model)
    optimizer = torch.optim.Adam(model.parameters())
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2)
    batches = some()
    bad = [*batches[:2], (batches[2][0] * float("nan"), batches[2][1]), batches[3]]
    grower = made(model, fxgrow.Every(steps=4), dataloader=bad, optimizer=optimizer, ema=ema, lr_scheduler=scheduler)
    train(grower, 3)
    scheduler.step()
    before, rate = state_of(grower, model), scheduler.state_dict()
    with pytest.raises(ProfileError, match="nan"):
        grower.step()
    torch.testing.assert_close(state_of(grower, model), before, rtol=0, atol=0)
    assert scheduler.state_dict() == rate
    assert grower.model is model and grower.ema is ema and not grower.history
    assert [id(p) for p in optimizer.param_groups[0]["params"]] == [id(p) for p in model.parameters()]
    train(grower, 3)  # and goes on


def test_errors_can_be_skipped(caplog: pytest.LogCaptureFixture) -> None:
    bad = [(x * float("nan"), y) for x, y in some()]
    grower = made(small(), fxgrow.Every(steps=2), dataloader=bad, on_error="skip")
    with caplog.at_level(logging.WARNING, "fxgrow"):
        train(grower, 5)
    assert [r.levelname for r in caplog.records] == ["WARNING"] * 2
    assert "growth at step 2 failed, training goes on: The loss of batch 0 is nan" in caplog.text
    assert not grower.history


def test_a_turn_that_failed_is_taken_again() -> None:
    batches = some()
    now = {"batches": [(x * float("nan"), y) for x, y in batches]}
    schedule = fxgrow.LayerByLayer({"layers.0": 8, "layers.1": 7}, steps=1)
    grower = made(small(), schedule, dataloader=lambda: now["batches"])
    with pytest.raises(ProfileError):
        grower.step()
    now["batches"] = batches
    assert grower.step() and grower.step() and not grower.step()
    assert sizes(grower.model) == [8, 7, 10]


@pytest.mark.parametrize("into", ["graph", "module"])
@pytest.mark.parametrize("compiled", [False, True])
def test_only_one_model_is_alive(into: Any, compiled: bool) -> None:
    torch._dynamo.reset()
    alive: list[Any] = []
    model: Any = small()
    alive += [weakref.ref(model), weakref.ref(model.layers[0].weight)]
    optimizer = torch.optim.Adam(model.parameters())
    average = torch.optim.swa_utils.AveragedModel(model)
    if compiled:
        model = torch.compile(model, backend="eager")
    grower = made(model, fxgrow.Every(steps=2), optimizer=optimizer, into=into, ema=average)
    del model
    for _ in range(3):
        before = grower.model
        while grower.model is before:
            train(grower, 1)
        del before
        inside = getattr(grower.model, "_orig_mod", grower.model)
        alive += [weakref.ref(inside), weakref.ref(inside.get_parameter("layers.0.weight"))]
        del inside
    train(grower, 1)
    gc.collect()
    assert [ref() is not None for ref in alive] == [False] * 6 + [True] * 2


def test_callbacks_get_both_models_and_the_map() -> None:
    grower = made(small(), fxgrow.Every(steps=2))
    called: list[tuple[nn.Module, nn.Module, Any]] = []
    grower.on_growth(lambda old, new, index: called.append((old, new, index)))
    first = grower.model
    train(grower, 2)
    ((old, new, index),) = called
    assert old is first and new is grower.model
    for name, p in old.named_parameters():
        moved = dict(new.named_parameters())[name]
        for dim, at in enumerate(index.get(name, ())):
            moved = moved if at is None else moved.index_select(dim, at)
        assert moved.shape == p.shape
        assert torch.equal(moved, p)  # random units leave old weights alone


def test_growing_at_once() -> None:
    grower = made(small(), fxgrow.Every(steps=100))
    assert grower.grow_now()
    assert grower.grow_now({"layers.1": 4}, reason="by hand")
    assert sizes(grower.model) == [6, 10, 10]
    assert [e.reason for e in grower.history] == ["asked for", "by hand"]
    with pytest.raises(PlanError, match="no width named 'nowhere'"):
        grower.grow_now({"nowhere": 4})


def test_state_goes_on_where_it_was() -> None:
    """Interrupted and resumed at each step, the run is the same."""
    schedule = (fxgrow.OnPlateau(patience=2, min_delta=9.0, every=2) | fxgrow.Every(epochs=2)).until(growths=3)

    def run(interrupted: bool) -> tuple[list[Any], list[Tensor]]:
        torch.manual_seed(0)
        grower = made(small(), schedule)
        for step in range(16):
            if interrupted:
                state = copy.deepcopy(grower.state_dict())
                again = made(grower.model, schedule, optimizer=grower.optimizer)
                again.load_state_dict(state)
                grower = again
            train(grower, 1)
            if step % 5 == 4:
                grower.epoch_end()
        return grower.history.to_list(), [p.detach() for p in grower.parameters()]

    (events, weights), (others, theirs) = run(False), run(True)
    assert len(events) == 3
    for a, b in zip(events, others, strict=True):
        assert {**a, "seconds": 0} == {**b, "seconds": 0}
    assert all(torch.equal(a, b) for a, b in zip(weights, theirs, strict=True))


def plain(value: Any) -> bool:
    if isinstance(value, dict):
        return all(isinstance(k, str) and plain(v) for k, v in value.items())
    if isinstance(value, (list, tuple)):
        return all(plain(v) for v in value)
    return value is None or type(value) in (int, float, str, bool)


def test_the_state_is_plain_and_checked(caplog: pytest.LogCaptureFixture) -> None:
    grower = made(small(), fxgrow.Every(steps=2))
    train(grower, 5)
    state = grower.state_dict()
    assert plain(state) and state["steps"] == 5 and len(state["history"]) == 2
    other = made(small(), fxgrow.Every(steps=3))
    for broken in ({}, {**state, "version": 9}, {**state, "history": [{"a": 1}]}, {**state, "schedule": "no"}):
        with pytest.raises(FxgrowError):
            other.load_state_dict(broken)
    assert other.steps == 0 and not other.history
    with caplog.at_level(logging.WARNING, "fxgrow"):
        other.load_state_dict(state)
    assert "Every(steps=3, epochs=None) starts afresh" in caplog.text
    assert other.steps == 5 and other.history.growths == 2


def test_the_history_prints_and_plots(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    pytest.importorskip("matplotlib")
    grower = made(small(), fxgrow.Every(steps=2))
    assert str(grower.history) == "no growth yet"
    with caplog.at_level(logging.INFO, "fxgrow"):
        train(grower, 4)
    lines = [r.getMessage() for r in caplog.records]
    assert len(lines) == 2 and all("\n" not in line for line in lines)
    assert "grew at step 2, epoch 0: step 2: layers.0 +1, layers.1 +1; 415 → " in lines[0]
    text = str(grower.history)
    assert max(map(len, text.splitlines())) <= 120
    assert "layers.0 +1, layers.1 +1" in text and "2 growths, 0 declined" in text
    before, after = grower.history[1].parameters
    assert (before, after) == (grower.history[0].parameters[1], parameters(grower.model))
    grower.history.plot(str(tmp_path / "history.png"))
    assert (tmp_path / "history.png").stat().st_size > 5000
    assert fxgrow.History.from_list(grower.history.to_list()).to_list() == grower.history.to_list()


def test_the_history_in_tensorboard(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    grower = made(small(), fxgrow.Every(steps=2))
    train(grower, 5)
    grower.history.to_tensorboard(tmp_path)
    found = EventAccumulator(str(tmp_path))
    found.Reload()
    assert [(s.step, s.value) for s in found.Scalars("fxgrow/parameters")] == [
        (e.step, e.parameters[1]) for e in grower.history
    ]
    assert "fxgrow/units/layers.0" in found.Tags()["scalars"]


def test_tensorboard_is_an_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(fxgrow.MissingExtraError, match=r"fxgrow\[tensorboard\]"):
        fxgrow.History().to_tensorboard("anywhere")


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"schedule": "often"}, ScheduleError, "schedule is a str"),
        ({"optimizer": "adam"}, FxgrowError, "optimizer is a str"),
        ({"optimizer": torch.optim.SGD(nn.Linear(1, 1).parameters())}, FxgrowError, "none of them of this MLP"),
        ({"dataloader": iter([])}, ProfileError, "can be read only once"),
        ({"dataloader": 3}, ProfileError, "cannot be iterated over"),
        ({"on_error": "ignore"}, FxgrowError, "choose 'raise' or 'skip'"),
        ({"into": "torch"}, PlanError, 'take "graph"'),
        ({"budget": "+5%"}, PlanError, "not both"),
        ({"ema": nn.Linear(1, 1)}, FxgrowError, "'layers.0.weight' is missing in it"),
        ({"ema": MLP((64, 6, 5, 10))}, FxgrowError, r"has the shape \[6, 64\] in it"),
        ({"parameters": [torch.zeros(2)]}, FxgrowError, "none of them a parameter"),
        ({"parameters": [(torch.zeros(2),)]}, FxgrowError, "takes lists"),
    ],
)
def test_bad_arguments(change: dict[str, Any], error: type[Exception], message: str) -> None:
    model = small()
    usual = {"optimizer": torch.optim.Adam(model.parameters()), "schedule": fxgrow.Every(steps=1)}
    options = {**usual, "dataloader": some(), "neurons": 1, **change}
    with pytest.raises(error, match=message):
        fxgrow.Grower(model, options.pop("optimizer"), options.pop("schedule"), **options)


def test_a_scheduler_of_another_optimizer() -> None:
    model = small()
    other = torch.optim.lr_scheduler.StepLR(torch.optim.SGD(model.parameters(), 0.1), 1)
    with pytest.raises(FxgrowError, match="StepLR scheduler sets the rates of another optimizer"):
        made(model, fxgrow.Every(steps=1), lr_scheduler=other)
