"""The slope of silent units against per-sample sums written out by hand."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxgrow
from fxgrow.analysis.analyse import analyse
from fxgrow.candidates.first_pass import FirstPass, project
from fxgrow.candidates.zero_unit_graph import SketchContext, WidthSketch, ZeroUnitGraph
from fxgrow.data.batches import Data
from fxgrow.initialisers.registry import find_initialiser
from fxgrow.statistics.collect import Statistics
from models.decoder import Decoder


class Attention(nn.Module):
    """Two heads written out, their number in the code (`heads`) or left to the layers' sizes."""

    def __init__(self, heads: int | None = None) -> None:
        super().__init__()
        self.heads = heads
        self.embed = nn.Linear(3, 6)
        self.q, self.k, self.v = nn.Linear(6, 8), nn.Linear(6, 8), nn.Linear(6, 8)
        self.o, self.out = nn.Linear(8, 6), nn.Linear(6, 4)

    def weights(self, x):
        n, t, _ = x.shape
        size = (n, t, -1, 4) if self.heads is None else (n, t, self.heads, -1)
        q, k, v = (layer(x).view(*size).transpose(1, 2) for layer in (self.q, self.k, self.v))
        return F.softmax(q @ k.transpose(-2, -1) / math.sqrt(4), -1), v

    def forward(self, x):
        x = self.embed(x)
        a, v = self.weights(x)
        y = (a @ v).transpose(1, 2).flatten(2)
        return self.out(torch.tanh(x + self.o(y)).mean(1))


def batches(count: int = 3) -> list:
    return [(torch.randn(5, 6, 3).double(), torch.randint(4, (5,))) for _ in range(count)]


def sketched(net, data, name, unit_groups, contexts=()):
    """The copy after a pass, and the width's sketch."""
    gm = fxgrow.capture(net, (data[0][0],))
    analysed = analyse(gm)
    h = analysed.widths[name]
    stats = Statistics(analysed, [h], exact=True, output_side=True)
    loader = Data(data)
    FirstPass(analysed, find_initialiser("tiny"), loader, None, True, torch.Generator()).collect(stats)
    stats.finish(torch.Generator())
    delta_w, _ = project(stats)
    s = WidthSketch.of(h, analysed)
    s.unit_groups, s.contexts = unit_groups, list(contexts)
    if contexts:
        s.producers["q.weight"].has_gradient[:] = s.producers["k.weight"].has_gradient[:] = False
    generator = torch.Generator().manual_seed(1)
    context = SketchContext(analysed, stats.consumers, delta_w, loader, None, False, generator)
    graph = ZeroUnitGraph(context, [s])
    graph.collect(loader)
    return graph, s, delta_w


def naive(net, data, update):
    """Sum over samples and tokens of b_h(t) (V(t) - dW* [y(t), 1])^T with b_h(t) = sum_s A_h(t, s) [x(s), 1]."""
    total = 0
    for x, y in data:
        for i in range(len(x)):
            e = net.embed(x[i : i + 1])
            a, v = net.weights(e)
            mixed = (a @ v).transpose(1, 2).flatten(2)
            o = net.o(mixed).detach().requires_grad_()
            loss = F.cross_entropy(net.out(torch.tanh(e + o).mean(1)), y[i : i + 1])
            rest = -torch.autograd.grad(loss, o)[0] - F.linear(mixed, update[:, :-1], update[:, -1])
            b = a[0] @ F.pad(e[0], (0, 1), value=1.0)
            total = total + torch.einsum("htp,to->hpo", b, rest[0])
    return total.detach()


def test_the_gradient_of_values_is_naive_n():
    torch.manual_seed(0)
    net, data = Attention(heads=2).double(), batches()
    graph, s, delta_w = sketched(net, data, "v", unit_groups=3)
    n = naive(net, data, delta_w["o.weight"])
    omega = graph.gm.o.weight[:, graph.new_indices["o.weight"]["v", 1]].unflatten(1, (3, 2))  # [O, units, heads]
    want = torch.einsum("hpo,oah->ahp", n, omega)
    torch.testing.assert_close(s.producers["v.weight"].gradient, want, rtol=1e-8, atol=1e-10)
    assert graph.zero_output["v"]


