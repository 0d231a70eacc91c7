"""Operators without a rule: widths pass where the operator is equivariant to selecting units, and nowhere else."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

import fxgrow
from fxgrow.ops import infer_rule
from fxgrow.ops.registry import find_rule
from tests.ops.table import Net

# -- a user's own functions: one node each, and no rule


@pytest.fixture(autouse=True)
def marked_functions_stay_nodes(monkeypatch: pytest.MonkeyPatch) -> None:
    """As compiled operators would; capture follows the code of marked functions otherwise."""
    monkeypatch.setattr("fxgrow.tracing.namespaces.has_rule", lambda function: True)


@fx.wrap
def gate(x: Tensor, y: Tensor) -> Tensor:
    return F.silu(x) * y


@fx.wrap
def sloped(x: Tensor, slope: Tensor) -> Tensor:
    return x * torch.sigmoid(x * slope[:, None, None])


@fx.wrap
def both_signs(x: Tensor) -> Tensor:
    return torch.cat([x.relu(), (-x).relu()], 1)


@fx.wrap
def packed_gate(x: Tensor) -> Tensor:
    a, b = x.chunk(2, 1)
    return F.silu(a) * b


@fx.wrap
def to_tokens(x: Tensor) -> Tensor:
    return x.flatten(2).transpose(1, 2)


@fx.wrap
def two_views(x: Tensor) -> dict[str, Any]:
    return {"first": x.sin(), "others": [x.cos(), x.mean((2, 3))]}


@fx.wrap
def drop_paths(x: Tensor, p: float, training: bool) -> Tensor:
    return x * (torch.rand(len(x), 1, 1, 1) >= p).to(x) / (1 - p) if training else x


@fx.wrap
def noisy_in_training(x: Tensor, training: bool) -> Tensor:
    return x + torch.randn_like(x) if training else x


@fx.wrap
def centred_in_training(x: Tensor, training: bool) -> Tensor:
    return x - x.mean(1, keepdim=True) if training else x


@fx.wrap
def turned_by_a_sum(x: Tensor) -> Tensor:
    return x if x.sum() > 0 else 2 * x


@fx.wrap
def clipped_by_the_largest(x: Tensor) -> Tensor:
    return x if x.abs().max() < 100 else x.clamp(-1, 1)


@fx.wrap
def centred_when_wide(x: Tensor) -> Tensor:
    return x - x.mean(1, keepdim=True) if x.shape[1] > 6 else x


@fx.wrap
def centred_unless_small(x: Tensor) -> Tensor:
    return x - x.mean(1, keepdim=True) if x.shape[2] > 30 else x


@fx.wrap
def in_place(x: Tensor) -> Tensor:
    return x.mul_(2)


_COUNT = [0]


@fx.wrap
def counting(x: Tensor) -> Tensor:
    _COUNT[0] += 1
    return x * _COUNT[0]


@fx.wrap
def of_eight(x: Tensor) -> Tensor:
    return x * torch.ones(8)[:, None, None]


@fx.wrap
def nonzero_entries(x: Tensor) -> Tensor:
    return x[x > 0]


class Straight(torch.autograd.Function):
    """Rounds on the way forward only."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return (x * 8).round() / 8

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g


Use = Callable[[nn.Module, Tensor, Tensor], Tensor]

