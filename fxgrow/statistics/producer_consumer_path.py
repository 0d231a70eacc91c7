"""The geometry from a producer to a consumer of the same width: a map, an average pool or none, and a window.

A linear layer after a convolution is a window too: over the map (flatten), one position (tokens), or the pooled map
(global pool). Across other operators (upsampling, selections, grouped convolutions) there is no path: such widths get
random incoming weights, refitted like all others.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor, fx
from torch.nn import functional as F

from fxgrow.analysis.analyse import AnalysedGraph
from fxgrow.analysis.widths import GrowableWidth
from fxgrow.axes.axes import Axis, Dims, UnitVar, axes_in, multiplicity, resolve
from fxgrow.axes.structure import Projection, Structure
from fxgrow.graph.conditional import runs_in_eval_mode
from fxgrow.graph.unrolled_rnn import rnn_cell, rnn_scan
from fxgrow.statistics.batch_dimension import Samples, as_maps, find_samples
from fxgrow.statistics.conv_geometry import Window

#: products with another tensor, and recurrences, carry a unit to other positions
_MIXES = {
    rnn_scan, rnn_cell, torch.matmul, torch.bmm, torch.baddbmm, torch.einsum, operator.matmul,
    F.scaled_dot_product_attention, "matmul", "bmm", "baddbmm", "__matmul__",
}  # fmt: skip


@dataclass(frozen=True)
class ConvPath:
    """How a consumer reads the output of a producer: one use each of the weights."""

    producer: Projection
    consumer: Projection
    producer_window: Window
    #: on the map that the consumer reads
    consumer_window: Window
    #: window of an average pool between them, or empty
    pool: tuple[int, ...]
    #: spatial shape of the map that the consumer reads; empty between linear layers
    read_shape: tuple[int, ...]

    @property
    def written_shape(self) -> tuple[int, ...]:
        """Spatial shape of the producer's output."""
        return tuple(r * p for r, p in zip(self.read_shape, self.pool or (1,) * len(self.read_shape), strict=True))


def window(p: Projection) -> Window:
    """The geometry of a convolution, or of a linear layer."""
    return Window(p.kernel, p.stride, p.dilation, p.padding)


def find_paths(width: GrowableWidth, analysed: AnalysedGraph) -> list[ConvPath] | None:
    """The path from every producer to every consumer behind it; None where one of them has no normal form."""
    paths: list[ConvPath] = []
    structure, samples = analysed.structure, find_samples(analysed.gm.graph)
    for producer in (p for p in width.producers if runs_in_eval_mode(p.node)):
        reachable = _downstream(producer.node, width.var, structure)
        for consumer in width.consumers:
            nodes = reachable.get(consumer.source)
            if nodes is None:
                continue
            mixed = any(n.target in _MIXES or _selects(n, structure) for n in nodes)
            path = None if mixed else _path(producer, consumer, width, nodes, samples)
            if path is None:
                return None
            paths.append(path)
    # a map and features without positions (a gate of the units) have no common rows
    kinds = {(path.consumer.node, len(path.read_shape)) for path in paths}
    consumers = [node for node, _ in kinds]
    complete = {c.node for c in width.consumers} == {*consumers} and len(consumers) == len({*consumers})
    return paths if paths and complete else None  # none where all of it runs in train mode only


def _downstream(start: fx.Node, var: UnitVar, structure: Structure) -> dict[fx.Node, list[fx.Node]]:
    """Every node after `start` that has the width's units, with a shortest path to it."""
    paths = {start: [start]}
    queue = [start]
    # another projection consumes the units, it does not pass them on
    projections = {p.node for p in structure.projections}
    for node in queue:
        for user in node.users:
            axes = axes_in(structure.outputs.get(user))
            if user not in paths and user not in projections and any(var in multiplicity(a) for a in axes):
                paths[user] = [*paths[node], user]
                queue.append(user)
    return paths


