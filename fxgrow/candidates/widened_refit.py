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
from fxgrow.statistics.consumer_moments import ConsumerMoments, consumers_of, uses_by_node
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
        keep = math.ceil(SAMPLES / batches)
        for c, p in self.uses[node]:
            h = c.layer_input(record.inputs[p.source][:keep])
            c.add_rows(h, c.output_gradient(v[:keep]), record.size, self.generator, 1 / batches, processes)

    def _consumer_batches(self, record: BatchRecord) -> Iterator[tuple[str, ConsumerBatch]]:
        for name, c in self.consumers.items():
            for p in c.uses:
                x = c.layer_input(record.inputs[p.source])
                h, z = (x.index_select(c.dim, channels) for channels in self.channels[name])
                yield name, ConsumerBatch(c, h, z, c.output_gradient(record.output_gradients[p.node]))

    def _new_channels(self, c: ConsumerMoments) -> dict[str, Tensor]:
        """Channels of each width's new units in what a weight reads."""
        new = self.candidates.new_indices[c.weight]
        return {width: positions for (width, dim), positions in new.items() if dim == c.uses[0].in_dim}

    def _channels(self, c: ConsumerMoments) -> tuple[Tensor, Tensor]:
        new = torch.cat(list(self._new_channels(c).values()))
        is_old = torch.ones((c.vh.shape[1] - (c.bias is not None)) // c.window.taps, dtype=torch.bool)
        is_old[new] = False
        return is_old.nonzero().flatten().to(c.vh.device), new.to(c.vh.device)

    def _columns(self, name: str) -> tuple[Tensor, Tensor]:
        """Old and new columns of the weight, and the bias with the old ones."""
        c, (old, new) = self.consumers[name], self.channels[name]
        taps = torch.arange(c.window.taps, device=old.device)
        old, new = ((channels[:, None] * len(taps) + taps).flatten() for channels in (old, new))
        return (old if c.bias is None else torch.cat([old, old.new_tensor([len(old) + len(new)])])), new

    def _fit(self, c: ConsumerMoments, old: Tensor, z: Tensor) -> OutgoingWeightFit:
        if c.m is None:
            raise RuntimeError("no rows were added")
        channels = self._new_channels(c)
        parts = torch.arange(len(z), device=z.device).split([len(at) * c.window.taps for at in channels.values()])
        groups = self.candidates.unit_groups
        new = {width: part.view(groups[width], -1) for width, part in zip(channels, parts, strict=True)}
        outputs = self._old_outputs(c)
        g, fit = c.curvature()[outputs][:, outputs], (c.vh[outputs][:, old], c.vh[outputs][:, z])
        hh, hz, zz = c.m[old][:, old], c.m[old][:, z], c.m[z][:, z]
        return OutgoingWeightFit(c.weight, c.bias, c.uses[0], outputs, new, hh, hz, zz, g, fit)

    def _old_outputs(self, c: ConsumerMoments) -> Tensor:
        """Rows of the weight that are not new units themselves."""
        groups = 1 if c.uses[0].experts else c.groups
        is_old = torch.ones(len(c.vh) * groups, dtype=torch.bool)
        for (_, dim), positions in self.candidates.new_indices[c.weight].items():
            if dim == c.uses[0].out_dim:
                is_old[(positions[:, None] * c.kernel_taps + torch.arange(c.kernel_taps)).flatten()] = False
        is_old = is_old if groups == 1 else is_old.unflatten(0, (groups, -1))[c.group]
        return is_old.nonzero().flatten().to(c.vh.device)
