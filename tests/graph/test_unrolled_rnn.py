"""Recurrent layers: their statistics against a cell written by hand, and growth of what they read and hold."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_padded_sequence

import fxgrow
from fxgrow.analysis.analyse import analyse
from fxgrow.candidates.zero_unit_graph import SketchContext, WidthSketch, ZeroUnitGraph
from fxgrow.data.batches import Data
from fxgrow.graph.graph import lookup
from fxgrow.graph.unrolled_rnn import unroll_recurrent_layers
from fxgrow.statistics.consumer_moments import consumers_of

KINDS: dict[str, tuple[type[nn.RNNBase], dict[str, Any]]] = {
    "lstm": (nn.LSTM, {}),
    "gru": (nn.GRU, {}),
    "rnn": (nn.RNN, {}),
    "rnn with relu": (nn.RNN, {"nonlinearity": "relu"}),
}
FORMS: dict[str, dict[str, Any]] = {
    "plain": {},
    "two layers": {"num_layers": 2},
    "both ways": {"bidirectional": True},
    "two layers both ways without biases": {"num_layers": 2, "bidirectional": True, "bias": False},
    "steps first": {"batch_first": False},
    "steps first, both ways": {"batch_first": False, "bidirectional": True},
    "given a state": {"given": True},
    "steps first, given a state": {"batch_first": False, "given": True},
}
STEPS, IN, WIDTH, UNITS, OUT = 6, 4, 3, 2, 2


class Net(nn.Module):
    """A linear layer with tanh, a recurrent one and a linear one."""

    def __init__(self, kind: str, given: bool = False, last: bool = False, **form: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        cls, options = KINDS[kind]
        self.a = nn.Linear(IN, WIDTH)
        self.r = cls(WIDTH, UNITS, **{"batch_first": True, **options, **form})
        directions = 1 + self.r.bidirectional
        self.out = nn.Linear(directions * UNITS, OUT)
        self.start = nn.Linear(IN, UNITS) if given else None
        self.last = last
        self.count = directions * self.r.num_layers

    def state(self, x: Tensor) -> Any:
        """The state at the start, for every layer and direction."""
        if self.start is None:
            return None
        h = torch.stack([self.start(x[:, 0])] * self.count)
        return (h, h.tanh()) if isinstance(self.r, nn.LSTM) else h

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.a(x))
        y, states = self.r(h if self.r.batch_first else h.transpose(0, 1), self.state(x))
        if self.last:
            return self.out((states[0] if isinstance(states, tuple) else states)[-1])
        return self.out(y if self.r.batch_first else y.transpose(0, 1))


def data(count: int = 48, size: int = 16) -> list[tuple[Tensor, Tensor]]:
    """To be remembered: a product over two steps, and a sum."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(count, STEPS, IN, dtype=torch.float64, generator=generator)
    y = torch.stack([x[..., 0] * x.roll(1, 1)[..., 1], x[..., 2].cumsum(1).tanh()], -1)
    return list(zip(x.split(size), y.split(size), strict=True))


# -- the statistics, by hand


class Gate(NamedTuple):
    """What one weight reads and what its output is asked for, for all samples and steps."""

    h: list[Tensor]
    v: list[Tensor]


