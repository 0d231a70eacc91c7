"""Units that start as old ones: the splitting matrix against autograd's Hessian, predictions against the loss."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fxgrow
from fxgrow.analysis.analyse import analyse
from fxgrow.data.batches import Data
from fxgrow.initialisers import firefly as firefly_module
from fxgrow.initialisers.registry import InitialiserRequest
from fxgrow.initialisers.splitting import BOX, SplittingMatrix, smallest
from tests.initialisers.test_initialisers import IMAGES, VECTORS, settled

METHODS = ["splitting", "firefly"]


pytestmark = pytest.mark.usefixtures("float64")


def mlp(act: type[nn.Module] = nn.Tanh) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 4), act(), nn.Linear(4, 5), act(), nn.Linear(5, 3))


def small_conv() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 3, 3, padding=1, stride=2), nn.GELU(), nn.Conv2d(3, 4, 2, bias=False), nn.Tanh(), nn.Flatten(),
        nn.Linear(16, 3),
    )  # fmt: skip


def learnable(*shape: int) -> list[tuple[Tensor, Tensor]]:
    """Enough samples for held-out ones to agree, and labels that depend on the inputs."""
    x = torch.randn(1024, *shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    y = (x.flatten(1)[:, 0] * x.flatten(1)[:, 1] > 0).long() + (x.flatten(1)[:, 2] > 0).long()
    return list(zip(x.split(64), y.split(64), strict=True))


def fitting(batches: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """All but the batches that are held out."""
    parts = [b for i, b in enumerate(batches) if i % 4 != 3]
    return torch.cat([x for x, _ in parts]), torch.cat([y for _, y in parts])


def setting(net: nn.Module, batches: list[tuple[Tensor, Tensor]], *names: str) -> InitialiserRequest:
    gm = fxgrow.capture(net, (batches[0][0],))
    analysed = analyse(gm)
    hiddens = [h for name, h in analysed.widths.items() if name in names]
    units = dict.fromkeys(names, 1)
    return InitialiserRequest(analysed, hiddens, units, torch.Generator().manual_seed(0), Data(batches))


def dense(matrix: SplittingMatrix, name: str) -> Tensor:
    """S of every unit, column by column."""
    columns = []
    for i in range(matrix.theta[name].shape[1]):
        vectors = {n: torch.zeros_like(t) for n, t in matrix.theta.items()}
        vectors[name][:, i] = 1.0
        columns.append(matrix.product(vectors)[name])
    return torch.stack(columns, 2)


def naive(net: nn.Sequential, i: int, x: Tensor, y: Tensor) -> Tensor:
    """E[dl/d sigma_j sigma''(theta_j^T b) b b^T] of the layer at i, by autograd's Hessian."""
    layer, act = net[i], net[i + 1]
    b = net[:i](x).detach()
    out = act(layer(b)).detach().requires_grad_()
    (g,) = torch.autograd.grad(F.cross_entropy(net[i + 2 :](out), y, reduction="sum"), out)
    whole = []
    for j in range(layer.weight.shape[0]):
        shape = layer.weight[j].shape

        def value(theta: Tensor, j: int = j, shape: torch.Size = shape) -> Tensor:
            w = theta[: shape.numel()].view(1, *shape)
            bias = None if layer.bias is None else theta[shape.numel() :]
            if isinstance(layer, nn.Conv2d):
                a = F.conv2d(b, w, bias, layer.stride, layer.padding)
            else:
                a = F.linear(b, w, bias)
            return (act(a)[:, 0] * g[:, j]).sum() / len(x)

        theta = layer.weight[j].detach().flatten()
        theta = theta if layer.bias is None else torch.cat([theta, layer.bias[j : j + 1].detach()])
        whole.append(torch.autograd.functional.hessian(value, theta))
    return torch.stack(whole)


@pytest.mark.parametrize(
    ("net", "batches", "layers"),
    [(mlp(nn.Tanh), VECTORS, (0, 2)), (mlp(nn.GELU), VECTORS, (0, 2)), (small_conv(), IMAGES, (0, 2))],
    ids=["tanh", "gelu", "conv"],
)
def test_the_splitting_matrix_is_the_hessian_of_the_formula(
    net: nn.Sequential, batches: list[tuple[Tensor, Tensor]], layers: tuple[int, ...]
) -> None:
    net = net.double()
    matrix = SplittingMatrix(setting(net, batches, *map(str, layers)))
    for i in layers:
        expected = naive(net, i, *fitting(batches))
        assert float(expected.abs().max()) > 1e-3
        torch.testing.assert_close(dense(matrix, str(i)), expected, rtol=1e-9, atol=1e-12)


