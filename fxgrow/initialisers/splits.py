"""Units that start as old ones and move away from them: splits, and fresh units beside them.

A split is theta + delta and theta - delta with half the outgoing weights each. The loss is even in each delta: what the
halves do to first order cancels, whatever lies between producer and consumer, and so do products of different units'
deltas. Its second derivative at zero is the splitting matrix.

requires: widths whose units can be copied.
ensures:  the loss of the widened graph as a differentiable function of the splits, and values for `rewrite` that are a
          point of it.
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
from fxgrow.initialisers.registry import Outgoing, Proposal, SearchRequest, Splits, WriteRequest
from fxgrow.rewriting.batch_norm import RunningStatistics
from fxgrow.rewriting.size_change import SizeChange
from fxgrow.rewriting.values import CopiedUnits, Values
from fxgrow.rewriting.widened_graph import WidenedGraph
from fxgrow.statistics.forward_backward import forward

#: splits are searched on about so many samples
SAMPLES = 2048


class SplitInitialiser(CopyInitialiser):
    """Base of the methods that search for splits."""

    def splits(self, request: SearchRequest) -> tuple[dict[str, Splits], float]:
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
    def search(self, request: SearchRequest) -> dict[str, Proposal]:
        """Units that lower the loss, best first, for widths whose units can be copied."""
        widths = [w for w in request.widths if why_no_copies(request.analysed, w) is None]
        found, loss = self.splits(replace(request, widths=widths)) if widths else ({}, 0.0)
        out = {}
        for name, splits in found.items():
            order = splits.gains.argsort(descending=True)
            rounding = torch.finfo(next(iter(splits.rows.values())).dtype).eps * abs(loss)
            out[name] = Proposal(splits=splits.take(order[splits.gains[order] > rounding]))
        return out

    def write(self, request: WriteRequest, values: Values) -> Outgoing | None:
        """Enters the best k splits."""
        splits = request.proposal.splits
        if splits is None:
            return None
        return write_splits(request.analysed, request.width, splits.take(torch.arange(request.k)), values)


def incoming_dims(analysed: AnalysedGraph, width: GrowableWidth) -> dict[str, int]:
    """Trained parameters that write a width, and along which dimension."""
    dims = {p.weight: p.out_dim for p in width.producers} | {p.bias: 0 for p in width.producers if p.bias is not None}
    return {name: dim for name, dim in dims.items() if lookup(analysed.gm, name).requires_grad}


def outgoing_dims(width: GrowableWidth) -> dict[str, int]:
    """Weights that read a width, and along which dimension."""
    return {p.weight: p.in_dim for p in width.consumers}


def unit_rows(analysed: AnalysedGraph, width: GrowableWidth, dims: Mapping[str, int]) -> dict[str, Tensor]:
    """Old entries of parameters unit by unit, `[units, entries, ...]`."""
    rows = {}
    for name, dim in dims.items():
        old = lookup(analysed.gm, name).detach().movedim(dim, 0)
        rows[name] = old[unit_entries(analysed.structure.parameters[name][dim], width.var).to(old.device)]
    return rows


def pack(rows: Mapping[str, Tensor]) -> Tensor:
    """All of a unit's entries in one row, `[k, D]`."""
    return torch.cat([t.flatten(1) for t in rows.values()], 1)


