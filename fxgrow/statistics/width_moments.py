"""Second moments of one width: N = E[b V^T] for each weight that consumes it, and S = E[b b^T].

b are the patches that all producers of the width read, side by side, with a 1 for each bias: P features. V is minus the
gradient of a sample's loss at a consumer's output. E is the mean over samples of the sum over positions.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import NamedTuple

import torch
from torch import Tensor, fx

from fxgrow.analysis.analyse import AnalysedGraph
from fxgrow.analysis.widths import GrowableWidth
from fxgrow.axes.axes import length
from fxgrow.statistics.consumer_moments import Sampling
from fxgrow.statistics.cross_moment import coverage, cross_moment, patch_rows
from fxgrow.statistics.factorisation import Factor, factor
from fxgrow.statistics.gram import accumulating, add_gram, matrix_product, mirrored
from fxgrow.statistics.producer_consumer_path import ConvPath, gradient_map, producer_map


class PatchMap(NamedTuple):
    """The map on which the patches b of all producers are taken, and the paths on it."""

    paths: list[ConvPath]
    #: its spatial shape, empty between linear layers
    shape: tuple[int, ...]
    #: whether it is the map that a consumer reads, after the pools, and not the output of the producers
    pooled: bool
    #: how often each position is read, `[*shape]`
    cover: Tensor


@dataclass
class WidthMoments:
    """N and S of one width, by the paths from every producer to every consumer."""

    growable: GrowableWidth
    paths: list[ConvPath]
    #: range of each producer's features in b, by weight
    spans: dict[str, tuple[int, int]]
    #: N by consumer, `[P, taps, O]`
    blocks: dict[str, Tensor] = field(default_factory=dict)
    #: S, `[P, P]`, in its upper triangle
    s: Tensor | None = None
    #: number of rows of b and of samples behind S, and of positions that are read, counted once per window
    rows: int = 0
    samples: float = 0.0
    position_count: float = 0.0
    #: number of samples of each batch that are cached for this width
    keep: int = 0
    #: relative ridge that S needs
    ridge: float = 0.0
    #: number of rows from which S is to be formed; with fewer than P, the rows replace S: weighted, `[m, P]` in parts
    wanted: int = 0
    sampled: list[Tensor] = field(default_factory=list)

    @property
    def features(self) -> int:
        """P."""
        return sum(stop - start for start, stop in self.spans.values())

    @property
    def positions_per_sample(self) -> float:
        """How many positions S sums over, counted once per window."""
        return self.position_count / max(1.0, self.samples)

    @property
    def second_moment(self) -> Tensor:
        """S, `[P, P]`."""
        if self.s is None:
            raise RuntimeError("no rows were added")
        return mirrored(self.s)

    def factor(self, ridge: float) -> Factor:
        """The factor of S plus a relative ridge."""
        return factor(rows=self._rows(), ridge=ridge) if self.sampled else factor(self.second_moment, ridge=ridge)

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
        """Adds scale * sum of b V^T to N: x is the producer's input, V at the consumer's output, `[n, ...]`."""
        name, bias = path.consumer.weight, path.producer.bias is not None
        x, v = producer_map(x, path), gradient_map(v, path)
        moment = cross_moment(x, v, path.producer_window, path.consumer_window, bias=bias, pool=path.pool).mul_(scale)
        if name not in self.blocks:
            if len(moment) == self.features:
                self.blocks[name] = moment
                return
            self.blocks[name] = moment.new_zeros(self.features, *moment.shape[1:])
        self.blocks[name][slice(*self.spans[path.producer.weight])].add_(moment)

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
            ((node, _),) = Counter(p.consumer.node for p in paths).most_common(1)
            paths = [p for p in paths if p.consumer.node is node]
        shape = paths[0].read_shape
        if not shape:
            return PatchMap(paths, shape, True, torch.ones(()))
        windows = {p.consumer.weight: p.consumer_window for p in paths}.values()
        return PatchMap(paths, shape, True, torch.stack([coverage(shape, w).double() for w in windows]).mean(0))

    def add_rows(self, inputs: Mapping[fx.Node, Tensor], samples: float, sampling: Sampling | None) -> None:
        """Adds rows b of the inputs of so many samples, by default all, to S."""
        total = len(inputs[self.paths[0].producer.source]) * self.positions(inputs)
        self.samples += samples
        for uses in self.rounds():
            rows, weight, bias = self.stacked(uses, inputs, sampling)
            self.position_count += float(weight.mean()) * total
            scale = 1.0 if sampling is None else sampling.samples / samples * total / len(rows)
            self.rows += len(rows)
            if sampling is not None and self.wanted < self.features:
                ones = (weight * (scale * sampling.share / sampling.samples)).sqrt()[:, None].to(rows)
                weighted = rows.new_empty(len(rows), self.features)
                torch.mul(rows, ones, out=weighted[:, : rows.shape[1]])
                if bias:
                    weighted[:, -1:] = ones
                self.sampled.append(weighted)
                continue
            least, most = (float(w) for w in weight.aminmax())
            even = least == most
            self.s = add_gram(self.s, rows, None if even else weight, bias, scale * (least if even else 1.0))

    def rounds(self) -> list[dict[str, ConvPath | None]]:
        """For each i the i-th use of every producer: further uses of a module count like further positions."""
        uses: dict[str, dict[fx.Node, ConvPath]] = {name: {} for name in self.spans}
        for path in self.patch_map().paths:
            uses[path.producer.weight].setdefault(path.producer.node, path)
        rounds = zip_longest(*(paths.values() for paths in uses.values()))
        return [dict(zip(uses, paths, strict=True)) for paths in rounds]

    def positions(self, inputs: Mapping[fx.Node, Tensor]) -> int:
        """Positions of a sample on the map of patches."""
        paths, shape, _, _ = self.patch_map()
        x = inputs[paths[0].producer.source]
        rows = producer_map(x, paths[0])
        return len(rows) // len(x) * math.prod(shape) if shape else rows.shape[1]

    def stacked(
        self, uses: Mapping[str, ConvPath | None], inputs: Mapping[fx.Node, Tensor], sampling: Sampling | None
    ) -> tuple[Tensor, Tensor, bool]:
        """Rows b of all producers side by side `[m, P]`, zero for one without a use, and how often each is read `[m]`.

        The last feature, if it is 1 in every row, may be left out: the third result.
        """
        _, shape, pooled, cover = self.patch_map()
        maps = {name: producer_map(inputs[path.producer.source], path) for name, path in uses.items() if path}
        first = next(iter(maps.values()))
        positions = math.prod(shape) if shape else first.shape[1]
        chosen = sampling and sampling.choose(len(first) * positions, self.wanted, first.device)
        cover = cover.flatten().to(first.device).expand(positions)
        weight = cover.repeat(len(first)) if chosen is None else cover[chosen % positions]
        parts, alone = [], len(self.spans) == 1
        for name, (start, stop) in self.spans.items():
            path = uses[name]
            if path is None:
                parts.append(accumulating(first.new_zeros(len(weight), stop - start)))
            else:
                bias, pool = not alone and path.producer.bias is not None, path.pool if pooled else ()
                parts.append(patch_rows(maps[name], path.producer_window, chosen, bias, pool))
        if alone:
            return parts[0], weight, self.paths[0].producer.bias is not None
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
