"""Units that start as old ones and move away from them: splits, and fresh units beside them.

A split is theta + delta and theta - delta with half the outgoing weights each. The loss is even in each delta: the
halves cancel to first order, and so do products of different units' deltas. Its second derivative at zero is the
splitting matrix.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from fxgrow.analysis.analyse import AnalysedGraph
from fxgrow.analysis.widths import GrowableWidth
from fxgrow.axes.axes import unit_entries
from fxgrow.data.batches import Batch
from fxgrow.data.loss import loss_of
from fxgrow.errors import ProfileError
from fxgrow.graph.graph import lookup
from fxgrow.initialisers.copies import CopyInitialiser, why_no_copies
from fxgrow.initialisers.registry import InitialiserRequest, Outgoing, Proposal, Splits
from fxgrow.rewriting.batch_norm import RunningStatistics
from fxgrow.rewriting.size_change import SizeChange
from fxgrow.rewriting.values import CopiedUnits, Values
from fxgrow.rewriting.widened_graph import WidenedGraph
from fxgrow.statistics.forward_backward import forward

#: splits are searched on about so many samples
SAMPLES = 2048
#: by parameter and dimension, the entries of units there, `[units, entries, ...]`
UnitEntries = dict[tuple[str, int], Tensor]


class SplitInitialiser(CopyInitialiser):
    """Base of the methods that search for splits."""

    def splits(self, request: InitialiserRequest) -> tuple[dict[str, Splits], float]:
        """Units per width with their gains, in any order, and the mean loss."""
        raise NotImplementedError

    def check_profile(self, processes: int, keep_moments: bool) -> None:
        """Refuses what only moments allow."""
        if keep_moments:
            raise ProfileError(f"keep_moments=True: method={self.name!r} has none.")
        if processes > 1:
            raise ProfileError(
                f"method={self.name!r} reads the data in a way of its own, on one process alone: choose another, or "
                "grow on one process and send fxgrow.Plan.to_json() to the others."
            )

    @torch.enable_grad()
    def search(self, request: InitialiserRequest) -> dict[str, Proposal]:
        """Units that lower the loss, best first, for widths whose units can be copied."""
        widths = [w for w in request.widths if why_no_copies(request.analysed, w) is None]
        found, loss = self.splits(replace(request, widths=widths)) if widths else ({}, 0.0)
        out = {}
        for name, splits in found.items():
            order = splits.gains.argsort(descending=True)
            rounding = torch.finfo(splits.incoming.dtype).eps * abs(loss)
            out[name] = Proposal(splits=splits.take(order[splits.gains[order] > rounding]))
        return out

    def write(
        self, request: InitialiserRequest, width: GrowableWidth, proposal: Proposal, values: Values
    ) -> Outgoing | None:
        """Enters the best k splits."""
        if proposal.splits is None:
            return None
        best = proposal.splits.take(torch.arange(request.additions[width.name]))
        return write_splits(request.analysed, width, best, values)


def unit_entries_of(analysed: AnalysedGraph, width: GrowableWidth) -> tuple[UnitEntries, UnitEntries]:
    """Old entries of trained parameters that write a width, and of weights that read it."""

    def entries(name: str, dim: int) -> Tensor:
        old = lookup(analysed.gm, name).detach().movedim(dim, 0)
        return old[unit_entries(analysed.structure.parameters[name][dim], width.var).to(old.device)]

    writes = [(p.weight, p.out_dim) for p in width.producers]
    writes += [(p.bias, 0) for p in width.producers if p.bias is not None]
    incoming = {key: entries(*key) for key in writes if lookup(analysed.gm, key[0]).requires_grad}
    return incoming, {(p.weight, p.in_dim): entries(p.weight, p.in_dim) for p in width.consumers}


def unit_vectors(analysed: AnalysedGraph, width: GrowableWidth) -> tuple[Tensor, Tensor]:
    """Incoming and outgoing weights of every unit in one row each, `[units, D]` and `[units, D']`."""
    incoming, outgoing = ([t.flatten(1) for t in es.values()] for es in unit_entries_of(analysed, width))
    return torch.cat(incoming, 1), torch.cat(outgoing, 1)


def write_splits(analysed: AnalysedGraph, width: GrowableWidth, splits: Splits, values: Values) -> Outgoing:
    """Enters these units into `values`; gradients flow to what the splits are made of. Returns the outgoing slices."""
    origin, fresh = splits.origin, splits.fresh
    count = torch.zeros(width.var.size, dtype=torch.float64).index_add_(0, origin, (~fresh).double())
    old = 1 / (1 + count)
    values.copies[width.name] = CopiedUnits(origin, torch.cat([old, torch.where(fresh, 0.0, old[origin])]))

    def enter(name: str, dim: int, rows: Tensor) -> None:
        values.new.setdefault(name, {})[width.name, dim] = rows.flatten(0, 1).movedim(0, dim)

    def unpacked(vectors: Tensor, like: UnitEntries) -> UnitEntries:
        parts = vectors.split([t[0].numel() for t in like.values()], 1)
        return {key: part.view(-1, *t.shape[1:]) for (key, t), part in zip(like.items(), parts, strict=True)}

    incoming, outgoing = unit_entries_of(analysed, width)
    for (name, dim), rows in unpacked(splits.incoming, incoming).items():
        is_fresh, shape = fresh.to(rows.device), lookup(analysed.gm, name).movedim(dim, 0).shape
        at = unit_entries(analysed.structure.parameters[name][dim], width.var)[origin[~fresh]].flatten().to(rows.device)
        delta = rows.new_zeros(shape).index_add(0, at, rows[~is_fresh].flatten(0, 1)).movedim(0, dim)
        values.delta[name] = values.delta[name] + delta if name in values.delta else delta
        if bool(fresh.any()):
            enter(name, dim, torch.where(is_fresh.view(-1, *[1] * (rows.dim() - 1)), rows, 0.0))
    for name, buffer in splits.buffers.items():
        enter(name, 0, buffer)
    if splits.outgoing is None:
        return []
    for (name, dim), columns in unpacked(splits.outgoing, outgoing).items():
        enter(name, dim, columns)
    return [(name, width.name, dim) for name, dim in outgoing]


def gradients(value: Tensor, leaves: Sequence[Tensor], create_graph: bool = False) -> tuple[Tensor, ...]:
    """Of a value; zero for what it does not depend on. The graph stays."""
    if not value.requires_grad:
        return tuple(torch.zeros_like(t) for t in leaves)
    return torch.autograd.grad(
        value, leaves, retain_graph=True, create_graph=create_graph, allow_unused=True, materialize_grads=True
    )


class SplitGraph(WidenedGraph):
    """The loss of a graph with split units on fitting batches, as a function of how they are split.

    It is made from splits of as many units as will be asked about, and runs in the given mode.
    """

    def __init__(
        self, request: InitialiserRequest, splits: Mapping[str, Splits], mode: AbstractContextManager[Any] | None = None
    ) -> None:
        self.request, self.analysed, self.mode = request, request.analysed, mode or nullcontext()
        units = {n: len(s.origin) * self.analysed.widths[n].step for n, s in splits.items()}
        generator = torch.Generator().manual_seed(0)
        super().__init__(SizeChange(self.analysed, units), self._values(splits), generator)
        running = RunningStatistics(self.gm.eval(), [request.data.first()])
        # batch statistics, as in the line search: what training would normalise away is no gain
        self.norms = running.norms if running.live else {}
        for m in self.norms.values():
            # without a momentum, running statistics are the means over batches since the counter was zero
            m.training, m.momentum = True, None
            m._buffers = {name: torch.zeros_like(b) for name, b in m.named_buffers()}

    def batches(self) -> Iterator[Batch]:
        """Fitting batches of `SAMPLES` samples in all."""
        seen = 0
        for batch in self.request.data.fitting():
            # a single sample has no statistics
            if batch.size > 1 or not self.norms:
                yield batch
                seen += batch.size
            if seen >= SAMPLES:
                return

    def _values(self, splits: Mapping[str, Splits]) -> Values:
        values = Values(new_units_see_each_other=False)
        for name, s in splits.items():
            write_splits(self.analysed, self.analysed.widths[name], s, values)
        return values

    def at(self, splits: Mapping[str, Splits]) -> dict[str, Tensor]:
        """The parameters with these splits at gamma = 1; gradients flow to what the splits are made of."""
        return self.parameters(self._values(splits))

    def loss(self, parameters: dict[str, Tensor], batch: Batch) -> Tensor:
        """The mean loss of a batch."""
        # the other kernels of attention have no second derivative
        with sdpa_kernel(SDPBackend.MATH):
            with self.mode:
                output = forward(lambda *inputs: functional_call(self.gm, parameters, inputs), self.gm, batch)
            return loss_of(output, batch, self.request.loss_fn)

    def means(
        self, parameters: dict[str, Tensor], derive: Callable[[Tensor], Sequence[Tensor]]
    ) -> tuple[float, list[Tensor]]:
        """Means over samples of the loss and of what `derive` makes of it; running statistics become the batches'."""
        sums: list[Tensor] = []
        count = 0
        for m in self.norms.values():
            m.num_batches_tracked.zero_()
        for batch in self.batches():
            loss = self.loss(parameters, batch)
            parts = [t * batch.size for t in (loss.detach(), *derive(loss))]
            sums = [torch.add(*pair) for pair in zip(sums, parts, strict=True)] if sums else parts
            count += batch.size
        return float(sums[0]) / count, [s / count for s in sums[1:]]

    @torch.no_grad()
    def running_statistics(
        self, splits: Mapping[str, Splits], measured: Mapping[str, Tensor]
    ) -> dict[str, dict[str, Tensor]]:
        """Per width, those of its norms, `[k, entries]`: of fresh units as measured in a pass, else of the origin."""
        out: dict[str, dict[str, Tensor]] = {name: {} for name in splits}
        old = self.at(splits)
        for buffer in (f"{name}.{key}" for name in self.norms for key in ("running_mean", "running_var")):
            for (width, _), at in self.new_indices.get(buffer, {}).items():
                fresh = splits[width].fresh.to(old[buffer].device)
                new, kept = (t[buffer][at.to(fresh.device)].view(len(fresh), -1) for t in (measured, old))
                out[width][buffer] = torch.where(fresh[:, None], new, kept)
        return out
