"""Units that start as old ones and move away from them: splits, and new units beside them.

A split is theta + delta and theta - delta with half the outgoing weights each. The loss is even in each delta: what the
halves do to first order cancels, whatever lies between producer and consumer, and so do products of different units'
deltas. Its second derivative at zero is the splitting matrix.

requires: widths whose units can be copied.
ensures:  the loss of the widened graph as a differentiable function of the splits, and values for `rewrite` that are a
          point of it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from fxgrow.analysis.analyse import AnalysedGraph
from fxgrow.analysis.widths import GrowableWidth
from fxgrow.axes.axes import unit_entries
from fxgrow.axes.structure import Projection
from fxgrow.data.batches import Batch, Data
from fxgrow.data.loss import LossFn, loss_of
from fxgrow.graph.graph import lookup
from fxgrow.rewriting.axis_growth import extend
from fxgrow.rewriting.batch_norm import Moments, average, moments, norms_of
from fxgrow.rewriting.copied_units import CopiedUnits
from fxgrow.rewriting.rewrite import Values, entries, widened
from fxgrow.statistics.forward_backward import forward

#: splits are looked for on about so many samples
SAMPLES = 2048


@dataclass(frozen=True)
class Splits:
    """New units of one width that start as old ones, best first.

    Attributes:
        origin: the old unit that each is split from, `[k]`; a fresh one takes only what follows on the way from it.
        fresh: which are no splits, `[k]`.
        rows: per parameter that writes the width, `[k, entries of a unit, ...]`: delta, or a fresh unit's own.
        columns: per weight that reads it, likewise, outgoing weights of fresh units (zero for splits).
        gains: predicted decrease of the loss by each, `[k]`.
        buffers: running statistics of the norms on the way, likewise, where they are not the origin's.
    """

    origin: Tensor
    fresh: Tensor
    rows: dict[str, Tensor]
    columns: dict[str, Tensor] = field(default_factory=dict)
    gains: Tensor = field(default_factory=lambda: torch.zeros(0))
    buffers: dict[str, Tensor] = field(default_factory=dict)

    def take(self, units: Tensor) -> Splits:
        """Those of these numbers."""
        rows, columns, buffers = (
            {name: t.detach()[units.to(t.device)] for name, t in parts.items()}
            for parts in (self.rows, self.columns, self.buffers)
        )
        return Splits(self.origin[units], self.fresh[units], rows, columns, self.gains[units], buffers)

    def best(self, least: float) -> Splits:
        """Those that gain more than `least`, best first."""
        order = self.gains.argsort(descending=True)
        return self.take(order[self.gains[order] > least])


def writes_of(h: GrowableWidth, gm: fx.GraphModule) -> dict[str, int]:
    """Trained parameters that write a width, and along which dimension."""
    found = {p.weight: p.out_dim for p in h.producers} | {p.bias: 0 for p in h.producers if p.bias is not None}
    return {name: dim for name, dim in found.items() if lookup(gm, name).requires_grad}


def reads_of(h: GrowableWidth) -> dict[str, Projection]:
    return {p.weight: p for p in h.consumers}


def unit_rows(analysed: AnalysedGraph, h: GrowableWidth, name: str, dim: int) -> Tensor:
    """A parameter's old entries unit by unit, `[units, entries, ...]`."""
    old = lookup(analysed.gm, name).detach().movedim(dim, 0)
    return old[unit_entries(analysed.structure.parameters[name][dim], h.var).to(old.device)]


def split_values(
    analysed: AnalysedGraph, splits: Sequence[tuple[GrowableWidth, Splits]]
) -> tuple[Values, tuple[tuple[str, str, int], ...]]:
    """Values for `rewrite` at gamma = 1, and which of the new ones are outgoing."""
    gm, structure, values = analysed.gm, analysed.structure, Values(new_units_see_each_other=False)
    outgoing = []
    for h, s in splits:
        count = torch.zeros(h.var.size, dtype=torch.float64).index_add_(0, s.origin, (~s.fresh).double())
        old = 1 / (1 + count)
        values.copies[h.name] = CopiedUnits(s.origin, torch.cat([old, torch.where(s.fresh, 0.0, old[s.origin])]))
        for name, dim in writes_of(h, gm).items():
            weight, t = lookup(gm, name), s.rows[name]
            own = s.fresh.to(t.device)
            at = unit_entries(structure.parameters[name][dim], h.var)[s.origin[~s.fresh]].flatten().to(t.device)
            delta = t.new_zeros(weight.movedim(dim, 0).shape).index_add(0, at, t[~own].flatten(0, 1)).movedim(0, dim)
            values.delta[name] = values.delta[name] + delta if name in values.delta else delta
            if bool(own.any()):
                rows = torch.where(own.view(-1, *[1] * (t.dim() - 1)), t, 0.0)
                values.new.setdefault(name, {})[h.name, dim] = rows.flatten(0, 1).movedim(0, dim)
        for name, t in s.columns.items():
            dim = reads_of(h)[name].in_dim
            values.new.setdefault(name, {})[h.name, dim] = t.flatten(0, 1).movedim(0, dim)
            outgoing.append((name, h.name, dim))
        for name, t in s.buffers.items():
            values.new.setdefault(name, {})[h.name, 0] = t.flatten(0, 1)
    return values, tuple(outgoing)


