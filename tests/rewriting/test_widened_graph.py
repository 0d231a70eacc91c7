"""Graphs with other numbers of units: the same maps add units and leave them out, whatever carries them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

from fxgrow.analysis.analyse import AnalysedGraph, analyse
from fxgrow.axes.axes import unit_entries
from fxgrow.errors import PlanError
from fxgrow.graph.graph import lookup
from fxgrow.rewriting.parametrizations import remove_parametrizations
from fxgrow.rewriting.rewrite import rewrite
from fxgrow.rewriting.size_change import SizeChange
from fxgrow.rewriting.values import CopiedUnits, Values
from fxgrow.rewriting.widened_graph import WidenedGraph
from fxgrow.tracing.capture import capture
from tests.ops.cases import CASES, Case
from tests.ops.test_ops import MODES, difference, double, prepare, randomise


class Attention(nn.Module):
    """So many heads, of a size that follows, or heads of a size, as many as there are, and a stream of a fixed size."""

    def __init__(self, heads: int, size: int) -> None:
        super().__init__()
        self.shape = heads, size
        self.q, self.k, self.v = (nn.Linear(4, 12) for _ in range(3))
        self.o = nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (p(x).view(*x.shape[:2], *self.shape).transpose(1, 2) for p in (self.q, self.k, self.v))
        return x + self.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Joined(nn.Module):
    """Two convolutions side by side, of which one is also read alone."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(2, 3, 1), nn.Conv2d(2, 4, 1)
        self.norm, self.both, self.alone = nn.BatchNorm2d(7), nn.Conv2d(7, 2, 3), nn.Conv2d(3, 2, 3)

    def forward(self, x: Tensor) -> Tensor:
        a = self.a(x)
        return self.both(self.norm(torch.cat([a, self.b(x)], 1)).relu()) + self.alone(a.tanh())


