"""What new units put out, by themselves: from what their producers read, without the rest of the network.

Between most producers and consumers every unit goes its own way: activations, pools, sums, norms per channel. There
new units are run as a network of their own, as narrow as they are few. Norms of new channels are transparent in eval
mode, so they are passed by. Whatever else lies between, the whole network is widened and run (`candidates/widened.py`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.func import functional_call

from fxgrow.analysis.analyse import AnalysedGraph
from fxgrow.analysis.widths import GrowableWidth
from fxgrow.axes.axes import Dims, UnitVar, multiplicity, resolve
from fxgrow.axes.structure import Projection
from fxgrow.candidates.widened import put_rows
from fxgrow.graph.graph import lookup
from fxgrow.initialisers.registry import Proposal
from fxgrow.ops.elementwise import elementwise
from fxgrow.ops.normalization import channel_norm
from fxgrow.ops.pooling import interpolate, pool
from fxgrow.ops.reductions import reduce
from fxgrow.ops.registry import Rule, find_rule
from fxgrow.ops.views import clone, flatten, identity
from fxgrow.rewriting.batch_norm import can_be_identity
from fxgrow.rewriting.parametrizations import spectral
from fxgrow.rewriting.values import Values
from fxgrow.statistics.batch_dimension import nodes_with_batch_second
from fxgrow.statistics.consumer_moments import ConsumerMoments

#: each unit apart, wherever the samples stand
_POINTWISE: tuple[Rule, ...] = (elementwise, identity, clone)
#: each channel of a map apart
_OF_MAPS: tuple[Rule, ...] = (pool, interpolate, reduce, flatten)


@dataclass(frozen=True)
class IsolatedPath:
    """The way of one width's new units, from what its producers read to what its consumers read.

    Attributes:
        hidden: the width.
        nodes: on the way, in the order in which they run.
        passed: norms that new channels pass as they are.
    """

    gm: fx.GraphModule
    hidden: GrowableWidth
    nodes: tuple[fx.Node, ...]
    passed: frozenset[fx.Node]

    @property
    def sources(self) -> list[fx.Node]:
        """What the producers read."""
        return list(dict.fromkeys(p.source for p in self.hidden.producers))

    @torch.no_grad()
    def put_out(self, proposal: Proposal, inputs: Mapping[fx.Node, Tensor]) -> dict[fx.Node, Tensor]:
        """New channels at every source of a consumer, for the inputs of the producers. In eval mode."""
        values = Values()
        for p in self.hidden.producers:
            put_rows(self.gm, p, "", proposal.alpha[p.weight], values)
        entries = {name: next(iter(own.values())) for name, own in values.new.items()}
        known: dict[fx.Node, Any] = {}
        writes = {p.node: p.source for p in self.hidden.producers}

        def value(n: fx.Node) -> Any:
            name = str(n.target)
            if n.op == "get_attr":
                return entries[name].to(lookup(self.gm, name)) if name in entries else lookup(self.gm, name)
            return known[n]

        for node in self.nodes:
            read = writes.get(node)
            # a producer may read old units of its own width
            own = value if read is None else lambda n, read=read: inputs[n] if n is read else value(n)
            known[node] = self._run(node, own, entries)
        return {p.source: known[p.source] for p in self.hidden.consumers}

    def _run(self, node: fx.Node, value: Any, entries: Mapping[str, Tensor]) -> Any:
        if node in self.passed:
            (before,) = node.all_input_nodes
            return value(before) if len(before.users) == 1 else value(before).clone()
        args, kwargs = fx.map_arg((node.args, node.kwargs), value)
        if node.op == "call_method":
            return getattr(args[0], str(node.target))(*args[1:], **kwargs)
        if node.op == "call_function":
            return node.target(*args, **kwargs)  # type: ignore[operator]
        module = self.gm.get_submodule(str(node.target))
        own = {leaf: entries[name] for leaf in ("weight", "bias") if (name := f"{node.target}.{leaf}") in entries}
        if not own:
            return module(*args, **kwargs)
        return functional_call(module, {leaf: t.to(getattr(module, leaf)) for leaf, t in own.items()}, args, kwargs)


def apart(
    analysed: AnalysedGraph, hiddens: Iterable[GrowableWidth], consumers: Mapping[str, ConsumerMoments]
) -> dict[str, IsolatedPath]:
    """The widths of which new units can be run by themselves; with one that cannot go all that share a consumer."""
    hiddens = list(hiddens)
    second = nodes_with_batch_second(analysed.gm.graph)
    found = {h.name: way for h in hiddens if (way := _way(analysed, h, consumers, second)) is not None}
    readers = {h.name: {p.weight for p in h.consumers} for h in hiddens}
    while True:
        lost = {w for name, own in readers.items() if name not in found for w in own}
        gone = [name for name in found if readers[name] & lost]
        if not gone:
            return found
        for name in gone:
            del found[name]


def _way(
    analysed: AnalysedGraph,
    h: GrowableWidth,
    consumers: Mapping[str, ConsumerMoments],
    second: set[fx.Node],
) -> IsolatedPath | None:
    gm = analysed.gm
    if not h.consumers or any(p.weight not in consumers or consumers[p.weight].uses[0].experts for p in h.consumers):
        return None
    if any(len(resolve(p.input_axis)) != 1 or p.transposed for p in h.consumers):
        return None
    if any(spectral(gm, p.weight) for p in (*h.producers, *h.consumers)):
        return None  # under such a norm new entries are not what was proposed
    if not all(p.plain and p.groups == 1 and not p.transposed and _own_weight(gm, p) for p in h.producers):
        return None
    writers = {p.node for p in h.producers}
    maps = all(p.kernel for p in h.producers)
    rules = (*_POINTWISE, *_OF_MAPS) if maps else _POINTWISE
    nodes: set[fx.Node] = set()
    passed: set[fx.Node] = set()
    queue = [p.source for p in h.consumers]
    for node in queue:
        if node in nodes:
            continue
        nodes.add(node)
        if maps and node in second:
            return None
        if node in writers:
            continue
        module = gm.get_submodule(str(node.target)) if node.op == "call_module" else None
        rule = find_rule(node, module) if node.op.startswith("call_") else None
        if rule is channel_norm and module is not None and can_be_identity(module):
            passed.add(node)
        elif rule not in rules or (module is not None and any(True for _ in module.parameters())):
            return None
        for n in node.all_input_nodes:
            if _carries(analysed, n, h.var):
                queue.append(n)
            else:
                return None
    return IsolatedPath(gm, h, tuple(n for n in gm.graph.nodes if n in nodes), frozenset(passed))


def _own_weight(gm: fx.GraphModule, p: Projection) -> bool:
    """Whether the use reads a parameter as it is stored, whatever its size: no norm or cast computes it from others."""
    if p.node.op == "call_module":
        module = gm.get_submodule(str(p.node.target))
        # other people's layers may keep their size as a number, as Conv1D of transformers does
        ours = type(module).__module__.startswith("torch.nn.modules.")
        return ours and p.weight == f"{p.node.target}.weight" and isinstance(module.weight, nn.Parameter)
    others = [n for n in p.node.all_input_nodes if n is not p.source]
    return all(n.op == "get_attr" and str(n.target) in (p.weight, p.bias) for n in others)


def _carries(analysed: AnalysedGraph, node: fx.Node, var: UnitVar) -> bool:
    dims = analysed.structure.outputs.get(node)
    return isinstance(dims, Dims) and any(var in multiplicity(a) for a in dims)
