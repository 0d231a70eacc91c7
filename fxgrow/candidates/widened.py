"""Candidate units inside the real graph: a wider copy in which nobody reads them yet.

What new units put out depends on everything between producer and consumer: norms, activations, pools, gates. Rather
than describe that again, the graph is widened with the candidates (outgoing weights zero, so nothing changes) and run.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx

from fxgrow.analysis.analyse import AnalysedGraph
from fxgrow.analysis.widths import GrowableWidth
from fxgrow.axes.structure import Projection
from fxgrow.graph.evaluate import eval_mode
from fxgrow.graph.graph import lookup
from fxgrow.initialisers.registry import Proposal
from fxgrow.rewriting.axis_growth import Places, places
from fxgrow.rewriting.batch_norm import IdentityBatchNorm
from fxgrow.rewriting.rewrite import Values, widened


@dataclass(frozen=True)
class Candidates:
    """The widened copy and where it holds what.

    Attributes:
        graph: the copy; it computes the same function as the original.
        projections: uses of weights in the copy.
        units: candidates per width.
        atoms: the same in steps of the width: what is added or left out as one.
        places: new entries per parameter, in the copy.
        values: their values as slices for `rewrite`, outgoing weights left out.
    """

    graph: fx.GraphModule
    projections: list[Projection]
    units: dict[str, int]
    atoms: dict[str, int]
    places: Places
    values: dict[str, dict[tuple[str, int], Tensor]]


def candidates(
    analysed: AnalysedGraph,
    proposals: Mapping[str, Proposal],
    additions: Mapping[str, int],
    inputs: Sequence[Any],
    generator: torch.Generator,
) -> Candidates:
    """Widens a copy of a graph by the proposed units, padded with random ones, and makes its BatchNorms transparent.

    Args:
        analysed: the original.
        proposals: per width; fewer units than asked for are padded.
        additions: units per width.
        inputs: placeholder values to measure what enters the norms.
        generator: draws the random rows.
    """
    gm, structure = analysed.gm, analysed.structure
    where = places(analysed, additions)
    values = Values(new_units_see_each_other=False)
    for name in additions:
        _rows(gm, analysed.widths[name], proposals[name], where, values, generator)
        _pass_on(analysed, name, proposals[name], where, values)
    wide = widened(analysed, additions, values, generator)
    graph = wide.graph
    transparent = IdentityBatchNorm(graph, where)
    if transparent.channels:
        with torch.no_grad(), eval_mode(graph):
            transparent.run(*inputs, enable_io_processing=False)
    outgoing = {(p.weight, p.in_dim) for p in structure.projections}
    slices: dict[str, dict[tuple[str, int], Tensor]] = {}
    for parameter, new in where.items():
        for (name, dim), positions in new.items():
            if (parameter, dim) not in outgoing:
                slices.setdefault(parameter, {})[name, dim] = _slice(lookup(graph, parameter), dim, positions, new)
    node_map = wide.node_map
    projections = [replace(p, node=node_map[p.node], source=node_map[p.source]) for p in structure.projections]
    atoms = {name: k // analysed.widths[name].step for name, k in additions.items()}
    return Candidates(graph, projections, dict(additions), atoms, where, slices)


def _slice(tensor: Tensor, dim: int, positions: Tensor, new: Mapping[tuple[str, int], Tensor]) -> Tensor:
    """New entries along one dimension; along the others the old ones (new ones are zero, nobody reads them yet)."""
    out = tensor.detach().index_select(dim, positions.to(tensor.device))
    for d in range(tensor.dim()):
        gone = [p for (_, other), p in new.items() if other == d]
        if d != dim and gone:
            keep = torch.ones(tensor.shape[d], dtype=torch.bool)
            keep[torch.cat(gone)] = False
            out = out.index_select(d, keep.nonzero().flatten().to(tensor.device))
    return out.clone()


def padded(gm: fx.GraphModule, h: GrowableWidth, proposal: Proposal, k: int, generator: torch.Generator) -> Proposal:
    """The proposal with k incoming rows for every producer: random ones (Kaiming) fill up, or are all there are."""
    alpha: dict[str, Tensor] = {}
    for p in h.producers:
        if p.weight in alpha:
            continue
        weight, biased = lookup(gm, p.weight), p.bias is not None
        rows = proposal.alpha.get(p.weight, weight.new_zeros(0, weight.numel() // weight.shape[p.out_dim] + biased))
        missing = k - len(rows[:k])
        drawn = torch.randn(missing, rows.shape[1] - biased, generator=generator).to(rows)
        drawn = drawn * (2 / max(1, drawn.shape[1])) ** 0.5
        if biased:
            drawn = torch.cat([drawn, drawn.new_zeros(missing, 1)], 1)
        alpha[p.weight] = torch.cat([rows[:k], drawn])
    return replace(proposal, alpha=alpha)


def _rows(
    gm: fx.GraphModule, h: GrowableWidth, proposal: Proposal, where: Places, values: Values, generator: torch.Generator
) -> None:
    """Proposed incoming weights as slices of the producers' weights and biases; random ones fill up."""
    if not proposal.alpha:
        return
    proposed = {p.weight: p for p in h.producers if p.weight in proposal.alpha}.values()
    for p in proposed:
        k = len(where[p.weight][h.name, p.out_dim])
        rows = padded(gm, replace(h, producers=(p,)), proposal, k, generator).alpha[p.weight]
        put_rows(gm, p, h.name, rows, values)


def put_rows(gm: fx.GraphModule, use: Projection, name: str, rows: Tensor, values: Values) -> None:
    """Enters incoming weights `[units, P (+ 1)]` as new slices of a weight and its bias."""
    weight = lookup(gm, use.weight)
    features = rows[:, :-1] if use.bias is not None else rows
    slices = features.mT if use.out_dim == 1 else features.reshape(len(rows), *weight.shape[1:])
    values.new.setdefault(use.weight, {})[name, use.out_dim] = slices
    if use.bias is not None:
        values.new.setdefault(use.bias, {})[name, 0] = rows[:, -1]


def _pass_on(analysed: AnalysedGraph, name: str, proposal: Proposal, where: Places, values: Values) -> None:
    """New slices of depthwise kernels are a delta: the proposal assumed that they pass their unit on."""
    for parameter, fill in analysed.structure.fills.items():
        positions = where.get(parameter, {}).get((name, 0))
        if fill == "random" and positions is not None and proposal.alpha:
            shape = lookup(analysed.gm, parameter).shape[1:]
            delta = torch.zeros(len(positions), math.prod(shape))
            centre = 0
            for n in shape[1:]:
                centre = centre * n + n // 2
            delta[:, centre] = 1.0
            delta = delta.reshape(-1, *shape)
            values.new.setdefault(parameter, {})[name, 0] = delta
