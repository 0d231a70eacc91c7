"""The second moments of all consumers and widths of a profile, from one pass over the data.

From every position: E[V h^T] (a weight gradient), E|V|^2, and N = E[b V^T] between producers and consumers. From
sampled positions (all of them with `exact`): M = E[h h^T], G = E[V V^T], S = E[b b^T] and the part of N that the
existing weights can express. h is a consumer's layer input, V minus the gradient at its output, b the patches that
producers read. E is the mean over samples of the sum over positions (TINY, arXiv 2405.19816, section 3).
"""

from __future__ import annotations

import math
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, fx

from fxgrow.analysis.analyse import AnalysedGraph
from fxgrow.analysis.widths import GrowableWidth
from fxgrow.distributed import SINGLE_PROCESS, ProcessGroup
from fxgrow.statistics.activation_cache import ActivationCache
from fxgrow.statistics.all_reduce import sum_consumers, sum_inputs
from fxgrow.statistics.consumer_moments import (
    ConsumerMoments,
    SampledRows,
    Sampling,
    consumers_of,
    rows_for,
    uses_by_node,
)
from fxgrow.statistics.forward_backward import BatchRecord
from fxgrow.statistics.producer_consumer_path import ConvPath, find_paths
from fxgrow.statistics.width_moments import WidthMoments, feature_spans

#: cached activations of one width take at most so many bytes
WIDTH_CACHE_BYTES = 128 << 20
#: activations for isolated units are cached if they take at most so many bytes, else another pass reads them
ISOLATED_CACHE_BYTES = 256 << 20
#: a sampled matrix is estimated from at least so many samples, if there are so many,
FEW_SAMPLES = 64
#: and from at least so many rows
FEW_ROWS = 512
#: relative ridge on a sampled S with at least ten rows per feature, and with fewer
SAMPLED_RIDGE = (1e-2, 1e-1)
#: by node, a tensor of some samples
NodeTensors = Mapping[fx.Node, Tensor]