def unpack(packed: Tensor, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse, in the shapes of `like` (but for the number of units)."""
    parts = packed.split([t[0].numel() for t in like.values()], 1)
    return {name: part.view(-1, *t.shape[1:]) for (name, t), part in zip(like.items(), parts, strict=True)}


def write_splits(analysed: AnalysedGraph, width: GrowableWidth, splits: Splits, values: Values) -> Outgoing:
    """Enters these units into `values`; gradients flow to what the splits are made of. Returns the outgoing slices."""
    origin, fresh = splits.origin, splits.fresh
    count = torch.zeros(width.var.size, dtype=torch.float64).index_add_(0, origin, (~fresh).double())
    old = 1 / (1 + count)
    values.copies[width.name] = CopiedUnits(origin, torch.cat([old, torch.where(fresh, 0.0, old[origin])]))

    def enter(name: str, dim: int, rows: Tensor) -> None:
        values.new.setdefault(name, {})[width.name, dim] = rows.flatten(0, 1).movedim(0, dim)

    for name, dim in incoming_dims(analysed, width).items():
        rows, shape = splits.rows[name], lookup(analysed.gm, name).movedim(dim, 0).shape
        is_fresh = fresh.to(rows.device)
        at = unit_entries(analysed.structure.parameters[name][dim], width.var)[origin[~fresh]].flatten().to(rows.device)
        delta = rows.new_zeros(shape).index_add(0, at, rows[~is_fresh].flatten(0, 1)).movedim(0, dim)
        values.delta[name] = values.delta[name] + delta if name in values.delta else delta
        if bool(fresh.any()):
            enter(name, dim, torch.where(is_fresh.view(-1, *[1] * (rows.dim() - 1)), rows, 0.0))
    dims = outgoing_dims(width)
    for name, columns in splits.columns.items():
        enter(name, dims[name], columns)
    for name, buffer in splits.buffers.items():
        enter(name, 0, buffer)
    return [(name, width.name, dims[name]) for name in splits.columns]


def gradients(value: Tensor, leaves: Sequence[Tensor], create_graph: bool = False) -> tuple[Tensor, ...]:
    """Of a value; zero for what it does not depend on. The graph stays."""
    if not value.requires_grad:
        return tuple(torch.zeros_like(t) for t in leaves)
    return torch.autograd.grad(
        value, leaves, retain_graph=True, create_graph=create_graph, allow_unused=True, materialize_grads=True
    )


def values_of(analysed: AnalysedGraph, splits: Mapping[str, Splits]) -> Values:
    """Values for the rewrite at gamma = 1, from the splits of each width."""
    values = Values(new_units_see_each_other=False)
    for name, s in splits.items():
        write_splits(analysed, analysed.widths[name], s, values)
    return values


class SplitGraph(WidenedGraph):
    """The loss of a graph with split units, as a function of how they are split.

    Args:
        request: the graph, which is left as it is, and the data, of which fitting batches are read.
        splits: per width, units of the kind that will be asked about.

    Attributes:
        mode: a context in which the graph runs.
    """

    def __init__(self, request: SearchRequest, splits: Mapping[str, Splits]) -> None:
        self.request, self.analysed = request, request.analysed
        units = {n: len(s.origin) * self.analysed.widths[n].step for n, s in splits.items()}
        values, generator = values_of(self.analysed, splits), torch.Generator().manual_seed(0)
        super().__init__(SizeChange(self.analysed, units), values, generator)
        self.mode: AbstractContextManager[Any] = nullcontext()
        # as the line search sees it: what training would normalise away is no gain
        self.running = RunningStatistics(self.gm.eval(), [request.data.first()])
        for m in self.running.norms.values() if self.running.live else ():
            m.training, m.track_running_stats = True, False

    def batches(self) -> Iterator[Batch]:
        """Fitting batches of `SAMPLES` samples in all."""
        seen = 0
        for batch in self.request.data.fitting():
            if self.running.live and batch.size == 1:
                continue  # has no statistics
            yield batch
            seen += batch.size
            if seen >= SAMPLES:
                return

    def at(self, splits: Mapping[str, Splits]) -> dict[str, Tensor]:
        """The parameters with these splits; gradients flow to what the splits are made of."""
        return self.parameters(values_of(self.analysed, splits))

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
        """Means over samples: of the loss, and of what `derive` makes of each batch's."""
        total, count, sums = 0.0, 0, None
        for batch in self.batches():
            loss = self.loss(parameters, batch)
            parts = [t * batch.size for t in derive(loss)]
            sums = parts if sums is None else [s + t for s, t in zip(sums, parts, strict=True)]
            total, count = total + float(loss.detach()) * batch.size, count + batch.size
        return total / count, [s / count for s in sums or ()]

    @torch.no_grad()
    def statistics(self, splits: Mapping[str, Splits], parameters: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
        """Per width, running statistics of its norms, `[k, entries]`: those of batches for fresh units."""
        with self.running.batch_statistics() as moments:
            for batch in self.batches() if self.running.live else ():
                self.loss(parameters, batch)
        out: dict[str, dict[str, Tensor]] = {name: {} for name in splits}
        for name, pair in moments.items():
            for key, t in zip(("running_mean", "running_var"), pair, strict=True):
                for (width, _), at in self.new_indices.get(buffer := f"{name}.{key}", {}).items():
                    s = splits[width]
                    old = unit_rows(self.analysed, self.analysed.widths[width], {buffer: 0})[buffer]
                    old = old[s.origin.to(t.device)]
                    measured = t[at.to(t.device)].view(old.shape).to(old)
                    out[width][buffer] = torch.where(s.fresh.to(t.device)[:, None], measured, old)
        return out
