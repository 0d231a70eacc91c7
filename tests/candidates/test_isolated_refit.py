"""New units tested isolated give what the widened network gives, cached or read again."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fxgrow
from fxgrow.analysis.analyse import analyse
from fxgrow.candidates import first_pass
from fxgrow.candidates.isolated import isolated_paths
from fxgrow.candidates.widened import Candidates, padded
from fxgrow.graph.evaluate import eval_mode
from fxgrow.initialisers import registry
from fxgrow.initialisers.registry import Proposal
from fxgrow.statistics import collect as _statistics
from fxgrow.statistics import consumer_moments as _consumer
from fxgrow.statistics.consumer_moments import consumers_of
from fxgrow.statistics.width_moments import WidthMoments
from models import GPT, MLP, DigitsResNet
from tests.statistics.test_collect import randomised

Batches = list[tuple[Tensor, Tensor]]


def batches(*shape: int, classes: int = 5, count: int = 192, batch: int = 24) -> Batches:
    x, y = torch.randn(count, *shape, dtype=torch.float64), torch.randint(classes, (count,))
    return list(zip(x.split(batch), y.split(batch), strict=True))


class Blocks(nn.Module):
    """A stream that two layers write, pooled, an activation in place, and a layer that is used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(2, 3, 3, padding=1, bias=False), nn.BatchNorm2d(3)
        self.inner, self.back = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 3, 1)
        self.pool, self.relu = nn.MaxPool2d(2), nn.ReLU(inplace=True)
        self.twice, self.head = nn.Conv2d(3, 3, 3, padding=1), nn.Linear(27, 5)

    def forward(self, x: Tensor) -> Tensor:
        s = self.norm(self.stem(x))
        s = s + self.back(F.gelu(self.inner(self.relu(s))))
        s = self.twice(torch.tanh(self.twice(s)))
        return self.head(self.pool(s).flatten(1))


def pooled() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 3, 3, stride=2), nn.Tanh(), nn.Conv2d(3, 4, (1, 3), bias=False), nn.BatchNorm2d(4), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.5), nn.Linear(4, 5),
    )  # fmt: skip


CASES = {
    "mlp": (lambda: MLP([6, 4, 5, 5], nn.Tanh), lambda: batches(6), None),
    "convolutions": (pooled, lambda: batches(2, 9, 9), None),
    "stream": (Blocks, lambda: batches(2, 6, 6), None),
    "resnet": (lambda: DigitsResNet(0.25, classes=5), lambda: batches(1, 8, 8), None),
    "gpt": (
        lambda: GPT(7, 4, depth=2, heads=2, width=0.125),
        lambda: [(torch.randint(7, (24, 4)), torch.randint(7, (24, 4))) for _ in range(8)],
        ["blocks.0.mlp.0", "blocks.1.mlp.0"],
    ),
}