def test_a_new_head_sees_what_the_head_it_is_like_sees():
    torch.manual_seed(0)
    net, data = Attention().double(), batches()
    graph, s, delta_w = sketched(net, data, "q", unit_groups=2, contexts=(1, 0))
    n = naive(net, data, delta_w["o.weight"])
    omega = graph.gm.o.weight[:, graph.new_indices["o.weight"]["q", 1]].unflatten(1, (2, 4))  # [O, units, slots]
    want = torch.stack([(n[1] @ omega[:, 0]).T, (n[0] @ omega[:, 1]).T])
    torch.testing.assert_close(s.producers["v.weight"].gradient, want, rtol=1e-8, atol=1e-10)


def test_values_and_heads_get_units_and_gains():
    torch.manual_seed(0)
    net = Decoder(11, 12, depth=1, heads=2, head_size=4, width=0.25)
    tokens = torch.randint(11, (40, 13))
    data = [(t[:, :-1], t[:, 1:]) for t in tokens.split(10)]
    profile = fxgrow.profile(net, data, progress=False)
    heads = next(w.name for w in profile.widths if w.pinned is None and w.name.endswith("attention.q"))
    alpha = profile.proposals[heads].alpha
    old = net.blocks[0].attention.q.weight
    assert {tuple(a.shape) for a in alpha.values()} == {(4, 16)}
    assert any(torch.equal(alpha[f"{heads}.weight"], old[i : i + 4]) for i in (0, 4))
    grown = fxgrow.apply(profile.gm, fxgrow.plan(profile, neurons={heads: 4}))
    assert grown(tokens[:2, :-1]).isfinite().all()


def test_units_that_are_not_silent_at_zero_get_random_rows():
    class Gate(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(3, 5), nn.Linear(5, 2)

        def forward(self, x):
            w = torch.sigmoid(self.a(x))
            return self.b(torch.matmul(x.mT @ x, w.mT.mT[..., :3, :]) if x.dim() == 3 else w)

    torch.manual_seed(0)
    data = [(torch.randn(4, 3, 3), torch.randn(4, 3, 2)) for _ in range(3)]
    profile = fxgrow.profile(Gate(), data, progress=False)
    assert profile.proposals["a"].alpha == {}


@pytest.mark.parametrize("method", ["tiny", "random-refit"])
def test_other_methods_do_without(method):
    torch.manual_seed(0)
    net, data = Attention(heads=2), [(x.float(), y) for x, y in batches()]
    profile = fxgrow.profile(net, data, method=method, widths=["v"], progress=False)
    assert profile.proposals["v"].alpha == {}


@pytest.mark.parametrize("bias", ["q.bias", "v.bias", "o.bias"])
def test_frozen_biases_stay_frozen(bias):
    torch.manual_seed(0)
    net, data = Attention(heads=None if bias == "q.bias" else 2), [(x.float(), y) for x, y in batches(4)]
    net.get_parameter(bias).requires_grad_(False)
    profile = fxgrow.profile(net, data, progress=False)
    assert any(p.alpha for p in profile.proposals.values())
    assert not net.get_parameter(bias).requires_grad
    name = next(n for n, p in profile.proposals.items() if p.alpha)
    grown = fxgrow.apply(profile.gm, fxgrow.plan(profile, neurons={name: profile[name].width.step}))
    assert [p.requires_grad for p in grown.parameters()] == [p.requires_grad for p in net.parameters()]


class TwoHeads(nn.Module):
    """A gated width that two heads read; the loss sees the first one alone, or none through a gate that is zero."""

    def __init__(self, gate: float) -> None:
        super().__init__()
        self.f, self.a, self.b = nn.Linear(6, 8), nn.Linear(4, 3), nn.Linear(4, 2)
        self.gate = nn.Parameter(torch.tensor(gate))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        u, v = self.f(x).chunk(2, -1)
        h = torch.tanh(u) * torch.sigmoid(v)
        return self.gate * self.a(h), self.b(h)


@pytest.mark.parametrize("gate", [1.0, 0.0])
def test_consumers_that_no_gradient_reaches(gate: float) -> None:
    net, x = TwoHeads(gate), torch.randn(128, 6)
    batches = [(part, part[:, :3].sin()) for part in x.split(16)]
    grown = fxgrow.grow(
        net, batches, loss_fn=lambda out, target: (out[0] - target).square().mean(), neurons=2, progress=False
    )
    assert all(p.isfinite().all() for p in grown.parameters())
    assert grown.get_submodule("f").out_features in (8, 10)
