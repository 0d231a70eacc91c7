"""Moments of one weight that consumes a width, over its layer input h and its output gradient V.

V is minus the gradient of a sample's loss at the layer's output (the desired update of TINY, arXiv 2405.19816). E is
the mean over samples of the sum over positions.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import NamedTuple, cast

import torch
from torch import Tensor, fx
from torch.nn import functional as F

from fxgrow.axes.structure import Projection
from fxgrow.graph.conditional import runs_in_eval_mode
from fxgrow.graph.graph import accumulation_dtype, lookup
from fxgrow.statistics.activation_cache import Span
from fxgrow.statistics.batch_dimension import as_maps
from fxgrow.statistics.conv_geometry import Window
from fxgrow.statistics.cross_moment import patch_rows, weight_gradient
from fxgrow.statistics.factorisation import Factor, factor
from fxgrow.statistics.forward_backward import BatchRecord
from fxgrow.statistics.gram import accumulating, add_gram, matrix_product, mirrored
from fxgrow.statistics.producer_consumer_path import window

#: relative ridge on M = E[h h^T] in dW* when rows are sampled
PROJECTION_RIDGE = 1e-1
#: weights with more groups than this have no statistics, since each group is measured separately
GROUPS = 32
#: rows gathered at once take at most so many bytes
GATHERED = 32 << 20
_CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


def rows_for(features: int) -> int:
    """Number of sampled positions for a second moment of so many features: 20 per feature, fewer of many features.

    It is at least 2048: for few features they cost nothing, and 20 rows per feature are noisy.
    """
    return min(max(20 * features, 2048), 12_000 + 2 * features)


def consumers_of(weight: str, projections: list[Projection], output_side: bool = True) -> dict[str, ConsumerMoments]:
    """Moments of a weight by its name, or of each of its groups by `name[group]`.

    Empty unless all uses of the weight are alike; one that is also an embedding has no statistics.
    """
    uses = [p for p in projections if p.weight == weight and runs_in_eval_mode(p.node)]
    kinds = {(p.out_dim, p.transposed, p.groups, p.scale) for p in uses}
    if (
        len(kinds) != 1
        or uses[0].scale is None
        or not all(p.plain or p.transposed or 1 < p.groups <= GROUPS for p in uses)
    ):
        return {}
    if uses[0].groups == 1:
        return {weight: ConsumerMoments(uses, output_side)}
    return {f"{weight}[{g}]": ConsumerMoments(uses, output_side, g) for g in range(uses[0].groups)}


def like_weight(matrix: Tensor, weight: Tensor, use: Projection) -> Tensor:
    """A matrix `[O, H]` in the layout of a weight, or of one of its groups or experts; H may be any number."""
    if use.experts:
        return (matrix.mT if use.in_dim < use.out_dim else matrix)[None]
    if use.in_dim < use.out_dim:
        return matrix.mT.reshape(-1, *weight.shape[1:])
    return matrix.reshape(len(matrix), -1, *weight.shape[2:])


def some_rows(count: int, limit: int, generator: torch.Generator | None, device: torch.device) -> Tensor | None:
    """Indices of at most `limit` of `count` rows, drawn without replacement; None for all."""
    return torch.randperm(count, generator=generator)[:limit].to(device) if limit < count else None


class Sampling(NamedTuple):
    """How rows of a second moment are sampled: each of the processes takes a share of the wanted rows."""

    #: rows are scaled as if they were of so many samples
    samples: float
    generator: torch.Generator
    share: float
    processes: int

    def choose(self, count: int, wanted: int, device: torch.device) -> Tensor | None:
        """Indices of the rows among `count`; None for all."""
        return some_rows(count, math.ceil(self.share * wanted / self.processes), self.generator, device)


class SampledRows(NamedTuple):
    """The sampled rows of one use's input from which M was formed: of the first `keep` samples of cached batches."""

    use: Projection
    span: Span
    keep: int
    #: indices of rows among these samples, in parts that are gathered at once; None for all
    parts: list[Tensor | None]
    #: weight of a row
    scale: float