#: id -> what is done with two maps of 8 channels, the step of the first width, the number of channels that come out
PASSES: dict[str, tuple[Use, int, int]] = {
    "special-expit": (lambda m, a, b: torch.special.expit(a), 1, 8),
    "special-log-ndtr": (lambda m, a, b: torch.special.log_ndtr(a), 1, 8),
    "special-entr": (lambda m, a, b: torch.special.entr(a.sigmoid()), 1, 8),
    "special-xlog1py": (lambda m, a, b: torch.special.xlog1py(a, b.exp()), 1, 8),
    "special-i0e": (lambda m, a, b: torch.special.i0e(a), 1, 8),
    "special-zeta": (lambda m, a, b: torch.special.zeta(a.exp() + 1, b.exp()), 1, 8),
    "logaddexp": (lambda m, a, b: torch.logaddexp(a, b), 1, 8),
    "xlogy": (lambda m, a, b: torch.xlogy(a, b.exp()), 1, 8),
    "fmax": (lambda m, a, b: torch.fmax(a, b), 1, 8),
    "dist-to-a-map": (lambda m, a, b: (a - b).ldexp(torch.tensor(2.0)), 1, 8),
    "log-along-rows": (lambda m, a, b: torch.logcumsumexp(a, 2), 1, 8),
    "cummax-along-rows": (lambda m, a, b: torch.cummax(a, 3)[0], 1, 8),
    "diff-along-rows": (lambda m, a, b: torch.diff(a, dim=2), 1, 8),
    "trapezoid": (lambda m, a, b: torch.cumulative_trapezoid(a, dim=3), 1, 8),
    "upper-triangle": (lambda m, a, b: torch.triu(a), 1, 8),
    "turned-by-90-degrees": (lambda m, a, b: torch.rot90(a, 1, (2, 3)), 1, 8),
    "swapped-and-back": (lambda m, a, b: torch.adjoint(torch.adjoint(a.sinc()).cosh()), 1, 8),
    "msort-over-samples": (lambda m, a, b: torch.msort(a), 1, 8),
    "renorm-by-channel": (lambda m, a, b: torch.renorm(a, 2, 1, 1.0), 1, 8),
    "fourier": (lambda m, a, b: torch.fft.irfft2(torch.fft.rfft2(a), s=a.shape[-2:]), 1, 8),
    "unfold": (lambda m, a, b: a.unfold(2, 2, 2).sum(-1), 1, 8),
    "index-select": (lambda m, a, b: a.index_select(2, torch.tensor([2, 0, 0])), 1, 8),
    "gather": (lambda m, a, b: torch.gather(a, 2, b.argsort(2)), 1, 8),
    "pixel-shuffle": (lambda m, a, b: F.pixel_shuffle(a, 2), 4, 2),
    "pixel-unshuffle": (lambda m, a, b: F.pixel_unshuffle(a, 2), 1, 32),
    "channel-shuffle": (lambda m, a, b: F.channel_shuffle(a, 4), 4, 8),
    "user-gate": (lambda m, a, b: gate(a, b), 1, 8),
    "user-parameter-by-channel": (lambda m, a, b: sloped(a, m.slope), 1, 8),
    "user-both-signs": (lambda m, a, b: both_signs(a), 1, 16),
    "user-packed-gate": (lambda m, a, b: packed_gate(a), 2, 4),
    "user-tokens": (lambda m, a, b: to_tokens(a).mT.unflatten(2, (6, 6)), 1, 8),
    "user-nested": (lambda m, a, b: (v := two_views(a))["first"] * v["others"][1][..., None, None], 1, 8),
    "user-drop-path": (lambda m, a, b: drop_paths(a, 0.3, m.training), 1, 8),
    "autograd-function": (lambda m, a, b: Straight.apply(a), 1, 8),
}  # fmt: skip

