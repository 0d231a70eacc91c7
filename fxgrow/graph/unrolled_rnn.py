"""Recurrent layers written out over time, for passes that look inside: no fused kernel shows what enters a gate.

requires: a captured graph.
ensures:  a graph of the same function in eval mode, over the same parameters, in which every weight of an LSTM, a GRU
          or an RNN is a linear layer of its own: W_ih at all steps at once, W_hh through `before`, which is what it
          reads, and a node of zeros that is added to what it writes, which is where V = -dl/d(W_hh h + b_hh) is read.

Packed sequences and projected outputs (`proj_size`) stay as they are: no width of theirs can grow. A loop over steps
takes longer than a fused kernel, so nobody else should run this graph.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from fxgrow.graph.conditional import graph_like
from fxgrow.graph.graph import release_generated_source, submodule
from fxgrow.graph.node_meta import KEY, OWNER, set_value

_FORWARDS = {kind.forward: kind for kind in (nn.LSTM, nn.GRU, nn.RNN)}


def rnn_input_gates(x: Tensor, weight: Tensor, bias: Tensor | None, recurrent: Tensor) -> Tensor:
    """What comes in adds this to the gates, at every step; by `recurrent`, which is W_hh, a rule counts the units."""
    return F.linear(x, weight, bias)


def steps(
    gates: Tensor,
    echo: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    h: Tensor | None,
    c: Tensor | None,
    cell: str,
    time: int,
    reverse: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """One layer in one direction.

    Args:
        gates: what comes in adds to the gates, `[n, T, gates * H]` or `[T, n, gates * H]`.
        echo: is added to W_hh h + b_hh, like `gates`.
        weight: W_hh, `[gates * H, H]`.
        bias: b_hh.
        h: the state at the start, `[n, H]`; None for zero.
        c: the LSTM's.
        cell: `LSTM`, `GRU`, `tanh` or `relu`.
        time: the dimension of the steps.
        reverse: from the last to the first.

    Returns:
        The states at all steps, and the last of h and of c.
    """
    given, echoes = gates.unbind(time), echo.unbind(time)
    start = gates.new_zeros(*given[0].shape[:-1], weight.shape[1])
    h, c = start if h is None else h, start if c is None else c
    out: list[Tensor] = [start] * len(given)
    for t in reversed(range(len(given))) if reverse else range(len(given)):
        again = F.linear(h, weight, bias) + echoes[t]
        if cell == "LSTM":
            i, f, g, o = (given[t] + again).chunk(4, -1)
            c = f.sigmoid() * c + i.sigmoid() * g.tanh()
            h = o.sigmoid() * c.tanh()
        elif cell == "GRU":
            (r, z, n), (hr, hz, hn) = given[t].chunk(3, -1), again.chunk(3, -1)
            n = (n + (r + hr).sigmoid() * hn).tanh()
            h = n + (z + hz).sigmoid() * (h - n)
        else:
            h = (given[t] + again).relu() if cell == "relu" else (given[t] + again).tanh()
        out[t] = h
    return torch.stack(out, time), h, c


def before(
    hidden: Tensor, h: Tensor | None, echo: Tensor, weight: Tensor, bias: Tensor | None, time: int, reverse: bool
) -> Tensor:
    """The state that W_hh reads at every step; `echo`, `weight` and `bias` tell a rule what that is."""
    first = torch.zeros_like(hidden.select(time, 0)) if h is None else h
    count = hidden.shape[time] - 1
    rest = hidden.narrow(time, int(reverse), count)
    parts = [rest, first.unsqueeze(time)] if reverse else [first.unsqueeze(time), rest]
    return torch.cat(parts, time)


def outputs(hidden: Tensor, h: list[Tensor], c: list[Tensor]) -> tuple[Tensor, Any]:
    """What the module returns: last states of all layers and directions, of c only for an LSTM."""
    return hidden, (torch.stack(h), torch.stack(c)) if c else torch.stack(h)


def unroll_recurrent_layers(gm: fx.GraphModule) -> fx.GraphModule:
    """The graph itself, or where it has recurrent layers one that shows their steps, over the same parameters."""
    found = [n for n in gm.graph.nodes if _can(gm, n)]
    if not found:
        return gm
    graph, node_map = graph_like(gm.graph)
    new = fx.GraphModule(nn.Module(), fx.Graph())
    new._modules.update(gm._modules)
    new._parameters.update(gm._parameters)
    new._buffers.update(gm._buffers)
    new._non_persistent_buffers_set = set(gm._non_persistent_buffers_set)
    new.meta = {key: value for key, value in gm.meta.items() if key != "fxgrow"}
    new.training = gm.training
    for node in found:
        module: Any = submodule(gm, str(node.target))
        with graph.inserting_before(node_map[node]):
            result = _Layers(graph, node_map[node], module).write()
        node_map[node].replace_all_uses_with(result)
        graph.erase_node(node_map[node])
    new.graph = graph
    release_generated_source(new)
    return new


def _can(gm: fx.GraphModule, node: fx.Node) -> bool:
    if node.op != "call_module" or KEY in node.meta:
        return False
    m = submodule(gm, str(node.target))
    if not isinstance(m, nn.RNNBase) or type(m).forward not in _FORWARDS or m.proj_size:
        return False
    known = isinstance(node.all_input_nodes[0].meta["val"], Tensor) and bool(node.args)
    # a weight under a norm is computed, and no parameter
    return known and all(name in m._parameters for names in m._all_weights for name in names)


class _Layers:
    """The nodes of one module's call, written in front of it."""

    def __init__(self, graph: fx.Graph, node: fx.Node, module: nn.RNNBase) -> None:
        self.graph, self.node, self.m = graph, node, module
        self.kind = _FORWARDS[type(module).forward]
        self.cell = getattr(module, "nonlinearity", self.kind.__name__)
        self.x = node.all_input_nodes[0]
        self.like: Tensor = self.x.meta["val"]
        self.time = int(module.batch_first and self.like.dim() == 3)
        state: Any = node.args[1] if len(node.args) > 1 else node.kwargs.get("hx")
        lstm = self.kind is nn.LSTM
        self.h = self._item(state, 0) if lstm and state is not None else state
        self.c = self._item(state, 1) if lstm and state is not None else None

    def write(self) -> fx.Node:
        last_h: list[fx.Node] = []
        last_c: list[fx.Node] = []
        x: Any = self.x
        directions = 1 + self.m.bidirectional
        for layer in range(self.m.num_layers):
            sides: list[fx.Node] = []
            for reverse in range(directions):
                names = self.m._all_weights[directions * layer + reverse]
                side, h, c = self._direction(x, names, bool(reverse), len(last_h))
                sides.append(side)
                last_h.append(h)
                last_c.append(c)
            x = sides[0] if directions == 1 else self._call(torch.cat, (sides, -1), self._new(directions))
        count, h_shape = len(last_h), last_h[0].meta["val"].shape
        states = [self.like.new_empty(count, *h_shape) for _ in range(2)]
        lstm = self.kind is nn.LSTM
        value = x.meta["val"], tuple(states) if lstm else states[0]
        return self._call(outputs, (x, last_h, last_c if lstm else []), value)

    def _direction(self, x: fx.Node, names: list[str], reverse: bool, at: int) -> tuple[fx.Node, fx.Node, fx.Node]:
        own = {name.split("_l")[0]: self._parameter(name) for name in names}
        w_ih, w_hh, b_ih, b_hh = (own.get(key) for key in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"))
        h, c = self._item(self.h, at), self._item(self.c, at)
        gates = self._new(len(getattr(self.m, names[0])) // self.m.hidden_size)
        given = self._call(rnn_input_gates, (x, w_ih, b_ih, w_hh), gates)
        echo = self._call(torch.zeros_like, (given,), gates)
        hidden = self._new(1)
        last = hidden.select(self.time, 0)
        arguments = given, echo, w_hh, b_hh, h, c, self.cell, self.time, reverse
        every = self._call(steps, arguments, (hidden, last, last))
        states, last_h, last_c = (self._item(every, i) for i in range(3))
        read = self._call(before, (states, h, echo, w_hh, b_hh, self.time, reverse), hidden)
        # so that backward passes by what W_hh reads, with a gradient of zero: what a reader returns can be corrected
        return self._call(torch.add, (states, read), hidden, alpha=0), last_h, last_c

    def _new(self, entries: int) -> Tensor:
        """A value of so many entries per unit at every step."""
        return self.like.new_empty(*self.like.shape[:-1], entries * self.m.hidden_size)

    def _parameter(self, name: str) -> fx.Node:
        node = self.graph.get_attr(f"{self.node.target}.{name}")
        set_value(node, self.like.new_empty(getattr(self.m, name).shape))
        return node

    def _item(self, of: Any, i: int) -> Any:
        if not isinstance(of, fx.Node):
            return None if of is None else of[i]
        return self._call(operator.getitem, (of, i), of.meta["val"][i])

    def _call(self, function: Any, arguments: tuple[Any, ...], value: Any, **options: Any) -> fx.Node:
        node = self.graph.call_function(function, arguments, options)
        node.meta[OWNER] = str(self.node.target)
        set_value(node, value)
        return node