def test_relu_bends_in_a_box() -> None:
    """E[g 1(|a| < r) / 2r b b^T], r half the root mean square of what enters it in a batch (here one)."""
    net = mlp(nn.ReLU)
    x, y = fitting(VECTORS)
    a = net[2](net[:2](x)).detach()
    out = net[3](a).requires_grad_()
    (g,) = torch.autograd.grad(F.cross_entropy(net[4](out), y, reduction="sum"), out)
    half = BOX * a.square().mean().sqrt()
    b = torch.cat([net[:2](x).detach(), torch.ones(len(x), 1)], 1)
    weight = g * (a.abs() < half) / (2 * half) / len(x)
    expected = torch.einsum("nu,np,nq->upq", weight, b, b)
    matrix = SplittingMatrix(setting(net, [(x, y)], "2"))
    torch.testing.assert_close(dense(matrix, "2"), expected, rtol=1e-9, atol=1e-12)
    # value and slope are those of the ReLU
    torch.testing.assert_close(matrix.loss, float(F.cross_entropy(net(x), y).detach()))


def test_lanczos_finds_the_smallest_eigenvalue() -> None:
    generator = torch.Generator().manual_seed(0)
    half = torch.randn(3, 30, 30, generator=generator)
    matrices = half + half.mT
    matrices[1] = 0.0
    product = lambda v: {"a": torch.einsum("upq,uq->up", matrices, v["a"])}  # noqa: E731
    start = {"a": torch.randn(3, 30, generator=generator)}
    expected = torch.linalg.eigvalsh(matrices)[:, 0]
    values, vectors = smallest(product, start, 30)
    torch.testing.assert_close(values["a"], expected, rtol=1e-8, atol=1e-10)
    seen = torch.einsum("up,upq,uq->u", vectors["a"], matrices, vectors["a"])
    torch.testing.assert_close(seen[[0, 2]], expected[[0, 2]], rtol=1e-8, atol=1e-10)
    few, _ = smallest(product, start, 12)
    assert bool((few["a"][[0, 2]] < 0.95 * expected[[0, 2]]).all())


@pytest.mark.parametrize("act", [nn.Tanh, nn.GELU])
def test_the_loss_falls_by_half_eps_squared_lambda(act: type[nn.Module]) -> None:
    """For small gamma, with units of two layers split at once; nothing at gamma = 0."""
    net = mlp(act)
    profile = fxgrow.profile(net, VECTORS, method="splitting", progress=False, units={"0": 3, "2": 2})
    plan = fxgrow.plan(profile, neurons={"0": 2, "2": 2})
    assert plan.units == {"0": 2, "2": 2}
    predicted = sum(plan.predicted.values())
    assert predicted == pytest.approx(sum(profile["0"].gains[:2]) + sum(profile["2"].gains[:2]))
    x, y = fitting(VECTORS)

    @torch.no_grad()
    def loss(gamma: float) -> float:
        return float(F.cross_entropy(fxgrow.apply(profile.graph, plan.scaled(gamma))(x), y))

    before = float(F.cross_entropy(net(x), y).detach())
    assert loss(0.0) == pytest.approx(before, rel=1e-12)
    for gamma in (0.02, 0.04):
        assert before - loss(gamma) == pytest.approx(gamma**2 * predicted, rel=2e-2)


def test_each_half_moves_one_way_and_takes_half() -> None:
    net = mlp()
    profile = fxgrow.profile(net, VECTORS, method="splitting", progress=False, units={"0": 1})
    grown = fxgrow.apply(profile.graph, fxgrow.plan(profile, neurons={"0": 1}))
    rows, columns = grown.get_parameter("0.weight"), grown.get_parameter("2.weight")
    (j,) = (rows[:4] != net[0].weight).any(1).nonzero().flatten().tolist()
    torch.testing.assert_close(rows[j] + rows[4], 2 * net[0].weight[j])
    torch.testing.assert_close(columns[:, [j, 4]], (net[2].weight[:, j] / 2)[:, None].expand(-1, 2))
    delta = torch.cat([rows[j] - net[0].weight[j], grown.get_parameter("0.bias")[j : j + 1] - net[0].bias[j]]).detach()
    matrix = dense(SplittingMatrix(setting(net, VECTORS, "0")), "0")
    smallest_of = torch.linalg.eigvalsh(matrix)[:, 0]
    assert j == int(smallest_of.argmin())
    assert float(delta @ matrix[j] @ delta / (delta @ delta)) == pytest.approx(float(smallest_of[j]), rel=1e-6)