def cell(r: nn.RNNBase, into: Tensor, again: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    """The next state, after the formulas in the documentation of torch.nn."""
    n = r.hidden_size
    if isinstance(r, nn.LSTM):
        s = into + again
        i, f, g, o = s[:n], s[n : 2 * n], s[2 * n : 3 * n], s[3 * n :]
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
        return torch.sigmoid(o) * torch.tanh(c), c
    if isinstance(r, nn.GRU):
        reset = torch.sigmoid(into[:n] + again[:n])
        update = torch.sigmoid(into[n : 2 * n] + again[n : 2 * n])
        new = torch.tanh(into[2 * n :] + reset * again[2 * n :])
        return (1 - update) * new + update * h, c
    return (torch.relu if r.nonlinearity == "relu" else torch.tanh)(into + again), c


def by_hand(net: Net, batches: list[tuple[Tensor, Tensor]]) -> tuple[dict[str, Gate], list[Tensor]]:
    """Every weight's inputs and V by autograd, a sample at a time; and what `a` reads."""
    found: dict[str, Gate] = {}
    inputs: list[Tensor] = []
    r = net.r

    def weight(name: str) -> Tensor | None:
        return getattr(r, name, None)

    for x, y in (pair for b in batches for pair in zip(*b, strict=True)):
        seen: list[tuple[str, Tensor, Tensor]] = []
        inputs.append(x)
        rows = list(torch.tanh(net.a(x)))
        states = net.state(x[None])
        at = 0
        for layer in range(r.num_layers):
            sides = []
            for suffix in ("", "_reverse")[: 1 + r.bidirectional]:
                name = f"l{layer}{suffix}"
                h = c = torch.zeros(UNITS, dtype=x.dtype)
                if states is not None:
                    h, c = (s[at, 0] for s in (states if isinstance(r, nn.LSTM) else (states, states)))
                order = range(STEPS)[::-1] if suffix else range(STEPS)
                side: dict[int, Tensor] = {}
                for t in order:
                    pair = []
                    for kind, source in (("ih", rows[t]), ("hh", h)):
                        pre = F.linear(source, weight(f"weight_{kind}_{name}"), weight(f"bias_{kind}_{name}"))
                        seen.append((f"r.weight_{kind}_{name}", source, pre))
                        pair.append(pre)
                    h, c = cell(r, *pair, h, c)
                    side[t] = h
                sides.append(side)
                at += 1
            rows = [torch.cat([side[t] for side in sides]) for t in range(STEPS)]
        outs = [net.out(row) for row in rows]
        seen += [("out.weight", row, o) for row, o in zip(rows, outs, strict=True)]
        loss = F.mse_loss(torch.stack(outs), y)
        gradients = torch.autograd.grad(loss, [pre for _, _, pre in seen])
        for (name, source, _), g in zip(seen, gradients, strict=True):
            own = found.setdefault(name, Gate([], []))
            biased = "out" in name or r.bias
            own.h.append(torch.cat([source, torch.ones(1, dtype=x.dtype)]).detach() if biased else source.detach())
            own.v.append(-g)
    return found, inputs


def moments(g: Gate, samples: int) -> tuple[Tensor, float, float]:
    """dW*, Psi and E|V|^2."""
    h, v = torch.stack(g.h), torch.stack(g.v)
    update = (v.T @ h / samples) @ torch.linalg.pinv(h.T @ h / samples, hermitian=True)
    return update, float((v - h @ update.T).square().sum()) / samples, float(v.square().sum()) / samples


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", KINDS)
def test_statistics_are_those_of_a_cell_by_hand(kind: str, form: str) -> None:
    net, batches = Net(kind, **FORMS[form]).double(), data()
    samples = sum(len(x) for x, _ in batches)
    expected, inputs = by_hand(net, batches)
    profile = fxgrow.profile(net, batches, F.mse_loss, method="tiny", positions="all", progress=False)
    into = [name for name in expected if "_ih_l0" in name]
    inner = [name for name in expected if name not in into]
    for width, readers in (("a", into), ("start" if "given" in FORMS[form] else "r", inner)):
        found = profile[width]
        own = [moments(expected[name], samples) for name in readers]
        assert found.bottleneck == pytest.approx(sum(psi for _, psi, _ in own), rel=1e-9)
        assert found.desired == pytest.approx(sum(all_of_it for _, _, all_of_it in own), rel=1e-9)
        for name, (update, _, _) in zip(readers, own, strict=True):
            torch.testing.assert_close(profile.updates[name], update, rtol=1e-8, atol=1e-10)
    # between the linear layer and the recurrent one: singular values of S^(-1/2) E[b V^T], less what is expressible
    b = torch.cat([torch.cat(inputs), torch.ones(samples * STEPS, 1, dtype=torch.float64)], 1)
    blocks = []
    for name in into:
        h, v = (torch.stack(t).unflatten(0, (samples, STEPS)) for t in expected[name])
        v = v.flip(1) if "reverse" in name else v  # as the steps were taken
        h = h.flip(1) if "reverse" in name else h
        rest = (v - h @ moments(expected[name], samples)[0].T).flatten(0, 1)
        blocks.append(b.T @ rest / samples)
    values, vectors = torch.linalg.eigh(b.T @ b / samples)
    singular = torch.linalg.svdvals(vectors @ (vectors.T @ torch.cat(blocks, 1) / values.sqrt()[:, None]))
    found_values = profile["a"].singular_values
    assert len(found_values) == int((singular > 1e-6 * singular[0]).sum())
    assert found_values == pytest.approx(singular[: len(found_values)].tolist(), rel=1e-7)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", KINDS)
def test_the_steps_are_the_same_function_and_have_the_same_widths(kind: str, form: str) -> None:
    net, (x, _) = Net(kind, **FORMS[form]).double().eval(), data()[0]
    gm = fxgrow.capture(net, (x,))
    steps = unroll_recurrent_layers(gm)
    assert steps is not gm and not any(n.op == "call_module" and n.target == "r" for n in steps.graph.nodes)
    torch.testing.assert_close(steps(x), net(x), rtol=1e-12, atol=1e-14)
    assert [h.width for h in analyse(steps).widths.values()] == fxgrow.widths(gm)
    assert steps.r is net.r


# -- growth


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", KINDS)
def test_growth_is_exact_and_lowers_the_loss(kind: str, form: str) -> None:
    net = Net(kind, **FORMS[form]).double()
    batches, inner = data(), "start" if "given" in FORMS[form] else "r"
    grown = fxgrow.grow(net, batches, loss_fn=F.mse_loss, neurons={"a": 2, inner: 2}, progress=False)
    growth = grown.meta["fxgrow"]
    before, after = growth.losses["eval"]
    assert after < before
    assert grown.r.hidden_size == UNITS + 2 and grown.r.input_size == WIDTH + 2
    assert sum(growth.plan.predicted.values()) > 0
    x = batches[0][0]
    same = fxgrow.apply(fxgrow.capture(net, (x,)), growth.plan.scaled(0.0))
    torch.testing.assert_close(same(x), net(x), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("method", ["tiny", "gradmax", "random-refit", "random", "net2wider"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_method_grows_what_a_recurrent_layer_reads(kind: str, method: str) -> None:
    net, batches = Net(kind, last=True).double(), [(x, y[:, -1]) for x, y in data()]
    grown = fxgrow.grow(net, batches, loss_fn=F.mse_loss, method=method, neurons={"a": 2}, progress=False)
    before, after = grown.meta["fxgrow"].losses["eval"]
    assert after <= before * (1 + 1e-12)
    if method in ("tiny", "random-refit"):
        assert after < before
    assert grown.r.weight_ih_l0.shape[1] == WIDTH + 2


@pytest.mark.parametrize("kind", KINDS)
def test_a_profile_leaves_the_layer_as_it_was(kind: str) -> None:
    net = Net(kind, num_layers=2, dropout=0.5).double().train()
    x = data()[0][0]
    state = {name: t.clone() for name, t in net.state_dict().items()}
    objects = [id(p) for p in net.r._flat_weights]
    torch.manual_seed(3)
    before = net(x)
    fxgrow.profile(net, data(), F.mse_loss, progress=False)
    assert net.training and net.r.training and net.r.dropout == 0.5
    assert all(p.grad is None and p.requires_grad for p in net.parameters())
    assert [id(p) for p in net.r._flat_weights] == objects == [id(p) for p in net.r.parameters()]
    assert all(torch.equal(t, state[name]) for name, t in net.state_dict().items())
    torch.manual_seed(3)
    assert torch.equal(net(x), before)


def test_the_record_lies_on_the_layer_itself() -> None:
    net = Net("lstm").double()
    gm = fxgrow.capture(net, (data()[0][0],))
    profile = fxgrow.profile(gm, data(), F.mse_loss, progress=False)
    (node,) = [n for n in gm.graph.nodes if n.target == "r"]
    assert node.meta["fxgrow"] is profile["r"] and profile.gm is gm


class Packed(nn.Module):
    """An LSTM over sequences of different lengths."""

    def __init__(self) -> None:
        super().__init__()
        self.r = nn.LSTM(5, UNITS, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        lengths = torch.full((len(x),), STEPS)
        return self.r(pack_padded_sequence(x, lengths, batch_first=True))[1][0][-1]


def test_packed_sequences_and_projections_stay_pinned() -> None:
    x = data()[0][0].float()
    projected = nn.LSTM(5, 4, proj_size=UNITS, batch_first=True)
    for layer, reason in ((projected, "proj_size"), (Packed(), "a packed sequence")):
        gm = fxgrow.capture(nn.Sequential(nn.Linear(IN, 5), layer), (x,))
        assert unroll_recurrent_layers(gm) is gm
        width = fxgrow.widths(gm)[0]
        assert width.name == "0" and width.pinned is not None and reason in str(width.pinned)
        with pytest.raises(fxgrow.ProfileError, match=reason):
            fxgrow.profile(gm, data(), F.mse_loss, progress=False)


# -- cells in a loop

CELLS = {"lstm": nn.LSTMCell, "gru": nn.GRUCell, "rnn": nn.RNNCell}


class Loop(nn.Module):
    """`Net` with a cell, which is called at every step."""

    def __init__(self, kind: str, given: bool) -> None:
        super().__init__()
        net = Net(kind)
        self.a, self.out, self.r, self.given = net.a, net.out, CELLS[kind](WIDTH, UNITS), given
        self.r.load_state_dict({name.replace("_l0", ""): t for name, t in net.r.state_dict().items()})

    def forward(self, x: Tensor) -> Tensor:
        h, out, state = torch.tanh(self.a(x)), [], None
        if self.given:
            zeros = torch.zeros(len(x), UNITS, dtype=x.dtype)
            state = (zeros, zeros) if isinstance(self.r, nn.LSTMCell) else zeros
        for t in range(STEPS):
            state = self.r(h[:, t], state)
            out.append(state[0] if isinstance(state, tuple) else state)
        return self.out(torch.stack(out, 1))


@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("kind", CELLS)
def test_a_cell_in_a_loop_is_the_layer(kind: str, given: bool) -> None:
    layer, loop = Net(kind).double(), Loop(kind, given).double()
    x = data()[0][0]
    steps = unroll_recurrent_layers(fxgrow.capture(loop, (x,)))
    torch.testing.assert_close(steps(x), layer(x), rtol=1e-12, atol=1e-14)
    expected, found = (
        fxgrow.profile(net, data(), F.mse_loss, method="tiny", positions="all", progress=False) for net in (layer, loop)
    )
    for width in ("a", "r"):
        assert found[width].bottleneck == pytest.approx(expected[width].bottleneck, rel=1e-9)
        assert found[width].desired == pytest.approx(expected[width].desired, rel=1e-9)
    for name, update in expected.updates.items():
        torch.testing.assert_close(found.updates[name.replace("_l0", "")], update, rtol=1e-8, atol=1e-10)
    grown = fxgrow.grow(loop, data(), loss_fn=F.mse_loss, neurons={"a": 2, "r": 2}, progress=False)
    before, after = grown.meta["fxgrow"].losses["eval"]
    assert after < before and (grown.r.input_size, grown.r.hidden_size) == (WIDTH + 2, UNITS + 2)


# -- new units


@pytest.mark.parametrize("batch_first", [True, False])
def test_silent_units_see_what_the_weights_cannot_express(batch_first: bool) -> None:
    """At zero a unit of an RNN puts out alpha b; W_hh reads it one step later."""
    net, batches = Net("rnn", batch_first=batch_first).double(), data()
    expected, inputs = by_hand(net, batches)
    analysed = analyse(unroll_recurrent_layers(fxgrow.capture(net, (batches[0][0],))))
    h = analysed.widths["r"]
    profile = fxgrow.profile(net, batches, F.mse_loss, positions="all", method="tiny", progress=False)
    uses = analysed.structure.projections
    consumers = {p.weight: c for p in h.consumers for c in consumers_of(p.weight, uses, False).values()}
    s = WidthSketch.of(h, analysed)
    s.unit_groups = 3
    generator = torch.Generator().manual_seed(1)
    graph = ZeroUnitGraph(
        SketchContext(analysed, consumers, profile.updates, Data(batches), F.mse_loss, False, generator), [s]
    )
    graph.collect(Data(batches))
    rest = {}
    for name in ("r.weight_hh_l0", "out.weight"):
        g = expected[name]
        rest[name] = torch.stack(g.v) - torch.stack(g.h) @ moments(g, 48)[0].T
        rest[name] = rest[name].unflatten(0, (48, STEPS))
    omega = {p.weight: lookup(graph.gm, p.weight)[: len(rest[p.weight][0, 0]), UNITS:].detach() for p in h.consumers}
    later = F.pad(rest["r.weight_hh_l0"] @ omega["r.weight_hh_l0"], (0, 0, 0, 1))[:, 1:]
    asked = (later + rest["out.weight"] @ omega["out.weight"]).flatten(0, 1)
    for name in ("ih", "hh"):
        b = torch.stack(expected[f"r.weight_{name}_l0"].h)
        torch.testing.assert_close(
            s.producers[f"r.weight_{name}_l0"].gradient[:, 0], asked.T @ b, rtol=1e-8, atol=1e-10
        )
    assert graph.zero_output["r"]


@pytest.mark.parametrize("kind", KINDS)
def test_new_units_are_told_what_to_be(kind: str) -> None:
    profile = fxgrow.profile(Net(kind).double(), data(), F.mse_loss, units=2, progress=False)
    if kind == "rnn with relu":  # has no slope at zero
        assert profile.proposals["r"].alpha == {}
        return
    alpha = profile.proposals["r"].alpha
    gates = {"lstm": 4, "gru": 3, "rnn": 1}[kind]
    assert alpha["r.weight_ih_l0"].shape == (2 * gates, WIDTH + 1)
    assert alpha["r.weight_hh_l0"].shape == (2 * gates, UNITS + 1)
    assert len(profile["r"].singular_values) > 0
    # layers and directions are units of their own, which one direction cannot serve
    both = fxgrow.profile(Net(kind, bidirectional=True).double(), data(), F.mse_loss, units=2, progress=False)
    assert both.proposals["r"].alpha == {} and both["r"].bottleneck > 0


@pytest.mark.parametrize("norm", [nn.LayerNorm, nn.RMSNorm])
@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_a_norm_over_the_units_pins_them(kind: type[nn.RNNBase], norm: type[nn.Module]) -> None:
    class Normed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.r, self.norm, self.out = kind(IN, 5, batch_first=True), norm(5), nn.Linear(5, OUT)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(self.norm(self.r(x)[0]))

    gm = fxgrow.capture(Normed().double(), (data()[0][0],))
    for graph in (gm, unroll_recurrent_layers(gm)):
        width = fxgrow.widths(graph)[0]
        assert width.name == "r" and width.pinned is not None and width.pinned.code == "norm"


# -- where the samples are


class Transposed(nn.Module):
    """The same network on `[steps, samples, ...]`, but for its input and output."""

    def __init__(self, net: Net) -> None:
        super().__init__()
        self.a, self.out = net.a, net.out
        self.r = nn.LSTM(WIDTH, UNITS)
        self.r.load_state_dict(net.r.state_dict())

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.r(torch.tanh(self.a(x.transpose(0, 1))))[0]).permute(1, 0, 2)


@pytest.mark.parametrize("size", [12, STEPS])
@pytest.mark.parametrize("positions", ["all", "sampled"])
@pytest.mark.parametrize("method", ["default", "tiny"])
def test_steps_first_is_samples_first_in_disguise(method: str, positions: str, size: int) -> None:
    net, batches = Net("lstm").double(), data(size=size)
    options: dict[str, Any] = {"method": method, "positions": positions, "units": 2, "progress": False}
    expected, found = (fxgrow.profile(m.double(), batches, F.mse_loss, **options) for m in (net, Transposed(net)))
    for name in ("a", "r"):
        assert found[name].bottleneck == pytest.approx(expected[name].bottleneck, rel=1e-9)
        assert found[name].desired == pytest.approx(expected[name].desired, rel=1e-9)
        assert found[name].singular_values == pytest.approx(expected[name].singular_values, rel=1e-6)
        assert found[name].gains == pytest.approx(expected[name].gains, rel=1e-6, abs=1e-12)


class Heard(nn.Module):
    """A convolution over time, or an embedding, read by a GRU."""

    def __init__(self, front: nn.Module, batch_first: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.front, self.r, self.out = front, nn.GRU(WIDTH, UNITS, batch_first=batch_first), nn.Linear(UNITS, OUT)

    def forward(self, x: Tensor) -> Tensor:
        h = self.front(x)
        if isinstance(self.front, nn.Conv1d):
            h = torch.tanh(h).permute(*((0, 2, 1) if self.r.batch_first else (2, 0, 1)))
        elif not self.r.batch_first:
            h = h.transpose(0, 1)
        return self.out(self.r(h)[0][(slice(None), -1) if self.r.batch_first else -1])


@pytest.mark.parametrize("size", [12, STEPS])
@pytest.mark.parametrize("front", ["convolution", "embedding"])
def test_what_writes_a_sequence_has_a_bottleneck(front: str, size: int) -> None:
    profiles = []
    for batch_first in (True, False):
        torch.manual_seed(2)
        layer = nn.Conv1d(IN, WIDTH, 3, padding=1) if front == "convolution" else nn.Embedding(5, WIDTH)
        inputs = [x.transpose(1, 2) if front == "convolution" else (x[..., 0] > 0).long() for x, _ in data(size=size)]
        batches = [(x, y[:, -1]) for x, (_, y) in zip(inputs, data(size=size), strict=True)]
        net = Heard(layer, batch_first).double()
        options: dict[str, Any] = {"positions": "all", "widths": ["front"], "progress": False}
        profiles.append(fxgrow.profile(net, batches, F.mse_loss, **options)["front"])
    first, second = profiles
    assert first.bottleneck > 0 and len(first.gains) == 4
    assert (len(first.singular_values) > 0) == (front == "convolution")
    assert second.bottleneck == pytest.approx(first.bottleneck, rel=1e-9)
    assert second.singular_values == pytest.approx(first.singular_values, rel=1e-6)
    assert second.gains == pytest.approx(first.gains, rel=1e-6, abs=1e-12)
