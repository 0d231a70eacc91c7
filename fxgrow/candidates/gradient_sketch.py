"""E[b V^T] where no window describes the path from producer to consumer: from the gradient of units with zero output.

A unit with incoming weights alpha = 0 and outgoing weights omega leaves the function as it is, and there
-dL/dalpha = E[b (V . omega)] = N omega, whatever lies between: attention that mixes tokens, a gate, a recurrence. One
pass over a copy of the graph with random omega gives N's range (Halko, Martinsson and Tropp 2011, section 4); the
activations of units with incoming weights in that range give S there. For attention values b(t) = sum_s A(t, s) x(s)
per head; a new head attends like an old one until its values are found.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor, fx

from fxgrow.analysis.widths import GrowableWidth
from fxgrow.candidates.zero_unit_graph import (
    Producer,
    SketchContext,
    SlotGroup,
    WidthSketch,
    ZeroUnitGraph,
    incoming_rows,
)
from fxgrow.graph.unrolled_rnn import rnn_previous_state
from fxgrow.initialisers.registry import Proposal
from fxgrow.statistics.consumer_moments import ConsumerMoments
from fxgrow.statistics.factorisation import factor
from fxgrow.statistics.gram import mirrored
from fxgrow.statistics.top_singular import DROP

#: relative ridge on S
INPUT_RIDGE = 1.0
#: old units that new ones may be like where they have no gradient, and copies of each
CONTEXTS, COPIES = 8, 2


def sketch(context: SketchContext, additions: Mapping[str, int]) -> dict[str, Proposal]:
    """Incoming weights for widths whose producers and consumers no window connects.

    Args:
        context: the graph and its data.
        additions: units wanted per width.

    Returns:
        Per width whose units have a gradient at zero: at most that many units, best first.
    """
    analysed, data = context.analysed, context.data
    widths = [analysed.widths[name] for name in additions]
    sketches = [WidthSketch.of(w, analysed) for w in widths if _can_be_sketched(w, context.consumers)]
    if not sketches:
        return {}
    graph = ZeroUnitGraph(context, sketches)
    graph.collect([data.first()])
    sketches = [s for s in sketches if graph.zero_output[s.name] and _note_gradients(s) and graph.reads_slots(s)]
    if not sketches:
        return {}
    wanted = {s.name: additions[s.name] // s.width.step for s in sketches}
    for s in sketches:
        _choose_candidates(s, wanted[s.name], context)
    ZeroUnitGraph(context, sketches).collect(data.fitting(context.hold_out))
    process_group = data.process_group
    for s in sketches:
        s.groups = process_group.broadcast_from_rank0(partial(_slot_groups, s))
    ZeroUnitGraph(context, sketches).probe(data.fitting(context.hold_out))
    return process_group.broadcast_from_rank0(
        lambda: {s.name: _best_units(analysed.gm, s, wanted[s.name]) for s in sketches}
    )


def _can_be_sketched(width: GrowableWidth, consumers: Mapping[str, ConsumerMoments]) -> bool:
    written = {p.weight for p in width.producers}
    reads = width.consumers
    # what a recurrence reads of itself is from a step before
    isolated = all(p.weight not in written or p.source.target is rnn_previous_state for p in reads)
    known = bool(reads) and all(p.weight in consumers for p in reads)
    return isolated and known and all(p.plain for p in width.producers)


def _note_gradients(s: WidthSketch) -> bool:
    """Notes which slots have a gradient; whether one weight has them all, or a recurrent layer's two have the same."""
    for p in s.producers.values():
        if p.gradient is None:
            return False
        p.has_gradient = p.gradient.abs().amax((0, 2)) > 0
    if len(s.with_gradient) != 2:
        return len(s.with_gradient) == 1
    first, second = s.with_gradient
    added = second.use.source.target is rnn_previous_state and first.use.node in second.use.node.all_input_nodes
    return added and torch.equal(first.has_gradient, second.has_gradient)


def _choose_candidates(s: WidthSketch, wanted: int, context: SketchContext) -> None:
    """How many candidates, and like which old units."""
    if all(p.has_gradient.all() for p in s.producers.values()):
        outputs = sum(context.consumers[w].vh.shape[0] for w in {p.weight for p in s.width.consumers})
        s.unit_groups = min(2 * wanted + 4, outputs)
        return
    chosen = torch.randperm(s.width.var.size, generator=context.generator)[: max(CONTEXTS, wanted)].tolist()
    s.contexts = [c for c in chosen for _ in range(COPIES)]
    s.unit_groups = len(s.contexts)