class Statistics:
    """All consumers and widths of one profile, filled batch by batch.

    With `exact` every matrix is formed from every position. S and N are collected with `width_moments`, G with
    `output_side`. With `project`, `subtract_expressible` will follow, and then adds cached samples to N. `rows` are the
    sampled rows of b per feature from which S is formed; None for `rows_for`.
    """

    def __init__(
        self,
        analysed: AnalysedGraph,
        widths: Iterable[GrowableWidth],
        *,
        exact: bool,
        width_moments: bool = True,
        project: bool = False,
        output_side: bool = False,
        width_cache_bytes: int = WIDTH_CACHE_BYTES,
        isolated_cache_bytes: int = ISOLATED_CACHE_BYTES,
        rows: float | None = None,
    ) -> None:
        self.width_cache_bytes, self.isolated_cache_bytes = width_cache_bytes, isolated_cache_bytes
        self.exact, self.project = exact, project and not exact
        #: samples of this process, and of all processes after `finish`
        self.samples, self.total = 0, 0.0
        self.consumers: dict[str, ConsumerMoments] = {}
        self.widths: dict[str, WidthMoments] = {}
        for h in widths:
            for p in h.consumers:
                if all(c.weight != p.weight for c in self.consumers.values()):
                    self.consumers |= consumers_of(p.weight, analysed.structure.projections, output_side)
            paths = find_paths(h, analysed) if width_moments else None
            if paths is not None and all(p.consumer.weight in self.consumers for p in paths):
                w = self.widths[h.name] = WidthMoments(h, paths, feature_spans(h, analysed))
                most = rows_for(w.features)
                w.wanted = most if rows is None else min(most, max(FEW_ROWS, math.ceil(rows * w.features)))
        self.uses = uses_by_node(self.consumers)
        #: inputs of the consumers
        self.inputs = {p.source for c in self.consumers.values() for p in c.uses}
        #: nodes whose outputs a pass must record
        self.sources = self.inputs | {path.producer.source for w in self.widths.values() for path in w.paths}
        self.paths: defaultdict[fx.Node, list[tuple[WidthMoments, ConvPath]]] = defaultdict(list)
        for w in self.widths.values():
            for path in w.paths:
                self.paths[path.consumer.node].append((w, path))
        self.cache = ActivationCache()
        #: entries in the first dimension of each node's tensors: as many as samples, or one per batch
        self.entries: Counter[fx.Node] = Counter()
        #: number of samples of each batch to cache
        self.keep: dict[fx.Node, int] = {}
        #: for isolated units: inputs and output gradients to cache of all samples, and inputs of held-out batches
        self.isolated_inputs: set[fx.Node] = set()
        self.isolated_targets: set[fx.Node] = set()
        self.held_out_inputs: set[fx.Node] = set()
        #: whether these are cached
        self.caches_isolated = False
        #: whether h and V of all samples are cached, so that no weight gradient is needed
        self.complete = False

    def cache_for_isolated(self, widths: Iterable[GrowableWidth]) -> None:
        """Asks to cache what isolated units of these widths need, if it is small enough."""
        for h in widths:
            self.isolated_inputs |= {p.source for p in h.producers}
            self.isolated_targets |= {p.node for p in h.consumers}
            self.held_out_inputs |= {p.source for p in (*h.producers, *h.consumers)}

    def _plan(self, record: BatchRecord, batches: int | None) -> None:
        """Decides how many samples of each batch to cache, from the first batch's shapes."""
        per_batch = self.cache.expected = max(1, batches or 8)
        few = math.ceil(FEW_SAMPLES / per_batch)
        self.keep = dict.fromkeys((*self.inputs, *self.uses), few)
        for w in self.widths.values():
            samples = math.ceil(rows_for(w.features) / w.positions(record.inputs))
            nodes = {n for path in w.paths for n in (path.producer.source, path.consumer.source)}
            sample_bytes = sum(record.inputs[n][0].nbytes for n in nodes)
            samples = min(max(samples, FEW_SAMPLES), max(1, self.width_cache_bytes // sample_bytes))
            w.keep = math.ceil(samples / per_batch)
            for n in (*nodes, *(path.consumer.node for path in w.paths)):
                self.keep[n] = max(self.keep.get(n, few), w.keep)
        size = self._isolated_bytes(record) * record.size * per_batch if self.isolated_inputs else math.inf
        if size <= self.isolated_cache_bytes:
            self.caches_isolated = True
            self.keep |= dict.fromkeys((*self.isolated_inputs, *self.isolated_targets), sys.maxsize)
            if self.isolated_targets == self.uses.keys() and all(self.keep[n] >= record.size for n in self.inputs):
                self.complete = True
                self.keep |= dict.fromkeys(self.inputs, sys.maxsize)

    def _isolated_bytes(self, record: BatchRecord) -> float:
        """Bytes per sample that isolated units need; infinity where inputs are not laid out by sample."""
        if any(len(record.inputs[n]) != record.size for n in self.isolated_inputs | self.held_out_inputs):
            return math.inf
        size = {n: t.numel() / record.size for n, t in record.inputs.items()}
        sources = {p.node: p.source for n in self.isolated_targets for _, p in self.uses[n]}
        size |= {n: n.meta["val"].numel() * size[h] / h.meta["val"].numel() for n, h in sources.items()}
        # a quarter of the batches is held out
        held_out = sum(size[n] for n in self.held_out_inputs - self.isolated_inputs) / 4
        entries = sum(size[n] for n in (*self.isolated_inputs, *self.isolated_targets)) + held_out
        return entries * next(iter(record.inputs.values())).element_size()

    def add_output_gradient(self, record: BatchRecord, node: fx.Node, v: Tensor, batches: int | None) -> None:
        """Adds V at a consumer's output, during backward; `batches` are expected."""
        if not self.exact:
            if not self.keep:
                self._plan(record, batches)
            self.cache.output_gradients[node].add(v, self.keep[node], self.cache.expected)
        for c, p in self.uses[node] if not self.complete else ():
            gradient = c.output_gradient(v)
            c.add_norm(gradient)
            if self.exact:
                c.add_rows(c.layer_input(record.inputs[p.source]), gradient, record.size, None)
        for w, path in self.paths[node]:
            later = w.keep if self.project else 0
            if later < len(v):
                gradient = self.consumers[path.consumer.weight].output_gradient(v[later:])
                w.add(path, record.inputs[path.producer.source][later:], gradient)

    def end_batch(self, record: BatchRecord) -> None:
        """Adds the inputs and weight gradients of a batch."""
        self.samples += record.size
        for c in self.consumers.values() if not self.complete else ():
            c.add_gradient(record)
        if self.exact:
            for w in self.widths.values():
                w.add_rows(record.inputs, record.size, None)
            return
        for node in self.sources:
            self.entries[node] += len(record.inputs[node])
            self.cache.inputs[node].add(record.inputs[node], self.keep[node], self.cache.expected)

    def finish(self, generator: torch.Generator, process_group: ProcessGroup = SINGLE_PROCESS) -> None:
        """Turns sums into means over all processes, except N; sampled matrices are formed from the cache."""
        for c in self.consumers.values() if not self.exact else ():
            for p in c.uses:
                keep = min(self.keep[p.node], self.keep[p.source])
                for share, span, inputs, gradients in self.cache.groups([p.source], [p.node], keep):
                    h, v = c.layer_input(inputs[p.source]), c.output_gradient(gradients[p.node])
                    if self.complete:
                        c.add_products(h, v)
                    samples = self._samples(p.source, inputs)
                    sampling = Sampling(share * self.samples, generator, share, process_group.size)
                    rows = c.add_rows(h, v, samples, sampling)
                    c.sampled.append(SampledRows(p, span, keep, *rows))
        self.total = sum_consumers(self.consumers, self.samples, process_group)
        for c in self.consumers.values():
            c.finish(self.total)
        same_input = {name: None if self.exact else self._same_input(w) for name, w in self.widths.items()}
        others = [w for name, w in self.widths.items() if same_input[name] is None]
        for w in others if not self.exact else ():
            for share, _, inputs, _ in self.cache.groups((path.producer.source for path in w.paths), keep=w.keep):
                sampling = Sampling(share * self.samples, generator, share, process_group.size)
                w.add_rows(inputs, self._samples(w.paths[0].producer.source, inputs), sampling)
        sum_inputs(others, self.samples, self.total, process_group)
        for name, w in self.widths.items():
            consumer = same_input[name]
            if consumer is not None and consumer.m is not None:
                w.s, w.rows = consumer.m.clone(), consumer.rows
                w.samples, w.position_count = 1.0, consumer.positions
            elif w.s is not None:
                w.s.div_(self.total)
            w.blocks = {name: block / self.total for name, block in w.blocks.items()}
            w.ridge = 0.0 if self.exact else SAMPLED_RIDGE[w.rows < 10 * w.features]

    def _samples(self, node: fx.Node, inputs: NodeTensors) -> float:
        """How many samples a node's cached inputs stand for."""
        return len(inputs[node]) * self.samples / self.entries[node]

    def _same_input(self, w: WidthMoments) -> ConsumerMoments | None:
        """The weight with the same input as this width's only producer: its M is S."""
        p, *more = {path.producer.node: path.producer for path in w.paths}.values()
        c = self.consumers.get(p.weight)
        if more or p.kernel or c is None or len(c.uses) > 1 or c.bias != p.bias or c.scale != 1.0:
            return None
        return c if w.keep <= min(self.keep[p.node], self.keep[p.source]) else None

    def subtract_expressible(self, updates: Mapping[str, Tensor]) -> None:
        """Subtracts E[b (dW* h)^T], what the existing weights can express, from N, by cached samples."""
        for w in self.widths.values():
            sources = [n for path in w.paths for n in (path.producer.source, path.consumer.source)]
            targets = [path.consumer.node for path in w.paths]
            for share, _, inputs, gradients in self.cache.groups(sources, targets, w.keep):
                # dW* h of cached samples stands for all samples; V of cached samples is not in N yet
                weight = share * self.samples / self._samples(sources[0], inputs)
                self._subtract(w, inputs, updates, weight, gradients)

    def subtract_expressible_of(self, record: BatchRecord, updates: Mapping[str, Tensor]) -> None:
        """The same by all positions of one more batch."""
        for w in self.widths.values():
            self._subtract(w, record.inputs, updates)

    def _subtract(
        self, w: WidthMoments, inputs: NodeTensors, updates: Mapping[str, Tensor], weight: float = 1.0,
        gradients: NodeTensors | None = None,
    ) -> None:  # fmt: skip
        """Subtracts weight * E[b (dW* h)^T] from N, and adds that of the output gradients."""
        for p in dict.fromkeys(path.consumer for path in w.paths):
            c = self.consumers[p.weight]
            rest = c.apply(updates[p.weight] * -weight, c.layer_input(inputs[p.source]))
            if gradients is not None:
                rest += c.output_gradient(gradients[p.node])
            for path in w.paths:
                if path.consumer is p:
                    w.add(path, inputs[path.producer.source], rest, scale=1.0 / self.total)
