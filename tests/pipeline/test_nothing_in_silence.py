"""What was not done, or done in another way than asked for, is said: budgets, methods, declines."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fxgrow
from fxgrow.initialisers.registry import method_names
from fxgrow.report.table import WIDTH

X = torch.randn(4096, 8, generator=torch.Generator().manual_seed(0))


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.Module] = nn.LSTM) -> None:
        super().__init__()
        self.cell, self.out = kind(2, 4, batch_first=True), nn.Linear(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.out(self.cell(x.unflatten(1, (4, 2)))[0][:, -1])
        return y


def mlp() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 1))


def batches(model: nn.Module | None = None) -> list[tuple[Tensor, Tensor]]:
    """Of a task, or of what a model does already."""
    y = X[:, :2].prod(1, keepdim=True) + X[:, 2:4].prod(1, keepdim=True)
    return list(zip(X.split(128), (y if model is None else model(X).detach()).split(128), strict=True))


def grow(model: nn.Module, **options: Any) -> fxgrow.Growth:
    growth = fxgrow.grow(model, batches(), progress=False, **options).meta["fxgrow"]
    assert isinstance(growth, fxgrow.Growth) and max(map(len, str(growth).splitlines())) <= WIDTH
    return growth


@pytest.mark.parametrize("cost", ["parameters", "multiply-adds"])
@pytest.mark.parametrize("budget", ["+25%", "+150%", "+400%"])
def test_budgets_are_filled_by_proposing_more(budget: str, cost: str) -> None:
    plan = grow(mlp(), budget=budget, cost=cost, method="random").plan
    before, after = plan.parameters
    asked = float(budget[1:-1]) / 100
    assert plan.reason is None and 0.8 * asked < after / before - 1 <= 1.02 * asked


def test_what_is_left_of_a_budget_is_said_with_the_reason() -> None:
    assert "left: no more units were proposed at 0, 2" in str(grow(mlp(), budget=20_000, method="random").plan.reason)
    profile = fxgrow.profile(mlp(), batches(), units=9, progress=False)
    kept = {name: replace(b, significant=3 if name == "0" else 9) for name, b in profile.bottlenecks.items()}
    plan = fxgrow.plan(replace(profile, bottlenecks=kept), budget=1_000)
    assert plan.units == {"0": 3, "2": 9}
    assert "left: the held-out test accepts no more units at 0; no more units were proposed at 2 (" in str(plan.reason)
    assert "less than asked for: " in str(grow(mlp(), budget=20_000, method="random"))
    profile = fxgrow.profile(mlp(), batches(), method="random", progress=False)
    reason = str(fxgrow.plan(profile, budget=1_000).reason)
    assert reason.endswith("(profile with more units=, or grow again)") and " of 1,000 parameters" in reason
    assert fxgrow.plan(profile).reason is None


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
@pytest.mark.parametrize("method", ["tiny", "gradmax", "north"])
def test_a_method_that_is_not_defined_for_a_width_says_so(method: str, kind: type[nn.Module]) -> None:
    torch.manual_seed(0)
    growth = grow(Recurrent(kind), neurons=2, method=method)
    text = str(growth)
    assert f"random incoming weights instead of those of {method}: cell (2 of 2: it is not defined there" in text
    assert "no test" in next(line for line in text.splitlines() if line.startswith("cell"))


def test_units_beyond_those_that_a_method_finds_are_random() -> None:
    """One output, so one direction for the second width."""
    profile = fxgrow.profile(mlp(), batches(), method="tiny", units=3, progress=False)
    assert [b.random for b in profile.values()] == [0, 2]
    assert "instead of those of tiny: 2 (2 of 3: it finds 1)" in str(profile)
    assert "instead of" not in str(grow(mlp(), neurons={"0": 2}, method="tiny"))


@pytest.mark.parametrize(
    "method", [name for name in method_names() if name not in ("default", "tiny", "gradmax", "north")]
)
def test_methods_of_random_units_or_copies_are_as_they_should_be(method: str) -> None:
    assert "instead of" not in str(grow(mlp(), neurons=2, method=method))


@pytest.mark.parametrize("options", [{}, {"method": "random-refit"}, {"budget": "+50%"}, {"update_existing": False}])
def test_a_decline_says_what_to_try_next(options: dict[str, Any]) -> None:
    model = mlp()
    growth = fxgrow.grow(model, batches(model), progress=False, **options).meta["fxgrow"]
    assert growth.declined and "more samples (samples=; 4,096 were read)" in growth.declined
    assert "neurons=" in growth.declined
    assert ('method="random-refit"' in growth.declined) == (options.get("method") != "random-refit")
    assert max(map(len, str(growth).splitlines())) <= WIDTH


def test_the_share_of_the_loss_tells_a_small_net_from_one_that_is_large_enough() -> None:
    """Both at a stationary point of their own, where the bottleneck is all of the gradient energy."""
    torch.manual_seed(1)
    teacher = nn.Sequential(nn.Linear(8, 4), nn.Tanh(), nn.Linear(4, 1))
    with torch.no_grad():
        for layer in (teacher[0], teacher[2]):
            layer.weight *= 3
    small = nn.Sequential(nn.Linear(8, 1), nn.Tanh(), nn.Linear(1, 1))
    noisy = [(x, y + 0.1 * torch.randn(y.shape)) for x, y in batches(teacher)]
    x, y = (torch.cat(parts) for parts in zip(*noisy, strict=True))
    shares = []
    for net in (small, teacher):
        optimizer = torch.optim.LBFGS(net.parameters(), max_iter=100)

        def closure(net: nn.Module = net, optimizer: torch.optim.Optimizer = optimizer) -> Tensor:
            optimizer.zero_grad()
            loss = F.mse_loss(net(x), y)
            loss.backward()
            return loss

        optimizer.step(closure)  # type: ignore[no-untyped-call]
        profile = fxgrow.profile(net, noisy, progress=False)
        assert all(b.bottleneck > 0.99 * b.desired for b in profile.values())
        shares.append(max(b.share for b in profile.values()))
    assert shares[0] > 0.05 and shares[1] == 0
