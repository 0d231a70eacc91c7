"""The plan: within its budget, never on units that do not count, plain data that replays bit for bit."""

from __future__ import annotations

import copy
import functools
import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fxgrow
from fxgrow.pipeline.plan import SHARE_CLAMP, _tilts
from models.mlp import MLP
from models.resnet import DigitsResNet


def size(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def images(count: int = 512, dtype: torch.dtype = torch.float32) -> list[tuple[Tensor, Tensor]]:
    x = torch.randn(count, 1, 8, 8, generator=torch.Generator().manual_seed(2), dtype=dtype)
    y = torch.stack([F.avg_pool2d(x[:, 0].roll(s, 2) * x[:, 0], 8).flatten() for s in range(1, 5)], 1).argmax(1)
    return list(zip(x.split(64), y.split(64), strict=True))


class Grouped(nn.Module):
    """A GroupNorm of 3 groups of 2, a convolution in 2 groups: three steps of 2, and one of 1."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm = nn.Conv2d(1, 6, 3, padding=1), nn.GroupNorm(3, 6)
        self.b, self.c, self.d = nn.Conv2d(6, 4, 1), nn.Conv2d(4, 6, 3, groups=2), nn.Conv2d(6, 3, 1)
        self.head = nn.Linear(3, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.c(torch.relu(self.b(torch.relu(self.norm(self.a(x)))))))
        return self.head(torch.relu(self.d(x)).mean((2, 3)))


def fit(model: nn.Module, batches: list[tuple[Tensor, Tensor]], steps: int = 30) -> nn.Module:
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for step in range(steps):
        x, y = batches[step % len(batches)]
        optimizer.zero_grad()
        F.cross_entropy(model.train()(x), y).backward()
        optimizer.step()
    model.zero_grad()
    return model.eval()


def make(name: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    kinds: dict[str, Callable[[], nn.Module]] = {
        "mlp": lambda: MLP([64, 10, 12, 4]),
        "resnet": lambda: DigitsResNet(0.25, classes=4),
        "groups": Grouped,
    }
    return fit(kinds[name]().to(dtype), images(dtype=dtype))


@functools.lru_cache
def profiled(name: str, significant: bool = True) -> fxgrow.Profile:
    """A profile in which every unit counts (the test of significance is tested with the profile)."""
    profile = fxgrow.profile(make(name), images(), units=12, progress=False)
    for evidence in profile.refit.tests.values() if significant and profile.refit else ():
        evidence.z = torch.full_like(evidence.z, 9.0)
    if not significant:
        return profile
    from dataclasses import replace

    every = {n: replace(b, significant=profile.proposed[n]) for n, b in profile.bottlenecks.items()}
    return replace(profile, bottlenecks=every)


@pytest.mark.parametrize("name", ["mlp", "resnet", "groups"])
@pytest.mark.parametrize("budget", ["+5%", "+10%", "+25%", "+60%", 300, "20%", None])
def test_budget_is_kept_and_used(name: str, budget: str | int | None) -> None:
    profile = profiled(name)
    total = size(profile.gm)
    share = 25 if budget is None else budget if isinstance(budget, int) else float(budget.strip("+%"))
    limit = budget if isinstance(budget, int) else int(share / 100 * total)
    try:
        plan = fxgrow.plan(profile, budget)
    except fxgrow.PlanError as error:
        assert "less than the smallest growth" in str(error)
        cheapest = min(
            size(fxgrow.apply(profile.gm, fxgrow.Plan({n: b.width.step}))) - total for n, b in profile.items()
        )
        assert limit < cheapest
        return
    grown = fxgrow.apply(profile.gm, plan)
    used = size(grown) - total
    assert plan.parameters == (total, total + used)
    assert used <= limit
    assert all(k % profile[n].width.step == 0 and 0 < k <= profile.proposed[n] for n, k in plan.units.items())
    assert used > 0
    if all(plan.units.get(n) == profile.proposed[n] for n in profile):
        return  # there are no more
    costs = [size(fxgrow.apply(profile.gm, fxgrow.Plan({n: b.width.step}))) - total for n, b in profile.items()]
    if limit > 2 * max(costs):
        assert used > 0.8 * limit


def test_units_are_spread_and_capped() -> None:
    """In proportion to sizes, tilted between bounds; never more than count."""
    profile = profiled("mlp")
    plan = fxgrow.plan(profile, "+40%")
    ratios = [plan.units[n] / b.width.size for n, b in profile.items()]
    assert max(ratios) / min(ratios) <= SHARE_CLAMP[1] / SHARE_CLAMP[0] * 1.5  # and rounding
    few = {n: (1, 2)[i % 2] for i, n in enumerate(profile)}
    for n, k in few.items():
        object.__setattr__(profile.bottlenecks[n], "significant", k)
    try:
        assert fxgrow.plan(profile, "+900%").units == few
    finally:
        for n in few:
            object.__setattr__(profile.bottlenecks[n], "significant", profile.proposed[n])


def test_nothing_significant_nothing_added() -> None:
    profile = profiled("mlp", significant=False)
    for b in profile.values():
        object.__setattr__(b, "significant", 0)
    plan = fxgrow.plan(profile)
    assert plan.units == {} and plan.parameters == (size(profile.gm),) * 2
    assert "held-out test" in str(plan.reason) and "nothing to add" in str(plan)
    x = images()[0][0]
    assert torch.equal(fxgrow.apply(profile.gm, plan)(x), profile.gm(x))


def test_neurons() -> None:
    profile = profiled("groups")
    steps = {n: b.width.step for n, b in profile.items()}
    assert (steps["a"], steps["c"], steps["d"]) == (2, 2, 1)
    for asked, rounded in ((1, 2), (2, 2), (7, 8)):
        plan = fxgrow.plan(profile, neurons=asked)
        grown = fxgrow.apply(profile.gm, plan)
        assert (plan.units["a"], plan.units["c"], plan.units["d"]) == (rounded, rounded, asked)
        assert grown.a.out_channels == 6 + rounded and grown.norm.num_groups == 3 + rounded // 2
        assert grown.c.out_channels == 6 + rounded and grown.c.groups == 2
    assert fxgrow.plan(profile, neurons={"c": 4}).units == {"c": 4}
    with pytest.raises(fxgrow.PlanError, match="3 units for width 'c': give a positive multiple of its step 2"):
        fxgrow.plan(profile, neurons={"c": 3})


@pytest.mark.parametrize("method", ["default", "tiny", "random", "random-refit"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", ["mlp", "resnet"])
def test_json_replays_bit_for_bit_on_a_fresh_copy(name: str, dtype: torch.dtype, method: str) -> None:
    model = make(name, dtype)
    fresh = copy.deepcopy(model)
    profile = fxgrow.profile(model, images(128, dtype), method=method, units=3, progress=False)
    plan = fxgrow.plan(profile, neurons=3).scaled(0.3)
    text = plan.to_json()
    again = fxgrow.Plan.from_json(text)
    assert again.to_json() == text and json.loads(text)["units"] == plan.units
    x = images(dtype=dtype)[0][0]
    one, two = fxgrow.apply(profile.gm, plan), fxgrow.apply(fresh, again, (x,))
    assert list(one.state_dict()) == list(two.state_dict()) == list(model.state_dict())
    for left, right in zip(one.state_dict().values(), two.state_dict().values(), strict=True):
        assert left.dtype == right.dtype and torch.equal(left, right)
    assert torch.equal(one.eval()(x), two.eval()(x))


@pytest.mark.parametrize("method", ["default", "tiny"])
def test_existing_entries(method: str) -> None:
    """Bit for bit without the update; with it they move, and only those of consumers."""
    model = make("resnet")
    profile = fxgrow.profile(model, images(), method=method, units=2, progress=False)
    old = model.state_dict()
    for update in (False, True):
        plan = fxgrow.plan(profile, neurons=2, update_existing=update)
        grown = fxgrow.apply(profile.gm, plan.scaled(0.5)).state_dict()
        moved = {
            n for n, t in grown.items() if not torch.equal(t[tuple(slice(0, s) for s in old[n].shape)], old[n])
        }  # fmt: skip
        consumers = {f"{c}.{leaf}" for b in profile.values() for c in b.width.consumers for leaf in ("weight", "bias")}
        assert (moved == set()) if not update else (moved and moved <= consumers)


@pytest.mark.parametrize("method", ["default", "tiny", "random", "random-refit"])
def test_gamma_zero_is_the_same_function(method: str) -> None:
    model = make("resnet")
    profile = fxgrow.profile(model, images(), method=method, units=3, progress=False)
    grown = fxgrow.apply(profile.gm, fxgrow.plan(profile, neurons=3).scaled(0.0)).eval()
    x: Any = images()[0][0]
    assert size(grown) > size(model)
    assert torch.allclose(grown(x), model(x), rtol=1e-5, atol=1e-5)


def test_prints_what_it_does() -> None:
    plan = fxgrow.plan(profiled("mlp"), neurons={"layers.1": 2})
    before, after = plan.parameters
    assert str(plan).startswith(f"layers.1 +2; {before:,} -> {after:,} parameters, gamma ")


def test_worth_is_the_decrease_of_the_fitted_step_times_the_root_of_what_weights_cannot_express() -> None:
    profile = profiled("mlp")
    assert profile.refit is not None
    for name, b in profile.items():
        evidence, (fit,) = profile.refit.tests[name], profile.refit.of(name)
        units = evidence.order[: -(-b.width.size // 8)].sort().values
        step, z = torch.cat(fit.solve({name: units}, True), 1), fit.new[name][units].flatten()
        slope = float((step * torch.cat([fit.held_out[0], fit.held_out[1][:, z]], 1)).sum())
        hz = fit.hz[:, z]
        m = torch.cat([torch.cat([fit.hh, hz], 1), torch.cat([hz.mT, fit.zz[z][:, z]], 1)])
        curvature = float((fit.g @ step @ m * step).sum())
        expected = slope**2 / 2 / curvature / evidence.coherence * b.bottleneck**0.5
        assert b.worth == pytest.approx(expected, rel=1e-4) if slope > 0 else b.worth == 0
    assert all(b.worth == 0 for b in fxgrow.profile(make("mlp"), images(), method="random", progress=False).values())


def test_shares_lean_towards_worth_for_the_size_within_bounds() -> None:
    profile = profiled("mlp")
    (first, a), (second, b) = list(profile.items())[:2]
    size = b.width.size / a.width.size

    def tilts(worth: float) -> float:
        given = {first: replace(a, worth=1.0), second: replace(b, worth=worth * size)}
        found = _tilts(replace(profile, bottlenecks=given), given)
        return found[second] / found[first]

    assert [tilts(w) for w in (1.0, 4.0)] == pytest.approx([1.0, 2.0])
    assert tilts(1e9) == pytest.approx(1 / SHARE_CLAMP[0])  # the larger of two is the median
    assert _tilts(replace(profile, bottlenecks={first: replace(a, worth=0.0)}), [first]) == {first: 1.0}


class Frequencies(nn.Module):
    """Mixes channels at every frequency by complex weights."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv1d(2, 4, 1), nn.Conv1d(5, 2, 1)
        self.w = nn.Parameter(0.3 * torch.randn(4, 5, 3, dtype=torch.cfloat))

    def forward(self, x: Tensor) -> Tensor:
        mixed = torch.einsum("bix,iox->box", torch.fft.rfft(self.first(x))[..., :3], self.w)
        return self.last(torch.fft.irfft(mixed, n=x.shape[-1]).relu())


def test_complex_entries_in_json() -> None:
    torch.manual_seed(0)
    model = Frequencies()
    batches = [(torch.randn(8, 2, 8), torch.randn(8, 2, 8)) for _ in range(4)]
    plan = fxgrow.plan(fxgrow.profile(model, batches, units=2, progress=False), neurons=2)
    again = fxgrow.Plan.from_json(plan.to_json())
    entries = plan.values.new["w"]
    assert entries and all(torch.equal(t, again.values.new["w"][key]) for key, t in entries.items())
    x = batches[0][0]
    one, two = (fxgrow.apply(model, p, (x,)) for p in (plan, again))
    assert one.get_parameter("w").is_complex() and torch.equal(one(x), two(x))
