"""Objects made of tensors: distributions inside of a model and as its result, and results of the user's own classes."""

from __future__ import annotations

import io
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, distributions, nn
from torch.nn import functional as F

import fxgrow


class Policy(nn.Module):
    def __init__(self, act: Callable[[Any, Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.act, self.body = act, nn.Sequential(nn.Linear(6, 8), nn.Tanh())
        self.mean, self.spread, self.log_std = nn.Linear(8, 3), nn.Linear(8, 3), nn.Parameter(torch.zeros(3))

    def forward(self, x: Tensor) -> Any:
        h = self.body(x)
        return self.act(self, x, h)


class Result:
    def __init__(self, action: Tensor, rest: dict[str, Any]) -> None:
        self.action, self.rest = action, rest


def normal(m: Policy, h: Tensor) -> distributions.Normal:
    return distributions.Normal(m.mean(h), F.softplus(m.spread(h)) + 1e-3)


def squashed(m: Policy, x: Tensor, h: Tensor) -> Any:
    d = distributions.TransformedDistribution(normal(m, h), [distributions.TanhTransform(cache_size=1)])
    action = d.rsample() if m.training else torch.tanh(d.base_dist.mean)
    return action, distributions.Independent(d, 1).log_prob(0.9 * action), d


def latent(m: Policy, x: Tensor, h: Tensor) -> Any:
    q = distributions.Independent(normal(m, h), 1)
    p = distributions.Independent(distributions.Normal(torch.zeros_like(m.mean(h)), torch.ones_like(m.mean(h))), 1)
    return q, distributions.kl_divergence(q, p)


def counts(m: Policy, x: Tensor, h: Tensor) -> Any:
    d = distributions.NegativeBinomial(F.softplus(m.mean(h)), logits=m.spread(h), validate_args=True)
    return d, d.log_prob(x[:, :3].abs().floor()), distributions.Categorical(logits=m.mean(h)).entropy()


ACTS: dict[str, Callable[[Policy, Tensor, Tensor], Any]] = {
    "fixed spread": lambda m, x, h: distributions.Normal(m.mean(h), m.log_std.exp().expand(x.shape[0], 3)),
    "multivariate": lambda m, x, h: distributions.MultivariateNormal(
        m.mean(h), torch.diag_embed(F.softplus(m.spread(h)))
    ),
    "squashed": squashed,
    "latent": latent,
    "counts": counts,
    "own class": lambda m, x, h: Result(m.mean(h), {"spread": [m.spread(h)], "name": "policy"}),
    "namespace": lambda m, x, h: types.SimpleNamespace(action=m.mean(h), size=x.shape[0]),
}


def content(value: Any) -> list[Any]:
    """What there is in a result, in order."""
    if isinstance(value, (tuple, list)):
        return [item for v in value for item in content(v)]
    if isinstance(value, dict):
        return content(sorted(item for item in value.items() if item[0][0] != "_"))
    return content(vars(value)) if hasattr(value, "__dict__") and not isinstance(value, Tensor) else [value]


def run(m: nn.Module, x: Tensor, training: bool) -> list[Any]:
    m.train(training)
    torch.manual_seed(0)
    return content(m(x))


@pytest.mark.parametrize("name", ACTS)
def test_objects_of_tensors_are_inside_of_graphs_and_come_out_of_them(name: str) -> None:
    torch.manual_seed(0)
    m, x = Policy(ACTS[name]).double(), torch.randn(4, 6).double()
    gm = fxgrow.capture(m, (x,))
    wider = fxgrow.widen(m, (x,), {"body.0": 2})
    for training in (True, False):
        for inputs in (x, torch.randn(3, 6).double()):
            expected = run(m, inputs, training)
            assert any(isinstance(item, Tensor) for item in expected)
            for graph in (gm, wider):
                assert type(graph(inputs)) is type(m(inputs))
                found = run(graph, inputs, training)
                assert list(map(type, found)) == list(map(type, expected))
                for a, b in zip(found, expected, strict=True):
                    torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10) if isinstance(a, Tensor) else None


def test_a_graph_that_returns_an_object_can_be_pickled() -> None:
    m, x = Policy(ACTS["latent"]), torch.randn(4, 6)
    gm, file = fxgrow.capture(m, (x,)), io.BytesIO()
    torch.save(gm, file)
    file.seek(0)
    q, divergence = torch.load(file, weights_only=False)(x)
    torch.testing.assert_close((q.mean, divergence), (m(x)[0].mean, m(x)[1]))


class Remembers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.mean = nn.Linear(6, 3), torch.zeros(6)

    def forward(self, x: Tensor) -> Tensor:
        self.mean = self.mean.type_as(x)
        return self.a(x - self.mean)


def test_a_proxy_that_another_trace_left_on_the_model_is_named() -> None:
    m = Remembers()
    fxgrow.capture(m, (torch.randn(2, 6),))
    torch.fx.symbolic_trace(m)
    with pytest.raises(fxgrow.CaptureError, match="from an earlier trace. Set that attribute anew"):
        fxgrow.capture(m, (torch.randn(2, 6),))


class GaussianHead:
    """Keeps its last distribution, as libraries for reinforcement learning do."""

    last: distributions.Normal | None = None

    def sample_mean(self, mean: Tensor) -> Tensor:
        self.last = distributions.Normal(mean, torch.ones_like(mean))
        return self.last.mean


class KeepingPolicy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.hidden, self.action, self.head = nn.Linear(4, 8), nn.Linear(8, 2), GaussianHead()

    def forward(self, x: Tensor) -> Tensor:
        return self.head.sample_mean(self.action(self.hidden(x).tanh()))


def test_an_object_of_the_model_keeps_no_proxy_inside_a_distribution() -> None:
    model, x = KeepingPolicy(), torch.randn(3, 4)
    fxgrow.capture(model, (x,))
    assert model.head.last is None
    wide = fxgrow.widen(model, (x,), {"hidden": 2})
    assert model.head.last is None
    assert torch.allclose(wide(x), model(x), atol=1e-6)
