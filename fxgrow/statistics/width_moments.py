"""Second moments of one width: N = E[b V^T] for each weight that consumes it, and S = E[b b^T].

b are the patches that all producers of the width read, side by side, with a 1 for each bias: P features. V is minus the
gradient of a sample's loss at a consumer's output. E is the mean over samples of the sum over positions.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, fx

from fxgrow.analysis.analyse import AnalysedGraph
from fxgrow.analysis.widths import GrowableWidth
from fxgrow.axes.axes import length
from fxgrow.statistics.consumer_moments import some_rows
from fxgrow.statistics.cross_moment import coverage, cross_moment, patch_rows
from fxgrow.statistics.factorisation import Factor, factor
from fxgrow.statistics.gram import accumulating, add_gram, matrix_product, mirrored
from fxgrow.statistics.producer_consumer_path import ConvPath, gradient_map, producer_map


class PatchMap(NamedTuple):
    """The map on which the patches b of all producers are taken.

    Attributes:
        paths: the paths on this map.
        shape: its spatial shape, empty between linear layers.
        pooled: whether it is the map that a consumer reads, after the pools, and not the output of the producers.
        cover: how often each position is read, `[*shape]`.
    """

    paths: list[ConvPath]
    shape: tuple[int, ...]
    pooled: bool
    cover: Tensor


@dataclass
class WidthMoments:
    """N and S of one width.

    Attributes:
        growable: the width.
        paths: from every producer to every consumer.
        spans: range of each producer's features in b, by weight.
        blocks: N by consumer, `[P, taps, O]`.
        s: S, `[P, P]`, in its upper triangle.
        rows: number of rows of b from which S was formed.
        samples: number of samples behind S.
        position_count: their positions that are read, counted once per window.
        keep: number of samples of each batch that are cached for this width.
        ridge: relative ridge that S needs.
        wanted: number of rows from which S is to be formed; with fewer than P, the rows replace S.
        sampled: these rows, weighted, `[m, P]` in parts.
    """

    growable: GrowableWidth
    paths: list[ConvPath]
    spans: dict[str, tuple[int, int]]
    blocks: dict[str, Tensor] = field(default_factory=dict)
    s: Tensor | None = None
    rows: int = 0
    samples: int = 0
    position_count: float = 0.0
    keep: int = 0
    ridge: float = 0.0
    wanted: int = 0
    sampled: list[Tensor] = field(default_factory=list)

    @property
    def features(self) -> int:
        """P."""
        return sum(stop - start for start, stop in self.spans.values())

    @property
    def positions_per_sample(self) -> float:
        """How many positions S sums over, counted once per window."""
        return self.position_count / max(1, self.samples)

    @property
    def second_moment(self) -> Tensor:
        """S, `[P, P]`."""
        return mirrored(self.upper)

    @property
    def upper(self) -> Tensor:
        """S in its upper triangle, which is what `factor` reads; the rest is unspecified."""
        if self.s is None:
            raise RuntimeError("no rows were added")
        return self.s

    def factor(self, ridge: float) -> Factor:
        """The factor of S plus a relative ridge."""
        return factor(rows=self._rows(), ridge=ridge) if self.sampled else factor(self.upper, ridge=ridge)

    def scaled(self, alpha: Tensor) -> Tensor:
        """Every column of alpha scaled so that E[(alpha^T b)^2] over positions is 1, `[P, k]`."""
        if self.sampled:
            total = matrix_product(self._rows(), alpha).square().sum(0)
        else:
            total = (alpha * (self.second_moment @ alpha)).sum(0)
        return alpha / (total / self.positions_per_sample).clamp_min(torch.finfo(total.dtype).tiny).sqrt()

    def _rows(self) -> Tensor:
        return self.sampled[0] if len(self.sampled) == 1 else torch.cat(self.sampled)

    def add(self, path: ConvPath, x: Tensor, v: Tensor, scale: float = 1.0) -> None:
        """Adds scale * sum of b V^T over one batch to N of the path's consumer.

        Args:
            path: from the producer to the consumer.
            x: the producer's input, `[n, ...]`.
            v: V at the consumer's output, `[n, ...]`.
            scale: see above.
        """
        name, bias = path.consumer.weight, path.producer.bias is not None
        x, v = producer_map(x, path), gradient_map(v, path)
        moment = cross_moment(x, v, path.producer_window, path.consumer_window, bias=bias, pool=path.pool)
        moment.mul_(scale)
        block = self.blocks.get(name)
        if block is None and len(moment) == self.features:
            self.blocks[name] = moment
            return
        if block is None:
            block = self.blocks[name] = moment.new_zeros(self.features, *moment.shape[1:])
        start, stop = self.spans[path.producer.weight]
        block[start:stop].add_(moment)

    def patch_map(self) -> PatchMap:
        """The map on which b is taken."""
        paths = self.paths
        if len({p.read_shape for p in paths}) > 1:
            # consumers read different maps: count every position of the producers' output once
            written = {p.written_shape for p in paths}
            if len(written) == 1:
                (shape,) = written
                return PatchMap(paths, shape, False, torch.ones(shape))
            # producers write different maps too: take the input of the consumer that most of them reach
            by_use: dict[fx.Node, list[ConvPath]] = {}
            for p in paths:
                by_use.setdefault(p.consumer.node, []).append(p)
            paths = max(by_use.values(), key=len)
        shape = paths[0].read_shape
        if not shape:
            return PatchMap(paths, shape, True, torch.ones(()))
        windows = {p.consumer.weight: p.consumer_window for p in paths}.values()
        return PatchMap(paths, shape, True, torch.stack([coverage(shape, w).double() for w in windows]).mean(0))

    def add_rows(
        self,
        inputs: Mapping[fx.Node, Tensor],
        samples: float | None,
        generator: torch.Generator | None = None,
        share: float = 1.0,
        processes: int = 1,
    ) -> None:
        """Adds rows b to S.

        Args:
            inputs: by node, `[n, ...]`.
            samples: sampled rows are scaled as if they were of so many samples; None for all rows, unscaled.
            generator: of the sampling.
            share: of the `wanted` rows, to be added by this call.
            processes: that add as much each.
        """
        limit = None if samples is None else math.ceil(share * self.wanted / processes)
        n = next(iter(inputs[p.producer.source] for p in self.paths)).shape[0]
        total = n * self.positions(inputs)
        self.samples += n
        for uses in self.rounds():
            rows, weight, bias = self.stacked(uses, inputs, limit, generator)
            self.position_count += float(weight.mean()) * total
            scale = 1.0 if samples is None else samples / n * total / len(rows)
            least, most = (float(w) for w in weight.aminmax())
            even = least == most
            self.rows += len(rows)
            if samples is not None and self.wanted < self.features:
                ones = (weight * (scale * share / samples)).sqrt()[:, None].to(rows)
                weighted = rows.new_empty(len(rows), self.features)
                torch.mul(rows, ones, out=weighted[:, : rows.shape[1]])
                if bias:
                    weighted[:, -1:] = ones
                self.sampled.append(weighted)
                continue
            self.s = add_gram(self.s, rows, None if even else weight, bias, scale * (least if even else 1.0))

    def rounds(self) -> list[dict[str, ConvPath]]:
        """For each i the i-th use of every producer: further uses of a module count like further positions."""
        uses: dict[str, dict[fx.Node, ConvPath]] = {name: {} for name in self.spans}
        for path in self.patch_map().paths:
            uses[path.producer.weight].setdefault(path.producer.node, path)
        lists = {name: list(paths.values()) for name, paths in uses.items()}
        return [
            {name: paths[i] for name, paths in lists.items() if i < len(paths)}
            for i in range(max(map(len, lists.values())))
        ]

    def positions(self, inputs: Mapping[fx.Node, Tensor]) -> int:
        """Positions of a sample on the map of patches."""
        paths, shape, _, _ = self.patch_map()
        return math.prod(shape) if shape else producer_map(inputs[paths[0].producer.source], paths[0]).shape[1]

    def stacked(
        self,
        uses: Mapping[str, ConvPath],
        inputs: Mapping[fx.Node, Tensor],
        limit: int | None,
        generator: torch.Generator | None = None,
    ) -> tuple[Tensor, Tensor, bool]:
        """Rows b of all producers side by side, at most `limit` of them (None: all).

        Returns:
            The rows `[m, P]` (zero for a producer without a use), how often each is read `[m]`, and whether the last
            feature, which is 1, is left out.
        """
        _, shape, pooled, cover = self.patch_map()
        maps = {name: producer_map(inputs[path.producer.source], path) for name, path in uses.items()}
        first = next(iter(maps.values()))
        n, device, positions = first.shape[0], first.device, self.positions(inputs)
        chosen = None if limit is None else some_rows(n * positions, limit, generator, device)
        count = n * positions if chosen is None else len(chosen)
        cover = cover.flatten().to(device)
        if not shape:
            weight = cover.expand(count)
        else:
            weight = cover.repeat(n) if chosen is None else cover[chosen % positions]

        def patches(name: str, bias: bool) -> Tensor:
            path = uses[name]
            return patch_rows(maps[name], path.producer_window, chosen, bias, path.pool if pooled else ())

        if len(self.spans) == 1:
            ((name, path),) = uses.items()
            return patches(name, False), weight, path.producer.bias is not None
        parts = []
        for name, (start, stop) in self.spans.items():
            if name in uses:
                parts.append(patches(name, uses[name].producer.bias is not None))
            else:
                parts.append(accumulating(first.new_zeros(count, stop - start)))
        return torch.cat(parts, 1), weight, False


def feature_spans(h: GrowableWidth, analysed: AnalysedGraph) -> dict[str, tuple[int, int]]:
    """The range of each producer's features in b, by weight."""
    spans: dict[str, tuple[int, int]] = {}
    at = 0
    for p in h.producers:
        if p.weight not in spans:
            dims = analysed.structure.parameters[p.weight]
            size = math.prod(length(a) for d, a in enumerate(dims) if d != p.out_dim) + (p.bias is not None)
            spans[p.weight] = (at, at + size)
            at += size
    return spans
