"""From a producer to a consumer of the same width: the geometry between them, in one normal form.

A producer writes a map, an average pool may lie behind it, a consumer's window reads the result. Linear layers behind
a convolution are windows too: over the whole map (flatten), one position (tokens), or the pooled map (global pool).
What lies between and does not fit (upsampling, selections, grouped convolutions) has no link: such
widths get random incoming weights, refitted like all others.
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
from fxgrow.axes.axes import Axis, Dims, UnitVar, multiplicity, resolve
from fxgrow.axes.structure import Projection, Structure
from fxgrow.graph.unrolled_rnn import steps
from fxgrow.statistics.batch_dimension import nodes_with_batch_second
from fxgrow.statistics.conv_geometry import Window

#: products with another tensor move what a unit says to other positions, and a recurrence hands it on
_MIXES = {
    steps, torch.matmul, torch.bmm, torch.baddbmm, torch.einsum, operator.matmul, F.scaled_dot_product_attention,
    "matmul", "bmm", "baddbmm", "__matmul__",
}  # fmt: skip


@dataclass(frozen=True)
class ConvPath:
    """How consumer `reads` sees what producer `writes`: their windows, the pool between and the map that is read."""

    writes: Projection
    reads: Projection
    producer: Window
    consumer: Window
    pool: tuple[int, ...]
    #: spatial shape of the map the consumer reads; empty between linear layers
    read_shape: tuple[int, ...]

    @property
    def written(self) -> tuple[int, ...]:
        """Spatial shape of the map the producer writes."""
        return tuple(r * p for r, p in zip(self.read_shape, self.pool or (1,) * len(self.read_shape), strict=True))


def window(p: Projection) -> Window:
    return Window(p.kernel, p.stride, p.dilation, p.padding)


def links(h: GrowableWidth, analysed: AnalysedGraph) -> list[ConvPath] | None:
    """A link for every producer that comes before a consumer; None where one of them has no normal form."""
    out: list[ConvPath] = []
    structure, second = analysed.structure, nodes_with_batch_second(analysed.gm.graph)
    for writes in h.producers:
        reachable = _downstream(writes.node, h.var, structure)
        for reads in h.consumers:
            if reads.source not in reachable:
                continue
            link = _link(writes, reads, h.var, h.step, reachable[reads.source], structure, second)
            if link is None:
                return None
            out.append(link)
    consumers = {link.reads.node for link in out}
    return out if out and all(r.node in consumers for r in h.consumers) else None


def _downstream(start: fx.Node, var: UnitVar, structure: Structure) -> dict[fx.Node, list[fx.Node]]:
    """Every node that carries the width's units behind `start`, with a shortest path to it."""
    paths = {start: [start]}
    queue = [start]
    # a layer that writes the width itself reads what comes in and passes none of it on
    writers = {p.node for p in structure.projections}
    for node in queue:
        for user in node.users:
            if user not in paths and user not in writers and _carries(structure.outputs.get(user), var):
                paths[user] = [*paths[node], user]
                queue.append(user)
    return paths


def _carries(value: object, var: UnitVar) -> bool:
    if isinstance(value, Dims):
        return any(var in multiplicity(a) for a in value)
    return isinstance(value, (tuple, list)) and any(_carries(v, var) for v in value)


def _link(
    writes: Projection,
    reads: Projection,
    var: UnitVar,
    step: int,
    path: list[fx.Node],
    structure: Structure,
    second: set[fx.Node],
) -> ConvPath | None:
    if not (writes.plain and (reads.plain or reads.transposed)) or any(
        n.target in _MIXES or _selects(n, var, structure) for n in path
    ):
        return None
    per_read = _entries(reads.input_axis, var, step)
    if _entries(writes.output_axis, var, step) != 1 or per_read is None:
        return None
    nd = len(writes.kernel)
    written = _positions(writes.node, nd, second)
    read = _positions(reads.source, len(reads.kernel), second)
    producer = window(writes)
    if nd == len(reads.kernel):
        pool = () if nd == 0 and _listed(writes.node) == _listed(reads.source) else _pool(written, read)
        if per_read != 1 or pool is None:
            return None
        # a transposed convolution reads one position at a time
        consumer = Window((1,) * nd) if reads.transposed else window(reads)
        return ConvPath(writes, reads, producer, consumer, pool, read if nd else ())
    if nd == 0 or reads.kernel:
        return None
    tokens = prod(read)
    if per_read > 1:
        shape = next((s for n in reversed(path) if prod(s := _positions(n, nd, second)) == per_read), None)
        kernel = shape
    else:
        shape = written if tokens == prod(written) else (1,) * nd if tokens == 1 else None
        kernel = (1,) * nd
    pool = None if shape is None else _pool(written, shape)
    if shape is None or kernel is None or pool is None or (per_read > 1 and tokens != 1):
        return None
    return ConvPath(writes, reads, producer, Window(kernel), pool, shape)


def _entries(axis: Axis, var: UnitVar, step: int) -> int | None:
    """Entries per unit in an axis of a weight, if the units stand in one segment and are whole there."""
    segments = [s for s in resolve(axis) if s.var is var]
    return segments[0].inner // step if len(segments) == 1 and segments[0].inner % step == 0 else None


def _positions(node: fx.Node, nd: int, second: set[fx.Node]) -> tuple[int, ...]:
    """The spatial shape behind the channels; for features in the last dimension, what stands between."""
    shape = tuple(node.meta["val"].shape) if isinstance(node.meta["val"], Tensor) else ()
    if nd == 0:
        return (shape[0], *shape[2:-1]) if node in second and len(shape) > 2 else shape[1:-1]
    return shape[-nd:] if len(shape) > nd else ()


def _listed(node: fx.Node) -> int:
    """All positions of all samples, which the model may hold as one list."""
    value = node.meta["val"]
    return prod(value.shape[:-1]) if isinstance(value, Tensor) else 0


def _pool(written: tuple[int, ...], read: tuple[int, ...]) -> tuple[int, ...] | None:
    """The window that shrinks one map to the other; empty if they are equal, None if there is none."""
    if prod(written) == prod(read):
        return ()
    if len(written) != len(read) or any(r == 0 or w % r for w, r in zip(written, read, strict=True)):
        return None
    return tuple(w // r for w, r in zip(written, read, strict=True))


def _selects(node: fx.Node, var: UnitVar, structure: Structure) -> bool:
    """Indexing picks positions, which no average describes; indexing a tuple of tensors is none."""
    if node.target not in (operator.getitem, "select", torch.select):
        return False
    return isinstance(structure.outputs.get(node.all_input_nodes[0]), Dims)


def producer_map(x: Tensor, link: ConvPath) -> Tensor:
    """A producer's input as `[n, C, *spatial]`, or `[n, tokens, features]` for a linear layer."""
    return _rows(x) if not link.writes.kernel else x


def gradient_map(v: Tensor, link: ConvPath) -> Tensor:
    """What a consumer is asked for, at the positions of the link's consumer window."""
    if link.reads.transposed:
        turned: Tensor = v.mT.unflatten(2, link.read_shape)
        return turned
    if link.reads.kernel or not link.writes.kernel:
        return v if link.reads.kernel else _rows(v)
    rows = _rows(v)  # [n, tokens, O] behind a convolution: tokens are positions
    out = link.consumer.output(link.read_shape)
    mapped: Tensor = rows.transpose(1, 2).unflatten(2, out)
    return mapped


def _rows(x: Tensor) -> Tensor:
    return x.reshape(x.shape[0], -1, x.shape[-1])
