"""Recurrent layers: one hidden width for all layers, directions and gates, consumed again at the next step."""

from __future__ import annotations

from itertools import product
from typing import Any

from torch import nn
from torch.nn.utils.rnn import PackedSequence, PackedSequence_, pack_padded_sequence, pad_packed_sequence

from fxgrow.axes.axes import Dims, UnitVar, axis_of, dims_in, fixed, length
from fxgrow.graph.unrolled_rnn import (
    rnn_cell,
    rnn_input_gates,
    rnn_outputs,
    rnn_previous_state,
    rnn_scan,
    rnn_zero_state,
)
from fxgrow.ops.context import Context, Unsupported
from fxgrow.ops.registry import op

_Packed: Any = PackedSequence_  # of axes
_GATES = {nn.LSTM: 4, nn.GRU: 3, nn.RNN: 1}
_CELLS = {nn.LSTMCell: 4, nn.GRUCell: 3, nn.RNNCell: 1}


@op(*_GATES)
def recurrent(ctx: Context, x: Any, state: Any = None) -> Any:
    m = ctx.module
    if not isinstance(x, Dims) or m.proj_size:
        raise Unsupported("a packed sequence" if not isinstance(x, Dims) else "its output is projected (proj_size)")
    gates = _GATES[type(m)]
    hidden = axis_of(UnitVar(m.hidden_size))
    reverse = ("", "_reverse") if m.bidirectional else ("",)
    for given in dims_in(state):
        ctx.same(given[-1], hidden)
    reads = x[-1]
    for layer in range(m.num_layers):
        for suffix, (kind, source) in product(reverse, (("ih", reads), ("hh", hidden))):
            weight = ctx.parameter(f"weight_{kind}_l{layer}{suffix}") or Dims()
            ctx.same(weight[0], hidden * gates)
            ctx.same(weight[1], source)
            bias = ctx.parameter(f"bias_{kind}_l{layer}{suffix}")
            # inputs of the gates are inside of the kernel; `graph/unrolled_rnn.py` makes them nodes
            ctx.project(weight, bias, hidden * gates, units=hidden, plain=False)
        reads = hidden * len(reverse)
    ctx.attribute("input_size", x[-1])
    ctx.attribute("hidden_size", hidden)
    batch = () if len(x) == 2 else (x[0] if m.batch_first else x[1],)
    last = Dims((fixed(m.num_layers * len(reverse)), *batch, hidden))
    return Dims((*x[:-1], reads)), (last, last) if isinstance(m, nn.LSTM) else last


@op(*_CELLS)
def cell(ctx: Context, x: Dims, state: Any = None) -> Any:
    """One step, called in a loop: every call reads the same weights."""
    hidden = (ctx.parameter("weight_hh") or Dims())[1]
    for given in dims_in(state):
        ctx.same(given[-1], hidden)
    for kind, source in (("ih", x[-1]), ("hh", hidden)):
        weight = ctx.parameter(f"weight_{kind}") or Dims()
        ctx.same(weight[0], hidden * _CELLS[type(ctx.module)])
        ctx.same(weight[1], source)
        ctx.project(weight, ctx.parameter(f"bias_{kind}"), weight[0], units=hidden, plain=False)
    ctx.attribute("input_size", x[-1])
    ctx.attribute("hidden_size", hidden)
    new = Dims((*x[:-1], hidden))
    return (new, new) if isinstance(ctx.module, nn.LSTMCell) else new


@op(pack_padded_sequence)
def pack(ctx: Context, x: Dims, *options: Any, **named: Any) -> Any:
    made: list[Any] = [t if t is None else Dims(map(fixed, t.shape)) for t in ctx.value]
    return _Packed(Dims((made[0][0], *x[2:])), *made[1:])


@op(pad_packed_sequence)
def pad(ctx: Context, sequence: Any, *options: Any, **named: Any) -> tuple[Dims, Dims]:
    padded, lengths = (Dims(map(fixed, t.shape)) for t in ctx.value)
    return Dims((*padded[:2], *sequence[0][1:])), lengths


@op(PackedSequence)
def packed(ctx: Context, *tensors: Dims | None) -> Any:
    return _Packed(*tensors)


@op(rnn_zero_state)
def _rnn_zero_state(ctx: Context, x: Dims, recurrent: Dims) -> Dims:
    return Dims((*x[:-1], recurrent[1]))


@op(rnn_cell)
def _rnn_cell(ctx: Context, from_input: Dims, from_state: Dims, h: Dims, c: Dims, kind: str) -> tuple[Dims, Dims]:
    ctx.same(from_input[-1], from_state[-1])
    ctx.same(h[-1], c[-1])
    return Dims(h), Dims(c)


@op(rnn_input_gates)
def _rnn_input_gates(ctx: Context, x: Dims, weight: Dims, bias: Dims | None, recurrent: Dims) -> Dims:
    hidden = recurrent[1]
    gates = hidden * (length(weight[0]) // length(hidden))
    ctx.same(recurrent[0], gates)
    ctx.same(weight[0], gates)
    ctx.same(weight[1], x[-1])
    ctx.project(weight, bias, gates, units=hidden)
    return Dims((*x[:-1], gates))


@op(rnn_scan)
def _rnn_scan(ctx: Context, gates: Dims, probe: Dims, weight: Dims, bias: Any, state: Any, *options: Any) -> Any:
    hidden, (_, (time, _)) = weight[1], options
    for start in dims_in(state):
        ctx.same(start[-1], hidden)
    last = Dims((*gates[:time], *gates[time + 1 : -1], hidden))
    return Dims((*gates[:-1], hidden)), last, last


@op(rnn_previous_state)
def _rnn_previous_state(ctx: Context, hidden: Dims, h: Any, probe: Dims, weight: Dims, bias: Any, order: Any) -> Dims:
    ctx.project(weight, bias, probe[-1], units=hidden[-1], node=ctx.argument(2, "probe"), source=ctx.node)
    return Dims(hidden)


@op(rnn_outputs)
def _rnn_outputs(ctx: Context, hidden: Dims, h: list[Dims], c: list[Dims]) -> Any:
    for state in (*h, *c):
        ctx.same(state[-1], h[0][-1])
    last = Dims((fixed(len(h)), *h[0]))
    return hidden, (last, last) if c else last
