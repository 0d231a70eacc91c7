"""What can grow in a model before any data is read: counts, places and reasons."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

import fxgrow
from fxgrow.pipeline.explain import explain
from fxgrow.report.table import WIDTH
from models import DigitsResNet


def test_explain_counts_what_can_grow() -> None:
    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 5), nn.Softmax(1), nn.Linear(5, 2))
    e = explain(net, (torch.zeros(1, 4),))
    assert [w.name for w in e.widths if w.pinned is None] == ["0"]
    # 8x4 + 8 of the producer, 5x8 of the consumer; its bias and the last layer stay as they are
    assert (e.parameters, e.reachable) == (8 * 5 + 5 * 9 + 2 * 6, 8 * 5 + 5 * 8)
    assert "1 of 3 widths can grow; 82.5% of 97 parameters" in str(e)
    assert repr(e) == str(e)


class Ranked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(self.a(x).softmax(1))


def test_explain_names_the_line_that_pins() -> None:
    e = explain(Ranked(), (torch.zeros(1, 4),))
    file, line = e.places["a"].split(":")
    assert "softmax(1)" in Path(__file__).with_name(Path(file).name).read_text().splitlines()[int(line) - 1]
    text = str(e)
    assert f"at node softmax ({file}:{line})" in " ".join(text.split())
    assert max(map(len, text.splitlines())) <= WIDTH


def test_explain_takes_a_captured_graph() -> None:
    net = DigitsResNet(0.25)
    x = torch.zeros(2, 1, 8, 8)
    assert explain(fxgrow.capture(net, (x,))).widths == explain(net, (x,)).widths