class ConsumerMoments:
    """E[V h^T], E|V|^2, M = E[h h^T] and G = E[V V^T] of one weight, over all its uses.

    A transposed convolution counts as a linear layer at each input position, before overlapping outputs are summed: V
    are then windows of the output gradient, `[positions, channels * taps]`. Before `finish` all moments are sums.
    """

    def __init__(self, uses: list[Projection], output_side: bool = True, group: int | None = None) -> None:
        self.uses, self.group, self.groups, self.scale = uses, group, uses[0].groups, uses[0].scale or 1.0
        self.output_side = output_side
        self.weight = uses[0].weight
        #: of a transposed convolution, the windows of its output
        self.output_window = window(uses[0]) if uses[0].transposed else None
        # a frozen bias is no feature; that of a transposed convolution is added once, not once per tap
        name, gm = uses[0].bias, cast(fx.GraphModule, uses[0].node.graph.owning_module)
        is_feature = name is not None and not self.output_window and lookup(gm, name).requires_grad
        self.bias = name if is_feature else None
        self.window = Window() if self.output_window else window(uses[0])
        #: number of spatial dimensions
        self.spatial = len(uses[0].kernel)
        #: rows of vh per output channel
        self.kernel_taps = self.output_window.taps if self.output_window else 1
        #: dimension of `layer_input` that the weight sums over, and of `output_gradient` that has its outputs
        self.dim = 1 if self.window.kernel else -1
        #: E[V h^T], `[O, H]`; with a bias h has a trailing 1
        self.vh = torch.zeros(0)
        self.vv: Tensor | float = 0.0
        #: `[H, H]`, and `[O, O]` if `output_side`
        self.m: Tensor | None = None
        self.g: Tensor | None = None
        #: samples behind M and G, their positions, and the rows from which M and G were formed
        self.samples, self.position_count, self.rows = 0.0, 0, 0
        self.sampled: list[SampledRows] = []
        #: M plus a ridge, factored, and dW*, once `project` was called
        self.input_factor: Factor | None = None
        self.delta_w: Tensor | None = None

    def add_gradient(self, record: BatchRecord) -> None:
        """Adds the sum of V h^T over a batch: the weight's gradient."""
        g = self.matrix(record.gradients[self.weight])
        if not self.vh.numel():
            self.vh = g.new_zeros(g.shape[0], g.shape[1] + (self.bias is not None), dtype=accumulation_dtype(g))
        self.vh[:, : g.shape[1]].add_(g)
        if self.bias is not None:
            self.vh[:, -1].add_(self._group_part(record.gradients[self.bias], 0))

    def add_products(self, h: Tensor, v: Tensor) -> None:
        """Adds the same, and |V|^2, from a `layer_input` and an `output_gradient`."""
        vh = self.products(h, v)
        self.vh = self.vh.add_(vh) if self.vh.numel() else vh
        self.add_norm(v)

    def products(self, h: Tensor, v: Tensor) -> Tensor:
        """The sum of V h^T, `[O, H]`, from a `layer_input` and an `output_gradient`."""
        vh = self.outer(v, h)
        if self.bias is None:
            return vh
        return torch.cat([vh, self.gradient_rows(accumulating(v)).sum((0, 1))[:, None]], 1)

    def matrix(self, weight: Tensor) -> Tensor:
        """A tensor like the weight as `[O, H]`; the inverse of `like_weight`."""
        part = self._group_part(weight, 0)
        flat = part[0] if self.uses[0].experts else part.flatten(1)
        return flat.mT if self.uses[0].in_dim < self.uses[0].out_dim else flat

    def _group_part(self, t: Tensor, dim: int) -> Tensor:
        """This group's (or expert's) part of a dimension."""
        return t if self.group is None else t.unflatten(dim, (self.groups, -1)).select(dim, self.group)

    def layer_input(self, h: Tensor) -> Tensor:
        """h: the layer's input, its group's or expert's part; of a transposed convolution `[n, positions, C]`.

        Maps that a sample has beside each other, the frames of a video, become rows: `[n * frames, C, *spatial]`.
        """
        h = as_maps(h, self.spatial)
        # moments are those of the parameter
        h = h if self.scale == 1.0 else h * self.scale
        return h.flatten(2).mT if self.output_window else self._group_part(h, 1)

    def output_gradient(self, v: Tensor) -> Tensor:
        """V: at the layer's output, its group's part; of a transposed convolution its windows `[n, positions, O]`."""
        v = as_maps(v, self.spatial)
        if self.output_window is None:
            return self._group_part(v, 1)
        rows: Tensor = patch_rows(v, self.output_window, None).unflatten(0, (len(v), -1))
        return rows

    def add_norm(self, v: Tensor) -> None:
        """Adds the sum of |V|^2."""
        self.vv = self.vv + torch.linalg.vector_norm(v, dtype=accumulation_dtype(v)).square()

    def add_rows(
        self, h: Tensor, v: Tensor, samples: float, sampling: Sampling | None
    ) -> tuple[list[Tensor | None], float]:
        """Adds rows of a `layer_input` and an `output_gradient` of so many samples, by default all, to M and G.

        Returns indices of the rows, in parts, and the weight of each.
        """
        gradients = self.gradient_rows(v)
        # an expert has no position where it gets no token
        routed = h.flatten(0, -2).any(-1).nonzero().flatten() if self.uses[0].experts else None
        count = len(gradients) * gradients.shape[1] if routed is None else len(routed)
        self.samples, self.position_count = self.samples + samples, self.position_count + count
        wanted = rows_for(h.shape[self.dim] * self.window.taps)
        chosen = None if sampling is None else sampling.choose(count, wanted, h.device)
        if routed is not None:
            chosen = routed if chosen is None else routed[chosen]
        rows = count if chosen is None else len(chosen)
        scale = 1.0 if sampling is None else sampling.samples * count / samples / max(1, rows)
        parts = list(self._parts(h, chosen, count))
        for part in parts:
            self.m = add_gram(self.m, self.input_rows(h, part), bias=self.bias is not None, scale=scale)
        if self.output_side:
            gradients = gradients.flatten(0, 1)
            self.g = add_gram(self.g, gradients if chosen is None else gradients.index_select(0, chosen), scale=scale)
        self.rows += rows
        return parts, scale

    def _parts(self, h: Tensor, chosen: Tensor | None, count: int) -> Iterator[Tensor | None]:
        """Indices of rows to be gathered at once; None where rows need no gathering."""
        if chosen is None and not self.window.kernel:
            yield None
            return
        most = max(1, GATHERED // (h.shape[self.dim] * self.window.taps * 4))
        yield from (torch.arange(count, device=h.device) if chosen is None else chosen).split(most)

    def outer(self, v: Tensor, z: Tensor) -> Tensor:
        """The sum of V z^T, `[O, channels * taps]`, for z like `layer_input` but of other channels."""
        v, z = accumulating(v), accumulating(z)
        w = self.window
        if not w.kernel:
            return matrix_product(v.flatten(0, -2).mT, z.flatten(0, -2))
        return weight_gradient(z, v, w.kernel, w.stride, w.padding, w.dilation).flatten(1)

    def gradient_rows(self, v: Tensor) -> Tensor:
        """The `output_gradient` in rows, `[n, positions, O]`."""
        if self.window.kernel:
            return v.flatten(2).transpose(1, 2)
        return v.reshape(v.shape[0], -1, v.shape[-1])

    def input_rows(self, h: Tensor, chosen: Tensor | None) -> Tensor:
        """Patches of the `layer_input`, `[m, H]` without the trailing 1."""
        if not self.window.kernel:
            h = h.reshape(h.shape[0], -1, h.shape[-1])
        return patch_rows(h, self.window, chosen)

    def finish(self, samples: float) -> None:
        """Turns sums into means over samples."""
        self.vh, self.vv = self.vh / samples, float(self.vv) / samples
        self.m = None if self.m is None else mirrored(self.m).div_(samples)
        self.g = None if self.g is None else mirrored(self.g).div_(samples)

    @property
    def positions(self) -> float:
        """Number of positions of a sample."""
        return self.position_count / max(1.0, self.samples)

    def project(self, exact: bool) -> Tensor:
        """The best update of the weights, dW* = E[V h^T] (M + eps)^-1, `[O, H]`."""
        if self.m is None:
            raise RuntimeError("no rows were added")
        self.input_factor = factor(self.m, ridge=0.0 if exact else PROJECTION_RIDGE)
        self.delta_w = self.input_factor.solve(self.vh.mT).mT
        return self.delta_w

    def curvature(self) -> Tensor:
        """G per position, `[O, O]`."""
        if self.g is None:
            raise RuntimeError("no rows were added")
        return self.g / max(1.0, self.positions * len(self.uses))

    def apply(self, update: Tensor, h: Tensor) -> Tensor:
        """The output of this layer with weights `[O, H]` on a `layer_input`, in the layout of `output_gradient`."""
        bias, weight = (update[:, -1], update[:, :-1]) if self.bias is not None else (None, update)
        return self.outgoing(weight, h.to(update.dtype), bias)

    def outgoing(self, weight: Tensor, h: Tensor, bias: Tensor | None = None) -> Tensor:
        """The same for weights `[O, channels * taps]` on other channels `h`."""
        w = self.window
        if not w.kernel:
            return F.linear(h, weight, bias)
        kernel = weight.unflatten(1, (-1, *w.kernel))
        return _CONV[len(w.kernel)](h, kernel, bias, w.stride, w.padding, w.dilation)

    def back(self, weight: Tensor, v: Tensor, z: Tensor) -> Tensor:
        """The gradient at other channels z for the gradient v at the output of `outgoing`."""
        w = self.window
        if not w.kernel:
            return v @ weight
        kernel = weight.unflatten(1, (-1, *w.kernel))
        gradient: Tensor = torch.ops.aten.convolution_backward(
            v, z, kernel, None, w.stride, w.padding, w.dilation, False, [0] * len(w.kernel), 1, (True, False, False)
        )[0]
        return gradient


def uses_by_node(consumers: Mapping[str, ConsumerMoments]) -> dict[fx.Node, list[tuple[ConsumerMoments, Projection]]]:
    """All uses of these weights, by node."""
    uses: dict[fx.Node, list[tuple[ConsumerMoments, Projection]]] = {}
    for c in consumers.values():
        for p in c.uses:
            uses.setdefault(p.node, []).append((c, p))
    return uses