@pytest.mark.parametrize("again", [False, True], ids=["remembered", "read again"])
@pytest.mark.parametrize("case", CASES)
def test_the_widened_network_says_the_same(case: str, again: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    make, data, names = CASES[case]
    torch.manual_seed(0)
    model, loader = randomised(make()), data()
    options = {"widths": names, "units": 3, "progress": False}
    for module in (_consumer, _statistics):  # every row, so that both draw the same
        monkeypatch.setattr(module, "rows_for", lambda features: 10**6)
    if again:
        monkeypatch.setattr(first_pass, "ISOLATED_CACHE_BYTES", 0)
    found = fxgrow.profile(model, loader, **options)
    assert found.found is None
    monkeypatch.setattr(first_pass, "isolated_paths", lambda *_: {})
    wide = fxgrow.profile(model, loader, **options)
    assert wide.found is not None
    assert found.samples == wide.samples and found.loss == pytest.approx(wide.loss, rel=1e-12)
    for name in wide:
        a, b = found[name], wide[name]
        assert a.significant == b.significant
        assert list(a.gains) == pytest.approx(list(b.gains), rel=1e-6, abs=1e-12)
        assert found.refit.tests[name].coherence == pytest.approx(wide.refit.tests[name].coherence, rel=1e-6)
    plans = [fxgrow.plan(p, neurons={n: 2 for n in wide}) for p in (found, wide)]
    assert plans[0].scale == pytest.approx(plans[1].scale, rel=1e-6)
    grown = [fxgrow.apply(p.gm, plan) for p, plan in zip((found, wide), plans, strict=True)]
    for mine, theirs in zip(*(g.parameters() for g in grown), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-9)


class Mixing(nn.Module):
    """A norm over all units stands behind the first layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.second = nn.Linear(6, 4), nn.LayerNorm(4), nn.Linear(4, 5)
        self.third, self.last = nn.Linear(5, 6), nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.second(self.norm(self.first(x))))
        return self.last(F.gelu(self.third(h)) * 2)


def test_widths_of_both_kinds_are_tried_on_the_same_units() -> None:
    """Perceptrons run by themselves, heads in the widened network; a plan finds the rows that were tried."""
    torch.manual_seed(0)
    batches = [(torch.randint(7, (24, 4)), torch.randint(7, (24, 4))) for _ in range(8)]
    profile = fxgrow.profile(GPT(7, 4, depth=2, heads=2, width=0.125), batches, units=4, progress=False)
    assert set(profile.refit.tests) == set(profile)
    assert 0 < len([n for n in profile if "mlp" in n]) < len(profile)
    for name in ("blocks.0.mlp.0", "blocks.1.mlp.0"):
        rows = profile.candidates().slices[f"{name}.weight"][name, 0]
        torch.testing.assert_close(rows, profile.proposals[name].alpha[f"{name}.weight"][:, :-1])
        (fit,) = profile.refit.of(name)
        assert fit.weight == name.replace("mlp.0", "mlp.2.weight")


def test_only_units_that_go_their_own_way_run_by_themselves() -> None:
    """A norm over the width needs the whole network; an activation and a factor do not."""
    model = Mixing().double()
    gm = fxgrow.capture(model, (torch.randn(2, 6).double(),))
    analysed = analyse(gm)
    hiddens = analysed.free_widths
    assert {h.name for h in hiddens} == {"first", "second", "third"}
    weights = {p.weight for h in hiddens for p in h.consumers}
    consumers = {n: c for w in weights for n, c in consumers_of(w, analysed.structure.projections).items()}
    assert set(isolated_paths(analysed, hiddens, consumers)) == {"second", "third"}


@pytest.mark.parametrize("case", ["mlp", "convolutions", "stream"])
def test_new_channels_are_those_of_the_widened_network(case: str) -> None:
    make, data, _ = CASES[case]
    torch.manual_seed(0)
    x = data()[0][0]
    gm = fxgrow.capture(randomised(make()), (x,))
    analysed, generator = analyse(gm), torch.Generator().manual_seed(0)
    hiddens = analysed.free_widths
    weights = {p.weight for h in hiddens for p in h.consumers}
    consumers = {n: c for w in weights for n, c in consumers_of(w, analysed.structure.projections).items()}
    paths = isolated_paths(analysed, hiddens, consumers)
    assert len(paths) == len(hiddens)
    proposals = {h.name: padded(gm, h, Proposal(), 3, generator) for h in hiddens}
    found = Candidates(analysed, proposals, dict.fromkeys(paths, 3), [x], generator)

    def values(graph: fxgrow.GraphModule) -> dict[str, Tensor]:
        class Keep(torch.fx.Interpreter):
            def run_node(self, n: torch.fx.Node) -> Tensor:
                out = super().run_node(n)
                kept[n.name] = out.clone() if isinstance(out, Tensor) else out
                return out

        kept: dict[str, Tensor] = {}
        with torch.no_grad(), eval_mode(graph):
            Keep(graph).run(x, enable_io_processing=False)
        return kept

    old, new = values(gm), values(found.gm)
    for name, path in paths.items():
        with eval_mode(gm):
            z = path.activations(proposals[name], {n: old[n.name] for n in path.sources})
        for p in path.width.consumers:
            entries = found.new_indices[p.weight][name, p.in_dim]
            torch.testing.assert_close(z[p.source], new[p.source.name].index_select(1, entries))


class Sized(nn.Module):
    """A linear layer that keeps its size as a number, as those of other libraries do."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.outputs = outputs
        self.weight, self.bias = nn.Parameter(torch.randn(inputs, outputs)), nn.Parameter(torch.zeros(outputs))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight).view(*x.shape[:-1], self.outputs)


def test_a_layer_that_keeps_its_size_grows_in_the_widened_network() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(Sized(6, 4), nn.Tanh(), nn.Linear(4, 5)).double()
    data = batches(6)
    grown = fxgrow.grow(net, data, neurons={"0": 2}, progress=False)
    assert grown.get_parameter("0.weight").shape == (6, 6)
    assert grown(data[0][0]).isfinite().all()


def test_a_method_with_a_refit_need_not_ask_for_the_output_side(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_TABLE", dict(registry._TABLE))
    for name, side in (("asks", True), ("does not", False)):

        @registry.initialiser(name, refit=True, output_side=side)
        def principal(width: WidthMoments, consumers: object, k: int) -> Proposal:
            values, vectors = torch.linalg.eigh(width.second_moment)
            return Proposal(registry.split_rows(vectors.flip(1)[:, :k], width), {}, values.flip(0)[:k].sqrt())

    torch.manual_seed(0)
    net, data = MLP([6, 4, 5]).double(), batches(6)
    first, second = (fxgrow.grow(net, data, method=m, neurons=2, progress=False) for m in ("asks", "does not"))
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    assert first.meta["fxgrow"].plan.units == {"layers.0": 2}
