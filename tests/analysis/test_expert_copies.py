"""Experts: statistics of each one's own rows, growth of their hidden width, and of their number by copies.

Both ways in which transformers computes a mixture: all tokens stacked for every expert (Llama 4), and rows sorted by
expert for one grouped product (Mixtral and most others).
"""

from __future__ import annotations

import functools
import importlib
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fxgrow
from fxgrow.integrations._torchvision import import_torchvision
from fxgrow.statistics.consumer_moments import GROUPS

EXPERTS, TOKENS = 3, 5


def library(name: str) -> Any:
    pytest.importorskip("torchvision")
    import_torchvision()
    pytest.importorskip("transformers")
    return importlib.import_module(f"transformers.models.{name}.modeling_{name}")


class Mixture(nn.Module):
    """A mixture of transformers beside a skip connection, between two linear layers."""

    def __init__(self, moe: nn.Module) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.into, self.moe, self.out = nn.Linear(6, 8), moe, nn.Linear(8, 4)
        for p in self.parameters():
            nn.init.normal_(p, std=0.5)

    def forward(self, x: Tensor) -> Tensor:
        h = self.into(x)
        moved = self.moe(h)
        moved = moved[0] if isinstance(moved, tuple) else moved
        return self.out(h + moved.view(h.shape))


def llama4(experts: int = EXPERTS) -> nn.Module:
    config = library("llama4").Llama4TextConfig(
        hidden_size=8, intermediate_size=8, num_local_experts=experts, num_experts_per_tok=1
    )
    return library("llama4").Llama4TextMoe(config)


def mixtral(experts: int = EXPERTS, implementation: str = "grouped_mm") -> nn.Module:
    if not hasattr(F, "grouped_mm"):
        pytest.skip("this PyTorch has no grouped_mm")
    config = library("mixtral").MixtralConfig(
        hidden_size=8, intermediate_size=8, num_local_experts=experts, num_experts_per_tok=2
    )
    config._experts_implementation = implementation
    return library("mixtral").MixtralSparseMoeBlock(config)


#: the dtype and how exact it is
KINDS = {"llama4": (torch.float64, 1e-9), "mixtral": (torch.float32, 2e-3)}
BLOCKS = {"llama4": llama4, "mixtral": mixtral}
every = pytest.mark.parametrize("kind", KINDS)


def made(kind: str) -> nn.Module:
    return Mixture(BLOCKS[kind]()).to(KINDS[kind][0])


@functools.cache
def data(kind: str, batches: int = 8, size: int = 32) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(batches, size, TOKENS, 6, dtype=KINDS[kind][0], generator=generator)
    return [(b, b[..., :4].abs() * b[..., 2:]) for b in x]


def given(model: nn.Module, x: Tensor) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """What each expert's `down_proj` reads and puts out, and what the model does; a loop written by hand."""
    experts, rows = model.moe.experts, []
    h = model.into(x).reshape(-1, 8)
    if hasattr(model.moe, "router"):
        scores, _ = model.moe.router(h)
        base = model.moe.shared_expert(h)
        parts = [(h * scores[:, e : e + 1], torch.arange(len(h)), None) for e in range(EXPERTS)]
        up = experts.gate_up_proj.mT
        down = experts.down_proj.mT
    else:
        probabilities = F.softmax(F.linear(h, model.moe.gate.weight), -1)
        top = probabilities.topk(2).indices
        share = probabilities / probabilities.gather(1, top).sum(1, keepdim=True)
        base, parts = torch.zeros_like(h), []
        for e in range(EXPERTS):
            mine = (top == e).any(1).nonzero().flatten()
            parts.append((h[mine], mine, share[mine, e]))
        up, down = experts.gate_up_proj, experts.down_proj
    outs = []
    for e, (own, tokens, weight) in enumerate(parts):
        gate, value = F.linear(own, up[e]).chunk(2, -1)
        z = F.silu(gate) * value
        out = F.linear(z, down[e])
        rows.append(z.detach())
        outs.append(out)
        base = base.index_add(0, tokens, out if weight is None else out * weight[:, None])
    y = model.out(h + base).view(x.shape[:-1] + (4,))
    torch.testing.assert_close(y, model(x), rtol=1e-4, atol=1e-4)
    return rows, outs, y


