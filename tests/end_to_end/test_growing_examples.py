"""The examples of growing transformers, and the soak, on next to nothing."""

from __future__ import annotations

import pytest
import torch

import fxgrow
from benchmarks import soak
from examples import grow_gpt, grow_vit
from examples.data import VARIABLE, text
from examples.growing import Pace, compare, train


@pytest.fixture(autouse=True)
def _without_data(monkeypatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)


def check(task, units) -> None:
    pace = Pace(steps=5, every=2, growths=2, units=units, batches=4, rate=2e-3)
    grown, alone = compare(task, pace, show=False)
    assert len(fxgrow.Recipe.of(grown.net).steps) == 2 and not fxgrow.Recipe.of(alone.net).steps
    # stream, heads and perceptrons have all grown by what was asked for, twice
    before = {name: p.shape for name, p in alone.net.named_parameters()}
    after = {name: p.shape for name, p in grown.net.named_parameters()}
    for name, k in units.items():
        name = f"{name}.weight"
        dim = 1 if name == "tokens.weight" else 0  # an embedding writes its columns
        assert after[name][dim] == before[name][dim] + 2 * k
    # the table: a line each step, sizes counted anew, the same first line with and without growth
    assert [line[0] for line in grown.lines] == [1, 2, 3, 4, 5]
    assert grown.lines[0] == alone.lines[0] and grown.lines[1][3].count("+") == len(units)
    assert grown.lines[-1][1] == sum(p.numel() for p in grown.net.parameters())
    assert all(torch.isfinite(torch.tensor(line[2])) for line in grown.lines + alone.lines)
    assert 0 < grown.growing < grown.seconds and alone.growing == 0


def test_gpt() -> None:
    task = grow_gpt.task(context=8, batch=8, depth=1)
    check(task._replace(held=task.held[:1]), grow_gpt.units(depth=1))


def test_vit() -> None:
    task = grow_vit.task(batch=8, depth=1)
    check(task._replace(held=task.held[:1]), grow_vit.units(depth=1))


def test_a_run_repeats() -> None:
    task = grow_gpt.task(context=8, batch=8, depth=1)
    pace = Pace(steps=2, every=4, growths=1, units={}, batches=1, rate=2e-3)
    few = task._replace(held=task.held[:1])
    assert train(few, pace, grow=False, show=False).lines == train(few, pace, grow=False, show=False).lines


def test_text_without_data() -> None:
    train, held, alphabet = text()
    assert len(train) + len(held) > 100_000 and max(ord(c) for c in alphabet) < 128
    assert "".join(alphabet[i] for i in train[:200].tolist()).isprintable() or "\n" in alphabet


@pytest.mark.slow
def test_nothing_piles_up() -> None:
    soak.soak(0, show=False)  # what is made once and kept
    memory, counts = soak.soak(0, show=False)
    assert counts[0] == counts[1]
    assert memory[1] < soak.ALLOWED * memory[0]