@pytest.mark.parametrize("method", METHODS)
def test_what_lies_between_is_split_too(method: str) -> None:
    """BatchNorm, depthwise convolutions, residual sums: the old function at gamma = 0, in both modes, and less loss."""
    net, parts = settled(), learnable(2, 6, 6)[:4]
    optimizer = torch.optim.Adam(net.parameters(), 3e-3)
    for a, b in parts * 10:  # running statistics that fit, and a state to carry over
        optimizer.zero_grad()
        F.cross_entropy(net.train()(a), b).backward()
        optimizer.step()
    net.eval()
    x, y = (torch.cat(each) for each in zip(*parts, strict=True))
    batches = [(x, y)]
    wanted = {"stem": 2, "expand": 2, "last": 1}
    profile = fxgrow.profile(net, batches, method=method, progress=False, units=wanted)
    plan = fxgrow.Plan.from_json(fxgrow.plan(profile, neurons=wanted).to_json())
    still, twin = fxgrow.apply(profile.graph, plan.scaled(0.0)), copy.deepcopy(net)
    for training in (False, True):
        torch.testing.assert_close(still.train(training)(x), twin.train(training)(x), rtol=1e-9, atol=1e-9)
    net.eval()
    grown = fxgrow.grow(net, batches, method=method, neurons=wanted, progress=False, optimizer=optimizer, into="module")
    record = grown.meta["fxgrow"]
    assert type(grown) is type(net) and record.plan.units == wanted
    for before, after in record.losses.values():
        assert after < before
    # running statistics are those of the grown net
    assert record.losses["eval"][1] == pytest.approx(record.losses["train"][1], rel=1e-2)
    again = fxgrow.apply(fxgrow.capture(net, (x,)), fxgrow.Plan.from_json(record.plan.to_json()))
    torch.testing.assert_close(again.eval()(x), grown.eval()(x), rtol=1e-9, atol=1e-9)
    assert grown.norm.running_mean.shape == (6,)
    state = optimizer.state[grown.stem.weight]["exp_avg"]
    assert state.shape == grown.stem.weight.shape and bool(state[:4].any()) and not bool(state[4:].any())
    F.cross_entropy(grown.train()(x), y).backward()
    optimizer.step()


@pytest.mark.parametrize("method", METHODS)
def test_a_budget(method: str) -> None:
    grown = fxgrow.grow(mlp(), learnable(6), method=method, budget=25, progress=False)
    plan = grown.meta["fxgrow"].plan
    assert plan.units and 0 < plan.parameters[1] - plan.parameters[0] <= 25


def test_no_negative_eigenvalue_no_split() -> None:
    """A convex unit that the loss wants smaller: its splitting matrix is positive."""
    net = nn.Sequential(nn.Linear(6, 3), nn.Softplus(), nn.Linear(3, 1))
    nn.init.constant_(net[2].weight, 1.0)
    batches = [(x, torch.full((len(x), 1), -100.0)) for x, _ in VECTORS]
    grown = fxgrow.grow(net, batches, method="splitting", neurons={"0": 2}, progress=False)
    growth = grown.meta["fxgrow"]
    assert not growth.plan.units and "negative eigenvalue" in growth.declined
    assert "declined: no unit's splitting matrix has a negative eigenvalue" in str(growth)
    torch.testing.assert_close(grown(VECTORS[0][0]), net(VECTORS[0][0]))
    # where it wants them larger, every unit has one
    batches = [(x, -y) for x, y in batches]
    growth = fxgrow.grow(net, batches, method="splitting", neurons={"0": 5}, progress=False).meta["fxgrow"]
    assert growth.plan.units == {"0": 3}
    assert "less than asked for: 3 of 5 units at 0" in str(growth)


def test_a_linear_unit_is_never_split() -> None:
    net = nn.Sequential(nn.Linear(6, 3), nn.Linear(3, 3))
    growth = fxgrow.grow(net, VECTORS, method="splitting", neurons={"0": 2}, progress=False).meta["fxgrow"]
    assert not growth.plan.units and growth.declined