def by_hand(model: nn.Module, batches: list[tuple[Tensor, Tensor]]) -> tuple[float, float, list[tuple[Tensor, Tensor]]]:
    """Psi and E|V|^2 of `down_proj`, and of each expert dW* and the second moment of what it reads."""
    pairs: list[list[tuple[Tensor, Tensor]]] = [[] for _ in range(EXPERTS)]
    count = 0
    for x, y in batches:
        for i in range(len(x)):
            rows, outs, found = given(model, x[i : i + 1])
            gradients = torch.autograd.grad(F.mse_loss(found, y[i : i + 1]), outs)
            for e, (z, g) in enumerate(zip(rows, gradients, strict=True)):
                pairs[e].append((z.double(), -g.double()))
            count += 1
    psi, desired, updates = 0.0, 0.0, []
    for own in pairs:
        m = sum(z.T @ z for z, _ in own) / count
        vh = sum(v.T @ z for z, v in own) / count
        update = vh @ torch.linalg.pinv(m, hermitian=True, rcond=1e-12)
        updates.append((update, m))
        psi += sum(float((v - z @ update.T).square().sum()) for z, v in own) / count
        desired += sum(float(v.square().sum()) for _, v in own) / count
    return psi, desired, updates


@every
def test_statistics_are_those_of_each_experts_rows(kind: str) -> None:
    model, batches = made(kind), data(kind, 3)
    rel = KINDS[kind][1]
    psi, desired, updates = by_hand(model, batches)
    assert 0 < psi < desired
    found = fxgrow.profile(model, batches, F.mse_loss, method="random", positions="all", progress=False)
    width = found["moe.experts.gate_up_proj"]
    assert width.bottleneck == pytest.approx(psi, rel=rel) and width.desired == pytest.approx(desired, rel=rel)
    for e, (expected, m) in enumerate(updates):
        # what it moves outputs by; Llama 4's router rounds to float32, for a batch now and then another way
        off = found.updates[f"moe.experts.down_proj[{e}]"].double() - expected
        assert float((off @ m * off).sum()) <= (10 * rel) ** 2 * float((expected @ m * expected).sum())


