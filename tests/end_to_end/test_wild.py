"""The benchmark over foreign packages reports what is there: a network that passes, one that fails half-way."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.coverage.modes import SameNoise
from benchmarks.coverage.process import options_of, records_of
from benchmarks.coverage.tables import tables
from benchmarks.wild.__main__ import failure, summary, wild_columns
from benchmarks.wild.entries import Entry, call, drawn, entries, floats
from benchmarks.wild.measure import steps


class Refuses(nn.Module):
    """Every layer that could grow is looked at by forward."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(3, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x) if bool(x.sum() > 0) else self.a(-x)


class Noisy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.o = nn.Linear(6, 5), nn.Linear(5, 4), nn.Linear(4, 3)
        self.drop = nn.Dropout(0.3)

    def forward(self, x: Tensor) -> Tensor:
        x = x + 0.1 * torch.randn_like(x)
        return self.o(self.b(self.drop(self.a(x).relu())).relu())


class WritesInPlace(nn.Module):
    """In eval mode, autograd needs a value that forward overwrites; its table is read or computed."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.o = nn.Linear(6, 5), nn.Linear(5, 3)
        self.register_buffer("table", self.computed(6), persistent=False)

    def computed(self, size: int) -> Tensor:
        return (torch.arange(size).float() / 7.0).sin()

    def forward(self, x: Tensor) -> Tensor:
        table = self.table if x.shape[1] == 6 else self.computed(x.shape[1])
        x = self.a(x + table).exp()
        return self.o(x + 1 if self.training else x.add_(1))


ENTRIES = (Entry("torch", "noisy", Noisy, floats(6)), Entry("torch", "refuses", Refuses, floats(3)))


def test_two_networks(tmp_path: Path) -> None:
    parser = options_of(None, "wild.jsonl", time_limit=120, memory=8)
    options = parser.parse_args(["--resume", str(tmp_path / "wild.jsonl")])
    todo = [(e.package, e.name, partial(steps, e, vars(options))) for e in ENTRIES]
    good, bad = records_of(todo, options, summary)
    assert [json.loads(line)["name"] for line in options.resume.read_text().splitlines()] == ["noisy", "refuses"]
    assert records_of(todo, options, summary) == [good, bad]

    assert failure(good) is None and "2 free, 100% of parameters" in summary(good)
    assert all(good[key] for key in ("captured", "faithful", "widened", "into_module", "train_step", "grown", "saved"))
    assert len(good["differences"]) == 4 and max(good["differences"].values()) < 1e-12
    assert bad["builds"] and bad["captured"] is False and "grown" not in bad
    assert str(failure(bad)).startswith("capture: ")
    text = tables([good, bad], wild_columns())
    assert "| torch | 1/2 | 1/2 | 1/1 |" in text and "torch/refuses | not captured" in text


def test_what_a_network_cannot_do_itself_is_not_asked_of_it(tmp_path: Path) -> None:
    options = options_of(None, "wild.jsonl", time_limit=120, memory=8).parse_args(
        ["--resume", str(tmp_path / "x.jsonl")]
    )
    entry = Entry("torch", "in_place", WritesInPlace, floats(6))
    (record,) = records_of([(entry.package, entry.name, partial(steps, entry, vars(options)))], options, summary)
    assert failure(record) is None and record["faithful"] and record["widened"] and record["saved"]
    assert "grown" not in record and "inplace operation" in record["not_asked"]["grown"]
    text = tables([record], wild_columns())
    assert "torch/in_place | grown on batches: not asked | the network itself cannot: its own backward" in text


def test_every_entry_is_well_formed() -> None:
    found = list(entries())
    assert len({(e.package, e.name) for e in found}) == len(found)
    listed = (Path(__file__).parents[2] / "benchmarks/wild/packages.txt").read_text()
    packages = {line.partition("==")[0] for line in listed.splitlines() if line and not line.startswith("#")}
    assert {e.package for e in found} <= packages


def test_builders_are_nested() -> None:
    net = call("torch.nn:Sequential", call("torch.nn:Linear", 3, out_features=2))()
    assert isinstance(net[0], nn.Linear) and net[0].out_features == 2


def test_batches_differ_and_come_again() -> None:
    def batches() -> list[Tensor]:
        return [x for (x,) in drawn(floats(3), (4, 4, 2))]

    a, b, c = batches()
    assert a.shape == b.shape == (4, 3) and c.shape == (2, 3) and not torch.equal(a, b)
    assert all(torch.equal(x, y) for x, y in zip((a, b, c), batches(), strict=True))
    assert torch.equal(floats(3)(4, 0)[0], floats(3)(4, 0)[0]) and not torch.equal(floats(3)(4, 0)[0], a)


def test_noise_is_that_of_the_narrow_network() -> None:
    def drawn(size: int) -> list[Any]:
        with SameNoise():
            x = torch.ones(2, size)
            noise = torch.randn_like(x)
            return [noise, torch.rand(2, size), x.clone().normal_(3.0, 2.0), torch.bernoulli(0.4 * x)]

    for narrow, wide in zip(drawn(100), drawn(150), strict=True):
        assert torch.equal(narrow, wide[:, :100])
    noise, uniform, moved, coins = drawn(10000)
    assert abs(float(noise.mean())) < 0.05 and abs(float(noise.std()) - 1) < 0.05
    assert abs(float(uniform.mean()) - 0.5) < 0.02
    assert abs(float(moved.mean()) - 3) < 0.1 and abs(float(coins.mean()) - 0.4) < 0.03
    layer = nn.Dropout(0.5)
    with SameNoise():
        assert torch.equal(layer(noise), noise)
