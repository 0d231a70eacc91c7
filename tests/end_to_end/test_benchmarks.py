"""What the benchmarks of growth rest on: targets that are reached, times and areas that are what they say."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch import nn

import fxgrow
from benchmarks._paper_run import Protocol, Trial, build, events, shifted
from benchmarks.equal_cost import fresh, over_time
from benchmarks.paper import CONFIGS, protocol_of
from examples.data import Split
from models import MLP

CPU = torch.device("cpu")


@pytest.mark.parametrize("start", [1 / 4, 1 / 64])
def test_growths_end_at_the_target(start: float) -> None:
    protocol = CONFIGS["reduced"]
    net, x = build(protocol, start, 0, CPU), torch.zeros(2, 3, 16, 16)
    added: Counter[str] = Counter()
    for width, units in events(protocol, start, net, x):
        added[width] += units
    grown = fxgrow.widen(net, (x,), added)
    target = build(protocol, 1.0, 0, CPU)
    assert {n: p.shape for n, p in grown.named_parameters()} == {n: p.shape for n, p in target.named_parameters()}


@pytest.mark.parametrize("method", Protocol().methods)
def test_a_growth_by_any_method_is_counted(method: str) -> None:
    protocol = Protocol(batch=16, samples=32)
    x, y = torch.randn(64, 3, 8, 8), torch.randint(10, (64,))
    trial = Trial(protocol, Split(x, y, x, y), build(protocol, 1 / 4, 0, CPU), 0)
    trial.net = fxgrow.capture(trial.net, (x[:2],))
    trial.grow("layer4.1.conv1", 3, method)
    assert trial.growths == 1 and trial.growing == trial.seconds > 0
    assert trial.multiply_adds > 2 * trial.per_step / 3


def test_the_full_config_is_the_whole_network() -> None:
    assert CONFIGS["full"].sizes(1.0) == (64, 128, 256, 512)
    assert CONFIGS["full"].sizes(1 / 64) == (1, 2, 4, 8)


def test_a_config_from_a_file(tmp_path: Path) -> None:
    (tmp_path / "own.json").write_text(json.dumps({"starts": [0.5], "images": 100}))
    assert protocol_of(str(tmp_path / "own.json")) == Protocol(starts=(0.5,), images=100)


def test_shifted_images_are_parts_of_the_mirrored_or_plain_one() -> None:
    x = torch.arange(1.0, 3 * 36 + 1).view(1, 3, 6, 6).repeat(20, 1, 1, 1)
    out = shifted(x, torch.Generator().manual_seed(0))
    assert out.shape == x.shape and len({tuple(image.flatten().tolist()) for image in out}) > 10
    for image in out:
        rows, columns = (int(i) for i in image[0].nonzero()[0])
        part = image[:, rows:, columns:]
        part = part[:, : int((part[0, :, 0] > 0).sum()), : int((part[0, 0] > 0).sum())]
        h, w = part.shape[1:]
        places = [(i, j) for i in range(7 - h) for j in range(7 - w)]
        plain = [y[:, i : i + h, j : j + w] for y in (x[0], x[0].flip(2)) for i, j in places]
        assert any(torch.equal(part, p) for p in plain)


def test_area_under_a_curve() -> None:
    assert over_time([(0.0, 0, 0.0, 10.0), (1.0, 5, 0.0, 30.0), (4.0, 9, 0.0, 30.0)]) == pytest.approx(27.5)


def test_fresh_weights_keep_the_sizes_and_follow_the_seed() -> None:
    def wide(seed: int) -> nn.Module:
        return fresh(fxgrow.widen(MLP((6, 4, 3)), (torch.zeros(2, 6),), {"layers.0": 8}), seed)

    one, same, other = wide(0).state_dict(), wide(0).state_dict(), wide(1).state_dict()
    assert one["layers.1.weight"].shape == (3, 12)
    assert all(torch.equal(one[n], same[n]) and not torch.equal(one[n], other[n]) for n in one)
    assert bool(one["layers.1.weight"].all())
