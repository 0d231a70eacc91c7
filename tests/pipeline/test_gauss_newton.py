"""Outgoing weights on the loss's own curvature."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, jvp, vjp

import fxgrow
from fxgrow.data.batches import Data
from fxgrow.pipeline.gauss_newton import Quadratic, conjugate_gradients
from models import Decoder


def batches_of(net: nn.Module, size: int, count: int = 8) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    inputs = [torch.randn(32, size, generator=generator, dtype=torch.float64) for _ in range(count)]
    return [(x, (x[:, :3].prod(1) > 0).long()) for x in inputs]


def deep() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2)
    ).double()


@pytest.mark.parametrize("update_existing", [True, False])
def test_curvature_is_gauss_newton(update_existing: bool, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("fxgrow.pipeline.gauss_newton.PROBE", 1e-5)
    net = deep()
    batches = batches_of(net, 6)
    gm = fxgrow.capture(net, (batches[0][0],))
    profile = fxgrow.profile(gm, batches, units=2, progress=False)
    plan = fxgrow.plan(profile, neurons=2, update_existing=update_existing)
    quadratic = Quadratic(gm, plan, Data(batches), None)
    directions = [torch.randn_like(b) * m for b, m in zip(quadratic.base, quadratic.masks, strict=True)]
    found = quadratic.curvature(directions)

    base = {n: p.detach() for n, p in quadratic.graph.named_parameters()}
    expected = [torch.zeros_like(d) for d in directions]
    for batch in quadratic.few:

        def logits(*moved: Tensor, x: Tensor = batch.inputs[0]) -> Tensor:
            return functional_call(quadratic.graph, base | dict(zip(quadratic.names, moved, strict=True)), (x,))

        y, u = jvp(logits, tuple(quadratic.base), tuple(directions))
        p = y.softmax(1)
        back = vjp(logits, *quadratic.base)[1]((p * u - p * (p * u).sum(1, keepdim=True)) / len(p))
        expected = [e + g * m / len(quadratic.few) for e, g, m in zip(expected, back, quadratic.masks, strict=True)]
    for f, e in zip(found, expected, strict=True):
        assert (f - e).norm() < 1e-3 * e.norm()


def test_conjugate_gradients_solve_a_small_system():
    torch.manual_seed(0)
    root = torch.randn(4, 4, dtype=torch.float64)
    matrix, right = root @ root.T + torch.eye(4), torch.randn(4, dtype=torch.float64)
    (found,) = conjugate_gradients([right], lambda d: [matrix @ d[0]])
    assert (matrix @ found - right).norm() < 0.1 * right.norm()
    assert conjugate_gradients([right], lambda d: [torch.zeros_like(d[0])]) is None


def test_values_have_the_shapes_of_the_plan():
    net = deep()
    batches = batches_of(net, 6)
    gm = fxgrow.capture(net, (batches[0][0],))
    plan = fxgrow.plan(fxgrow.profile(gm, batches, units=2, progress=False), neurons=2)
    quadratic = Quadratic(gm, plan, Data(batches), None)
    values = quadratic.values([torch.ones_like(b) for b in quadratic.base])
    for name, slices in values.new.items():
        assert {k: t.shape for k, t in slices.items()} == {k: t.shape for k, t in plan.values.new[name].items()}
    assert {n: t.shape for n, t in values.delta.items()} == {n: t.shape for n, t in plan.values.delta.items()}


def test_attention_gains_more_than_with_the_refit():
    torch.manual_seed(0)
    net = Decoder(11, 16, fixed_heads=True, width=0.25)
    generator = torch.Generator().manual_seed(0)
    text = [torch.randint(11, (16, 16), generator=generator) for _ in range(24)]
    batches = [(x, x.roll(2, 1)) for x in text]
    optimizer = torch.optim.Adam(net.parameters(), 5e-3)
    for x, y in batches * 5:
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(x).flatten(0, 1), y.flatten()).backward()
        optimizer.step()
    before = copy.deepcopy(net.state_dict())
    losses = {}
    for method in ("default", "newton"):
        neurons = {f"blocks.{i}.attention.v": 8 for i in range(2)}
        grown = fxgrow.grow(net, batches, neurons=neurons, method=method, progress=False)
        growth = grown.meta["fxgrow"]
        losses[method] = min(growth.search.losses)
        assert growth.plan.method == method
    assert losses["newton"] < losses["default"]
    assert all(torch.equal(t, before[n]) for n, t in net.state_dict().items())


def test_convolutions_under_batch_norms():
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(),
        nn.Conv2d(4, 4, 3, stride=2), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(36, 3),
    )  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(32, 2, 8, 8, generator=generator) for _ in range(8)]
    batches = [(x, (x[:, 0].mean((1, 2)) > 0).long() + (x[:, 1].mean((1, 2)) > 0).long()) for x in inputs]
    grown = fxgrow.grow(net, batches, neurons={"0": 2, "3": 2}, method="newton", progress=False)
    before, after = grown.meta["fxgrow"].losses["train"]
    assert after < before and grown.get_submodule("3").weight.shape == (6, 6, 3, 3)


def test_a_model_with_its_own_loss_keeps_the_refit():
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 3), nn.Linear(3, 1)

        def forward(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
            return {"loss": (self.b(torch.tanh(self.a(x))) - y).square().mean()}

    torch.manual_seed(0)
    x = torch.randn(128, 4)
    batches = [{"x": part, "y": part.prod(1, keepdim=True)} for part in x.split(32)]
    torch.manual_seed(0)
    net = Own()
    plans = [
        fxgrow.grow(net, batches, neurons=1, method=m, progress=False).meta["fxgrow"].plan
        for m in ("default", "newton")
    ]
    # the same direction; of the step that the line search found, newton applies a quarter
    assert plans[0].scale == pytest.approx(4 * plans[1].scale)
