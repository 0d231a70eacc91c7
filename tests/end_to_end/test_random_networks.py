"""Random networks, every free width grown twice in random order: the same function, names and sizes."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from fxgrow.analysis.analyse import widths
from fxgrow.rewriting.rewrite import rewrite
from fxgrow.tracing.capture import capture
from tests.rewriting.test_rewrite import close


class Random(nn.Module):
    """A sequence of steps over a list of tensors [n, c, 4]; each step adds one made of earlier ones."""

    def __init__(self, steps: list[tuple[str, int, int, int]]) -> None:
        super().__init__()
        self.steps = []
        self.layers = nn.ModuleDict()
        channels = [3]
        for i, (kind, a, b, size) in enumerate(steps):
            a, b = a % len(channels), b % len(channels)
            c = channels[a]
            out, layer = self._layer(kind, c, size)
            if kind == "add" and c != channels[b]:
                kind, out, layer = "cat", c + channels[b], None
            elif kind == "cat":
                out = c + channels[b]
            elif kind in ("chunk", "glu") and c % 2:
                kind, out = "tanh", c
            elif kind == "shuffle" and c % 2:
                kind = "tanh"
            if kind == "again" and not any(k == "square" and channels[x] == c for k, x, _, _ in self.steps):
                kind, layer = "square", nn.Conv1d(c, c, 1)
            elif kind == "again":
                layer = next(self.layers[n] for k, x, _, n in self.steps if k == "square" and channels[x] == c)
            if layer is not None:
                self.layers[str(i)] = layer
            self.steps.append((kind, a, b, str(i)))
            channels.append(out)
        self.head = nn.Linear(channels[-1] * 4, 2)

    @staticmethod
    def _layer(kind: str, c: int, size: int) -> tuple[int, nn.Module | None]:
        if kind == "conv":
            return size, nn.Conv1d(c, size, 3, padding=1)
        if kind == "grouped":
            groups = math.gcd(c, size)
            return size, nn.Conv1d(c, size, 1, groups=groups)
        if kind == "depthwise":
            return c, nn.Conv1d(c, c, 3, padding=1, groups=c)
        if kind == "linear":
            return size, nn.Linear(c, size)
        if kind == "batchnorm":
            return c, nn.BatchNorm1d(c)
        if kind == "groupnorm":
            return c, nn.GroupNorm(c // 2 if c % 2 == 0 else 1, c)
        if kind == "layernorm":
            return c, nn.LayerNorm(c)
        if kind == "rmsnorm":
            return c, nn.RMSNorm(c, eps=1e-5)
        if kind == "gated":
            return size, nn.ModuleList([nn.Linear(c, size), nn.Linear(c, size)])
        if kind == "attention":
            return size, nn.ModuleList([nn.Linear(c, 3 * size), nn.Linear(size, size)])
        if kind in ("chunk", "glu"):
            return c // 2, None
        return c, None

    def forward(self, x: Tensor) -> Tensor:
        made = [x]
        for kind, a, b, name in self.steps:
            h = made[a]
            n, c, length = h.shape
            if kind in ("linear", "layernorm", "rmsnorm"):
                h = self.layers[name](h.transpose(1, 2)).transpose(1, 2)
            elif kind == "gated":
                gate, up = self.layers[name]
                h = (F.silu(gate(h.transpose(1, 2))) * up(h.transpose(1, 2))).transpose(1, 2)
            elif kind == "attention":
                qkv, o = self.layers[name]
                heads = 2 if qkv.out_features % 4 == 0 else 1
                q, k, v = qkv(h.transpose(1, 2)).view(n, length, 3, heads, -1).permute(2, 0, 3, 1, 4)
                h = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
                h = o(h).transpose(1, 2)
            elif name in self.layers:
                h = self.layers[name](h)
            elif kind == "add":
                h = h + made[b]
            elif kind == "cat":
                h = torch.cat([h, made[b]], 1)
            elif kind == "chunk":
                left, right = h.chunk(2, 1)
                h = left - right
            elif kind == "glu":
                h = F.glu(h, 1)
            elif kind == "shuffle":
                h = h.view(n, 2, c // 2, length).transpose(1, 2).reshape(n, c, length)
            elif kind == "gate":
                h = h * h.mean(2, keepdim=True).sigmoid()
            elif kind == "flat":
                h = h.flatten(1).view(n, c, length)
            else:
                h = h.tanh()
            made.append(h)
        return self.head(made[-1].flatten(1))


KINDS = (
    "conv conv conv grouped depthwise linear batchnorm groupnorm layernorm rmsnorm add add add cat chunk glu shuffle "
    "gate gated attention flat again tanh"
).split()
STEPS = st.lists(
    st.tuples(st.sampled_from(KINDS), st.integers(-3, -1), st.integers(-5, -1), st.sampled_from([2, 3, 4, 6])),
    min_size=2,
    max_size=9,
)


def grow_twice_and_compare(steps: list[tuple[str, int, int, int]], order: list[int]) -> None:
    torch.manual_seed(0)
    model = Random([("conv", -1, -1, 4), *steps]).double()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d):
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 2)
    x = torch.randn(3, 3, 4, dtype=torch.float64)
    gm = capture(model, (x,))
    found = {w.name: w for w in widths(gm)}
    names = [n for n, w in found.items() if w.pinned is None]
    names = [names[i % len(names)] for i in order] if names else []
    names = list(dict.fromkeys(names))
    grown = gm
    for times in (1, 2):
        for name in names:
            grown, _ = rewrite(grown, {name: times * found[name].step})
    once, _ = rewrite(gm, {name: 3 * found[name].step for name in names})
    assert {n: t.shape for n, t in once.state_dict().items()} == {n: t.shape for n, t in grown.state_dict().items()}
    assert [(w.name, w.size) for w in widths(once)] == [(w.name, w.size) for w in widths(grown)]
    assert list(found) == [w.name for w in widths(grown)]
    for inputs in (x, torch.randn(2, 3, 4, dtype=torch.float64)):
        for training in (False, True):
            assert close(model, grown, inputs, training) and close(model, once, inputs, training)


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(STEPS, st.lists(st.integers(0, 20), min_size=1, max_size=6))
def test_random_networks(steps: list[tuple[str, int, int, int]], order: list[int]) -> None:
    grow_twice_and_compare(steps, order)


@pytest.mark.slow
@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@given(STEPS, st.lists(st.integers(0, 20), min_size=1, max_size=6))
def test_many_random_networks(steps: list[tuple[str, int, int, int]], order: list[int]) -> None:
    grow_twice_and_compare(steps, order)
