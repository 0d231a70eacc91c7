"""Budgets in parameters, multiply-adds and measured seconds, and sizes that suit the hardware."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

import fxgrow
from fxgrow.analysis.analyse import analyse
from fxgrow.pipeline.cost import Latency, MultiplyAdds, Parameters


class Net(nn.Module):
    """Layers of every kind whose products are counted."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.depth = nn.Conv2d(2, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1, groups=4)
        self.grouped, self.up = nn.Conv2d(4, 6, 3, stride=2, groups=2, padding=1), nn.ConvTranspose2d(6, 3, 2, 2)
        self.q, self.k, self.v = nn.Linear(3, 4), nn.Linear(3, 4), nn.Linear(3, 5)
        self.mlp, self.head = nn.Linear(5, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.up(self.grouped(torch.relu(self.depth(self.stem(x)))).relu())
        t = x.flatten(2).mT
        y = F.scaled_dot_product_attention(self.q(t), self.k(t), self.v(t))
        y = (self.q(t) @ self.k(t).mT).softmax(-1) @ y
        return self.head(self.mlp(y).relu()).mean(1)


def counted(net: nn.Module, x: Tensor) -> float:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        net(x)
    return counter.get_total_flops() / 2 / len(x)


def test_costs_are_those_of_the_grown_network() -> None:
    torch.manual_seed(0)
    net, x = Net().eval(), torch.randn(2, 2, 6, 6)
    gm = fxgrow.capture(net, (x,))
    analysed = analyse(gm)
    sums, parameters = MultiplyAdds(analysed), Parameters(analysed)
    units = {w.name: 2 * w.step for w in fxgrow.widths(gm) if w.pinned is None}
    assert units.keys() >= {"stem", "grouped", "up", "q", "v", "mlp"}
    for added in ({}, units, *({name: k} for name, k in units.items())):
        grown = fxgrow.widen(net, (x,), added) if added else net
        assert parameters.total(added) == sum(p.numel() for p in grown.parameters())
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            assert sums.total(added) == pytest.approx(counted(grown, x), rel=1e-9), added


class Recurrent(nn.Module):
    """An LSTM of two layers in two directions; its counter of operations knows no fused kernels."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(9, 4)
        self.rnn, self.head = nn.LSTM(4, 6, 2, batch_first=True, bidirectional=True), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(self.embed(x))[0][:, -1])


def test_every_weight_of_a_recurrent_layer_multiplies_every_step() -> None:
    net, x = Recurrent(), torch.randint(9, (5, 7))
    analysed = analyse(fxgrow.capture(net, (x,)))
    for units in (0, 2):
        h = 6 + units
        layers = 2 * 7 * 4 * h * (4 + h) + 2 * 7 * 4 * h * (2 * h + h)
        assert MultiplyAdds(analysed).total({"rnn": units}) == layers + 2 * h * 3
    grown = fxgrow.grow(
        net, [(x, torch.randn(5, 3)) for _ in range(4)], budget="+50%", cost="multiply-adds", progress=False
    )
    assert grown.meta["fxgrow"].plan is not None


def data() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    x, a = torch.randn(12, 32, 6, generator=generator), torch.randn(6, 3, generator=generator)
    return [(b, (3 * b @ a).tanh()) for b in x]


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3))


def test_a_budget_in_multiply_adds_is_kept() -> None:
    convolutions = nn.Conv1d(1, 5, 3, padding=1), nn.Tanh(), nn.Conv1d(5, 5, 3, padding=1), nn.Tanh()
    head = nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3)
    net = nn.Sequential(nn.Unflatten(1, (1, 6)), *convolutions, *head)
    x = data()[0][0]
    before = counted(net, x)
    for budget, most in (("+40%", 0.4 * before), (300, 300)):
        grown = fxgrow.grow(net, data(), method="random-refit", budget=budget, cost="multiply-adds", progress=False)
        plan = grown.meta["fxgrow"].plan
        if plan.units:
            assert 0 < counted(grown, x) - before <= most
    assert plan.units, "nothing was significant: the test says nothing"


def test_a_budget_in_seconds_is_kept_as_far_as_widths_add_up() -> None:
    net = mlp()
    gm = fxgrow.capture(net, (data()[0][0],))
    latency = Latency(analyse(gm), ["0", "2"])
    assert latency.base > 0 and latency.total({"0": 4}) > latency.base
    assert latency.total({"0": 4, "2": 2}) == pytest.approx(
        latency.base + latency.slopes["0"] * 4 + latency.slopes["2"] * 2
    )
    profile = fxgrow.profile(net, data(), progress=False)
    plan = fxgrow.plan(profile, budget="+50%", cost="latency")
    assert plan.units and all(k <= profile[name].significant for name, k in plan.units.items())


@pytest.mark.parametrize("multiple", [2, 4, 8])
def test_sizes_suit_the_hardware(multiple: int) -> None:
    profile = fxgrow.profile(mlp(), data(), units=16, progress=False)
    plan = fxgrow.plan(profile, budget="+200%", multiple=multiple)
    assert plan.units
    for name, k in plan.units.items():
        assert (profile[name].width.size + k) % multiple == 0


def test_sizes_suit_hardware_and_groups() -> None:
    layers = nn.Unflatten(1, (2, 3)), nn.Conv1d(2, 9, 1), nn.Tanh(), nn.Conv1d(9, 6, 3, groups=3), nn.Flatten()
    net = nn.Sequential(*layers, nn.Linear(6, 3))
    profile = fxgrow.profile(net, data(), method="random", widths=["1"], units=12, progress=False)
    assert profile["1"].width.step == 3
    sizes = {9 + fxgrow.plan(profile, budget=b, multiple=4).units["1"] for b in ("+50%", "+90%")}
    assert sizes == {12} and 9 + fxgrow.plan(profile, budget="+90%").units["1"] == 18


def test_bad_costs() -> None:
    profile = fxgrow.profile(mlp(), data(), progress=False)
    with pytest.raises(fxgrow.PlanError, match="choose 'parameters', 'multiply-adds' or 'latency'"):
        fxgrow.plan(profile, cost="flops")
    with pytest.raises(fxgrow.PlanError, match="positive number, 1 for any size"):
        fxgrow.plan(profile, multiple=0)
    with pytest.raises(fxgrow.PlanError, match="multiply-adds is less than the smallest growth"):
        fxgrow.plan(profile, budget=1, cost="multiply-adds")
    with pytest.raises(fxgrow.PlanError, match="seconds to add: give a positive budget"):
        fxgrow.plan(profile, budget=-0.5, cost="latency")