def _slot_groups(s: WidthSketch) -> list[SlotGroup]:
    """Bases of (S + eps)^-1 N omega, for S of the inputs."""
    p = s.with_gradient[0]
    # cross moments of two producers' inputs are left out: S only chooses the basis
    second_moment = torch.block_diag(*(_second_moment(p) for p in s.with_gradient))
    gradients = torch.cat([p.gradient for p in s.with_gradient if p.gradient is not None], -1)
    root = factor(second_moment, ridge=INPUT_RIDGE)
    contexts = torch.tensor(s.contexts or [-1] * s.unit_groups)
    groups = []
    for context in contexts.unique().tolist():
        units = (contexts == context).nonzero().flatten()
        for segment in p.segment[p.has_gradient].unique():
            slots = ((p.segment == segment) & p.has_gradient).nonzero().flatten()
            gradient = gradients[units[:, None], slots].flatten(0, 1).mT
            basis = _scaled(torch.linalg.qr(root.solve(gradient)).Q, second_moment)
            padded = basis.new_zeros(len(basis), gradient.shape[1])
            padded[:, : basis.shape[1]] = basis
            empty = basis.new_zeros(gradient.shape[1], gradient.shape[1])
            groups.append(SlotGroup(None if context < 0 else context, units, slots, padded, gradient, empty))
    return groups


def _second_moment(p: Producer) -> Tensor:
    if p.second_moment is None:
        raise RuntimeError("nothing was collected")
    return mirrored(p.second_moment).div_(p.rows)


def _scaled(columns: Tensor, second_moment: Tensor) -> Tensor:
    """Columns whose products with rows of this second moment have unit mean square."""
    squares = (columns * (second_moment @ columns)).sum(0)
    return columns / squares.clamp_min(torch.finfo(columns.dtype).tiny).sqrt()


def _best_units(gm: fx.GraphModule, s: WidthSketch, wanted: int) -> Proposal:
    """The best directions: left singular vectors of S^(-1/2) N omega in each group's basis, S of the activations."""
    found = [(g, *_directions(g, wanted if g.context is None else 1)) for g in s.groups]
    contexts = list(dict.fromkeys(g.context for g in s.groups if g.context is not None))
    if contexts:
        gains = {c: sum(float(v.square().sum()) for g, _, v in found if g.context == c) for c in contexts}
        contexts = sorted(contexts, key=lambda c: -gains[c])[:wanted]
    count = len(contexts) or max(len(directions) for _, directions, _ in found)
    if not count:
        return Proposal()  # no gradient comes back, say through a gate that is zero: random rows
    alpha = {}
    for weight, p in s.producers.items():
        rows = incoming_rows(gm, p, contexts, count)
        if p in s.with_gradient:
            rows = rows.to(found[0][1])
            for g, directions, _ in found:
                part = s.split(directions)[s.with_gradient.index(p)]
                if g.context is None:
                    rows[: len(part), g.slots] = part
                elif g.context in contexts and len(part):
                    rows[contexts.index(g.context), g.slots] = part[0]
        alpha[weight] = rows.flatten(0, 1)
    return Proposal(alpha, {}, torch.cat([v for _, _, v in found]).sort(descending=True).values)


def _directions(g: SlotGroup, units: int) -> tuple[Tensor, Tensor]:
    """Rows for the group's slots, `[units, slots, P]`, whose activations have unit mean square, and singular values."""
    root = factor(g.second_moment, ridge=INPUT_RIDGE)
    u, values, _ = torch.linalg.svd(root.whiten(g.basis.mT @ g.gradient), full_matrices=False)
    n = min(len(g.slots) * units, int((values > DROP * values[:1]).sum()))
    inner = _scaled(root.unwhiten(u[:, :n]), g.second_moment)
    rows = inner.new_zeros(len(g.slots) * units, len(g.basis))
    rows[:n] = (g.basis @ inner).mT
    return rows.unflatten(0, (units, len(g.slots))), values[:n]