#: id -> what is done with two maps of 8 channels, what the reason says
REFUSED: dict[str, tuple[Use, str]] = {
    "msort-over-channels": (lambda m, a, b: torch.msort(a.transpose(0, 1)).transpose(0, 1), "mixes the units"),
    "cummax": (lambda m, a, b: torch.cummax(a, 1)[0], "mixes the units of dimension 1"),
    "logcumsumexp": (lambda m, a, b: torch.logcumsumexp(a, 1), "mixes the units of dimension 1"),
    "mirrored-channels": (lambda m, a, b: torch.rot90(a, 2, (1, 2)), "mixes the units of dimension 1"),
    "renorm-over-channels": (lambda m, a, b: torch.renorm(a, 2, 0, 1.0), "mixes the units of dimension 1"),
    "fourier-over-channels": (lambda m, a, b: F.pad(torch.fft.rfft(a, dim=1).abs(), (0, 0, 0, 0, 0, 3)), "follow"),
    "noise": (lambda m, a, b: torch.poisson(a.abs()), "is random"),
    "user-noise-in-training": (lambda m, a, b: noisy_in_training(a, m.training), "is random"),
    "user-mean-in-training": (lambda m, a, b: centred_in_training(a, m.training), "mixes the units of dimension 1"),
    "user-sum": (lambda m, a, b: turned_by_a_sum(a), "mixes the units of dimension 1"),
    "user-maximum": (lambda m, a, b: clipped_by_the_largest(a), "mixes the units of dimension 1"),
    "user-when-wide": (lambda m, a, b: centred_when_wide(a), "mixes the units of dimension 1"),
    "user-in-place": (lambda m, a, b: in_place(a * 1), "writes into its input"),
    "user-literal-size": (lambda m, a, b: of_eight(a), "does not run with another number of entries in dimension 1"),
    "user-size-of-data": (lambda m, a, b: a * nonzero_entries(a).mean(), "size"),
}  # fmt: skip


@pytest.fixture(autouse=True)
def _fresh() -> None:
    infer_rule._rules.clear()


def network(use: Use, channels: int = 8) -> nn.Module:
    torch.manual_seed(0)
    parts = {
        "a": nn.Conv2d(3, 8, 3, padding=1),
        "b": nn.Conv2d(3, 8, 3, padding=1),
        "slope": nn.Parameter(torch.rand(8)),
        "out": nn.Conv2d(channels, 3, 1),
    }
    return Net(lambda m, x: m.out(use(m, m.a(x), m.b(x))), parts).double()


@pytest.mark.parametrize("name", PASSES)
def test_widths_pass_and_widening_is_exact(name: str) -> None:
    use, step, channels = PASSES[name]
    model, x = network(use, channels), torch.randn(2, 3, 6, 6, dtype=torch.float64)
    gm = fxgrow.capture(model, (x,))
    assert any(n.op.startswith("call_") and find_rule(n, None) is None for n in gm.graph.nodes if n.op != "call_module")
    found = {w.name: w for w in fxgrow.widths(gm)}
    assert found["a"].pinned is None and (found["a"].size, found["a"].step) == (8, step)
    wide = fxgrow.widen(gm, None, {n: 2 * w.step for n, w in found.items() if w.pinned is None})
    assert wide.get_submodule("a").out_channels == 8 + 2 * step
    for training in (False, True):
        for batch in (x, torch.randn(3, 3, 6, 6, dtype=torch.float64)):
            torch.manual_seed(1)
            expected = model.train(training)(batch)
            torch.manual_seed(1)
            assert torch.allclose(wide.train(training)(batch), expected, rtol=1e-10, atol=1e-12)


def test_a_function_that_keeps_a_state_is_refused() -> None:
    with pytest.raises(fxgrow.CaptureError, match="another result each time"):
        fxgrow.capture(network(lambda m, a, b: counting(a)), (torch.randn(2, 3, 6, 6, dtype=torch.float64),))


@pytest.mark.parametrize("name", REFUSED)
def test_what_mixes_units_is_pinned_with_what_was_seen(name: str) -> None:
    use, message = REFUSED[name]
    gm = fxgrow.capture(network(use), (torch.randn(2, 3, 6, 6, dtype=torch.float64),))
    why = next(w.pinned for w in fxgrow.widths(gm) if w.name == "a")
    assert why is not None and why.code == "operator"
    assert "is not described by any rule" in why.message and message in why.message


def test_one_width_may_pass_where_another_is_refused() -> None:
    """A product of two activations that no rule knows: summed over one dimension, the other one passes."""
    model = Net(
        lambda m, x: m.out(torch.cdist(m.a(x), m.b(x).transpose(1, 2).contiguous())),
        {"a": nn.Linear(6, 5), "b": nn.Conv1d(4, 5, 1), "out": nn.Linear(6, 2)},
    )
    found = {w.name: w for w in fxgrow.widths(fxgrow.capture(model, (torch.randn(2, 4, 6),)))}
    assert found["a"].pinned is not None and "mixes the units of dimension 2" in found["a"].pinned.message


