"""Second moments of one width: N = E[b V^T] for each weight that reads it, and S = E[b b^T]."""

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


class Reading(NamedTuple):
    """The map on which the features b of all producers stand side by side.

    Attributes:
        links: whose maps these are.
        shape: of the map, empty between linear layers.
        pooled: it is what a consumer reads, behind the pools, and not what the producers write.
        cover: how often each position is read.
    """

    links: list[ConvPath]
    shape: tuple[int, ...]
    pooled: bool
    cover: Tensor


@dataclass
class WidthMoments:
    """N = E[b V^T] per consumer `[P, taps, O]`, and S = E[b b^T] `[P, P]`, over the stacked producers."""

    hidden: GrowableWidth
    links: list[ConvPath]
    #: rows of each producer's features in b
    spans: dict[str, tuple[int, int]]
    blocks: dict[str, Tensor] = field(default_factory=dict)
    s: Tensor | None = None
    rows: int = 0
    #: samples behind S, and their positions that are read, counted once per window
    samples: int = 0
    reads: float = 0.0
    #: samples of a batch that are remembered for this width
    keep: int = 0
    #: relative ridge that S needs
    ridge: float = 0.0
    #: rows to make S from; of fewer than there are features the rows are kept instead of S, as they count
    wanted: int = 0
    few: list[Tensor] = field(default_factory=list)

    @property
    def features(self) -> int:
        return sum(stop - start for start, stop in self.spans.values())

    @property
    def readings(self) -> float:
        """Positions of a sample that are read, counted once per window: S sums over them."""
        return self.reads / max(1, self.samples)

    @property
    def second_moment(self) -> Tensor:
        """S."""
        return mirrored(self.upper)

    @property
    def upper(self) -> Tensor:
        """S in its upper triangle, which is what a factor reads; the rest is unspecified."""
        if self.s is None:
            raise RuntimeError("no rows were added")
        return self.s

    def factor(self, ridge: float) -> Factor:
        """Of S and a relative ridge."""
        return factor(rows=self._sampled(), ridge=ridge) if self.few else factor(self.upper, ridge=ridge)

    def mean_squares(self, alpha: Tensor) -> Tensor:
        """E[(alpha^T b)^2] over what is read, for every column of alpha."""
        if self.few:
            return matrix_product(self._sampled(), alpha).square().sum(0) / self.readings
        return (alpha * (self.second_moment @ alpha)).sum(0) / self.readings

    def _sampled(self) -> Tensor:
        return self.few[0] if len(self.few) == 1 else torch.cat(self.few)

    def add(self, link: ConvPath, x: Tensor, v: Tensor, scale: float = 1.0) -> None:
        """Adds scale * sum b V^T of one batch to the consumer's block."""
        moment = cross_moment(
            producer_map(x, link),
            gradient_map(v, link),
            link.producer,
            link.consumer,
            bias=link.writes.bias is not None,
            pool=link.pool,
        )
        moment.mul_(scale)
        block = self.blocks.get(link.reads.weight)
        if block is None and len(moment) == self.features:
            self.blocks[link.reads.weight] = moment
            return
        if block is None:
            block = self.blocks[link.reads.weight] = moment.new_zeros(self.features, *moment.shape[1:])
        start, stop = self.spans[link.writes.weight]
        block[start:stop].add_(moment)

    def reading(self) -> Reading:
        """The map that b is taken on."""
        links = self.links
        if len({k.read_shape for k in links}) > 1:
            # consumers that read different maps: count every written position once
            written = {k.written for k in links}
            if len(written) == 1:
                (shape,) = written
                return Reading(links, shape, False, torch.ones(shape))
            # and producers that write different ones: they meet at the consumer that most of them reach
            by_use: dict[fx.Node, list[ConvPath]] = {}
            for k in links:
                by_use.setdefault(k.reads.node, []).append(k)
            links = max(by_use.values(), key=len)
        shape = links[0].read_shape
        if not shape:
            return Reading(links, shape, True, torch.ones(()))
        windows = {k.reads.weight: k.consumer for k in links}.values()
        return Reading(links, shape, True, torch.stack([coverage(shape, w).double() for w in windows]).mean(0))

    def add_rows(
        self,
        inputs: Mapping[fx.Node, Tensor],
        samples: float | None,
        generator: torch.Generator | None = None,
        share: float = 1.0,
        processes: int = 1,
    ) -> None:
        """Adds to S, from this share of its rows, as if there were `samples` samples (None: all, as they are).

        As many processes add as much.
        """
        limit = None if samples is None else math.ceil(share * self.wanted / processes)
        n = next(iter(inputs[k.writes.source] for k in self.links)).shape[0]
        total = n * self.positions(inputs)
        self.samples += n
        for uses in self.rounds():
            rows, weight, bias = self.stacked(uses, inputs, limit, generator)
            self.reads += float(weight.mean()) * total
            scale = 1.0 if samples is None else samples / n * total / len(rows)
            least, most = (float(w) for w in weight.aminmax())
            even = least == most
            self.rows += len(rows)
            if samples is not None and self.wanted < self.features:
                ones = (weight * (scale * share / samples)).sqrt()[:, None].to(rows)
                few = rows.new_empty(len(rows), self.features)
                torch.mul(rows, ones, out=few[:, : rows.shape[1]])
                if bias:
                    few[:, -1:] = ones
                self.few.append(few)
                continue
            self.s = add_gram(self.s, rows, None if even else weight, bias, scale * (least if even else 1.0))

    def rounds(self) -> list[dict[str, ConvPath]]:
        """The i-th use of every producer, for each i: a module used twice writes twice, as two positions would."""
        uses: dict[str, dict[fx.Node, ConvPath]] = {name: {} for name in self.spans}
        for link in self.reading().links:
            uses[link.writes.weight].setdefault(link.writes.node, link)
        return [
            {name: links[i] for name, links in ((n, list(u.values())) for n, u in uses.items()) if i < len(links)}
            for i in range(max(len(u) for u in uses.values()))
        ]

    def positions(self, inputs: Mapping[fx.Node, Tensor]) -> int:
        links, shape, _, _ = self.reading()
        link = links[0]
        return math.prod(shape) if shape else producer_map(inputs[link.writes.source], link).shape[1]

    def stacked(
        self,
        uses: Mapping[str, ConvPath],
        inputs: Mapping[fx.Node, Tensor],
        limit: int | None,
        generator: torch.Generator | None = None,
    ) -> tuple[Tensor, Tensor, bool]:
        """Rows b of all producers side by side, `[m, P]` (zero for one without a use), and how often each is read.

        True: the last feature, which is 1, is left out.
        """
        _, shape, pooled, cover = self.reading()
        maps = {name: producer_map(inputs[k.writes.source], k) for name, k in uses.items()}
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
            k = uses[name]
            return patch_rows(maps[name], k.producer, chosen, bias, k.pool if pooled else ())

        if len(self.spans) == 1:
            ((name, k),) = uses.items()
            return patches(name, False), weight, k.writes.bias is not None
        parts = []
        for name, (start, stop) in self.spans.items():
            if name in uses:
                parts.append(patches(name, uses[name].writes.bias is not None))
            else:
                parts.append(accumulating(first.new_zeros(count, stop - start)))
        return torch.cat(parts, 1), weight, False


def spans_of(h: GrowableWidth, analysed: AnalysedGraph) -> dict[str, tuple[int, int]]:
    spans: dict[str, tuple[int, int]] = {}
    at = 0
    for p in h.producers:
        if p.weight not in spans:
            own = analysed.structure.parameters[p.weight]
            size = math.prod(length(a) for d, a in enumerate(own) if d != p.out_dim) + (p.bias is not None)
            spans[p.weight] = (at, at + size)
            at += size
    return spans
