"""New units tested isolated: no pass over the widened network, and none at all where the first pass is cached.

requires: the statistics of a first pass, and the paths of widths whose new units can be run isolated (`isolated.py`).
ensures:  the same fits and tests as `WidenedRefit` gives from the widened network.

The activations z of new units follow from what their producers read. Nobody reads them yet, so that V and h are as
before: what a refit needs beyond the first pass is E[V z^T], E[h z^T] and E[z z^T].
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from fxgrow.candidates.isolated import IsolatedPath
from fxgrow.candidates.outgoing_weights import OutgoingWeightFit
from fxgrow.candidates.refit import Refit
from fxgrow.candidates.significance import ConsumerBatch, HeldOutSlopes
from fxgrow.data.batches import Batch, Data
from fxgrow.data.loss import LossFn
from fxgrow.graph.evaluate import eval_mode
from fxgrow.initialisers.registry import Proposal
from fxgrow.statistics.activation_cache import ActivationCache, Span
from fxgrow.statistics.collect import Statistics
from fxgrow.statistics.consumer_moments import ConsumerMoments
from fxgrow.statistics.forward_backward import BatchRecord, PassRequest, forward_backward
from fxgrow.statistics.gram import accumulating, matrix_product

#: by node, a tensor of some samples
NodeTensors = Mapping[fx.Node, Tensor]


class HeldOutCache(ActivationCache):
    """Held-out batches that the first pass has cached, and the sum of their losses."""

    samples: int = 0
    loss: float = 0.0

    def add(self, record: BatchRecord, sources: Iterable[fx.Node] = (), targets: Iterable[fx.Node] = ()) -> None:
        """Caches one batch: the outputs of sources and the output gradients of targets."""
        self.samples += record.size
        self.loss += record.loss * record.size
        for node in sources:
            self.inputs[node].add(record.inputs[node], record.size, self.expected)
        for node in targets:
            self.output_gradients[node].add(record.output_gradients[node], record.size, self.expected)


@dataclass
class IsolatedRefit:
    """New units of several widths, and what they are tested on.

    Attributes:
        paths: by width.
        proposals: by width, as many rows as units are to be tested.
        unit_groups: by width, how many those are in steps.
        stats: of the first pass.
        held_out: what it cached of held-out batches.
        data: the batches, for what was not cached.
        loss_fn: see `fxgrow.profile`.
    """

    paths: Mapping[str, IsolatedPath]
    proposals: Mapping[str, Proposal]
    unit_groups: Mapping[str, int]
    stats: Statistics
    held_out: HeldOutCache
    data: Data
    loss_fn: LossFn | None

    def __post_init__(self) -> None:
        #: by consumer, the width that it reads
        self.reads = {p.weight: name for name, path in self.paths.items() for p in path.width.consumers}
        #: activations of new units for batches that are cached as a whole
        self.activations: dict[tuple[str, Span], NodeTensors] = {}
        self.consumers = {name: self.stats.consumers[name] for name in self.reads}
        uses = [p for c in self.consumers.values() for p in c.uses]
        self.sources = list(dict.fromkeys(n for path in self.paths.values() for n in path.sources))
        self.targets = list(dict.fromkeys(p.node for p in uses))
        self.inputs = list(dict.fromkeys([*self.sources, *(p.source for p in uses)]))

    def run(self) -> Refit:
        """Fits on the fitting batches, tests on the held-out ones."""
        refit = Refit()
        with eval_mode(self._gm):
            vz = self._output_products()
            for name, c in self.consumers.items():
                refit.fits[name] = self._fit(c, vz[name])
            self.activations.clear()
            refit.rank(self.unit_groups, self.data.process_group)
            self._test(refit)
        return refit

    @property
    def _gm(self) -> fx.GraphModule:
        return next(iter(self.paths.values())).gm

    def _uses(
        self, inputs: NodeTensors, gradients: NodeTensors, span: Span | None = None
    ) -> Iterator[tuple[str, ConsumerMoments, fx.Node, Tensor, Tensor]]:
        """Yields consumer, its moments, the node that it reads, z and V of one or more batches."""
        for width, path in self.paths.items():
            z = path.activations(self.proposals[width], inputs)
            if span is not None and self.stats.complete:
                self.activations[width, span] = z
            for name in (n for n, w in self.reads.items() if w == width):
                c = self.consumers[name]
                for p in c.uses:
                    yield name, c, p.source, c.layer_input(z[p.source]), c.output_gradient(gradients[p.node])

    def _pass(
        self, batches: Iterator[Batch], sources: list[fx.Node], visit: Callable[[int, NodeTensors, NodeTensors], None]
    ) -> HeldOutCache:
        """Reads the data again; returns samples and the sum of losses."""
        counts = HeldOutCache()

        def on_batch(batch: Batch, record: BatchRecord) -> None:
            counts.add(record)
            visit(record.size, record.inputs, record.output_gradients)

        forward_backward(self._gm, batches, self.loss_fn, PassRequest(sources, on_batch, self.targets))
        return counts

    # -- fitting

    def _output_products(self) -> dict[str, Tensor]:
        """E[V z^T] per consumer."""
        sums: dict[str, Tensor] = {}

        def visit(size: int, inputs: NodeTensors, gradients: NodeTensors, span: Span | None = None) -> None:
            for name, c, _, z, v in self._uses(inputs, gradients, span):
                _add(sums, name, c.outer(v, z))

        if self.held_out.samples:
            for _, span, inputs, gradients in self.stats.cache.groups(self.sources, self.targets):
                visit(0, inputs, gradients, span)
        else:
            self._pass(self.data.fitting(), self.sources, visit)
        self.data.process_group.sum_([sums[name] for name in self.consumers])
        return {name: sums[name] / self.stats.total for name in self.consumers}

    def _fit(self, c: ConsumerMoments, vz: Tensor) -> OutgoingWeightFit:
        if c.m is None:
            raise RuntimeError("no rows were added")
        width = self.reads[c.weight]
        hz, zz = self._second_moments(c, width)
        new = {width: torch.arange(vz.shape[1], device=vz.device).view(self.unit_groups[width], -1)}
        outputs = torch.arange(len(c.vh), device=c.vh.device)
        # the first pass saw the same V and h
        fit = OutgoingWeightFit(c.weight, c.bias, c.uses[0], outputs, new, c.m, hz, zz, c.curvature(), (c.vh, vz))
        if self.held_out.samples:  # the same E[V h^T], so the same dW*
            fit.input_factor, fit.delta_w = c.input_factor, c.delta_w
        return fit

    @torch.no_grad()
    def _second_moments(self, c: ConsumerMoments, width: str) -> tuple[Tensor, Tensor]:
        """E[h z^T] and E[z z^T], from the rows that E[h h^T] is from."""
        cached, path = self.stats.cache.inputs, self.paths[width]
        total: list[Tensor] = []
        for sampled in c.sampled:
            h = cached[sampled.use.source].read(sampled.span, sampled.keep)
            activations = self.activations.get((width, sampled.span))
            if activations is None:
                inputs = {n: cached[n].read(sampled.span, sampled.keep) for n in path.sources}
                activations = path.activations(self.proposals[width], inputs)
            z = activations[sampled.use.source]
            for part in sampled.parts:
                right = accumulating(c.input_rows(c.layer_input(z), part))
                left = accumulating(c.input_rows(c.layer_input(h), part))
                moments = [matrix_product(left.mT, right), matrix_product(right.mT, right)]
                if c.bias is not None:
                    moments[0] = torch.cat([moments[0], right.sum(0, keepdim=True)])
                moments = [m.mul_(sampled.scale / self.stats.total) for m in moments]
                total = [a.add_(b) for a, b in zip(total, moments, strict=True)] if total else moments
        self.data.process_group.sum_(total)
        return total[0], total[1]

    # -- the held-out test

    def _test(self, refit: Refit) -> None:
        slopes = HeldOutSlopes(refit.fits, refit.tests, self.unit_groups)
        vh: dict[str, Tensor] = {}
        vz: dict[str, Tensor] = {}

        def visit(size: int, inputs: NodeTensors, gradients: NodeTensors) -> None:
            uses = []
            for name, c, source, z, v in self._uses(inputs, gradients):
                h = c.layer_input(inputs[source])
                _add(vh, name, c.products(h, v))
                _add(vz, name, c.outer(v, z))
                uses.append((name, ConsumerBatch(c, h, z, v, len(inputs[source]))))
            slopes.add(size, uses)

        counts = self.held_out
        if counts.samples:
            for _, _, inputs, gradients in counts.groups(self.inputs, self.targets):
                visit(len(inputs[self.sources[0]]), inputs, gradients)
        else:
            counts = self._pass(self.data.held_out(), self.inputs, visit)
        refit.samples, refit.loss = counts.samples, counts.loss
        for name, fit in refit.fits.items():
            if name in vh:
                fit.held_out = vh[name], vz[name]
        refit.reduce(self.data.process_group)
        slopes.finish(self.data.process_group)


def _add(sums: dict[str, Tensor], name: str, value: Tensor) -> None:
    sums[name] = sums[name].add_(value) if name in sums else value
