"""Processes with different settings get an error at once, all of them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F

from fxgrow.data.settings import description

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch was built without torch.distributed")
ROOT = Path(__file__).parents[2]
SECONDS = 10
#: what the message says on every process, by what the last one does differently
DIFFERENT = {
    "activation module": "the model is 1: ReLU {'inplace': False} and 1: GELU {'approximate': 'none'}",
    "activation option": "'negative_slope': 0.1",
    "activation function": "the model's graph is call_function relu [] and call_function tanh []",
    "budget": "budget is '+25%' and '+50%'",
    "invalid budget": "'much'",
    "neurons": "neurons is 1 and 2",
    "update_existing": "update_existing is False and True",
    "loss": "loss_fn is torch.nn.functional.mse_loss",
    "loss closure": "(1.0)",
    "loss lambda": "loss_fn is",
    "loss object": "Scaled object>{'scale': 1.0}",
    "loss method": "Scaled object>{'scale': 1.0}",
    "loss module": "uberLoss {'reduction': 'mean', 'delta': 2.0}",
    "seed": "seed is 0 and 1",
    "method": "method is 'default' and 'tiny'",
    "unknown option": "'buget'",
    "optimizer": "'adam'",
    "loader": "OSError: disk on fire",
    "profile's seed": "seed is 0 and 1",
    "kind of optimizer": "optimizer is",
    "no optimizer": "optimizer is SGD",
    "whole number in a loss": "different losses of one batch",
    "whole number in a model": "different losses of one batch",
    "schedule": "schedule is Every(steps=4, epochs=None) and Every(steps=5, epochs=None)",
    "kind of schedule": "OnPlateau",
    "Grower's budget": "neurons is 1 and 2",
    "Grower's loader": "OSError: disk on fire",
    "grow_now": "neurons is 1 and 2",
    "state": "steps is 3 and 4",
}


@pytest.fixture(scope="module", params=[2, pytest.param(3, marks=pytest.mark.slow)])
def results(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> list[dict[str, tuple[str, float]]]:
    folder, size = tmp_path_factory.mktemp("differing"), request.param
    command = [sys.executable, "-m", "tests.distributed.differing", str(folder), str(size)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    running = [
        subprocess.Popen(command, env=environment | {"RANK": str(r)}, cwd=ROOT, stderr=subprocess.PIPE, text=True)
        for r in range(size)
    ]
    try:
        for process in running:
            _, errors = process.communicate(timeout=300)
            assert process.returncode == 0, errors[-4000:]
    finally:
        for process in running:
            process.kill()
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(size)]


@pytest.mark.parametrize("name", DIFFERENT)
def test_every_process_raises_within_seconds(name: str, results: list[dict[str, tuple[str, float]]]) -> None:
    for found, seconds in (r[name] for r in results):
        kind, _, message = found.partition(": ")
        assert kind.endswith("Error") and kind not in ("TypeError", "OSError", "RuntimeError")
        assert DIFFERENT[name] in message
        assert seconds < SECONDS


def test_an_error_of_the_loader_names_its_process(results: list[dict[str, tuple[str, float]]]) -> None:
    assert all(f"Process {len(results) - 1} of {len(results)} failed" in r["loader"][0] for r in results)


def test_a_failed_growth_keeps_the_readings_of_the_schedule(results: list[dict[str, tuple[str, float]]]) -> None:
    assert [r["kept readings"][0] for r in results] == ["False True True"] * len(results)


def test_settings_are_the_same_where_they_do_the_same() -> None:
    def loss(weight: float) -> object:
        return lambda output, target: weight * F.mse_loss(output, target)

    class Net(nn.Module):
        def __init__(self, rank: int) -> None:
            super().__init__()
            self.layer, self.rank, self.device = nn.Linear(2, 2), rank, f"cuda:{rank}"

    same = [(loss(1.0), loss(1.0)), (Net(0), Net(1)), (nn.MSELoss(), nn.MSELoss().eval()), (object(), object())]
    assert all(description(a) == description(b) for a, b in same)
    different = [(loss(1.0), loss(2.0)), (F.relu, F.gelu), (nn.Softmax(0), nn.Softmax(1)), ("1", 1)]
    assert all(description(a) != description(b) for a, b in different)
