"""What a pass over the data leaves behind, per consumer and per width.

Exact, over every position: E[V h^T] (a weight gradient), E|V|^2 and, between linked layers, E[b V^T]. From sampled
positions (all of them with `exact`): E[h h^T], E[V V^T], E[b b^T] and the part of E[b V^T] that the existing weights
can express. E is the mean over samples of the sum over positions (Verbockhaven et al. 2024, section 3).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, fx

from fxgrow._axes import length
from fxgrow._consumer import Consumer, consumers_of, reads_of, rows_for, some_rows
from fxgrow._gram import accumulating, add_gram, mirrored
from fxgrow._links import Link, gradient_map, links, producer_map
from fxgrow._memory import Memory
from fxgrow._moments import coverage, cross_moment, patch_rows
from fxgrow._pass import Seen
from fxgrow._widths import Hidden
from fxgrow.ops.registry import Projection, Structure

#: remembered activations of one width take at most so many bytes
CACHE = 128 << 20
#: a sampled matrix is estimated from at least so many samples, where there are any
FEW_SAMPLES = 64
#: relative ridge on a sampled S, with ten rows per feature and with fewer: what it lacks must not be divided by
SAMPLED_RIDGE = (1e-2, 1e-1)


@dataclass
class WidthMoments:
    """N = E[b V^T] per consumer `[P, taps, O]`, and S = E[b b^T] `[P, P]`, over the stacked producers."""

    hidden: Hidden
    links: list[Link]
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

    def add(self, link: Link, x: Tensor, v: Tensor, scale: float = 1.0) -> None:
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

    def reading(self) -> tuple[tuple[int, ...], tuple[int, ...], Tensor]:
        """The map that new units are read on: its shape, the pool before it, how often each position is read."""
        first = self.links[0]
        shape, pool = first.read_shape, first.pool
        if any((k.pool, k.read_shape) != (pool, shape) for k in self.links):
            # consumers that read different maps: count every written position once
            shape = tuple(r * p for r, p in zip(shape, pool or (1,) * len(shape), strict=True))
            return shape, (), torch.ones(shape)
        if not shape:
            return shape, pool, torch.ones(())
        windows = {k.reads.weight: k.consumer for k in self.links}.values()
        cover = torch.stack([coverage(shape, w).double() for w in windows]).mean(0)
        return shape, pool, cover

    def add_rows(
        self,
        inputs: Mapping[fx.Node, Tensor],
        samples: float | None,
        generator: torch.Generator | None = None,
        share: float = 1.0,
    ) -> None:
        """Adds to S, from this share of its rows, as if there were `samples` samples (None: all, as they are)."""
        limit = None if samples is None else math.ceil(share * rows_for(self.features))
        n = next(iter(inputs[k.writes.source] for k in self.links)).shape[0]
        total = n * self.positions(inputs)
        self.samples += n
        for uses in self.rounds():
            rows, weight, bias = self.stacked(uses, inputs, limit, generator)
            self.reads += float(weight.mean()) * total
            scale = 1.0 if samples is None else samples / n * total / len(rows)
            least, most = (float(w) for w in weight.aminmax())
            even = least == most
            self.s = add_gram(self.s, rows, None if even else weight, bias, scale * (least if even else 1.0))
            self.rows += len(rows)

    def rounds(self) -> list[dict[str, Link]]:
        """The i-th use of every producer, for each i: a module used twice writes twice, as two positions would."""
        uses: dict[str, dict[fx.Node, Link]] = {name: {} for name in self.spans}
        for link in self.links:
            uses[link.writes.weight].setdefault(link.writes.node, link)
        return [
            {name: links[i] for name, links in ((n, list(u.values())) for n, u in uses.items()) if i < len(links)}
            for i in range(max(len(u) for u in uses.values()))
        ]

    def positions(self, inputs: Mapping[fx.Node, Tensor]) -> int:
        shape, _, _ = self.reading()
        link = self.links[0]
        return math.prod(shape) if shape else producer_map(inputs[link.writes.source], link).shape[1]

    def stacked(
        self,
        uses: Mapping[str, Link],
        inputs: Mapping[fx.Node, Tensor],
        limit: int | None,
        generator: torch.Generator | None = None,
    ) -> tuple[Tensor, Tensor, bool]:
        """Rows b of all producers side by side, `[m, P]` (zero for one without a use), and how often each is read.

        True: the last feature, which is 1, is left out.
        """
        shape, pool, cover = self.reading()
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
        if len(self.spans) == 1:
            ((name, k),) = uses.items()
            return patch_rows(maps[name], k.producer, chosen, pool=pool), weight, k.writes.bias is not None
        parts = []
        for name, (start, stop) in self.spans.items():
            if name in uses:
                k = uses[name]
                parts.append(patch_rows(maps[name], k.producer, chosen, bias=k.writes.bias is not None, pool=pool))
            else:
                parts.append(accumulating(first.new_zeros(count, stop - start)))
        return torch.cat(parts, 1), weight, False


class Statistics:
    """All consumers and widths of one profile, filled batch by batch.

    Args:
        structure: of the graph.
        hiddens: the widths to measure.
        exact: every matrix from every position.
        link: collect S and N at all.
        project: `subtract_expressible` will follow; it then adds what remembered samples give to N too.
        output_side: collect E[V V^T] too.
        cache: bytes of activations to remember per width at most.
    """

    def __init__(
        self,
        structure: Structure,
        hiddens: Iterable[Hidden],
        *,
        exact: bool,
        link: bool = True,
        project: bool = False,
        output_side: bool = False,
        cache: int = CACHE,
    ) -> None:
        self.cache = cache
        self.exact, self.project = exact, project and not exact
        self.samples = 0
        self.consumers: dict[str, Consumer] = {}
        self.widths: dict[str, WidthMoments] = {}
        for h in hiddens:
            for p in h.reads:
                if all(c.weight != p.weight for c in self.consumers.values()):
                    self.consumers |= consumers_of(p.weight, structure.projections, output_side)
            found = links(h, structure) if link else None
            if found is not None and all(k.reads.weight in self.consumers for k in found):
                self.widths[h.width.name] = WidthMoments(h, found, _spans(h, structure))
        self.reads = reads_of(self.consumers)
        self.by_node: dict[fx.Node, list[tuple[WidthMoments, Link]]] = {}
        for w in self.widths.values():
            for way in w.links:
                self.by_node.setdefault(way.reads.node, []).append((w, way))
        self.memory = Memory()
        #: how many samples of a batch to remember
        self.keep: dict[fx.Node, int] = {}

    @property
    def sources(self) -> set[fx.Node]:
        """Nodes whose outputs a pass must keep."""
        writes = {k.writes.source for w in self.widths.values() for k in w.links}
        return writes | {p.source for own in self.reads.values() for _, p in own}

    @property
    def weights(self) -> list[str]:
        """Parameters whose gradients a pass must compute."""
        biases = [c.bias for c in self.consumers.values() if c.bias is not None]
        return list(dict.fromkeys([*(c.weight for c in self.consumers.values()), *biases]))

    # -- during a pass

    def _plan(self, seen: Seen, batches: int | None) -> None:
        """How many samples of each batch to remember, from the first batch's shapes."""
        per_batch = self.memory.expected = max(1, batches or 8)
        for p in (p for own in self.reads.values() for _, p in own):
            self.keep[p.node] = self.keep[p.source] = math.ceil(FEW_SAMPLES / per_batch)
        for w in self.widths.values():
            need = math.ceil(rows_for(w.features) / w.positions(seen.inputs))
            nodes = {n for k in w.links for n in (k.writes.source, k.reads.source)}
            bytes_ = sum(seen.inputs[n][0].numel() * seen.inputs[n].element_size() for n in nodes)
            need = min(max(need, FEW_SAMPLES), max(1, self.cache // bytes_))
            w.keep = math.ceil(need / per_batch)
            for n in (*nodes, *(k.reads.node for k in w.links)):
                self.keep[n] = max(self.keep.get(n, 0), w.keep)

    def read(self, seen: Seen, node: fx.Node, v: Tensor, batches: int | None) -> None:
        """V came back to a consumer's output."""
        for c, p in self.reads[node]:
            asked = c.asked(v)
            c.add_norm(asked)
            if self.exact:
                c.add_rows(c.taken(seen.inputs[p.source]), asked, None)
        if not self.exact:
            if not self.keep:
                self._plan(seen, batches)
            self.memory.add_update(node, v, self.keep[node])
        for w, link in self.by_node.get(node, []):
            later = w.keep if self.project else 0
            if later < len(v):
                w.add(link, seen.inputs[link.writes.source][later:], self.consumers[link.reads.weight].asked(v[later:]))

    def end_batch(self, seen: Seen) -> None:
        self.samples += seen.size
        for c in self.consumers.values():
            c.add_gradient(seen)
        if self.exact:
            for w in self.widths.values():
                w.add_rows(seen.inputs, None)
            return
        for node in self.sources:
            self.memory.add_input(node, seen.inputs[node], self.keep[node])

    def finish(self, generator: torch.Generator) -> None:
        """Turns sums into means; sampled matrices come from what was remembered."""
        for c in self.consumers.values():
            if not self.exact:
                for p in c.uses:
                    keep = min(self.keep[p.node], self.keep[p.source])
                    for share, inputs, updates in self._groups(keep, [p.source], [p.node]):
                        c.add_rows(
                            c.taken(inputs[p.source]), c.asked(updates[p.node]), share * self.samples, generator, share
                        )
            c.finish(self.samples)
        for w in self.widths.values():
            same = None if self.exact else self._same_input(w)
            if same is not None and same.m is not None:
                w.s, w.rows = same.m * self.samples, same.rows
                w.samples, w.reads = 1, same.positions
            elif not self.exact:
                for share, inputs, _ in self._groups(w.keep, [k.writes.source for k in w.links]):
                    w.add_rows(inputs, share * self.samples, generator, share)
            w.blocks = {name: block / self.samples for name, block in w.blocks.items()}
            w.s = None if w.s is None else w.s.div_(self.samples)
            w.ridge = 0.0 if self.exact else SAMPLED_RIDGE[w.rows < 10 * w.features]

    def _groups(
        self, keep: int, inputs: Iterable[fx.Node], updates: Iterable[fx.Node] = ()
    ) -> Iterator[tuple[float, dict[fx.Node, Tensor], dict[fx.Node, Tensor]]]:
        """Remembered samples, and which share of them this is."""
        sources, targets = list(dict.fromkeys(inputs)), list(dict.fromkeys(updates))
        total = sum(min(keep, c.size) for c in self.memory.inputs[sources[0]].chunks)
        for ins, outs in self.memory.groups(keep, sources, targets):
            yield len(ins[sources[0]]) / total, ins, outs

    def _same_input(self, w: WidthMoments) -> Consumer | None:
        """The weight that reads exactly what this width's producer reads: M of one width is S of the next."""
        p, *more = {k.writes.node: k.writes for k in w.links}.values()
        c = self.consumers.get(p.weight)
        if more or p.kernel or c is None or len(c.uses) > 1 or c.bias != p.bias:
            return None
        return c if w.keep <= min(self.keep[p.node], self.keep[p.source]) else None

    def subtract_expressible(self, updates: Mapping[str, Tensor]) -> None:
        """N - E[b (dW* h)^T], from remembered samples: what the existing weights can express is no bottleneck."""
        for w in self.widths.values():
            by_use: dict[Projection, list[Link]] = {}
            for link in w.links:
                by_use.setdefault(link.reads, []).append(link)
            sources = [n for k in w.links for n in (k.writes.source, k.reads.source)]
            for share, inputs, returned in self._groups(w.keep, sources, [p.node for p in by_use]):
                for p, own in by_use.items():
                    c = self.consumers[p.weight]
                    h = c.taken(inputs[p.source])
                    # what was remembered stands for all samples; its V is here in N for the first time
                    rest = c.apply(updates[p.weight] * (-share * self.samples / len(h)), h)
                    rest += c.asked(returned[p.node])
                    for link in own:
                        w.add(link, inputs[link.writes.source], rest, scale=1.0 / self.samples)

    def subtract_expressible_of(self, seen: Seen, updates: Mapping[str, Tensor]) -> None:
        """The same from all positions of one more batch."""
        for w in self.widths.values():
            for link in w.links:
                c = self.consumers[link.reads.weight]
                fitted = c.apply(updates[c.weight], c.taken(seen.inputs[link.reads.source]))
                w.add(link, seen.inputs[link.writes.source], fitted, scale=-1.0 / self.samples)


def _spans(h: Hidden, structure: Structure) -> dict[str, tuple[int, int]]:
    spans: dict[str, tuple[int, int]] = {}
    at = 0
    for p in h.writes:
        if p.weight not in spans:
            own = structure.parameters[p.weight]
            size = math.prod(length(a) for d, a in enumerate(own) if d != p.out_dim) + (p.bias is not None)
            spans[p.weight] = (at, at + size)
            at += size
    return spans
