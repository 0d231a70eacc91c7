"""Norms as people write them: a mean, variance or length over a width, and arithmetic with it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fxgrow
from fxgrow.analysis.analyse import analyse
from fxgrow.rewriting.rewrite import rewrite

Formula = Callable[[Any, Tensor], Tensor]
K: dict[str, Any] = {"dim": -1, "keepdim": True}


class Norm(nn.Module):
    """A formula with the parameters that it may use."""

    def __init__(self, formula: Formula, *shape: int) -> None:
        super().__init__()
        self.formula, self.root = formula, 8**0.5
        self.w, self.b = nn.Parameter(torch.randn(8, *shape)), nn.Parameter(torch.randn(8, *shape))
        self.g = nn.Parameter(torch.tensor(1.3))
        self.register_buffer("eps", torch.tensor(0.03))

    def forward(self, x: Tensor) -> Tensor:
        return self.formula(self, x)


class Stream(nn.Module):
    """A residual stream of 8 units that is normalised before its two readers."""

    def __init__(self, formula: Formula, *shape: int) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(5, 8), nn.Linear(8, 3)
        self.norm1, self.norm2 = Norm(formula, *shape), Norm(formula, *shape)
        self.mlp = nn.Sequential(nn.Linear(8, 12), nn.GELU(), nn.Linear(12, 8))
        self.units_last = not shape

    def normalised(self, norm: nn.Module, x: Tensor) -> Tensor:
        return norm(x) if self.units_last else norm(x.mT).mT

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        x = x + self.mlp(self.normalised(self.norm1, x))
        return self.last(self.normalised(self.norm2, x))


def unsqueezed(s: Any, x: Tensor) -> Tensor:
    mean, variance = x.mean(-1), x.var(-1, unbiased=False)
    return (x - mean.unsqueeze(-1)) / (variance[..., None] + 0.02) ** 0.5 * s.w + s.b


def centred_length(s: Any, x: Tensor) -> Tensor:
    x = x - x.mean(**K)
    return x / (x.norm(**K) * s.root**-1 + 0.1) * s.w + s.b


def both_at_once(s: Any, x: Tensor) -> Tensor:
    deviation, mean = torch.std_mean(x, **K)
    return (x - mean) / (deviation + 0.1) * s.w + s.b


FORMULAS: dict[str, Formula] = {
    "variance": lambda s, x: s.w * (x - x.mean(**K)) / (x.var(**K, correction=0) + 0.02).sqrt() + s.b,
    "squared deviation": lambda s, x: (x - x.mean(-1, True)) * torch.rsqrt(x.std(-1, keepdim=True) ** 2 + 0.02) * s.w,
    "offset": lambda s, x: (x - x.mean(**K)) / (x.std(**K) + 0.1) * (1 + s.w) - s.b,
    "eps that is a buffer": lambda s, x: (x - x.mean(**K)) / torch.sqrt(x.var(**K) + s.eps) * s.w + s.b,
    "limit": lambda s, x: (x - x.mean(**K)) / x.std(**K).clamp(min=0.4) * s.w + s.b,
    "in place": lambda s, x: (x - x.mean(**K)).div_(x.std(**K) + 0.1).mul_(s.w).add_(s.b),
    "without weights": lambda s, x: (x - x.mean(**K)) / (x.std(**K) + 0.1),
    "one weight": lambda s, x: s.g * (x - x.mean(**K)) / (x.std(**K) + 0.1),
    "numerator not centred": lambda s, x: x / torch.sqrt(x.var(**K, unbiased=False) + 0.02) * s.w + s.b,
    "mean taken out": lambda s, x: x - x.mean(**K),
    "unsqueezed": unsqueezed,
    "centred length": centred_length,
    "both at once": both_at_once,
    "rms": lambda s, x: x / torch.sqrt(torch.mean(x**2, **K) + 0.02) * s.w,
    "rms of a length": lambda s, x: x / (torch.linalg.vector_norm(x, **K) * x.shape[-1] ** -0.5 + 0.1) * s.w,
    "rms over positions too": lambda s, x: x / torch.sqrt((x**2).mean((1, 2), keepdim=True) + 0.02) * s.w,
    "length and root of the size": lambda s, x: F.normalize(x, dim=-1) * x.shape[-1] ** 0.5 * (s.w + 1),
    "one length for all": lambda s, x: x * (s.g / torch.norm(x, **K).clamp(min=0.1)),
    "mean of absolute values": lambda s, x: x / (x.abs().mean(**K) + 0.1) * s.w,
    "norm of a norm": lambda s, x: x / (F.layer_norm(x, (x.shape[-1],)).norm(**K) + 0.1) * s.w,
    "response": lambda s, x: s.w * x * (r := x.norm(dim=1, keepdim=True)) / (r.mean(**K) + 0.1) + s.b + x,
}
CHANNELS_FIRST: dict[str, tuple[Formula, int]] = {
    "weights of the shape": (
        lambda s, x: (
            s.w * ((x - x.mean(1, True)) / torch.sqrt((x - x.mean(1, True)).pow(2).mean(1, True) + 0.02)) + s.b
        ),
        1,
    ),
    "variance and mean": (
        lambda s, x: (x - (vm := torch.var_mean(x, 1, keepdim=True))[1]) * (vm[0] + 0.02).rsqrt() * s.w,
        1,
    ),
}


pytestmark = pytest.mark.usefixtures("float64")


def assert_widens(net: nn.Module, x: Tensor, name: str) -> None:
    gm = fxgrow.capture(net, (x,))
    units = {w.name: 3 * w.step for w in fxgrow.widths(gm) if w.pinned is None}
    assert name in units, [(w.name, str(w.pinned)) for w in fxgrow.widths(gm)]
    wider, _ = rewrite(gm, units, generator=torch.Generator().manual_seed(0))
    again, _ = rewrite(wider, {name: 1}, generator=torch.Generator().manual_seed(1))
    back, _ = rewrite(wider, {}, removals={name: [8, 9, 10]})
    for other in (wider, again, back):
        for training in (False, True):
            for inputs in (x, x[:2, :4]):
                expected = net.train(training)(inputs).detach()
                torch.testing.assert_close(other.train(training)(inputs).detach(), expected, rtol=0, atol=1e-11)
    wider(x).square().sum().backward()
    for parameter, p in wider.named_parameters():
        assert p.grad is None or bool(p.grad.isfinite().all()), parameter
    # new units learn
    assert bool(wider.get_parameter(f"{name}.weight").grad[8:].abs().max() > 0)


@pytest.mark.parametrize("formula", FORMULAS)
def test_a_stream_grows_under_its_norms(formula: str) -> None:
    assert_widens(Stream(FORMULAS[formula]), torch.randn(3, 6, 5), "first")


@pytest.mark.parametrize("formula", CHANNELS_FIRST)
def test_norms_over_channels_first(formula: str) -> None:
    assert_widens(Stream(*CHANNELS_FIRST[formula]), torch.randn(3, 6, 5), "first")


@pytest.mark.parametrize(
    ("formula", "code", "message"),
    [
        (lambda s, x: (x - x.mean(**K)) / (x.std(**K) + 0.1) + s.b, "norm", "without a weight that could be rescaled"),
        (lambda s, x: F.gelu(x / (x.std(**K) + 0.1)) * s.w, "norm", "without a weight that could be rescaled"),
        (lambda s, x: (x / (x.std(**K) + 0.1) * s.w + s.b) * s.w, "norm", "norm1.w, which would have to be rescaled"),
        # a unit at the mean of each position is not at the mean of all
        (lambda s, x: x / (x.var((1, 2), keepdim=True) + 0.1) * s.w, "reduce", "summed or compared"),
        (lambda s, x: x.abs() - x.abs().mean(**K), "reduce", "summed or compared"),
        (lambda s, x: x * x.norm(-1, -1, keepdim=True), "reduce", "summed or compared"),
    ],
    ids=["only a bias", "gelu", "weight used twice", "over positions", "absolute", "harmonic"],
)
def test_what_cannot_be_taken_back_is_pinned(formula: Formula, code: str, message: str) -> None:
    gm = fxgrow.capture(Stream(formula), (torch.randn(3, 6, 5),))
    reason = next(w.pinned for w in fxgrow.widths(gm) if w.name == "first")
    assert reason is not None and reason.code == code and message in reason.message


def test_a_value_that_is_added_is_not_the_mean_that_is_subtracted() -> None:
    """`x + mean` and `x + (-mean)` stay exact as well: the new units are then no zeros."""
    for formula in (
        lambda s, x: (x + x.mean(**K)) / (x.std(**K) + 0.1) * s.w + s.b,
        lambda s, x: (x - -x.mean(**K)) / (x.std(**K) + 0.1) * s.w + s.b,
        lambda s, x: (x - x.mean(**K)).square() / (x.var(**K) + 0.1) * s.w + s.b,
    ):
        assert_widens(Stream(formula), torch.randn(3, 6, 5), "first")


def test_a_bias_behind_a_norm_starts_at_zero_and_one_before_it_at_the_mean() -> None:
    class Positions(Stream):
        def __init__(self) -> None:
            super().__init__(FORMULAS["variance"])
            self.positions = nn.Parameter(torch.randn(6, 8))

        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x) + self.positions[: x.shape[1]]
            return self.last(self.norm1(x + self.mlp(self.norm2(x))))

    net, x = Positions(), torch.randn(3, 6, 5)
    assert_widens(net, x, "first")
    wider = fxgrow.widen(net, (x,), {"first": 2})
    assert not bool(wider.get_parameter("norm1.b")[8:].any())
    mean = net.positions.mean(1, keepdim=True).expand(-1, 2)
    torch.testing.assert_close(wider.get_parameter("positions")[:, 8:], mean)


def test_what_is_rescaled_is_named() -> None:
    gm = fxgrow.capture(Stream(FORMULAS["without weights"]), (torch.randn(3, 6, 5),))
    state = analyse(gm).free_width("first").initial_state
    assert state is not None and state.rescaled.keys() == {"mlp.0.weight", "last.weight"}
