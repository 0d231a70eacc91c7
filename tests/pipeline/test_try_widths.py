"""Trying each width by itself: what it reports is what applying that growth does to held-out batches."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fxgrow
from fxgrow.data.batches import Data

Batches = list[tuple[Tensor, Tensor]]


@pytest.fixture
def trained() -> tuple[nn.Module, Batches]:
    torch.manual_seed(0)
    x = torch.randn(512, 6)
    batches = [(part, (part[:, :2].prod(1) > 0).long()) for part in x.split(64)]
    net = nn.Sequential(nn.Linear(6, 2), nn.Tanh(), nn.Linear(2, 6), nn.Tanh(), nn.Linear(6, 2))
    return net, batches


def test_the_decrease_is_that_of_applying_the_growth(trained: tuple[nn.Module, Batches]) -> None:
    net, batches = trained
    profile = fxgrow.profile(net, batches, progress=False)
    before = copy.deepcopy(profile.graph.state_dict())
    tried = fxgrow.try_widths(profile, batches, units=2)
    assert {*tried} == {"0", "2"}
    held = list(Data(batches).held_out())
    assert 0 < len(held) < len(batches)

    @torch.no_grad()
    def loss(model: nn.Module) -> float:
        return sum(float(F.cross_entropy(model(b.inputs[0]), b.targets)) for b in held) / len(held)

    for name, t in tried.items():
        grown = fxgrow.apply(profile.graph, fxgrow.plan(profile, neurons={name: 2}).scaled(t.gamma))
        assert t.parameters == sum(p.numel() for p in grown.parameters()) - sum(p.numel() for p in net.parameters())
        assert t.decrease == pytest.approx(loss(net) - loss(grown), abs=1e-6)
        assert t.per_parameter == t.decrease / t.parameters
    assert max(t.decrease for t in tried.values()) > 0
    rates = [t.per_parameter for t in tried.values()]
    assert rates == sorted(rates, reverse=True)
    assert all(torch.equal(a, before[n]) for n, a in profile.graph.state_dict().items())


def test_no_more_units_than_were_proposed(trained: tuple[nn.Module, Batches]) -> None:
    net, batches = trained
    tried = fxgrow.try_widths(fxgrow.profile(net, batches, units=3, progress=False), batches, units=50)
    assert {t.units for t in tried.values()} == {3}


def test_refuses_what_it_cannot_try(trained: tuple[nn.Module, Batches]) -> None:
    net, batches = trained
    profile = fxgrow.profile(net, batches, method="random", progress=False)
    with pytest.raises(fxgrow.PlanError, match="'random' change nothing at first"):
        fxgrow.try_widths(profile, batches)
    with pytest.raises(fxgrow.PlanError, match="units=0"):
        fxgrow.try_widths(profile, batches, units=0)
    with pytest.raises(fxgrow.PlanError, match="record of a growth"):
        fxgrow.try_widths(profile.record(), batches)
