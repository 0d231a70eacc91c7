"""The benchmark of harmlessness sees harm where there is some, and lets two arms differ by growth alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import fxgrow
from benchmarks.harmless import loop
from benchmarks.harmless.loop import Setting, compare
from benchmarks.harmless.nets import NETS, SMALL
from benchmarks.harmless.tables import harms, summary, tables

#: too few samples for any unit
SETTING = Setting("sgd", "cold", 32, after=6)


def record_of(make: Any, setting: Setting) -> dict[str, Any]:
    record: dict[str, Any] = {"family": "small", "name": f"net {setting}", "wall": 1.0}
    for findings in compare(make, setting):
        record |= findings
    return record


def grown_by(change: Any) -> Any:
    """A stand-in for `fxgrow.grow` that declines, and changes the copy."""

    def grow(model: nn.Module, batches: Any, *, optimizer: Any, **options: Any) -> nn.Module:
        grown = real(model, batches, optimizer=optimizer, **options)
        with torch.no_grad():
            change(grown)
        return grown

    real = fxgrow.grow
    return grow


def scaled(factor: float) -> Any:
    return grown_by(lambda grown: [p.mul_(factor) for p in list(grown.parameters())[:2]])


def slow(*values: Any) -> Any:
    return pytest.param(*values, marks=pytest.mark.slow)


def test_an_arm_that_declined_is_the_other_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop.fxgrow, "grow", scaled(1.0))
    record = record_of(SMALL["dropout"], SETTING)
    assert record["declined"] and record["grown"] == record["ungrown"]
    assert record["grown_final"] == record["ungrown_final"] and record["losses"] == record["losses_grown"]
    assert not harms(record) and "declined" in summary(record)


@pytest.mark.parametrize("factor, harm", [(30.0, "times its largest"), (float("nan"), "not finite")])
def test_harm_is_seen(monkeypatch: pytest.MonkeyPatch, factor: float, harm: str) -> None:
    monkeypatch.setattr(loop.fxgrow, "grow", scaled(factor))
    record = record_of(SMALL["mlp"], SETTING)
    assert any(harm in found for found in harms(record))
    assert harm in summary(record) and harm in tables([record])


def test_a_worse_batch_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop.fxgrow, "grow", grown_by(lambda grown: list(grown.parameters())[-1][0].add_(9.0)))
    assert any("worst batch" in found for found in harms(record_of(SMALL["mlp"], SETTING)))


def test_rates_are_lowered_until_training_is_stable() -> None:
    def steep(samples: int, seed: int) -> Any:
        trial = SMALL["mlp"](samples, seed)
        trial.rate = 100.0
        return trial

    assert record_of(steep, SETTING)["rate"] < 100.0


@pytest.mark.parametrize("family, name", [("gan", "gan"), ("vae", "vae"), slow("hf", "bert")])
def test_other_steps_run(family: str, name: str) -> None:
    if family == "hf":
        pytest.importorskip("transformers")
    record = record_of(NETS[family][name], Setting("adamw", "cold", 32, after=2))
    assert len(record["grown"]) == len(record["ungrown"]) == 2


@pytest.mark.parametrize(
    "family, name, setting",
    [
        ("small", "dropout", Setting("sgd", "cold", 256, after=16)),
        ("small", "no_norm", Setting("sgd", "cold", 256, after=16)),
        ("gan", "gan_no_norm", Setting("sgd", "cold", 2000, after=16)),
        slow("small", "batchnorm", Setting("adamw", "cold", 256, after=16)),
        slow("small", "groupnorm", Setting("sgd", "warm", 256, after=16)),
        slow("hf", "llama", Setting("adamw", "cold", 256)),
        slow("torchvision", "shufflenet_v2_x0_5", Setting("adamw", "cold", 64)),
        slow("torchvision", "mobilenet_v3_small", Setting("sgd", "warm", 256)),
        slow("timm", "test_resnet", Setting("sgd", "cold", 512)),
    ],
    ids=str,
)
def test_growth_does_not_harm(family: str, name: str, setting: Setting) -> None:
    """Arms that grew beyond the bounds, or trained worse, when nothing bounded what is written."""
    record = record_of(NETS[family][name], setting)
    assert not harms(record)
    # a stock network may decline
    assert record["units"] or family in ("torchvision", "timm")