def test_large_tensors() -> None:
    """An operator of torch is tested at small sizes; a user's function never, since its code may ask for the size."""
    x = torch.randn(1, 3, 96, 96, dtype=torch.float64)
    by_torch = fxgrow.widths(fxgrow.capture(network(lambda m, a, b: torch.logaddexp(a, b)), (x,)))
    assert by_torch[0].pinned is None
    by_user = fxgrow.widths(fxgrow.capture(network(lambda m, a, b: centred_unless_small(a)), (x,)))
    assert by_user[0].pinned is not None and "mixes the units" in by_user[0].pinned.message
    huge = torch.randn(64, 3, 96, 96, dtype=torch.float64)
    refused = fxgrow.widths(fxgrow.capture(network(lambda m, a, b: gate(a, b)), (huge,)))
    assert refused[0].pinned is not None and "too large to test" in refused[0].pinned.message


def test_an_inferred_rule_is_cached(monkeypatch: pytest.MonkeyPatch) -> None:
    runs = []
    test = infer_rule._test
    monkeypatch.setattr(infer_rule, "_test", lambda *a: runs.append(1) or test(*a))
    gm = fxgrow.capture(network(lambda m, a, b: gate(a, b)), (torch.randn(2, 3, 6, 6, dtype=torch.float64),))
    first, second = fxgrow.widths(gm), fxgrow.widths(gm)
    assert len(runs) == 1 and first == second and first[0].pinned is None


def test_nothing_changes_for_anybody_else() -> None:
    """The random numbers that follow are the same, and no module or tensor of the model has changed."""
    model = network(lambda m, a, b: drop_paths(gate(a, b), 0.5, m.training))
    gm = fxgrow.capture(model, (torch.randn(2, 3, 6, 6, dtype=torch.float64),))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    torch.manual_seed(3)
    random.seed(3)
    state, python = torch.get_rng_state(), random.getstate()
    fxgrow.widths(gm)
    assert torch.equal(torch.get_rng_state(), state) and random.getstate() == python
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


class Bumps(nn.Module):
    """A plain module without a rule: one node, since its class is entered by the test."""

    def __init__(self, over: int) -> None:
        super().__init__()
        self.over = over

    def forward(self, x: Tensor) -> Tensor:
        return x * x.cumsum(self.over).exp().clamp(max=2)


@pytest.mark.parametrize(("over", "passes"), [(2, True), (1, False)])
def test_plain_modules_are_tested_too(over: int, passes: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fxgrow.tracing.tracer.is_layer", lambda cls: cls is Bumps or issubclass(cls, nn.Conv2d))
    model = Net(
        lambda m, x: m.out(m.f(m.a(x))),
        {"a": nn.Conv2d(3, 8, 1), "f": Bumps(over), "out": nn.Conv2d(8, 2, 1)},
    )
    gm = fxgrow.capture(model, (torch.randn(2, 3, 5, 5),))
    assert [n.target for n in gm.graph.nodes if n.op == "call_module"] == ["a", "f", "out"]
    assert (fxgrow.widths(gm)[0].pinned is None) == passes


def test_grow_runs_through_an_unknown_operator() -> None:
    torch.manual_seed(0)
    model = Net(
        lambda m, x: m.out(Straight.apply(gate(m.a(x), m.b(x)))),
        {"a": nn.Linear(4, 6), "b": nn.Linear(4, 6), "out": nn.Linear(6, 2)},
    )
    batches = [(torch.randn(32, 4), torch.randn(32, 2)) for _ in range(4)]
    grown = fxgrow.grow(model, batches, neurons=3, progress=False)
    assert grown.get_submodule("a").out_features == grown.get_submodule("b").out_features == 9
