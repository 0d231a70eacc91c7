"""Moments of one weight that reads a width: what its output is asked for, and what it reads."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, fx
from torch.nn import functional as F

from fxgrow.axes.structure import Projection
from fxgrow.graph.graph import accumulation_dtype, lookup
from fxgrow.statistics.activation_cache import Span
from fxgrow.statistics.conv_geometry import Window
from fxgrow.statistics.cross_moment import patch_rows
from fxgrow.statistics.factorisation import Factor, factor
from fxgrow.statistics.forward_backward import BatchRecord
from fxgrow.statistics.gram import accumulating, add_gram, matrix_product, mirrored
from fxgrow.statistics.producer_consumer_path import window

#: relative ridge on E[h h^T] for the projection when rows are sampled
PROJECTION_RIDGE = 1e-1
#: weights of more groups than this have no statistics: each is measured on its own
GROUPS = 32
#: rows that are gathered at once take at most so many bytes
GATHERED = 32 << 20
_CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


def rows_for(features: int) -> int:
    """Sampled positions for a second moment of so many features: 20 per feature, fewer when there are many.

    Never less than 2048: for few features they cost nothing, and 20 rows of each are noise.
    """
    return min(max(20 * features, 2048), 12_000 + 2 * features)


def uses_of(weight: str, projections: list[Projection]) -> list[Projection]:
    """Every use of a weight, if all of them read it alike; a weight that is also an embedding has no statistics."""
    uses = [p for p in projections if p.weight == weight]
    one = {(p.out_dim, p.transposed, p.groups) for p in uses}
    return uses if len(one) == 1 and all(p.plain or p.transposed or 1 < p.groups <= GROUPS for p in uses) else []


def consumers_of(weight: str, projections: list[Projection], output_side: bool = True) -> dict[str, ConsumerMoments]:
    """By a name of its own: one for a weight, or one for each of its groups; none where it has no statistics."""
    uses = uses_of(weight, projections)
    if not uses or uses[0].groups == 1:
        return {weight: ConsumerMoments(uses, output_side)} if uses else {}
    return {f"{weight}[{g}]": ConsumerMoments(uses, output_side, g) for g in range(uses[0].groups)}


def like_weight(matrix: Tensor, weight: Tensor, use: Projection) -> Tensor:
    """`[O, H]` in the layout of a weight, or of one of its groups or experts, for any number of inputs."""
    if use.experts:
        return (matrix.mT if use.in_dim < use.out_dim else matrix)[None]
    if use.in_dim < use.out_dim:
        return matrix.mT.reshape(-1, *weight.shape[1:])
    return matrix.reshape(len(matrix), -1, *weight.shape[2:])


def some_rows(count: int, limit: int, generator: torch.Generator | None, device: torch.device) -> Tensor | None:
    """At most `limit` of so many rows, drawn without replacement; None for all."""
    return torch.randperm(count, generator=generator)[:limit].to(device) if limit < count else None


def _movable(p: Projection) -> str | None:
    """The bias, if it may be updated: a frozen one is no feature."""
    gm = p.node.graph.owning_module
    return p.bias if p.bias is not None and gm is not None and lookup(gm, p.bias).requires_grad else None


@dataclass(frozen=True)
class Drawn:
    """Which rows of what one use reads M was made from.

    Attributes:
        use: the use.
        span: of the batches that are remembered.
        keep: samples of each.
        parts: rows of these samples, as many as are gathered at once; None for all.
        scale: what each of them counts.
    """

    use: Projection
    span: Span
    keep: int
    parts: list[Tensor | None]
    scale: float


class ConsumerMoments:
    """E[V h^T], E|V|^2, M = E[h h^T] and G = E[V V^T] of one weight, over all its uses.

    A transposed convolution is the dense layer that it is before its outputs are laid over each other: V is then the
    gradient's window at each position of the input, [positions, channels * taps].

    With a bias that is trained, h has a trailing 1. G is left out unless `output_side`. Before `finish` the attributes
    are sums over samples and positions.
    """

    def __init__(self, uses: list[Projection], output_side: bool = True, group: int | None = None) -> None:
        self.uses, self.group, self.groups = uses, group, uses[0].groups
        self.output_side = output_side
        self.weight = uses[0].weight
        #: where the weight itself is stored [in, out]; here it is [out, in] throughout
        self.transposed = uses[0].in_dim < uses[0].out_dim
        self.turned = window(uses[0]) if uses[0].transposed else None
        #: the bias of a transposed convolution is added once, not once for each tap
        self.bias = None if self.turned else _movable(uses[0])
        self.window = Window() if self.turned else window(uses[0])
        #: rows for each output channel of the weight
        self.fan = self.turned.taps if self.turned else 1
        #: the dimension of what is `taken` that the weight sums over, and of what is `asked` that has its rows
        self.dim = 1 if self.window.kernel else -1
        self.vh = torch.zeros(0)
        self.vv: Tensor | float = 0.0
        self.m: Tensor | None = None
        self.g: Tensor | None = None
        #: samples and positions that were seen, and rows that M and G were made from
        self.samples, self.given = 0, 0
        self.rows = 0
        self.drawn: list[Drawn] = []
        #: of M with its ridge, and dW*, once `project` has found them
        self.root: Factor | None = None
        self.move: Tensor | None = None

    def add_gradient(self, seen: BatchRecord) -> None:
        """The sum of V h^T over a batch is its weight gradient."""
        g = self.matrix(seen.gradients[self.weight])
        if not self.vh.numel():
            self.vh = g.new_zeros(g.shape[0], g.shape[1] + (self.bias is not None), dtype=accumulation_dtype(g))
        self.vh[:, : g.shape[1]].add_(g)
        if self.bias is not None:
            self.vh[:, -1].add_(self._own(seen.gradients[self.bias], 0))

    def add_products(self, h: Tensor, v: Tensor) -> None:
        """The same, and |V|^2, of remembered samples: h as `taken`, V as `asked`."""
        own = self.products(h, v)
        self.vh = self.vh.add_(own) if self.vh.numel() else own
        self.add_norm(v)

    def products(self, h: Tensor, v: Tensor) -> Tensor:
        """The sum of V h^T, and of V where there is a bias."""
        found = self.outer(v, h)
        if self.bias is None:
            return found
        return torch.cat([found, self.updates(accumulating(v)).sum((0, 1))[:, None]], 1)

    def matrix(self, weight: Tensor) -> Tensor:
        """A tensor like the weight as `[O, H]`; `like_weight` is the reverse."""
        own = self._own(weight, 0)
        flat = own[0] if self.uses[0].experts else own.flatten(1)
        return flat.mT if self.transposed else flat

    def _own(self, t: Tensor, dim: int) -> Tensor:
        """This group's, or this expert's, part of a dimension."""
        return t if self.group is None else t.unflatten(dim, (self.groups, -1)).select(dim, self.group)

    def layer_input(self, h: Tensor) -> Tensor:
        """What this layer reads of its input: all of it, its group's or expert's part, or one row per position."""
        return h.flatten(2).mT if self.turned else self._own(h, 1)

    def output_gradient(self, v: Tensor) -> Tensor:
        """V as this layer has it: its output's gradient, its group's, or the windows of that, `[n, positions, O]`."""
        if self.turned is None:
            return self._own(v, 1)
        rows: Tensor = patch_rows(v, self.turned, None).unflatten(0, (len(v), -1))
        return rows

    def add_norm(self, v: Tensor) -> None:
        self.vv = self.vv + torch.linalg.vector_norm(v, dtype=accumulation_dtype(v)).square()

    def add_rows(
        self,
        h: Tensor,
        v: Tensor,
        samples: float | None,
        generator: torch.Generator | None = None,
        share: float = 1.0,
        processes: int = 1,
    ) -> tuple[list[Tensor | None], float]:
        """Adds to M and G, from this share of their rows, as if there were `samples` samples.

        Args:
            h: the input as `taken`.
            v: V as `asked`.
            samples: None: all rows, as they are.
            generator: chooses the rows.
            share: of the rows that this weight needs.
            processes: how many add as much.

        Returns:
            Which rows, in parts, and what each counts.
        """
        updates = self.updates(v)
        n = len(updates)
        # where an expert is given nothing it has no position
        given = h.flatten(0, -2).any(-1).nonzero().flatten() if self.uses[0].experts else None
        count = n * updates.shape[1] if given is None else len(given)
        self.samples, self.given = self.samples + n, self.given + count
        chosen = None
        if samples is not None:
            width = h.shape[self.dim] * self.window.taps
            chosen = some_rows(count, math.ceil(share * rows_for(width) / processes), generator, h.device)
        if given is not None:
            chosen = given if chosen is None else given[chosen]
        rows = count if chosen is None else len(chosen)
        scale = 1.0 if samples is None else samples * count / n / max(1, rows)
        parts = list(self._parts(h, chosen, count))
        for part in parts:
            self.m = add_gram(self.m, self.inputs(h, part), bias=self.bias is not None, scale=scale)
        if self.output_side:
            updates = updates.flatten(0, 1)
            self.g = add_gram(self.g, updates if chosen is None else updates.index_select(0, chosen), scale=scale)
        self.rows += rows
        return parts, scale

    def _parts(self, h: Tensor, chosen: Tensor | None, count: int) -> Iterator[Tensor | None]:
        """Rows to be gathered at once; those of dense layers lie where they can be read."""
        if chosen is None and not self.window.kernel:
            yield None
            return
        most = max(1, GATHERED // (h.shape[self.dim] * self.window.taps * 4))
        yield from (torch.arange(count, device=h.device) if chosen is None else chosen).split(most)

    def outer(self, v: Tensor, z: Tensor) -> Tensor:
        """The sum of V z^T, `[O, channels * taps]`: V as `asked`, z as `taken`, of other channels than h."""
        v, z = accumulating(v), accumulating(z)
        w = self.window
        if not w.kernel:
            return matrix_product(v.flatten(0, -2).mT, z.flatten(0, -2))
        like = v.new_empty(1).expand(v.shape[1], z.shape[1], *w.kernel)
        gradient: Tensor = torch.ops.aten.convolution_backward(
            v, z, like, None, w.stride, w.padding, w.dilation, False, [0] * len(w.kernel), 1, (False, True, False)
        )[1]
        return gradient.flatten(1)

    def updates(self, v: Tensor) -> Tensor:
        """V, as `asked`, in rows: `[n, positions, O]`."""
        if self.window.kernel:
            return v.flatten(2).transpose(1, 2)
        return v.reshape(v.shape[0], -1, v.shape[-1])

    def inputs(self, h: Tensor, chosen: Tensor | None) -> Tensor:
        """Rows of the (unfolded) input as `layer_input`, `[m, H]` (less the trailing 1)."""
        if not self.window.kernel:
            h = h.reshape(h.shape[0], -1, h.shape[-1])
        return patch_rows(h, self.window, chosen)

    def finish(self, samples: float) -> None:
        """From sums to means over samples."""
        self.vh, self.vv = self.vh / samples, float(self.vv) / samples
        self.m = None if self.m is None else mirrored(self.m).div_(samples)
        self.g = None if self.g is None else mirrored(self.g).div_(samples)

    @property
    def positions(self) -> float:
        """Per sample."""
        return self.given / max(1, self.samples)

    def project(self, exact: bool) -> Tensor:
        """The best move of the weights dW* = E[V h^T] M^-1, `[O, H]`."""
        if self.m is None:
            raise RuntimeError("no rows were added")
        self.root = factor(self.m, ridge=0.0 if exact else PROJECTION_RIDGE)
        self.move = self.root.solve(self.vh.mT).mT
        return self.move

    def curvature(self) -> Tensor:
        """G per position, `[O, O]`."""
        if self.g is None:
            raise RuntimeError("no rows were added")
        return self.g / max(1.0, self.positions * len(self.uses))

    def apply(self, update: Tensor, h: Tensor) -> Tensor:
        """This layer with weights `update` (`[O, H]`) on h as `taken`, in the layout of `asked`."""
        bias, weight = (update[:, -1], update[:, :-1]) if self.bias is not None else (None, update)
        return self.outgoing(weight, h.to(update.dtype), bias)

    def outgoing(self, weight: Tensor, h: Tensor, bias: Tensor | None = None) -> Tensor:
        """This layer's map with other weights `[O, channels * taps]` on other channels `h`."""
        w = self.window
        if not w.kernel:
            return F.linear(h, weight, bias)
        kernel = weight.reshape(weight.shape[0], weight.shape[1] // w.taps, *w.kernel)
        return _CONV[len(w.kernel)](h, kernel, bias, w.stride, w.padding, w.dilation)

    def back(self, weight: Tensor, v: Tensor, z: Tensor) -> Tensor:
        """What comes back to other channels z when v comes back to `outgoing`, its transpose on v as `asked`."""
        w = self.window
        if not w.kernel:
            return v @ weight
        kernel = weight.reshape(weight.shape[0], weight.shape[1] // w.taps, *w.kernel)
        gradient: Tensor = torch.ops.aten.convolution_backward(
            v, z, kernel, None, w.stride, w.padding, w.dilation, False, [0] * len(w.kernel), 1, (True, False, False)
        )[0]
        return gradient


def reads_of(consumers: Mapping[str, ConsumerMoments]) -> dict[fx.Node, list[tuple[ConsumerMoments, Projection]]]:
    """By node: who asks for what there."""
    found: dict[fx.Node, list[tuple[ConsumerMoments, Projection]]] = {}
    for c in consumers.values():
        for p in c.uses:
            found.setdefault(p.node, []).append((c, p))
    return found
