"""The published ways to start new units: each against its own formula, exact where it says so, or refused."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

import fxgrow
from fxgrow.initialisers.registry import _TABLE, method_names
from fxgrow.statistics.consumer_moments import ConsumerMoments
from fxgrow.statistics.width_moments import WidthMoments

#: every method: whether its new units leave the function as it is ("stays"), or gamma moves it ("moves")
METHODS = {
    "default": "moves",
    "firefly": "moves",
    "gradmax": "stays",
    "net2wider": "stays",
    "north": "stays",
    "random": "stays",
    "random-refit": "moves",
    "splitting": "moves",
    "tiny": "moves",
    "variance-transfer": "stays",
}
KEEPING = [name for name, function in METHODS.items() if function == "stays"]


pytestmark = pytest.mark.usefixtures("float64")


class Net(nn.Module):
    """Convolutions with a norm, a depthwise one and a residual sum, and a head that reads flattened maps."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.expand, self.depth = nn.Conv2d(4, 6, 1), nn.Conv2d(6, 6, 3, padding=1, groups=6)
        self.norm2, self.project = nn.BatchNorm2d(6), nn.Conv2d(6, 4, 1, bias=False)
        self.last, self.head = nn.Conv2d(4, 3, 3, stride=2), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.stem(x)))
        x = x + self.project(torch.relu(self.norm2(self.depth(self.expand(x)))))
        return self.head(torch.relu(self.last(x)).flatten(1))


def settled() -> Net:
    torch.manual_seed(0)
    net = Net()
    for m in (net.norm, net.norm2):
        nn.init.normal_(m.running_mean)
        nn.init.uniform_(m.running_var, 0.5, 2.0)
        nn.init.normal_(m.weight)
    return net


def batches(*shape: int) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    make = lambda: torch.randn(16, *shape, dtype=torch.float64, generator=generator)  # noqa: E731
    return [(make(), torch.randint(3, (16,), generator=generator)) for _ in range(8)]


IMAGES = batches(2, 6, 6)


def test_the_table_has_every_method() -> None:
    assert sorted(METHODS) == method_names()


@pytest.mark.parametrize("method", [name for name in METHODS if name not in KEEPING])
def test_gamma_moves_the_function(method: str) -> None:
    profile = fxgrow.profile(mlp(), VECTORS, method=method, units={"0": 2}, progress=False)
    plan = fxgrow.plan(profile, neurons={"0": 2})
    x = VECTORS[0][0]
    at = {gamma: fxgrow.apply(profile.graph, plan.scaled(gamma))(x) for gamma in (0.0, 1.0)}
    torch.testing.assert_close(at[0.0], mlp()(x))
    assert plan.moves and not torch.allclose(at[1.0], at[0.0])


@pytest.mark.parametrize("method", KEEPING)
def test_the_function_stays_and_new_units_learn(method: str) -> None:
    net, x = settled(), IMAGES[0][0]
    wanted = {"stem": 4, "expand": 6, "last": 4}
    grown = fxgrow.grow(net, IMAGES, method=method, neurons=wanted, progress=False)
    growth = grown.meta["fxgrow"]
    assert growth.plan.units == wanted
    # nothing to search for, and the report says so
    assert growth.search is None and "gamma: function kept; no line search" in str(growth)
    assert str(growth.plan).endswith("function kept")
    again = fxgrow.apply(fxgrow.capture(net, (x,)), fxgrow.Plan.from_json(grown.meta["fxgrow"].plan.to_json()))
    for g in (grown, again):
        twin = copy.deepcopy(net)
        for training in (False, True):
            torch.testing.assert_close(g.train(training)(x), twin.train(training)(x), rtol=1e-10, atol=1e-10)
    optimizer = torch.optim.SGD(grown.parameters(), 1e-2)
    new = {"stem.weight": (slice(4, None),), "last.weight": (slice(3, None),), "expand.weight": (slice(6, None),)}
    start = {name: grown.get_parameter(name)[at].detach().clone() for name, at in new.items()}
    for _ in range(2):
        optimizer.zero_grad()
        F.cross_entropy(grown(x), IMAGES[0][1]).backward()
        optimizer.step()
    for name, at in new.items():
        moved = (grown.get_parameter(name)[at].detach() - start[name]).flatten(1).abs().amax(1)
        assert bool((moved > 0).sum() >= len(moved) / 2), name  # ReLU leaves some silent


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))


VECTORS = batches(6)


def test_gradmax_takes_the_top_singular_vectors_of_the_gradient() -> None:
    """The gradient of outgoing weights right after growth, against every other set of directions of that length."""
    net = mlp()
    proposal = fxgrow.profile(net, VECTORS, method="gradmax", positions="all", progress=False, units={"0": 3})
    x, y = torch.cat([b for b, _ in VECTORS]), torch.cat([t for _, t in VECTORS])
    b = torch.cat([x, torch.ones(len(x), 1)], 1)
    inner = net[2](net[1](net[0](x))).detach().requires_grad_()
    (v,) = torch.autograd.grad(F.cross_entropy(net[3:](inner), y, reduction="sum"), inner)
    moment = -(b.T @ v) / len(x)
    u, values, _ = torch.linalg.svd(moment)
    alpha = proposal.proposals["0"].alpha["0.weight"].T
    cosine = (u[:, :3] * alpha).sum(0).abs() / alpha.norm(dim=0)
    torch.testing.assert_close(cosine, torch.ones(3))
    torch.testing.assert_close(proposal["0"].singular_values[:3], tuple(values[:3].tolist()), rtol=1e-6, atol=0)
    torch.testing.assert_close(((b @ alpha) ** 2).mean(0), torch.ones(3))


