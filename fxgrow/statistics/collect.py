"""What a pass over the data leaves behind, per consumer and per width.

Exact, over every position: E[V h^T] (a weight gradient), E|V|^2 and, between linked layers, E[b V^T]. From sampled
positions (all of them with `exact`): E[h h^T], E[V V^T], E[b b^T] and the part of E[b V^T] that the existing weights
can express. E is the mean over samples of the sum over positions (Verbockhaven et al. 2024, section 3).
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor, fx

from fxgrow.analysis.analyse import AnalysedGraph
from fxgrow.analysis.widths import GrowableWidth
from fxgrow.axes.structure import Projection
from fxgrow.distributed import SINGLE_PROCESS, ProcessGroup
from fxgrow.statistics.activation_cache import ActivationCache, Span
from fxgrow.statistics.all_reduce import sum_consumers, sum_inputs
from fxgrow.statistics.consumer_moments import ConsumerMoments, Drawn, consumers_of, reads_of, rows_for
from fxgrow.statistics.forward_backward import BatchRecord
from fxgrow.statistics.producer_consumer_path import ConvPath, links
from fxgrow.statistics.width_moments import WidthMoments, spans_of

#: remembered activations of one width take at most so many bytes
CACHE = 128 << 20
#: what new units are tried on is remembered if it takes at most so many bytes, else read again
CACHE_BYTES = 256 << 20
#: a sampled matrix is estimated from at least so many samples, where there are any
FEW_SAMPLES = 64
#: and from at least so many rows
FEW_ROWS = 512
#: relative ridge on a sampled S, with ten rows per feature and with fewer: what it lacks must not be divided by
SAMPLED_RIDGE = (1e-2, 1e-1)


class Statistics:
    """All consumers and widths of one profile, filled batch by batch.

    Args:
        analysed: the graph.
        hiddens: the widths to measure.
        exact: every matrix from every position.
        link: collect S and N at all.
        project: `subtract_expressible` will follow; it then adds what remembered samples give to N too.
        output_side: collect E[V V^T] too.
        cache: bytes of activations to remember per width at most.
        room: bytes that what new units are tried on may take.
        rows: sampled rows of b for each of its features that S is made from, None for as many as `rows_for` says.
    """

    def __init__(
        self,
        analysed: AnalysedGraph,
        hiddens: Iterable[GrowableWidth],
        *,
        exact: bool,
        link: bool = True,
        project: bool = False,
        output_side: bool = False,
        cache: int = CACHE,
        room: int = CACHE_BYTES,
        rows: float | None = None,
    ) -> None:
        self.cache, self.room = cache, room
        self.exact, self.project = exact, project and not exact
        #: of this process, and of all once they are finished
        self.samples, self.total = 0, 0.0
        self.consumers: dict[str, ConsumerMoments] = {}
        self.widths: dict[str, WidthMoments] = {}
        for h in hiddens:
            for p in h.consumers:
                if all(c.weight != p.weight for c in self.consumers.values()):
                    self.consumers |= consumers_of(p.weight, analysed.structure.projections, output_side)
            found = links(h, analysed) if link else None
            if found is not None and all(k.reads.weight in self.consumers for k in found):
                w = self.widths[h.name] = WidthMoments(h, found, spans_of(h, analysed))
                most = rows_for(w.features)
                w.wanted = most if rows is None else min(most, max(FEW_ROWS, math.ceil(rows * w.features)))
        self.reads = reads_of(self.consumers)
        self.by_node: dict[fx.Node, list[tuple[WidthMoments, ConvPath]]] = {}
        for w in self.widths.values():
            for way in w.links:
                self.by_node.setdefault(way.reads.node, []).append((w, way))
        self.memory = ActivationCache()
        #: how many samples of a batch to remember
        self.keep: dict[fx.Node, int] = {}
        #: inputs and updates to remember of all samples, where they have room; of held-back ones other inputs
        self.whole: tuple[set[fx.Node], set[fx.Node]] = set(), set()
        self.held: set[fx.Node] = set()
        self.remembers = False
        #: all that consumers read and are asked for is remembered: no gradient of a weight is needed
        self.complete = False

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

    def remember(self, hiddens: Iterable[GrowableWidth]) -> None:
        """New units of these widths will be tried by themselves: on what is remembered, if it has room."""
        hiddens = list(hiddens)
        reads = [p for h in hiddens for p in h.consumers]
        self.whole = {p.source for h in hiddens for p in h.producers}, {p.node for p in reads}
        self.held = self.whole[0] | {p.source for p in reads}

    # -- during a pass

    def _plan(self, seen: BatchRecord, batches: int | None) -> None:
        """How many samples of each batch to remember, from the first batch's shapes."""
        per_batch = self.memory.expected = max(1, batches or 8)
        few = math.ceil(FEW_SAMPLES / per_batch)
        for p in (p for own in self.reads.values() for _, p in own):
            self.keep[p.node] = self.keep[p.source] = few
        for w in self.widths.values():
            need = math.ceil(rows_for(w.features) / w.positions(seen.inputs))
            nodes = {n for k in w.links for n in (k.writes.source, k.reads.source)}
            bytes_ = sum(seen.inputs[n][0].numel() * seen.inputs[n].element_size() for n in nodes)
            need = min(max(need, FEW_SAMPLES), max(1, self.cache // bytes_))
            w.keep = math.ceil(need / per_batch)
            for n in (*nodes, *(k.reads.node for k in w.links)):
                self.keep[n] = max(self.keep.get(n, few), w.keep)
        if self.whole[0] and self._bytes(seen) * seen.size * per_batch <= self.room:
            self.remembers = True
            self.keep |= dict.fromkeys((*self.whole[0], *self.whole[1]), sys.maxsize)
            read = {p.source for own in self.reads.values() for _, p in own}
            if self.whole[1] == self.reads.keys() and all(self.keep[n] >= seen.size for n in read):
                self.complete = True
                self.keep |= dict.fromkeys(read, sys.maxsize)

    def _bytes(self, seen: BatchRecord) -> float:
        """What a sample takes in all that is to be remembered; infinity where rows are not those of samples."""
        inputs, updates = self.whole
        if any(len(seen.inputs[n]) != seen.size for n in inputs | self.held):
            return math.inf
        size = {n: t.numel() / seen.size for n, t in seen.inputs.items()}
        reads = {p.node: p.source for n in updates for _, p in self.reads[n]}
        size |= {n: n.meta["val"].numel() * size[h] / h.meta["val"].numel() for n, h in reads.items()}
        # a quarter of the batches is held back
        every = sum(size[n] for n in (*inputs, *updates)) + sum(size[n] for n in self.held - inputs) / 4
        return every * next(iter(seen.inputs.values())).element_size()

    def read(self, seen: BatchRecord, node: fx.Node, v: Tensor, batches: int | None) -> None:
        """V came back to a consumer's output."""
        if not self.exact:
            if not self.keep:
                self._plan(seen, batches)
            self.memory.add_update(node, v, self.keep[node])
        for c, p in self.reads[node] if not self.complete else ():
            asked = c.output_gradient(v)
            c.add_norm(asked)
            if self.exact:
                c.add_rows(c.layer_input(seen.inputs[p.source]), asked, None)
        for w, link in self.by_node.get(node, []):
            later = w.keep if self.project else 0
            if later < len(v):
                w.add(
                    link,
                    seen.inputs[link.writes.source][later:],
                    self.consumers[link.reads.weight].output_gradient(v[later:]),
                )

    def end_batch(self, seen: BatchRecord) -> None:
        self.samples += seen.size
        for c in self.consumers.values() if not self.complete else ():
            c.add_gradient(seen)
        if self.exact:
            for w in self.widths.values():
                w.add_rows(seen.inputs, None)
            return
        for node in self.sources:
            self.memory.add_input(node, seen.inputs[node], self.keep[node])

    def finish(self, generator: torch.Generator, process_group: ProcessGroup = SINGLE_PROCESS) -> None:
        """Turns sums into means over all processes, but for N; sampled matrices come from what was remembered."""
        for c in self.consumers.values() if not self.exact else ():
            for p in c.uses:
                keep = min(self.keep[p.node], self.keep[p.source])
                for share, span, inputs, updates in self._groups(keep, [p.source], [p.node]):
                    h, v = c.layer_input(inputs[p.source]), c.output_gradient(updates[p.node])
                    if self.complete:
                        c.add_products(h, v)
                    drawn = c.add_rows(h, v, share * self.samples, generator, share, process_group.size)
                    c.drawn.append(Drawn(p, span, keep, *drawn))
        self.total = sum_consumers(self.consumers, self.samples, process_group)
        for c in self.consumers.values():
            c.finish(self.total)
        alike = {name: None if self.exact else self._same_input(w) for name, w in self.widths.items()}
        own = [w for name, w in self.widths.items() if alike[name] is None]
        for w in own if not self.exact else ():
            for share, _, inputs, _ in self._groups(w.keep, [k.writes.source for k in w.links]):
                w.add_rows(inputs, share * self.samples, generator, share, process_group.size)
        sum_inputs(own, self.samples, self.total, process_group)
        for name, w in self.widths.items():
            same = alike[name]
            if same is not None and same.m is not None:
                w.s, w.rows = same.m.clone(), same.rows
                w.samples, w.reads = 1, same.positions
            elif w.s is not None:
                w.s.div_(self.total)
            w.blocks = {name: block / self.total for name, block in w.blocks.items()}
            w.ridge = 0.0 if self.exact else SAMPLED_RIDGE[w.rows < 10 * w.features]

    def _groups(
        self, keep: int, inputs: Iterable[fx.Node], updates: Iterable[fx.Node] = ()
    ) -> Iterator[tuple[float, Span, dict[fx.Node, Tensor], dict[fx.Node, Tensor]]]:
        """Remembered samples, and which share of them this is, of which batches."""
        sources, targets = list(dict.fromkeys(inputs)), list(dict.fromkeys(updates))
        total = sum(min(keep, c.size) for c in self.memory.inputs[sources[0]].chunks)
        for span, ins, outs in self.memory.groups(keep, sources, targets):
            yield len(ins[sources[0]]) / total, span, ins, outs

    def _same_input(self, w: WidthMoments) -> ConsumerMoments | None:
        """The weight that reads exactly what this width's producer reads: M of one width is S of the next."""
        p, *more = {k.writes.node: k.writes for k in w.links}.values()
        c = self.consumers.get(p.weight)
        if more or p.kernel or c is None or len(c.uses) > 1 or c.bias != p.bias:
            return None
        return c if w.keep <= min(self.keep[p.node], self.keep[p.source]) else None

    def subtract_expressible(self, updates: Mapping[str, Tensor]) -> None:
        """N - E[b (dW* h)^T], from remembered samples: what the existing weights can express is no bottleneck."""
        for w in self.widths.values():
            by_use: dict[Projection, list[ConvPath]] = {}
            for link in w.links:
                by_use.setdefault(link.reads, []).append(link)
            sources = [n for k in w.links for n in (k.writes.source, k.reads.source)]
            for share, _, inputs, returned in self._groups(w.keep, sources, [p.node for p in by_use]):
                for p, own in by_use.items():
                    c = self.consumers[p.weight]
                    h = c.layer_input(inputs[p.source])
                    # what was remembered stands for all samples; its V is here in N for the first time
                    rest = c.apply(updates[p.weight] * (-share * self.samples / len(h)), h)
                    rest += c.output_gradient(returned[p.node])
                    for link in own:
                        w.add(link, inputs[link.writes.source], rest, scale=1.0 / self.total)

    def subtract_expressible_of(self, seen: BatchRecord, updates: Mapping[str, Tensor]) -> None:
        """The same from all positions of one more batch."""
        for w in self.widths.values():
            for link in w.links:
                c = self.consumers[link.reads.weight]
                fitted = c.apply(updates[c.weight], c.layer_input(seen.inputs[link.reads.source]))
                w.add(link, seen.inputs[link.writes.source], fitted, scale=-1.0 / self.total)
