"""The coverage benchmark reports what is there: an exact network, one that is not, one that is not captured."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import benchmarks.coverage.measure as measured
from benchmarks.coverage.measure import measure
from benchmarks.coverage.plain import CASES
from benchmarks.coverage.subjects import Subject
from benchmarks.coverage.tables import tables


def record(subject: Subject, name: str) -> dict[str, Any]:
    out: dict[str, Any] = {"family": "plain", "name": name}
    for findings in measure(subject, {}):
        out.update(findings)
    return out


def test_an_exact_network() -> None:
    found = record(CASES["resnet20"](), "resnet20")
    assert found["captured"] and found["widened"] and found["other_size"] and found["train_step"]
    assert len(found["differences"]) == 4 and max(found["differences"].values()) < 1e-12
    assert found["opaque"] == {} and found["free"] == 9
    assert found["open"] + sum(found["pinned_parameters"].values()) == found["parameters"]
    text = tables([found])
    assert "| plain | 1/1 | 1/1 | 1/1 |" in text and "1 of 1 networks captured; 1 of 1 exact" in text


def test_a_wrong_rewrite_is_seen_and_blamed(monkeypatch: pytest.MonkeyPatch) -> None:
    rewrite = measured.rewrite

    def wrong(gm: Any, units: dict[str, int], **options: Any) -> Any:
        grown, index = rewrite(gm, units, **options)
        if "layer1.0.conv1" in units:
            with torch.no_grad():
                grown.get_parameter("linear.bias").add_(1e-6)
        return grown, index

    monkeypatch.setattr(measured, "rewrite", wrong)
    found = record(CASES["resnet20"](), "resnet20")
    assert found["widened"] is False and list(found["blame"]) == ["layer1.0.conv1"]
    assert "plain/resnet20 | not exact" in tables([found])


def test_a_network_that_cannot_be_captured() -> None:
    class Broken(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(3, 4)

        def forward(self, x: Tensor) -> Tensor:
            raise ValueError("not today")

    found = record(Subject(Broken(), lambda batch, other: (torch.ones(batch, 3),)), "broken")
    assert found["captured"] is False and "not today" in found["capture_error"]
    assert "plain/broken | not captured | " in tables([found])
