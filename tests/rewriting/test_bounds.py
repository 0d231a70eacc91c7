"""Nothing that a growth writes dwarfs the layer that it joins."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxgrow
from fxgrow.rewriting.bounds import LIMIT, EntrySize, bounded

METHODS = ["default", "tiny", "gradmax", "random", "random-refit", "north", "net2wider", "variance-transfer", "firefly"]


def net(norm: bool) -> nn.Sequential:
    torch.manual_seed(0)
    layers = [nn.Conv2d(2, 6, 3, padding=1), *([nn.BatchNorm2d(6)] if norm else []), nn.ReLU(), nn.Conv2d(6, 4, 3)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))


def batches(scale: float = 1.0) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(96, 2, 6, 6, generator=generator)
    y = (x[:, 0].mean((1, 2)) * x[:, 1].std((1, 2)) * 12).round().long().clamp(-1, 1) + 1
    return list(zip((x * scale).split(16), y.split(16), strict=True))


def excesses(old: nn.Module, new: nn.Module) -> dict[str, float]:
    """Per parameter: its largest entry over that of its layer before, which has at least weights."""
    out = {}
    for name, p in new.named_parameters():
        layer = old.get_submodule(name.rpartition(".")[0])
        like = [old.get_parameter(name)] if p.dim() > 1 else list(layer.parameters(recurse=False))
        out[name] = float(p.detach().abs().max()) / max(float(t.detach().abs().max()) for t in like)
    return out


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e3])
@pytest.mark.parametrize("method", METHODS)
def test_no_method_writes_entries_that_dwarf_their_layer(method: str, scale: float, norm: bool) -> None:
    """Inputs of any scale: units that are normalised to their outputs would be as much larger or smaller."""
    model = net(norm)
    data = batches(scale)
    for x, _ in data * 4:
        model.train()(x)
    grown = fxgrow.grow(model.eval(), data, method=method, neurons=2, progress=False)
    assert all(e <= LIMIT + 1 for e in excesses(model, grown).values()), excesses(model, grown)


def test_random_rows_of_a_small_layer() -> None:
    """A layer of small weights gets rows of its size, not of a fresh layer's."""
    model = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 2))
    with torch.no_grad():
        model[0].weight *= 0.01
    wide = fxgrow.widen(model, (torch.randn(2, 8),), {"0": 50})
    old, new = model[0].weight, wide.get_parameter("0.weight")[6:]
    assert 0 < new.abs().max() <= LIMIT * old.abs().max() * 1.001
    assert new.square().mean() <= (LIMIT * 1.001) ** 2 * old.square().mean()


def plan_of(model: nn.Module, **changes: Any) -> tuple[fxgrow.Profile, fxgrow.Plan]:
    profile = fxgrow.profile(model, batches(), units=2, progress=False)
    return profile, replace(fxgrow.plan(profile, neurons={"0": 2}), **changes)


def test_a_step_keeps_its_direction_and_says_how_far_it_goes() -> None:
    model = net(False)
    profile, plan = plan_of(model)
    far = plan.scaled(1e6)
    near = bounded(far, profile.graph, profile.analysed.structure)
    assert near.bounded and 0 < near.bounded["2.weight"] == near.bounded["2.bias"] < 1
    size = EntrySize.of(model, "2.weight")
    one, other = (p.at(p.scale).new["2.weight"]["0", 1].flatten() for p in (far, near))
    assert torch.cosine_similarity(one, other, 0) > 1 - 1e-6
    written = near.at(near.scale)
    parts = [written.new["2.weight"]["0", 1], written.delta["2.weight"], written.delta["2.bias"]]
    assert max(float(t.abs().max()) / size.largest for t in parts) <= LIMIT * 1.001
    assert near.slope < far.slope
    grown = fxgrow.apply(profile.graph, near)
    assert all(e <= LIMIT + 1.001 for e in excesses(model, grown).values())
    assert fxgrow.Plan.from_json(near.to_json()).bounded == near.bounded


def test_what_is_within_bounds_is_left_as_it_is() -> None:
    profile, plan = plan_of(net(False))
    small = plan.scaled(plan.scale * 1e-3)
    assert bounded(small, profile.graph, profile.analysed.structure) is small and not small.bounded


def test_layers_of_zeros_are_measured_as_fresh_ones() -> None:
    model = net(True)
    for p in (model[0].bias, model[1].bias):
        nn.init.zeros_(p)
    assert EntrySize.of(model, "1.bias").largest == 1.0  # as its scale
    assert EntrySize.of(model, "0.bias").largest == float(model[0].weight.detach().abs().max())
    empty = copy.deepcopy(model)
    nn.init.zeros_(empty[3].weight)
    assert EntrySize.of(empty, "3.weight").rms == pytest.approx((6 * 9) ** -0.5)
