"""Activations of new units without the rest of the network, from what their producers read.

Between most producers and consumers every unit has a path of its own: activations, pools, sums, norms per channel.
There new units are run as a network by themselves, as narrow as they are few. BatchNorms of new channels are the
identity in eval mode, so they are passed by. Whatever else lies between, the whole network is widened and run
(`widened.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.func import functional_call

from fxgrow.analysis.analyse import AnalysedGraph
from fxgrow.analysis.widths import GrowableWidth
from fxgrow.axes.axes import Dims, resolve, variables
from fxgrow.axes.structure import Projection
from fxgrow.candidates.widened import put_rows
from fxgrow.graph.conditional import runs_in_eval_mode
from fxgrow.graph.graph import lookup
from fxgrow.initialisers.registry import Proposal
from fxgrow.ops.elementwise import elementwise
from fxgrow.ops.normalization import channel_norm
from fxgrow.ops.pooling import interpolate, pool
from fxgrow.ops.reductions import reduce
from fxgrow.ops.registry import Rule, find_rule
from fxgrow.ops.views import flatten, identity
from fxgrow.rewriting.batch_norm import can_be_identity
from fxgrow.rewriting.parametrizations import spectral
from fxgrow.rewriting.values import Values
from fxgrow.statistics.batch_dimension import Samples, as_maps, find_samples
from fxgrow.statistics.consumer_moments import ConsumerMoments

#: rules of operators that keep units isolated, wherever the batch dimension is
_POINTWISE: tuple[Rule, ...] = (elementwise, identity)
#: and of those that keep the channels of a map isolated
_OF_MAPS: tuple[Rule, ...] = (pool, interpolate, reduce, flatten)


@dataclass(frozen=True)
class IsolatedPath:
    """The path of one width's new units, from what its producers read to what its consumers read.

    Attributes:
        gm: the graph.
        width: the width.
        nodes: on the path, in the order in which they run.
        passed: BatchNorms that are the identity for new channels.
    """

    gm: fx.GraphModule
    width: GrowableWidth
    nodes: tuple[fx.Node, ...]
    passed: frozenset[fx.Node]

    @property
    def sources(self) -> list[fx.Node]:
        """What the producers read."""
        return list(dict.fromkeys(p.source for p in self.width.producers))

    @torch.no_grad()
    def activations(self, proposal: Proposal, inputs: Mapping[fx.Node, Tensor]) -> dict[fx.Node, Tensor]:
        """New channels at every source of a consumer, for the inputs of the producers. In eval mode.

        All are laid out by sample, see `statistics/batch_dimension.py`.
        """
        values = Values()
        for p in self.width.producers:
            put_rows(self.gm, p, "", proposal.alpha[p.weight], values)
        entries = {name: next(iter(slices.values())) for name, slices in values.new.items()}
        computed: dict[fx.Node, Any] = {}
        n = len(inputs[self.sources[0]])
        inputs = {p.source: as_maps(inputs[p.source], len(p.kernel)) for p in self.width.producers}
        read_by = {p.node: p.source for p in self.width.producers}

        def value(n: fx.Node) -> Any:
            if n.op != "get_attr":
                return computed[n]
            old = lookup(self.gm, str(n.target))
            return entries[str(n.target)].to(old) if n.target in entries else old

        for node in self.nodes:
            source = read_by.get(node)
            # a producer may read old units of its own width
            operand = value if source is None else lambda n, source=source: inputs[n] if n is source else value(n)
            computed[node] = self._run(node, operand, entries)
        out = {p.source: computed[p.source] for p in self.width.consumers}
        return {node: z if len(z) == n else z.unflatten(0, (n, -1)) for node, z in out.items()}

    def _run(self, node: fx.Node, value: Callable[[fx.Node], Any], entries: Mapping[str, Tensor]) -> Any:
        if node in self.passed:
            (before,) = node.all_input_nodes
            return value(before) if len(before.users) == 1 else value(before).clone()
        args, kwargs = fx.map_arg((node.args, node.kwargs), value)
        if node.op == "call_method":
            return getattr(args[0], str(node.target))(*args[1:], **kwargs)
        if node.op == "call_function":
            return node.target(*args, **kwargs)  # type: ignore[operator]
        module = self.gm.get_submodule(str(node.target))
        new = {
            leaf: entries[name].to(getattr(module, leaf))
            for leaf in ("weight", "bias")
            if (name := f"{node.target}.{leaf}") in entries
        }
        return functional_call(module, new, args, kwargs) if new else module(*args, **kwargs)


def isolated_paths(
    analysed: AnalysedGraph, widths: Iterable[GrowableWidth], consumers: Mapping[str, ConsumerMoments]
) -> dict[str, IsolatedPath]:
    """The widths whose new units can be run isolated; with one that cannot go all that share a consumer."""
    samples = find_samples(analysed.gm.graph)
    readers = {w.name: {p.weight for p in w.consumers} for w in widths}
    paths = {}
    for name in readers:
        width = analysed.widths[name]
        path = _isolated_path(analysed, width, samples) if _can_be_isolated(analysed, width, consumers) else None
        if path is not None:
            paths[name] = path
    while True:
        lost = {weight for name, weights in readers.items() if name not in paths for weight in weights}
        gone = [name for name in paths if readers[name] & lost]
        if not gone:
            return paths
        for name in gone:
            del paths[name]


def _can_be_isolated(analysed: AnalysedGraph, width: GrowableWidth, consumers: Mapping[str, ConsumerMoments]) -> bool:
    """Whether the producers and consumers of a width are plain matrices or kernels, whatever lies between them."""
    gm, reads = analysed.gm, width.consumers
    if not all(runs_in_eval_mode(p.node) for p in width.producers):
        return False
    if not reads or any(p.weight not in consumers or consumers[p.weight].uses[0].experts for p in reads):
        return False
    if any(len(resolve(p.input_axis)) != 1 or p.transposed for p in reads):
        return False
    if any(spectral(gm, p.weight) for p in (*width.producers, *reads)):
        return False  # under such a norm new entries are not what was proposed
    return all(p.plain and p.groups == 1 and not p.transposed and _is_stored(gm, p) for p in width.producers)


def _isolated_path(
    analysed: AnalysedGraph, width: GrowableWidth, samples: Mapping[fx.Node, Samples]
) -> IsolatedPath | None:
    gm, producers = analysed.gm, {p.node for p in width.producers}
    maps = all(p.kernel for p in width.producers)
    rules = (*_POINTWISE, *_OF_MAPS) if maps else _POINTWISE
    passed: set[fx.Node] = set()
    queue = list(dict.fromkeys(p.source for p in width.consumers))
    places = {samples.get(p.source) for p in width.producers}
    for node in queue:
        # maps have their samples, and frames of samples, in the first dimension
        if len(places | {samples.get(node)}) > 1 or None in places:
            return None
        if node in producers:
            continue
        module = gm.get_submodule(str(node.target)) if node.op == "call_module" else None
        rule = find_rule(node, module) if node.op.startswith("call_") else None
        if rule is channel_norm and module is not None and can_be_identity(module):
            passed.add(node)
        elif rule not in rules or (module is not None and any(True for _ in module.parameters())):
            return None
        for n in node.all_input_nodes:
            dims = analysed.structure.outputs.get(n)
            if not isinstance(dims, Dims) or width.var not in variables(*dims):
                return None
            if n not in queue:
                queue.append(n)
    nodes = set(queue)
    return IsolatedPath(gm, width, tuple(n for n in gm.graph.nodes if n in nodes), frozenset(passed))


def _is_stored(gm: fx.GraphModule, p: Projection) -> bool:
    """Whether the use reads a parameter as it is stored, whatever its size: no norm or cast computes it from others."""
    if p.node.op == "call_module":
        module = gm.get_submodule(str(p.node.target))
        # other people's layers may keep their size as a number, as Conv1D of transformers does
        ours = type(module).__module__.startswith("torch.nn.modules.")
        return ours and p.weight == f"{p.node.target}.weight" and isinstance(module.weight, nn.Parameter)
    others = [n for n in p.node.all_input_nodes if n is not p.source]
    return all(n.op == "get_attr" and str(n.target) in (p.weight, p.bias) for n in others)