@every
def test_what_is_remembered_gives_the_same(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 64 samples all are remembered, and every row of each expert is read once."""
    monkeypatch.setattr("fxgrow.statistics.consumer_moments.PROJECTION_RIDGE", 0.0)
    exact, sampled = (
        fxgrow.profile(made(kind), data(kind, 2), F.mse_loss, method="random", positions=p, progress=False)
        for p in ("all", "sampled")
    )
    name = "moe.experts.gate_up_proj"
    assert sampled[name].desired == pytest.approx(exact[name].desired, rel=KINDS[kind][1])
    assert sampled[name].bottleneck == pytest.approx(exact[name].bottleneck, rel=KINDS[kind][1])


@every
@pytest.mark.parametrize("method", ["default", "random-refit"])
def test_growth_lowers_the_loss(kind: str, method: str) -> None:
    model, name = made(kind), "moe.experts.gate_up_proj"
    step = next(w.step for w in fxgrow.widths(fxgrow.capture(model, data(kind)[0][:1])) if w.name == name)
    grown = fxgrow.grow(model, data(kind), loss_fn=F.mse_loss, method=method, neurons={name: 2 * step}, progress=False)
    record = grown.meta["fxgrow"]
    before, after = record.losses["eval"]
    assert after < before and record.profile[name].gains[0] > 0
    new = grown.get_parameter("moe.experts.down_proj").numel() - model.moe.experts.down_proj.numel()
    assert new == EXPERTS * 8 * step
    fresh = [(x, y) for x, y in data(kind, 12)[8:]]
    assert sum(F.mse_loss(grown(x), y) for x, y in fresh) < sum(F.mse_loss(model(x), y) for x, y in fresh)
    x = data(kind)[0][0]
    same = fxgrow.apply(fxgrow.capture(model, (x,)), record.plan.scaled(0.0))
    bound = 1e-10 if KINDS[kind][0] == torch.float64 else 1e-5
    torch.testing.assert_close(same(x), model(x), rtol=bound, atol=bound)


@every
@pytest.mark.parametrize("method", ["net2wider", "variance-transfer"])
def test_units_that_are_written_keep_the_function(kind: str, method: str) -> None:
    model, name, x = made(kind), "moe.experts.gate_up_proj", data(kind)[0][0]
    grown = fxgrow.grow(model, data(kind), loss_fn=F.mse_loss, method=method, neurons={name: 16}, progress=False)
    bound = 1e-10 if KINDS[kind][0] == torch.float64 else 1e-5
    torch.testing.assert_close(grown(x), model(x), rtol=bound, atol=bound)
    assert float(grown.get_parameter("moe.experts.down_proj").detach().abs().min()) > 0


@every
def test_new_rows_have_the_scale_of_one_experts_inputs(kind: str) -> None:
    model, x = made(kind), data(kind)[0][:1]
    gm = fxgrow.capture(model, x)
    wide = fxgrow.widen(gm, x, {"moe.experts.gate_up_proj": 400})
    weight = wide.get_parameter("moe.experts.gate_up_proj")
    weight = weight.mT if kind == "llama4" else weight  # [experts, gates and values, in]
    new = weight.unflatten(1, (2, -1))[:, :, 8:]
    assert new.shape == (EXPERTS, 2, 200, 8)
    assert float(new.detach().std()) == pytest.approx((2 / 8) ** 0.5, rel=0.05)


def test_more_experts_than_can_be_measured_have_no_statistics() -> None:
    model = Mixture(llama4(GROUPS + 1)).double()
    profile = fxgrow.profile(model, data("llama4", 2), F.mse_loss, progress=False)
    assert profile["moe.experts.gate_up_proj"].bottleneck == 0


def test_a_token_that_goes_to_an_expert_twice() -> None:
    """Its rows cannot be told apart by token."""
    if not hasattr(F, "grouped_mm"):
        pytest.skip("this PyTorch has no grouped_mm")

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Parameter(torch.randn(2, 8, 8)), nn.Parameter(torch.randn(2, 8, 8))

        def forward(self, x: Tensor) -> Tensor:
            index = torch.cat([torch.zeros(4, dtype=torch.long), torch.arange(x.shape[0] - 4)])
            ends = torch.full((2,), 4, dtype=torch.int32).cumsum(0, dtype=torch.int32)
            h = F.relu(F.grouped_mm(x[index], self.a, offs=ends))
            return F.grouped_mm(h, self.b, offs=ends)

    x = torch.randn(8, 8)
    with pytest.raises(fxgrow.ProfileError, match="same expert twice"):
        fxgrow.profile(Twice(), [(x, torch.randn(8, 8))], F.mse_loss, progress=False)


class Routed(nn.Module):
    """A mixture that is written out, with one thing or another that copies may not survive."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        if not hasattr(F, "grouped_mm"):
            pytest.skip("this PyTorch has no grouped_mm")
        torch.manual_seed(0)
        self.kind, self.router = kind, nn.Linear(8, 4, bias=kind == "bias")
        self.up, self.down = nn.Parameter(torch.randn(4, 8, 12) / 3), nn.Parameter(torch.randn(4, 12, 8) / 3)
        self.scale = nn.Parameter(torch.rand(4) + 0.5)
        self.router.weight.requires_grad_(kind != "frozen")

    def forward(self, x: Tensor) -> Any:
        logits = self.router(x)
        scores = logits.sigmoid() if self.kind == "sigmoid" else logits.softmax(-1)
        if self.kind == "scaled":
            scores = scores * self.scale
        weights, chosen = torch.topk(scores, 2, dim=-1)
        if self.kind == "normalised":
            weights = weights / weights.sum(-1, keepdim=True)
        if self.kind == "sure":
            weights = weights * (weights > 0.2)
        expert, order = chosen.reshape(-1).sort()
        ends = torch.histc(expert.float(), bins=4, min=0, max=3).cumsum(0, dtype=torch.int32)
        h = F.grouped_mm(x[order // chosen.size(-1)], self.up, offs=ends)
        out = F.grouped_mm(F.relu(h), self.down, offs=ends) * weights.reshape(-1)[order][:, None]
        y = torch.zeros_like(out).index_copy(0, order, out).view(x.shape[0], -1, 8).sum(1)
        if self.kind == "seen":
            return y + self.up.square().mean()
        return (y, logits) if self.kind == "returned" else y


@pytest.mark.parametrize("kind", ["plain", "bias", "scaled", "normalised"])
def test_all_experts_can_be_copied_where_weights_add_up_to_the_same(kind: str) -> None:
    model, x = Routed(kind), torch.randn(6, 8)
    (width,) = [w for w in fxgrow.widths(fxgrow.capture(model, (x,))) if w.name == "router"]
    assert width.pinned is None and (width.size, width.step) == (4, 4)
    grown = fxgrow.widen(model, (x,), {"router": 8, "up": 4})
    for name, p in model.named_parameters():
        if name != "scale" or kind == name + "d":
            old = grown.get_parameter(name)
            assert len(old) == 12 and torch.equal(old[:4][tuple(slice(n) for n in p.shape)], p)
            assert torch.equal(old[:4], old[4:8]) and torch.equal(old[:4], old[8:])
    x = torch.randn(40, 8)
    torch.testing.assert_close(grown(x), model(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["sigmoid", "sure", "frozen", "seen", "returned"])
def test_experts_are_not_copied_where_that_would_change_something(kind: str) -> None:
    model, x = Routed(kind), torch.randn(6, 8)
    (width,) = [w for w in fxgrow.widths(fxgrow.capture(model, (x,))) if w.name == "router"]
    assert width.pinned is not None
    with pytest.raises(fxgrow.PlanError, match="router"):
        fxgrow.widen(model, (x,), {"router": 4})


def test_copies_stay_copies_until_they_are_told_apart() -> None:
    model, (x, y) = made("mixtral"), data("mixtral")[0]
    grown = fxgrow.widen(model, (x,), {"moe.gate": EXPERTS})
    names = ["moe.gate.weight", "moe.experts.gate_up_proj", "moe.experts.down_proj"]

    def slopes() -> list[tuple[Tensor, Tensor]]:
        grown.zero_grad()
        F.mse_loss(grown(x), y).backward()
        return [tuple(grown.get_parameter(n).grad.chunk(2)) for n in names]  # type: ignore[union-attr, misc]

    for a, b in slopes():
        assert a.any()
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5 * float(a.abs().max()))
    # half and half: what is added to the one and taken from the other leaves the function as it is
    with torch.no_grad():
        old, new = grown.get_parameter(names[2]).chunk(2)
        noise = 0.1 * torch.randn_like(old)
        old += noise
        new -= noise
    torch.testing.assert_close(grown(x), model(x), rtol=1e-4, atol=1e-4)
    for a, b in slopes()[:2]:
        assert float((a - b).abs().max()) > 1e-2 * float(a.abs().max())


def test_data_say_nothing_of_copies() -> None:
    model, name = made("mixtral"), "moe.gate"
    assert name not in fxgrow.profile(model, data("mixtral", 2), F.mse_loss, progress=False)
    with pytest.raises(fxgrow.PlanError, match=r"moe\.gate.*fxgrow\.widen"):
        fxgrow.grow(model, data("mixtral", 2), loss_fn=F.mse_loss, neurons={name: EXPERTS}, progress=False)
    twice = fxgrow.widen(model, (data("mixtral")[0][0],), {name: EXPERTS})
    grown = fxgrow.grow(
        twice, data("mixtral"), loss_fn=F.mse_loss, neurons={"moe.experts.gate_up_proj": 8}, progress=False
    )
    before, after = grown.meta["fxgrow"].losses["eval"]
    assert after < before and grown.get_parameter("moe.experts.down_proj").shape == (2 * EXPERTS, 8, 12)
