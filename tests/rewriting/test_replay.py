"""Replaying a recipe gives the code, sizes and attributes that growth gave, whatever the fresh weights are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm, weight_norm

import fxgrow
from fxgrow.graph.graph import named_tensors
from tests.end_to_end.test_exact_widenings import FREE, Row, given, made, named

FAST = {"swiglu_packed_chunk", "qk_bias", "multihead_attention_embed_plus_head", "postnorm_layernorm_uniform_weight"}


def attributes(net: nn.Module) -> dict[tuple[str, str], Any]:
    """What describes the modules: numbers, names and tuples."""
    plain = (int, float, str, tuple)
    return {
        (path, name): value
        for path, module in net.named_modules()
        for name, value in vars(module).items()
        if isinstance(value, plain) and name != "training"
    }


def scrambled(model: nn.Module) -> nn.Module:
    """Another fresh model: other weights, none of which say what growth was allowed to do, and nothing trained."""
    with torch.no_grad():
        for p in model.parameters():
            p.normal_()
    return model.requires_grad_(False)


def assert_replays(grown: Any, fresh: nn.Module) -> None:
    net = fxgrow.resize(scrambled(fresh), fxgrow.Recipe.from_json(fxgrow.Recipe.of(grown).to_json()))
    assert net.code == grown.code
    assert attributes(net) == attributes(grown)
    ours, theirs = named_tensors(net), named_tensors(grown)
    assert {name: t.shape for name, t in ours.items()} == {name: t.shape for name, t in theirs.items()}
    old, new = {n.name: n for n in grown.graph.nodes}, {n.name: n for n in net.graph.nodes}
    for name, node in old.items():
        before, after = node.meta.get("val"), new[name].meta.get("val")
        if isinstance(before, torch.Tensor):
            assert before.shape == after.shape and before.dtype == after.dtype


def check(row: Row) -> None:
    inputs = given(row, 2)
    grown = fxgrow.widen(made(row), inputs, {name: row.steps[0] * step for name, step in row.free.items()})
    grown = fxgrow.widen(grown, inputs, {w.name: w.step for w in fxgrow.widths(grown) if w.name in row.free})
    assert len(fxgrow.Recipe.of(grown).steps) == 2
    assert_replays(grown, made(row))


@named([row for row in FREE if row.recipe in FAST])
def test_recipes_replay(row: Row) -> None:
    check(row)


@pytest.mark.slow
@named([row for row in FREE if row.recipe not in FAST])
def test_all_recipes_replay(row: Row) -> None:
    check(row)


class Uniform(nn.Module):
    """A post-norm stream, which can grow only while the norms have one weight for all units."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.ModuleList(nn.Linear(6, 6) for _ in range(3))
        self.norms = nn.ModuleList(nn.LayerNorm(6) for _ in range(3))
        self.out = nn.Linear(6, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norms[0](self.inner[0](x))
        for layer, norm in zip(self.inner[1:], self.norms[1:], strict=True):
            x = norm(x + layer(x))
        return self.out(x)


def test_values_of_a_fresh_model_do_not_matter() -> None:
    """Growth itself would be refused on this one: the proof behind it looks at the weights."""
    x = torch.randn(4, 6)
    grown = fxgrow.widen(Uniform(), (x,), {"inner.0": 2})
    fresh = scrambled(Uniform())
    with pytest.raises(fxgrow.PlanError):
        fxgrow.widen(fresh.requires_grad_(True), (x,), {"inner.0": 2})
    assert_replays(grown, fresh)
    eps = fxgrow.resize(fresh, fxgrow.Recipe.of(grown)).get_submodule("norms.1").eps
    assert eps == 1e-5 * (6 / 8)


@pytest.mark.parametrize("norm", [weight_norm, spectral_norm])
def test_weights_under_a_norm(norm: Callable[..., nn.Module]) -> None:
    def build() -> nn.Module:
        return nn.Sequential(norm(nn.Linear(3, 4)), nn.Tanh(), norm(nn.Linear(4, 5)), nn.Tanh(), nn.Linear(5, 2))

    grown = fxgrow.widen(build(), (torch.randn(2, 3),), {"0": 2, "2": 1})
    assert_replays(grown, build())


def test_growths_by_every_door_are_steps() -> None:
    """`grow`, `apply` and `widen` append; a growth that declines does not."""
    torch.manual_seed(0)
    x = torch.randn(256, 3)
    batches = [(part, part.prod(1, keepdim=True)) for part in x.split(64)]

    def build() -> nn.Module:
        return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))

    one = fxgrow.grow(build(), batches, neurons=2, progress=False)
    two = fxgrow.apply(one, fxgrow.Plan({"0": 3}, method="by hand"))
    three = fxgrow.widen(two, (), {"0": 1})
    splits = fxgrow.grow(three, batches, neurons=1, method="splitting", progress=False)
    kept = fxgrow.grow(splits, [(x, splits(x).detach())] * 4, progress=False)
    assert kept.meta["fxgrow"].declined
    recipe = fxgrow.Recipe.of(kept)
    assert [(s.method, dict(s.units)) for s in recipe.steps[:3]] == [
        ("default", {"0": 2}),
        ("by hand", {"0": 3}),
        ("widen", {"0": 1}),
    ]
    assert recipe == fxgrow.Recipe.of(splits) and len(recipe.steps) == 3 + bool(splits.meta["fxgrow"].plan.units)
    assert_replays(kept, build())
    assert fxgrow.Recipe.of(one).steps == recipe.steps[:1]


def test_units_of_a_recipe_sum_to_the_sizes() -> None:
    """An independent count of what a chain of growths did."""
    net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 2))
    grown = net
    for units in ({"0": 1}, {"2": 2}, {"0": 3, "2": 4}):
        grown = fxgrow.widen(grown, (torch.zeros(1, 3),), units)
    total: dict[str, int] = {}
    for step in fxgrow.Recipe.of(grown).steps:
        for name, k in step.units.items():
            total[name] = total.get(name, 0) + k
    assert total == {"0": 4, "2": 6}
    assert [tuple(p.shape) for p in fxgrow.resize(net, fxgrow.Recipe.of(grown)).parameters()] == [
        (8, 3), (8,), (11, 8), (11,), (2, 11), (2,),
    ]  # fmt: skip


class KeepsSizes(nn.Module):
    """Code that looks at data stays one node, and keeps on its module how large the last batch was."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.batch = nn.Linear(4, 6), nn.Linear(6, 2), 0

    def scaled(self, x: torch.Tensor) -> torch.Tensor:
        self.batch = len(x)
        return x / self.batch if bool((x > 0).any()) else x

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(self.a(self.scaled(x)).relu())


def test_what_a_network_keeps_as_it_runs_is_no_part_of_a_recipe() -> None:
    batches = [(torch.randn(n, 4), torch.randn(n, 2)) for n in (8, 8, 8, 5)]
    model = nn.Sequential(KeepsSizes())
    model(batches[0][0])
    grown = fxgrow.grow(model, batches, loss_fn=nn.functional.mse_loss, neurons=2, progress=False)
    (step,) = fxgrow.Recipe.of(grown).steps
    assert {(a.module, a.name) for a in step.attributes} == {("0.a", "out_features"), ("0.b", "in_features")}
    fxgrow.resize(nn.Sequential(KeepsSizes()), fxgrow.Recipe.of(grown))