class Normalised(nn.Module):
    """A residual stream under norms."""

    def __init__(self, norm: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.tokens, self.norm, self.up, self.down = nn.Linear(3, 6), norm(6), nn.Linear(6, 8), nn.Linear(8, 6)
        self.last, self.head = norm(6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.tokens(x)
        return self.head(self.last(x + self.down(self.up(self.norm(x)).relu())))


class Cosine(nn.Module):
    """Queries and keys that are divided by their length."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k = nn.Linear(4, 6), nn.Linear(4, 6)

    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(self.q(x), dim=-1) @ F.normalize(self.k(x), dim=-1).mT


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 2))


def conv(channels: int = 6) -> nn.Module:
    norm = nn.BatchNorm2d(channels)
    layers = [nn.Conv2d(2, channels, 3), norm, nn.ReLU(), nn.Conv2d(channels, 4, 3), nn.Flatten(), nn.Linear(16, 2)]
    return nn.Sequential(*layers)


def grouped() -> nn.Module:
    return nn.Sequential(nn.Conv2d(2, 8, 3), nn.GroupNorm(4, 8), nn.SiLU(), nn.Conv2d(8, 2, 3))


def depthwise() -> nn.Module:
    return nn.Sequential(nn.Conv2d(2, 5, 1), nn.Conv2d(5, 5, 3, groups=5), nn.BatchNorm2d(5), nn.Conv2d(5, 2, 1))


#: network, shape of an input, free widths
NETS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], set[str]]] = {
    "mlp": (mlp, (3,), {"0", "2"}),
    "conv and batch norm": (conv, (2, 6, 6), {"0", "3"}),
    "group norm by groups": (grouped, (2, 6, 6), {"0"}),
    "attention by heads": (lambda: Attention(-1, 3), (5, 4), {"q"}),
    "attention by the size of heads": (lambda: Attention(3, -1), (5, 4), {"q", "v"}),
    "concat": (Joined, (2, 6, 6), {"a", "b"}),
    "depthwise": (depthwise, (2, 6, 6), {"0"}),
}


def prepared(make: Callable[[], nn.Module], shape: tuple[int, ...]) -> tuple[nn.Module, AnalysedGraph, Tensor]:
    torch.manual_seed(0)
    net, x = make(), torch.randn(4, *shape).double()
    randomise(net)
    net = net.double()
    return net, analyse(capture(net, (x,))), x


def last_groups(analysed: AnalysedGraph, counts: Mapping[str, int]) -> dict[str, range]:
    """So many unit groups at the end of each width."""
    sizes = {name: analysed.widths[name].var.size for name in counts}
    return {name: range(sizes[name] - k, sizes[name]) for name, k in counts.items()}


@torch.no_grad()
def silence(analysed: AnalysedGraph, groups: Mapping[str, list[int]]) -> None:
    """Zeros where these unit groups are read; of a product over units, where one side is written."""
    for width in (analysed.widths[name] for name in groups):
        first = width.producers[0]
        places = [(p.weight, p.in_dim) for p in width.consumers] or [(first.weight, 0), (first.bias, 0)]
        for parameter, dim in places:
            entries = unit_entries(analysed.structure.parameters[parameter][dim], width.var)[groups[width.name]]
            lookup(analysed.gm, parameter).index_fill_(dim, entries.flatten(), 0)


def assert_equal(a: fx.GraphModule, b: fx.GraphModule) -> None:
    assert [repr(m) for m in a.children()] == [repr(m) for m in b.children()]
    assert list(a.state_dict()) == list(b.state_dict())
    for name, t in a.state_dict().items():
        assert torch.equal(t, b.state_dict()[name]), name


# -- growing, and leaving out what was grown


@pytest.mark.parametrize("name", NETS)
def test_leaving_out_the_new_units_gives_the_original_back(name: str) -> None:
    make, shape, free = NETS[name]
    net, analysed, x = prepared(make, shape)
    assert {w.name for w in analysed.free_widths} == free
    grown, _ = rewrite(analysed.gm, {w.name: 2 * w.step for w in analysed.free_widths})
    removals = last_groups(analyse(grown), dict.fromkeys(free, 2))
    back, index = rewrite(grown, {}, removals=removals)
    assert_equal(back, analysed.gm)
    # of `scale=d**-0.5` the number is written out
    assert (back.code == analysed.gm.code) is (name != "attention by the size of heads")
    for training in MODES:
        assert difference(net, back, (x,), training) == 0.0
    for parameter, positions in index.items():
        old = [
            n if p is None else int((p >= 0).sum())
            for n, p in zip(lookup(grown, parameter).shape, positions, strict=True)
        ]
        assert old == list(lookup(net, parameter).shape)


# a minimum with a number is another one where units are left out: the graph refuses, and says so
OPERATORS = [c for c in CASES if c.free and c.id != "view-of-minimum"]


@pytest.mark.parametrize("case", OPERATORS, ids=[c.id for c in OPERATORS])
def test_every_operator_lets_new_units_go(case: Case) -> None:
    """Norms over a width, and of a weight, were computed anew: they come back but for rounding."""
    net, gm = prepare(case)
    grown, _ = rewrite(gm, {name: 2 * step for name, (_, step) in case.free.items()})
    states = [w.initial_state for w in analyse(grown).free_widths]
    if any(state is not None and state.kind in ("split", "copy") for state in states):
        return
    back, _ = rewrite(grown, {}, removals=last_groups(analyse(grown), dict.fromkeys(case.free, 2)))
    exactly = all(state is None or not (state.norms or state.rescaled) for state in states)
    exactly = exactly and not any("parametrizations" in name for name in gm.state_dict())
    for name, t in gm.state_dict().items():
        if exactly:
            assert torch.equal(back.state_dict()[name], t), name
        else:
            torch.testing.assert_close(back.state_dict()[name], t)
    for training in MODES:
        assert difference(net, back, double(case.inputs(4)), training) <= (0.0 if exactly else 1e-10)


@pytest.mark.parametrize("case", OPERATORS, ids=[c.id for c in OPERATORS])
def test_every_operator_lets_units_go_that_nobody_reads(case: Case) -> None:
    _, gm = prepare(case)
    plain = analyse(remove_parametrizations(gm))
    names = [w.name for w in plain.free_widths if w.consumers and w.initial_state is None and w.var.size > 2]
    if plain.gm is not gm or not names:
        return
    silence(plain, {name: [1] for name in names})
    smaller, _ = rewrite(gm, {}, removals={name: [1] for name in names})
    for training in MODES:
        for n in (4, 3):
            assert difference(gm, smaller, double(case.inputs(n)), training) <= 1e-10


# -- leaving out units of a network as it is


@pytest.mark.parametrize("name", NETS)
def test_units_that_nobody_reads_can_go(name: str) -> None:
    make, shape, _ = NETS[name]
    net, analysed, x = prepared(make, shape)
    removals = {w.name: [0, w.var.size - 1] if w.var.size > 3 else [1] for w in analysed.free_widths}
    silence(analysed, removals)
    smaller, _ = rewrite(analysed.gm, {}, removals=removals)
    assert sum(p.numel() for p in smaller.parameters()) < sum(p.numel() for p in net.parameters())
    for training in MODES:
        assert difference(net, smaller, (x,), training) <= 1e-10
    sizes = {w.name: w.width.size for w in analyse(smaller).free_widths}
    assert sizes == {w.name: w.width.size - w.step * len(removals.get(w.name, ())) for w in analysed.free_widths}


@pytest.mark.parametrize(("norm", "value"), [(nn.RMSNorm, "zero"), (nn.LayerNorm, "mean")])
def test_a_norm_keeps_its_function_where_the_units_left_out_add_nothing(norm: type[nn.Module], value: str) -> None:
    net, analysed, x = prepared(lambda: Normalised(norm), (5, 3))
    with torch.no_grad():
        for name in ("tokens.weight", "tokens.bias", "down.weight", "down.bias"):
            rows = lookup(net, name)
            rows[[1, 4]] = 0.0 if value == "zero" else rows[[0, 2, 3, 5]].mean(0)
        for name in ("norm", "last"):
            lookup(net, f"{name}.weight")[[1, 4]] = 0.0
            if value == "mean":
                lookup(net, f"{name}.bias")[[1, 4]] = 0.0
    smaller, _ = rewrite(analysed.gm, {}, removals={"tokens": [1, 4]})
    for training in MODES:
        assert difference(net, smaller, (x,), training) <= 1e-10
    assert smaller.get_submodule("last").weight.shape == (4,)


def test_arbitrary_units_of_an_mlp_are_sliced_away() -> None:
    net, analysed, x = prepared(mlp, (3,))
    keep, rest = [0, 2, 4], [1, 3]
    expected = copy.deepcopy(net)
    with torch.no_grad():
        expected[0] = nn.Linear(3, 3).double()
        expected[0].weight.copy_(net[0].weight[keep]), expected[0].bias.copy_(net[0].bias[keep])
        expected[2] = nn.Linear(3, 3).double()
        expected[2].weight.copy_(net[2].weight[1:, keep]), expected[2].bias.copy_(net[2].bias[1:])
        expected[4] = nn.Linear(3, 2).double()
        expected[4].weight.copy_(net[4].weight[:, 1:]), expected[4].bias.copy_(net[4].bias)
    smaller, _ = rewrite(analysed.gm, {}, removals={"0": rest, "2": [0]})
    assert_equal(smaller, capture(expected, (x,)))
    assert smaller.code == analysed.gm.code
    assert torch.equal(smaller(x), expected(x))


def test_arbitrary_channels_of_a_conv_net_are_sliced_away() -> None:
    net, analysed, x = prepared(conv, (2, 6, 6))
    keep = [1, 2, 5]
    expected = conv(3).double()
    flat = torch.arange(16).view(4, 4)[[0, 3]].flatten()
    with torch.no_grad():
        expected[3], expected[5] = nn.Conv2d(3, 2, 3).double(), nn.Linear(8, 2).double()
        expected[0].weight.copy_(net[0].weight[keep]), expected[0].bias.copy_(net[0].bias[keep])
        for name in ("weight", "bias", "running_mean", "running_var"):
            lookup(expected[1], name).copy_(lookup(net[1], name)[keep])
        expected[1].num_batches_tracked.copy_(net[1].num_batches_tracked)
        expected[3].weight.copy_(net[3].weight[[0, 3]][:, keep]), expected[3].bias.copy_(net[3].bias[[0, 3]])
        expected[5].weight.copy_(net[5].weight[:, flat]), expected[5].bias.copy_(net[5].bias)
    smaller, _ = rewrite(analysed.gm, {}, removals={"0": [0, 3, 4], "3": [1, 2]})
    assert_equal(smaller, capture(expected, (x,)))
    assert smaller.code == analysed.gm.code
    for training in MODES:
        assert difference(expected, smaller, (x,), training) == 0.0


# -- both at once


def test_units_come_and_go_at_once() -> None:
    net, analysed, x = prepared(conv, (2, 6, 6))
    with torch.no_grad():
        net[3].weight[:, [1, 4]] = 0
    delta = torch.randn_like(net[3].weight)
    rows = torch.randn(2, 2, 3, 3).double()
    values = Values(new={"0.weight": {("0", 0): rows}}, delta={"3.weight": delta})
    resized, index = rewrite(analysed.gm, {"0": 2}, values, removals={"0": [1, 4]})
    assert index["0.weight"][0].tolist() == [0, -1, 1, 2, -1, 3]
    weight = lookup(resized, "0.weight")
    assert torch.equal(weight, torch.cat([net[0].weight[[0, 2, 3, 5]], rows]))
    with torch.no_grad():
        net[3].weight += delta
        net[3].weight[:, [1, 4]] = 0
    for training in MODES:
        assert difference(net, resized, (x,), training) <= 1e-10


# -- parameters as functions of values


def test_parameters_follow_values_and_give_gradients() -> None:
    _, analysed, x = prepared(mlp, (3,))
    change = SizeChange(analysed, {"0": 2, "2": 1})
    widened = WidenedGraph(change, Values(), torch.Generator().manual_seed(1)).check()
    again = widened.parameters(Values())
    assert again.keys() == {"0.weight", "0.bias", "2.weight", "2.bias", "4.weight"}
    assert all(torch.equal(t, lookup(widened.gm, name)) for name, t in again.items())
    columns = torch.randn(4, 2).double().requires_grad_()
    delta = torch.zeros(4, 5).double().requires_grad_()
    values = Values(new={"2.weight": {("0", 1): columns}}, delta={"2.weight": delta})
    parameters = widened.parameters(values)
    out = torch.func.functional_call(widened.gm, parameters, (x,))
    out.square().sum().backward()
    assert columns.grad is not None and bool(columns.grad.any())
    assert delta.grad is not None and bool(delta.grad.any())
    assert [p.node.graph for p in widened.projections] == [widened.gm.graph] * 3


def test_rows_that_a_product_needs_zero_are_zero_among_the_parameters_too() -> None:
    net, analysed, x = prepared(lambda: Attention(3, -1), (5, 4))
    widened = WidenedGraph(SizeChange(analysed, {"q": 6}), generator=torch.Generator().manual_seed(1))
    parameters = widened.parameters(Values())
    assert all(torch.equal(t, lookup(widened.gm, name)) for name, t in parameters.items())
    assert difference(net, widened.gm, (x,), False) <= 1e-10


# -- what cannot be left out


@pytest.mark.parametrize(
    ("make", "shape", "removals", "message"),
    [
        (mlp, (3,), {"0": range(5)}, "at least one must stay"),
        (mlp, (3,), {"0": [5]}, "unit groups 0 to 4"),
        (mlp, (3,), {"4": [0]}, "cannot change: output"),
        (mlp, (3,), {"1": [0]}, "no width named '1'"),
        (Cosine, (5, 4), {"q": [0]}, "divided by their length"),
    ],
)
def test_refusals(
    make: Callable[[], nn.Module], shape: tuple[int, ...], removals: dict[str, list[int]], message: str
) -> None:
    _, analysed, _ = prepared(make, shape)
    with pytest.raises(PlanError, match=message):
        SizeChange(analysed, {}, removals)


def test_a_weight_that_keeps_its_largest_singular_value_keeps_its_units() -> None:
    net = nn.Sequential(parametrizations.spectral_norm(nn.Linear(3, 4)), nn.ReLU(), nn.Linear(4, 2))
    with pytest.raises(PlanError, match=r"largest singular value of 0\.weight"):
        SizeChange(analyse(remove_parametrizations(capture(net, (torch.randn(4, 3),)))), {}, {"0": [0]})


def test_weight_norm_lets_units_go() -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), parametrizations.weight_norm(nn.Linear(4, 3)), nn.Linear(3, 2))
    x = torch.randn(5, 3)
    grown, _ = rewrite(capture(net, (x,)), {"0": 2, "2": 1})
    back, index = rewrite(grown, {}, removals={"0": [4, 5], "2": [3]})
    assert torch.allclose(back(x), net(x), atol=1e-6)
    assert index["2.parametrizations.weight.original0"][0].tolist() == [0, 1, 2, -1]
    assert dict(back.named_parameters()).keys() == dict(net.named_parameters()).keys()


def test_copies_and_removals_exclude_each_other() -> None:
    _, analysed, _ = prepared(mlp, (3,))
    values = Values(copies={"0": CopiedUnits(torch.tensor([0]), torch.full((6,), 0.5))})
    with pytest.raises(PlanError, match="copied and left out at once"):
        WidenedGraph(SizeChange(analysed, {"0": 1}, {"2": [0]}), values)