def test_net2wider_copies_units_and_shares_what_they_say() -> None:
    net = mlp()
    grown = fxgrow.grow(net, VECTORS, method="net2wider", neurons={"0": 6}, progress=False, seed=3)
    rows, old = grown.get_parameter("0.weight"), net[0].weight
    origin = (rows[:, None] == old).all(-1).long().argmax(1)
    torch.testing.assert_close(rows, old[origin], rtol=0, atol=0)
    assert origin[:4].tolist() == [0, 1, 2, 3]
    columns = grown.get_parameter("2.weight")
    back = torch.zeros_like(net[2].weight).index_add_(1, origin, columns.detach())
    torch.testing.assert_close(back, net[2].weight.detach(), rtol=1e-12, atol=1e-12)
    shares = columns / net[2].weight[:, origin]
    assert bool((shares > 0).all()) and len(shares[0].unique()) > 4  # unequal, or copies would stay copies


def test_variance_transfer_adds_pairs_that_cancel() -> None:
    net = mlp()
    grown = fxgrow.grow(net, VECTORS, method="variance-transfer", neurons={"0": 4, "2": 2}, progress=False)
    for writer, reader, size in (("0", "2", 4), ("2", "4", 5)):
        rows = grown.get_parameter(f"{writer}.weight").detach()[size:]
        columns = grown.get_parameter(f"{reader}.weight").detach()[: net[int(reader)].out_features, size:]
        assert bool((rows[::2] == rows[1::2]).all()) and bool((columns[:, ::2] == -columns[:, 1::2]).all())
        assert bool((columns != 0).all())
    with pytest.raises(fxgrow.PlanError, match="even number"):
        fxgrow.grow(net, VECTORS, method="variance-transfer", neurons={"0": 3}, progress=False)


def test_north_is_orthogonal_to_what_is_there() -> None:
    net = mlp()
    profile = fxgrow.profile(net, VECTORS, method="north", positions="all", progress=False, units={"0": 3, "2": 2})
    x = torch.cat([b for b, _ in VECTORS])
    before = net[0](x).detach()
    alpha = profile.proposals["0"].alpha["0.weight"]
    new = torch.cat([x, torch.ones(len(x), 1)], 1) @ alpha.T
    torch.testing.assert_close(before.T @ new / len(x), torch.zeros(4, 3), rtol=0, atol=1e-8)
    torch.testing.assert_close(new.T @ new / len(x), torch.eye(3), rtol=1e-8, atol=1e-8)
    # five units on four inputs and a bias: no direction is left, and the units are random
    assert profile.proposals["2"].alpha["2.weight"].shape == (2, 5)


@pytest.mark.parametrize("method", ["net2wider", "variance-transfer"])
def test_copies_are_refused_where_they_would_change_a_norm(method: str) -> None:
    net = nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 3))
    with pytest.raises(fxgrow.PlanError, match=f"method='{method}' is not defined for width '0'"):
        fxgrow.grow(net, VECTORS, method=method, neurons={"0": 2}, progress=False)

    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell, self.out = nn.LSTM(6, 4, batch_first=True), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(self.cell(x[:, None])[0][:, 0])

    with pytest.raises(fxgrow.PlanError, match="both writes and reads it"):
        fxgrow.grow(Recurrent(), VECTORS, method=method, neurons={"cell": 2}, progress=False)


def test_heads_are_copied_whole() -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.value, self.out = nn.Linear(6, 8), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            v = self.value(x).view(len(x), 2, 4)
            return self.out((v.softmax(1) * v).flatten(1))

    net, x = Attention(), VECTORS[0][0]
    for method in ("net2wider", "variance-transfer"):
        grown = fxgrow.grow(net, VECTORS, method=method, neurons={"value": 4}, progress=False)
        torch.testing.assert_close(grown(x), net(x), rtol=1e-12, atol=1e-12)


def test_an_initialiser_of_ones_own() -> None:
    """Entered with a decorator, found by its name; gone again after the test."""

    @fxgrow.initialiser("first-input", project=False)
    def first_input(width: WidthMoments, consumers: Mapping[str, ConsumerMoments], k: int) -> fxgrow.Proposal:
        rows = torch.zeros(k, width.features)
        rows[:, 0] = torch.arange(1.0, k + 1) / 2
        return fxgrow.Proposal({name: rows[:, a:b] for name, (a, b) in width.spans.items()})

    try:
        grown: Any = fxgrow.grow(mlp(), VECTORS, method="first-input", neurons={"0": 2}, progress=False)
    finally:
        _TABLE.pop("first-input")
    assert isinstance(grown, fx.GraphModule)
    assert grown.get_parameter("0.weight")[4:].tolist() == [[0.5, 0, 0, 0, 0, 0], [1, 0, 0, 0, 0, 0]]
    with pytest.raises(fxgrow.ProfileError, match="no method 'first-input'; there are default, firefly, gradmax"):
        fxgrow.grow(mlp(), VECTORS, method="first-input", progress=False)