def _path(
    producer: Projection,
    consumer: Projection,
    width: GrowableWidth,
    nodes: list[fx.Node],
    samples: Mapping[fx.Node, Samples],
) -> ConvPath | None:
    if not (producer.plain and (consumer.plain or consumer.transposed)):
        return None
    if producer.node not in samples or consumer.source not in samples:
        return None
    per_read = _entries(consumer.input_axis, width)
    if _entries(producer.output_axis, width) != 1 or per_read is None:
        return None
    nd = len(producer.kernel)
    # maps, and rows of linear layers: the model may hold those of all samples in one dimension
    rows, read_rows = _rows_of(producer.node, nd), _rows_of(consumer.source, len(consumer.kernel))
    written, read = _shape(producer.node)[-nd:], _shape(consumer.source)[-nd:]
    if nd == len(consumer.kernel):
        pool = _pool(written, read) if nd else ()
        if per_read != 1 or pool is None or rows != read_rows:
            return None
        # a transposed convolution reads one position at a time
        consumer_window = Window((1,) * nd) if consumer.transposed else window(consumer)
        return ConvPath(producer, consumer, window(producer), consumer_window, pool, read if nd else ())
    if nd == 0 or consumer.kernel or read_rows % rows:
        return None
    tokens = read_rows // rows
    if per_read > 1:
        maps = (_shape(n)[-nd:] for n in reversed(nodes) if len(_shape(n)) > nd + 1)
        shape = kernel = next((s for s in maps if prod(s) == per_read), None)
    else:
        shape = written if tokens == prod(written) else (1,) * nd if tokens == 1 else None
        kernel = (1,) * nd
    pool = None if shape is None else _pool(written, shape)
    if shape is None or kernel is None or pool is None or (per_read > 1 and tokens != 1):
        return None
    return ConvPath(producer, consumer, window(producer), Window(kernel), pool, shape)


def _entries(axis: Axis, width: GrowableWidth) -> int | None:
    """Entries per unit in an axis of a weight; None unless all units are in one segment."""
    segments = [s for s in resolve(axis) if s.var is width.var]
    one = len(segments) == 1 and segments[0].inner % width.step == 0
    return segments[0].inner // width.step if one else None


def _rows_of(node: fx.Node, nd: int) -> int:
    """How many maps `[C, *spatial]`, or rows of features, a node's output holds."""
    shape = _shape(node)
    return prod(shape[: len(shape) - nd - 1])


def _shape(node: fx.Node) -> tuple[int, ...]:
    return tuple(node.meta["val"].shape) if isinstance(node.meta["val"], Tensor) else ()


def _pool(written: tuple[int, ...], read: tuple[int, ...]) -> tuple[int, ...] | None:
    """The window that reduces one map to the other; empty if they are equal, None if there is none."""
    if prod(written) == prod(read):
        return ()
    if len(written) != len(read) or any(r == 0 or w % r for w, r in zip(written, read, strict=True)):
        return None
    return tuple(w // r for w, r in zip(written, read, strict=True))


def _selects(node: fx.Node, structure: Structure) -> bool:
    """Whether a node indexes a tensor (not a tuple of tensors): it may select positions, which is no average."""
    indexes = node.target in (operator.getitem, "select", torch.select)
    return indexes and isinstance(structure.outputs.get(node.all_input_nodes[0]), Dims)


def producer_map(x: Tensor, path: ConvPath) -> Tensor:
    """A producer's input as `[rows, C, *spatial]`, or `[n, tokens, features]` for a linear layer."""
    return as_maps(x, len(path.producer.kernel)) if path.producer.kernel else x.reshape(len(x), -1, x.shape[-1])


def gradient_map(v: Tensor, path: ConvPath) -> Tensor:
    """V at a consumer's output, at the positions of `consumer_window`: `[rows, O, *spatial]`, or `[n, tokens, O]`."""
    if path.consumer.kernel and not path.consumer.transposed:
        return v
    if not path.producer.kernel:
        return v.reshape(len(v), -1, v.shape[-1])
    # tokens, or what a transposed convolution read, are positions after a convolution
    spatial = path.consumer_window.output(path.read_shape)
    maps: Tensor = v.reshape(-1, prod(spatial), v.shape[-1]).mT.unflatten(2, spatial)
    return maps
