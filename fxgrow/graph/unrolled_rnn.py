"""Recurrent layers unrolled over time, and cells: a fused kernel does not show a gate's inputs, which passes look at.

ensures:  a graph of the same function in eval mode, over the same parameters, in which every weight of an LSTM, a GRU
          or an RNN is a linear layer by itself: W_ih at all steps at once, W_hh through `rnn_previous_state`, its layer
          input, and a gradient probe (zeros that are added to its output), where -dl/d(W_hh h + b_hh) is read.

Packed sequences and projected outputs (`proj_size`) stay as they are. The loop is slower than a fused kernel.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from fxgrow.graph.conditional import graph_like
from fxgrow.graph.graph import release_generated_source, submodule
from fxgrow.graph.node_meta import OPAQUE, OWNER, RECORD, set_value

_FORWARDS: dict[Any, Any] = {kind.forward: kind for kind in (nn.LSTM, nn.GRU, nn.RNN)}
_CELLS: dict[Any, Any] = {kind.forward: kind for kind in (nn.LSTMCell, nn.GRUCell, nn.RNNCell)}


def rnn_input_gates(x: Tensor, weight: Tensor, bias: Tensor | None, recurrent: Tensor) -> Tensor:
    """Returns the part of the gates that comes from the layer input, at all steps; W_hh tells a rule the units."""
    return F.linear(x, weight, bias)


def rnn_scan(
    gates: Tensor,
    probe: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    state: tuple[Tensor | None, Tensor | None],
    cell: str,
    order: tuple[int, bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns h at all steps of one layer in one direction, and the last h and c.

    `gates` and `probe`, which is added to W_hh h + b_hh, are `[n, T, gates * H]` or `[T, n, gates * H]`; `weight` and
    `bias` are W_hh and b_hh, `state` is h and c at the start (None: zero), `cell` is `LSTM`, `GRU`, `tanh` or `relu`,
    and `order` the dimension of the steps and whether they run from the last to the first.
    """
    time, reverse = order
    from_input, probes = gates.unbind(time), probe.unbind(time)
    zeros = gates.new_zeros(*from_input[0].shape[:-1], weight.shape[1])
    h, c = (zeros if s is None else s for s in state)
    out: list[Tensor] = [zeros] * len(from_input)
    for t in reversed(range(len(out))) if reverse else range(len(out)):
        h, c = rnn_cell(from_input[t], F.linear(h, weight, bias) + probes[t], h, c, cell)
        out[t] = h
    return torch.stack(out, time), h, c


