"""The geometry from a producer to a consumer of the same width: a map, an average pool or none, and a window.

A linear layer after a convolution is a window too: over the map (flatten), one position (tokens), or the pooled map
(global pool). Across other operators (upsampling, selections, grouped convolutions) there is no path: such widths get
random incoming weights, refitted like all others.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor, fx
from torch.nn import functional as F

from fxgrow.analysis.analyse import AnalysedGraph
from fxgrow.analysis.widths import GrowableWidth
from fxgrow.axes.axes import Axis, Dims, UnitVar, axes_in, multiplicity, resolve
from fxgrow.axes.structure import Projection, Structure
from fxgrow.graph.unrolled_rnn import rnn_scan
from fxgrow.statistics.batch_dimension import nodes_with_batch_second
from fxgrow.statistics.conv_geometry import Window

#: products with another tensor, and recurrences, carry a unit to other positions
_MIXES = {
    rnn_scan, torch.matmul, torch.bmm, torch.baddbmm, torch.einsum, operator.matmul, F.scaled_dot_product_attention,
    "matmul", "bmm", "baddbmm", "__matmul__",
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
    structure, second = analysed.structure, nodes_with_batch_second(analysed.gm.graph)
    for producer in width.producers:
        reachable = _downstream(producer.node, width.var, structure)
        for consumer in width.consumers:
            nodes = reachable.get(consumer.source)
            if nodes is None:
                continue
            mixed = any(n.target in _MIXES or _selects(n, structure) for n in nodes)
            path = None if mixed else _path(producer, consumer, width, nodes, second)
            if path is None:
                return None
            paths.append(path)
    consumers = {path.consumer.node for path in paths}
    return paths if paths and all(c.node in consumers for c in width.consumers) else None


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
    producer: Projection, consumer: Projection, width: GrowableWidth, nodes: list[fx.Node], second: set[fx.Node]
) -> ConvPath | None:
    if not (producer.plain and (consumer.plain or consumer.transposed)):
        return None
    per_read = _entries(consumer.input_axis, width)
    if _entries(producer.output_axis, width) != 1 or per_read is None:
        return None
    nd = len(producer.kernel)
    written = _positions(producer.node, nd, second)
    read = _positions(consumer.source, len(consumer.kernel), second)
    if nd == len(consumer.kernel):
        # the model may hold the positions of all samples in one dimension
        sizes = {_shape(node)[:-1] for node in (producer.node, consumer.source)}
        same = nd == 0 and len({prod(size) for size in sizes}) == 1
        pool = () if same else _pool(written, read)
        if per_read != 1 or pool is None:
            return None
        # a transposed convolution reads one position at a time
        consumer_window = Window((1,) * nd) if consumer.transposed else window(consumer)
        return ConvPath(producer, consumer, window(producer), consumer_window, pool, read if nd else ())
    if nd == 0 or consumer.kernel:
        return None
    tokens = prod(read)
    if per_read > 1:
        shape = kernel = next((s for n in reversed(nodes) if prod(s := _positions(n, nd, second)) == per_read), None)
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


def _positions(node: fx.Node, nd: int, second: set[fx.Node]) -> tuple[int, ...]:
    """The spatial shape after the channels; for features in the last dimension, the dimensions before them."""
    shape = _shape(node)
    if nd == 0:
        return (shape[0], *shape[2:-1]) if node in second and len(shape) > 2 else shape[1:-1]
    return shape[-nd:] if len(shape) > nd else ()


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
    """A producer's input as `[n, C, *spatial]`, or `[n, tokens, features]` for a linear layer."""
    return _rows(x) if not path.producer.kernel else x


def gradient_map(v: Tensor, path: ConvPath) -> Tensor:
    """V at a consumer's output, at the positions of `consumer_window`: `[n, O, *spatial]`, or `[n, tokens, O]`."""
    spatial: tuple[int, ...] = ()
    if path.consumer.transposed:
        spatial = path.read_shape
    elif not path.consumer.kernel:
        v = _rows(v)  # [n, tokens, O]; tokens are positions after a convolution
        spatial = path.consumer_window.output(path.read_shape) if path.producer.kernel else ()
    return v.mT.unflatten(2, spatial) if spatial else v


def _rows(x: Tensor) -> Tensor:
    return x.reshape(x.shape[0], -1, x.shape[-1])
