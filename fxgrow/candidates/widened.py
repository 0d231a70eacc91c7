"""Candidate units inside the real graph: a wider copy in which nobody reads them yet.

The activations of new units depend on everything between producer and consumer: norms, activations, pools, gates.
Rather than describe that again, the graph is widened with the candidates (outgoing weights zero, so nothing changes)
and run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx

from fxgrow.analysis.analyse import AnalysedGraph
from fxgrow.analysis.widths import GrowableWidth
from fxgrow.axes.structure import Projection
from fxgrow.graph.evaluate import eval_mode
from fxgrow.graph.graph import lookup
from fxgrow.initialisers.registry import Proposal
from fxgrow.rewriting.batch_norm import IdentityBatchNorm
from fxgrow.rewriting.bounds import EntrySize
from fxgrow.rewriting.size_change import SizeChange
from fxgrow.rewriting.values import Values
from fxgrow.rewriting.widened_graph import WidenedGraph


class Candidates(WidenedGraph):
    """A copy of a graph with the proposed units, padded with random ones; it computes the same function.

    Args:
        analysed: the original.
        proposals: per width; fewer units than asked for are padded.
        additions: units per width.
        inputs: placeholder values to measure what enters the BatchNorms, whose new channels become the identity.
        generator: draws the random rows.

    Attributes:
        unit_groups: candidates per width, in steps of the width: what is added or left out as one.
        slices: new entries as slices for `rewrite`, outgoing weights left out.
    """

    def __init__(
        self,
        analysed: AnalysedGraph,
        proposals: Mapping[str, Proposal],
        additions: Mapping[str, int],
        inputs: Sequence[Any],
        generator: torch.Generator,
    ) -> None:
        change = SizeChange(analysed, additions)
        values = Values(new_units_see_each_other=False)
        for name in additions:
            _put_proposed_rows(change, name, proposals[name], values, generator)
            if proposals[name].alpha:
                _put_identity_kernels(change, name, values)
        super().__init__(change, values, generator)
        identity = IdentityBatchNorm(self.gm, self.new_indices)
        if identity.channels:
            with torch.no_grad(), eval_mode(self.gm):
                identity.run(*inputs, enable_io_processing=False)
        self.unit_groups = {name: k // analysed.widths[name].step for name, k in additions.items()}
        outgoing = {(p.weight, p.in_dim) for p in self.projections}
        self.slices: dict[str, dict[tuple[str, int], Tensor]] = {}
        for parameter, new in self.new_indices.items():
            for (name, dim), positions in new.items():
                if (parameter, dim) not in outgoing:
                    self.slices.setdefault(parameter, {})[name, dim] = self._slice(parameter, dim, positions)

    def _slice(self, parameter: str, dim: int, positions: Tensor) -> Tensor:
        """New entries along one dimension; along the others the old ones (new ones are zero, nobody reads them yet)."""
        out = lookup(self.gm, parameter).detach()
        for d, axis in enumerate(self.change.parameters[parameter]):
            if d == dim or axis.changed:
                out = out.index_select(d, (positions if d == dim else axis.moved).to(out.device))
        return out


def padded(
    gm: fx.GraphModule, width: GrowableWidth, proposal: Proposal, k: int, generator: torch.Generator
) -> Proposal:
    """The proposal with k incoming rows for every producer: random ones (Kaiming) fill up, or are all there are."""
    alpha: dict[str, Tensor] = {}
    for p in width.producers:
        if p.weight in alpha:
            continue
        weight, biased = lookup(gm, p.weight), p.bias is not None
        rows = proposal.alpha.get(p.weight, weight.new_zeros(0, weight.numel() // weight.shape[p.out_dim] + biased))
        missing = k - len(rows[:k])
        drawn = torch.randn(missing, rows.shape[1] - biased, generator=generator).to(rows)
        scale = p.scale or 1.0
        drawn = EntrySize.of(gm, p.weight).cut(drawn * (2 / max(1, drawn.shape[1])) ** 0.5 / scale) * scale
        if biased:
            drawn = torch.cat([drawn, drawn.new_zeros(missing, 1)], 1)
        alpha[p.weight] = torch.cat([rows[:k], drawn])
    return replace(proposal, alpha=alpha)


def within_bounds(gm: fx.GraphModule, width: GrowableWidth, proposal: Proposal) -> Proposal:
    """The proposal with rows that do not dwarf their layer: outgoing weights are fitted to what will be written."""
    alpha = dict(proposal.alpha)
    for p in {p.weight: p for p in width.producers if p.weight in alpha}.values():
        scale = p.scale or 1.0
        alpha[p.weight] = EntrySize.of(gm, p.weight).within(alpha[p.weight] / scale, 0) * scale
    return replace(proposal, alpha=alpha) if alpha else proposal


def _put_proposed_rows(
    change: SizeChange, name: str, proposal: Proposal, values: Values, generator: torch.Generator
) -> None:
    """Proposed incoming weights as slices of the producers' weights and biases; random ones fill up."""
    width = change.analysed.widths[name]
    for p in {p.weight: p for p in width.producers if p.weight in proposal.alpha}.values():
        k = len(change.new_indices[p.weight][name, p.out_dim])
        rows = padded(change.gm, replace(width, producers=(p,)), proposal, k, generator).alpha[p.weight]
        put_rows(change.gm, p, name, rows, values)


def put_rows(gm: fx.GraphModule, use: Projection, name: str, rows: Tensor, values: Values) -> None:
    """Enters incoming weights `[units, P (+ 1)]`, as inputs meet them, as new slices of a weight and its bias."""
    weight = lookup(gm, use.weight)
    features = rows[:, :-1] if use.bias is not None else rows
    others = [n for d, n in enumerate(weight.shape) if d != use.out_dim]
    slices = (features / (use.scale or 1.0)).reshape(len(rows), *others).movedim(0, use.out_dim)
    values.new.setdefault(use.weight, {})[name, use.out_dim] = slices
    if use.bias is not None:
        values.new.setdefault(use.bias, {})[name, 0] = rows[:, -1]


def _put_identity_kernels(change: SizeChange, name: str, values: Values) -> None:
    """New slices of depthwise kernels are a delta: the proposal assumed that they pass their unit on."""
    for parameter, fill in change.structure.fills.items():
        positions = change.new_indices.get(parameter, {}).get((name, 0))
        if fill == "random" and positions is not None:
            shape = lookup(change.gm, parameter).shape[1:]
            kernel = torch.zeros(len(positions), *shape)
            centre: Any = (0, *(n // 2 for n in shape[1:]))
            kernel[(slice(None), *centre)] = 1.0
            values.new.setdefault(parameter, {})[name, 0] = kernel