def rnn_cell(from_input: Tensor, from_state: Tensor, h: Tensor, c: Tensor, cell: str) -> tuple[Tensor, Tensor]:
    """Returns h and c after one step, from the two parts of the gates; c is only that of an LSTM."""
    if cell == "LSTM":
        i, f, g, o = (from_input + from_state).chunk(4, -1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        return o.sigmoid() * c.tanh(), c
    if cell == "GRU":
        (r, z, n), (hr, hz, hn) = from_input.chunk(3, -1), from_state.chunk(3, -1)
        n = (n + (r + hr).sigmoid() * hn).tanh()
        return n + (z + hz).sigmoid() * (h - n), c
    return (from_input + from_state).relu() if cell == "relu" else (from_input + from_state).tanh(), c


def rnn_zero_state(x: Tensor, recurrent: Tensor) -> Tensor:
    """Returns the state of a cell that is given none; W_hh tells the units."""
    return x.new_zeros(*x.shape[:-1], recurrent.shape[1])


def rnn_previous_state(
    hidden: Tensor, h: Tensor | None, probe: Tensor, weight: Tensor, bias: Tensor | None, order: tuple[int, bool]
) -> Tensor:
    """Returns the layer input of W_hh at every step; `probe`, `weight` and `bias` tell a rule which layer that is."""
    time, reverse = order
    first = torch.zeros_like(hidden.select(time, 0)) if h is None else h
    rest = hidden.narrow(time, int(reverse), hidden.shape[time] - 1)
    parts = [rest, first.unsqueeze(time)] if reverse else [first.unsqueeze(time), rest]
    return torch.cat(parts, time)


def rnn_outputs(hidden: Tensor, h: list[Tensor], c: list[Tensor]) -> tuple[Tensor, Any]:
    """Returns the outputs of the module: with the last states of all layers and directions, c only of an LSTM."""
    return hidden, (torch.stack(h), torch.stack(c)) if c else torch.stack(h)


def unroll_recurrent_layers(gm: fx.GraphModule) -> fx.GraphModule:
    """Returns the graph itself, or where it has recurrent layers one with their steps, over the same parameters."""
    layers = [n for n in gm.graph.nodes if _can_unroll(gm, n)]
    if not layers:
        return gm
    graph, node_map = graph_like(gm.graph)
    new = fx.GraphModule(nn.Module(), fx.Graph())
    for name in ("_modules", "_parameters", "_buffers", "_non_persistent_buffers_set"):
        getattr(new, name).update(getattr(gm, name))
    new.meta = {key: value for key, value in gm.meta.items() if key != RECORD}
    new.training = gm.training
    for node in layers:
        module: Any = submodule(gm, str(node.target))
        with graph.inserting_before(node_map[node]):
            unrolled = _Unrolled(graph, node_map[node], module)
            result = unrolled.cell_step() if isinstance(module, nn.RNNCellBase) else unrolled.write()
        node_map[node].replace_all_uses_with(result)
        graph.erase_node(node_map[node])
    new.graph = graph
    release_generated_source(new)
    return new


def _can_unroll(gm: fx.GraphModule, node: fx.Node) -> bool:
    if node.op != "call_module" or OPAQUE in node.meta:
        return False
    m = submodule(gm, str(node.target))
    if type(m).forward in _CELLS:
        return not any(name not in m._parameters for name in ("weight_ih", "weight_hh"))
    if not isinstance(m, nn.RNNBase) or type(m).forward not in _FORWARDS or m.proj_size:
        return False
    known = isinstance(node.all_input_nodes[0].meta["val"], Tensor) and bool(node.args)
    # a weight under a norm is computed, and no parameter
    return known and all(name in m._parameters for names in m._all_weights for name in names)


class _Unrolled:
    """The nodes of one module's call, inserted before it."""

    def __init__(self, graph: fx.Graph, node: fx.Node, module: Any) -> None:
        self.graph, self.node, self.module = graph, node, module
        kind = (_FORWARDS | _CELLS)[type(module).forward].__name__.removesuffix("Cell")
        self.lstm = kind == "LSTM"
        self.cell = getattr(module, "nonlinearity", kind)
        self.x = node.all_input_nodes[0]
        self.like: Tensor = self.x.meta["val"]
        self.time = int(getattr(module, "batch_first", False) and self.like.dim() == 3)
        state: Any = node.args[1] if len(node.args) > 1 else node.kwargs.get("hx")
        self.h = self._item(state, 0) if self.lstm else state
        self.c = self._item(state, 1) if self.lstm else None

    def write(self) -> fx.Node:
        last_h: list[fx.Node] = []
        last_c: list[fx.Node] = []
        x: Any = self.x
        directions = 1 + self.module.bidirectional
        for layer in range(self.module.num_layers):
            sides: list[fx.Node] = []
            for reverse in range(directions):
                names = self.module._all_weights[directions * layer + reverse]
                side, h, c = self._direction(x, names, bool(reverse), len(last_h))
                sides.append(side)
                last_h.append(h)
                last_c.append(c)
            x = sides[0] if directions == 1 else self._call(torch.cat, (sides, -1), self._new(directions))
        states = [self.like.new_empty(len(last_h), *last_h[0].meta["val"].shape) for _ in range(2)]
        value = x.meta["val"], tuple(states) if self.lstm else states[0]
        return self._call(rnn_outputs, (x, last_h, last_c if self.lstm else []), value)

    def cell_step(self) -> fx.Node:
        """One step, of a cell."""
        w_ih, w_hh, b_ih, b_hh = map(self._parameter, ("weight_ih", "weight_hh", "bias_ih", "bias_hh"))
        start = None
        if self.h is None:
            start = self._call(rnn_zero_state, (self.x, w_hh), self._new(1))
        h, c = (start if s is None else s for s in (self.h, self.c if self.lstm else self.h))
        like_gates = self._new(len(self.module.weight_hh) // self.module.hidden_size)
        from_input = self._call(rnn_input_gates, (self.x, w_ih, b_ih, w_hh), like_gates)
        from_state = self._call(rnn_input_gates, (h, w_hh, b_hh, w_hh), like_gates)
        state = self._call(rnn_cell, (from_input, from_state, h, c, self.cell), (self._new(1), self._new(1)))
        return state if self.lstm else self._item(state, 0)

    def _direction(self, x: fx.Node, names: list[str], reverse: bool, index: int) -> tuple[fx.Node, fx.Node, fx.Node]:
        parameters = {name.split("_l")[0]: self._parameter(name) for name in names}
        w_ih, w_hh, b_ih, b_hh = (parameters.get(key) for key in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"))
        h, c = self._item(self.h, index), self._item(self.c, index)
        like_gates = self._new(len(getattr(self.module, names[0])) // self.module.hidden_size)
        gates = self._call(rnn_input_gates, (x, w_ih, b_ih, w_hh), like_gates)
        probe = self._call(torch.zeros_like, (gates,), like_gates)
        hidden, order = self._new(1), (self.time, reverse)
        last = hidden.select(self.time, 0)
        scan = self._call(rnn_scan, (gates, probe, w_hh, b_hh, (h, c), self.cell, order), (hidden, last, last))
        states, last_h, last_c = (self._item(scan, i) for i in range(3))
        previous = self._call(rnn_previous_state, (states, h, probe, w_hh, b_hh, order), hidden)
        # added with a factor of zero, so that backward reaches the previous state, whose gradient a pass can correct
        return self._call(torch.add, (states, previous), hidden, alpha=0), last_h, last_c

    def _new(self, entries: int) -> Tensor:
        """Returns a value with so many entries per unit at every step."""
        return self.like.new_empty(*self.like.shape[:-1], entries * self.module.hidden_size)

    def _parameter(self, name: str) -> fx.Node | None:
        if getattr(self.module, name) is None:
            return None
        node = self.graph.get_attr(f"{self.node.target}.{name}")
        set_value(node, self.like.new_empty(getattr(self.module, name).shape))
        return node

    def _item(self, sequence: Any, i: int) -> Any:
        if not isinstance(sequence, fx.Node):
            return None if sequence is None else sequence[i]
        return self._call(operator.getitem, (sequence, i), sequence.meta["val"][i])

    def _call(self, function: Any, arguments: tuple[Any, ...], value: Any, **options: Any) -> fx.Node:
        node = self.graph.call_function(function, arguments, options)
        node.meta[OWNER] = str(self.node.target)
        set_value(node, value)
        return node
