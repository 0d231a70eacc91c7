"""Outgoing weights and significance of candidates, measured in the widened network.

Two passes over it: one over the fitting batches, where E[V [h, z]^T] is the weight gradient of the widened consumer,
and one over the held-out ones, where each unit is tested. For units that cannot be run isolated
(`isolated_refit.py`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator

import torch
from torch import Tensor, fx

from fxgrow.candidates.outgoing_weights import OutgoingWeightFit
from fxgrow.candidates.refit import Refit
from fxgrow.candidates.significance import ConsumerBatch, HeldOutSlopes
from fxgrow.candidates.widened import Candidates
from fxgrow.data.batches import Batch, Data
from fxgrow.data.loss import LossFn
from fxgrow.graph.graph import lookup
from fxgrow.statistics.all_reduce import sum_consumers
from fxgrow.statistics.consumer_moments import ConsumerMoments, Sampling, consumers_of, uses_by_node
from fxgrow.statistics.forward_backward import BatchRecord, PassRequest, forward_backward

#: second moments of inputs are estimated from about so many samples
SAMPLES = 1024


class WidenedRefit:
    """The candidates of some widths of a widened graph, and the consumers that read them.

    Args:
        candidates: the widened graph.
        data: fitting and held-out batches.
        loss_fn: see `fxgrow.profile`.
        generator: of the sampling.
        widths: which; None for all.
    """

    def __init__(
        self,
        candidates: Candidates,
        data: Data,
        loss_fn: LossFn | None,
        generator: torch.Generator,
        widths: Collection[str] | None = None,
    ) -> None:
        self.candidates, self.data, self.loss_fn, self.generator = candidates, data, loss_fn, generator
        self.unit_groups = {w: k for w, k in candidates.unit_groups.items() if widths is None or w in widths}
        new, uses = candidates.new_indices, candidates.projections
        readers = [p.weight for p in uses if any((w, p.in_dim) in new.get(p.weight, {}) for w in self.unit_groups)]
        consumers = [consumers_of(weight, uses) for weight in dict.fromkeys(readers)]
        self.consumers = {name: c for parts in consumers for name, c in parts.items()}
        self.uses = uses_by_node(self.consumers)
        self.samples = 0
        #: old and new channels in what a weight reads, the latter width by width, once gradients were added
        self.channels: dict[str, tuple[Tensor, Tensor]] = {}

    def run(self) -> Refit:
        """Fits on the fitting batches, tests on the held-out ones."""
        refit, process_group = Refit(), self.data.process_group
        if not self.consumers:
            return refit
        self._pass(self.data.fitting(), self._add_gradients, self._add_rows)
        total = sum_consumers(self.consumers, self.samples, process_group)
        for name, c in self.consumers.items():
            c.finish(total)
            self.channels[name] = self._channels(c)
            refit.fits[name] = self._fit(c, *self._columns(name))
            # the fit has what it needs of them
            c.vh, c.m, c.g = torch.zeros(0), None, None
        refit.rank(self.unit_groups, process_group)
        slopes = HeldOutSlopes(refit.fits, refit.tests, self.unit_groups)

        def test(batch: Batch, record: BatchRecord) -> None:
            self._add_gradients(batch, record)
            refit.samples += record.size
            refit.loss += record.loss * record.size
            slopes.add(record.size, list(self._consumer_batches(record)))

        self._pass(self.data.held_out(), test)
        for name, c in self.consumers.items():
            if len(c.vh):
                fit, (old, z) = refit.fits[name], self._columns(name)
                fit.held_out = c.vh[fit.outputs][:, old], c.vh[fit.outputs][:, z]
        refit.reduce(process_group)
        slopes.finish(process_group)
        return refit

    def _pass(
        self,
        batches: Iterator[Batch],
        on_batch: Callable[[Batch, BatchRecord], None],
        on_output_gradient: Callable[[BatchRecord, fx.Node, Tensor], None] | None = None,
    ) -> None:
        graph, consumers = self.candidates.gm, self.consumers.values()
        names = [n for c in consumers for n in (c.weight, c.bias) if n is not None]
        sources = {p.source for uses in self.uses.values() for _, p in uses}
        weights = {name: lookup(graph, name) for name in names}
        request = PassRequest(sources, on_batch, list(self.uses), on_output_gradient, weights)
        forward_backward(graph, batches, self.loss_fn, request)

    def _add_gradients(self, batch: Batch, record: BatchRecord) -> None:
        self.samples += record.size
        for c in self.consumers.values():
            c.add_gradient(record)

    def _add_rows(self, record: BatchRecord, node: fx.Node, v: Tensor) -> None:
        batches, processes = self.data.expected(record.size), self.data.process_group.size
        sampling, keep = Sampling(record.size, self.generator, 1 / batches, processes), math.ceil(SAMPLES / batches)
        for c, p in self.uses[node]:
            x = record.inputs[p.source]
            samples = record.size * min(keep, len(x)) / len(x)
            c.add_rows(c.layer_input(x[:keep]), c.output_gradient(v[:keep]), samples, sampling)

    def _consumer_batches(self, record: BatchRecord) -> Iterator[tuple[str, ConsumerBatch]]:
        for name, c in self.consumers.items():
            for p in c.uses:
                x = c.layer_input(record.inputs[p.source])
                h, z = (x.index_select(c.dim, channels) for channels in self.channels[name])
                v = record.output_gradients[p.node]
                yield name, ConsumerBatch(c, h, z, c.output_gradient(v), len(v))

    def _channels(self, c: ConsumerMoments) -> tuple[Tensor, Tensor]:
        axis = self.candidates.change.parameters[c.weight][c.uses[0].in_dim]
        return axis.moved.to(c.vh.device), torch.cat(list(axis.new.values())).to(c.vh.device)

    def _columns(self, name: str) -> tuple[Tensor, Tensor]:
        """Old and new columns of the weight, and the bias with the old ones."""
        c, channels = self.consumers[name], self.channels[name]
        old, new = (_spread(part, c.window.taps) for part in channels)
        return (old if c.bias is None else torch.cat([old, old.new_tensor([len(old) + len(new)])])), new

    def _fit(self, c: ConsumerMoments, old: Tensor, z: Tensor) -> OutgoingWeightFit:
        if c.m is None:
            raise RuntimeError("no rows were added")
        change, use = self.candidates.change, c.uses[0]
        axes = change.parameters[c.weight]
        new, at = {}, 0
        for var, positions in axes[use.in_dim].new.items():
            columns = torch.arange(at, at + len(positions) * c.window.taps, device=z.device)
            new[change.names[var]] = columns.view(change.added[var], -1)
            at += len(columns)
        # rows of the weight that are not new units themselves
        outputs = _spread(axes[use.out_dim].moved, c.kernel_taps).to(c.vh.device)
        if c.groups > 1 and not use.experts:
            outputs = outputs[outputs // len(c.vh) == c.group] % len(c.vh)
        g, fit = c.curvature()[outputs][:, outputs], (c.vh[outputs][:, old], c.vh[outputs][:, z])
        hh, hz, zz = c.m[old][:, old], c.m[old][:, z], c.m[z][:, z]
        return OutgoingWeightFit(c.weight, c.bias, use, outputs, new, hh, hz, zz, g, fit)


def _spread(positions: Tensor, taps: int) -> Tensor:
    """Positions of all taps of these channels."""
    return (positions[:, None] * taps + torch.arange(taps, device=positions.device)).flatten()