@pytest.mark.parametrize("act", [nn.Tanh, nn.ReLU])
def test_firefly_predicts_its_decrease(act: type[nn.Module], monkeypatch: pytest.MonkeyPatch) -> None:
    """Splits and new units of two layers together, for small eps."""
    monkeypatch.setattr(firefly_module, "EPS", 1e-3)
    net = mlp(act)
    profile = fxgrow.profile(net, VECTORS, method="firefly", progress=False, units={"0": 4, "2": 4})
    splits = profile.proposals["0"].splits
    assert splits is not None and bool(splits.fresh.any())
    if act is nn.Tanh:
        assert not bool(splits.fresh.all())
    most = {name: profile[name].significant for name in profile}
    plan = fxgrow.plan(profile, neurons=most)
    x, y = fitting(VECTORS)
    with torch.no_grad():
        before, after = (F.cross_entropy(f(x), y) for f in (net, fxgrow.apply(profile.graph, plan)))
    predicted = sum(plan.predicted.values())
    assert predicted > 0 and float(before - after) == pytest.approx(predicted, rel=2e-2)


def test_firefly_beats_its_random_start() -> None:
    """The steps on the candidates are worth something: deltas as drawn, without them, gain less."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(firefly_module, "STEPS", 0)
        start = fxgrow.profile(mlp(), VECTORS, method="firefly", progress=False, units={"0": 4})
    moved = fxgrow.profile(mlp(), VECTORS, method="firefly", progress=False, units={"0": 4})
    assert sum(moved["0"].gains) > 2 * sum(start["0"].gains)


@pytest.mark.parametrize("method", METHODS)
def test_refused_where_copies_would_change_a_norm(method: str) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.norm = nn.Linear(6, 5), nn.Linear(5, 8), nn.LayerNorm(8)
            self.out = nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(self.norm(self.second(torch.tanh(self.first(x)))))

    with pytest.raises(fxgrow.PlanError, match=f"method='{method}' is not defined for width 'second': copies of a"):
        fxgrow.grow(Net(), VECTORS, method=method, neurons={"second": 2}, progress=False)
    # a budget goes to the others
    growth = fxgrow.grow(Net(), VECTORS, method=method, budget="+30%", progress=False).meta["fxgrow"]
    assert set(growth.plan.units) <= {"first"}
    profile = fxgrow.profile(Net(), VECTORS, method=method, progress=False, units={"second": 1})
    with pytest.raises(fxgrow.PlanError, match="the profile proposed 0"):
        fxgrow.plan(profile, neurons={"first": 1})


@pytest.mark.parametrize("method", [*METHODS, "net2wider"])
def test_refused_under_spectral_normalisation(method: str) -> None:
    net = nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Linear(6, 4)), nn.Tanh(), nn.Linear(4, 3))
    with pytest.raises(fxgrow.PlanError, match=r"the largest singular value of 0\.weight"):
        fxgrow.grow(net, VECTORS, method=method, neurons={"0": 2}, progress=False)


def test_values_of_attention_are_linear() -> None:
    """Nothing to split, whatever the fused kernel of attention has for a second derivative; new units help."""

    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.query, self.key, self.value = nn.Linear(2, 4), nn.Linear(2, 4), nn.Linear(2, 4)
            self.out = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = x.view(len(x), 3, 2)
            return self.out(F.scaled_dot_product_attention(self.query(x), self.key(x), self.value(x)).mean(1))

    torch.manual_seed(0)
    net, found = Attention(), {}
    for method in METHODS:
        found[method] = fxgrow.profile(net, learnable(6), method=method, progress=False, units={"value": 2})
    assert float(dense(SplittingMatrix(setting(net, VECTORS, "value")), "value").abs().max()) < 1e-12
    assert sum(found["splitting"]["value"].gains) < 1e-12
    splits = found["firefly"].proposals["value"].splits
    assert splits is not None and bool(splits.fresh[0]) and float(splits.gains[0]) > 1e-6
    with pytest.raises(fxgrow.PlanError, match="products of its units"):
        fxgrow.grow(net, VECTORS, method="splitting", neurons={"query": 1}, progress=False)


@pytest.mark.parametrize("method", METHODS)
def test_a_gated_width_is_split_with_its_gate(method: str) -> None:
    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate, self.up, self.down = nn.Linear(6, 4), nn.Linear(6, 4), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.down(F.silu(self.gate(x)) * self.up(x))

    torch.manual_seed(0)
    net = Gated()
    profile = fxgrow.profile(net, VECTORS, method=method, progress=False, units={"gate": 2})
    plan = fxgrow.plan(profile, neurons={"gate": 2})
    x, y = fitting(VECTORS)
    with torch.no_grad():
        before, still, after = (
            float(F.cross_entropy(f(x), y))
            for f in (net, *(fxgrow.apply(profile.graph, plan.scaled(g)) for g in (0.0, 0.1)))
        )
    assert still == pytest.approx(before, rel=1e-12) and after < before
    if method == "splitting":
        assert before - after == pytest.approx(0.01 * sum(plan.predicted.values()), rel=5e-2)