def pack(rows: Mapping[str, Tensor]) -> Tensor:
    """All of a unit's entries in one row, `[k, D]`."""
    return torch.cat([t.flatten(1) for t in rows.values()], 1)


def unpack(packed: Tensor, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse, in the shapes of `like` (but for the number of units)."""
    sizes = [t[0].numel() for t in like.values()]
    parts = packed.split(sizes, 1)
    return {name: part.view(-1, *t.shape[1:]) for (name, t), part in zip(like.items(), parts, strict=True)}


class SplitGraph:
    """The loss of a graph with split units, as a function of how they are split.

    Args:
        analysed: the graph; it is left as it is.
        splits: per width, units of the kind that will be asked about.
        data: its fitting batches are read.
        loss_fn: see `fxgrow.profile`.
    """

    def __init__(
        self,
        analysed: AnalysedGraph,
        splits: Sequence[tuple[GrowableWidth, Splits]],
        data: Data,
        loss_fn: LossFn | None,
    ) -> None:
        self.analysed, self.data, self.loss_fn = analysed, data, loss_fn
        self.additions = {h.name: len(s.origin) * h.step for h, s in splits}
        values, _ = split_values(analysed, splits)
        self.graph = widened(analysed, self.additions, values, torch.Generator().manual_seed(0)).graph
        self.graph.eval()
        #: in which the graph runs
        self.mode: AbstractContextManager[Any] = nullcontext()
        # as the line search sees it: what training would normalise away is no gain
        self.norms = norms_of(self.graph) if data.first().size > 1 else {}
        for m in self.norms.values():
            m.training, m.track_running_stats = True, False

    def batches(self) -> Iterator[Batch]:
        """Fitting batches of `SAMPLES` samples in all."""
        seen = 0
        for batch in self.data.fitting():
            if self.norms and batch.size == 1:
                continue  # has no statistics
            yield batch
            seen += batch.size
            if seen >= SAMPLES:
                return

    def at(self, splits: Sequence[tuple[GrowableWidth, Splits]]) -> dict[str, Tensor]:
        """The parameters with these splits; gradients flow to what the splits are made of."""
        values, _ = split_values(self.analysed, splits)
        filled, _ = entries(self.analysed, self.additions, values, torch.Generator().manual_seed(0))
        return filled

    def loss(self, parameters: dict[str, Tensor], batch: Batch) -> Tensor:
        """The mean loss of a batch."""
        # the other kernels of attention have no second derivative
        with sdpa_kernel(SDPBackend.MATH):
            with self.mode:
                output = forward(lambda *inputs: functional_call(self.graph, parameters, inputs), self.graph, batch)
            return loss_of(output, batch, self.loss_fn)

    @torch.no_grad()
    def statistics(
        self, splits: Sequence[tuple[GrowableWidth, Splits]], parameters: dict[str, Tensor]
    ) -> list[dict[str, Tensor]]:
        """Per width, running statistics of its norms, `[k, entries]`: those of batches for fresh units."""
        seen: dict[str, list[Moments]] = {name: [] for name in self.norms}
        hooks = [
            m.register_forward_pre_hook(lambda _, args, name=name: seen[name].append(moments(args[0])))
            for name, m in self.norms.items()
        ]
        for batch in self.batches():
            self.loss(parameters, batch)
        for hook in hooks:
            hook.remove()
        grow = {h.var: len(s.origin) for h, s in splits}
        out: list[dict[str, Tensor]] = [{} for _ in splits]
        for name, found in seen.items():
            for key, t in zip(("running_mean", "running_var"), average(found), strict=True):
                buffer = f"{name}.{key}"
                for var, at in extend(self.analysed.structure.parameters[buffer][0], grow).new.items():
                    i = next(i for i, (h, _) in enumerate(splits) if h.var is var)
                    h, s = splits[i]
                    old = unit_rows(self.analysed, h, buffer, 0)[s.origin.to(t.device)]
                    own = t[at.to(t.device)].view(old.shape).to(old)
                    out[i][buffer] = torch.where(s.fresh.to(t.device)[:, None], own, old)
        return out
