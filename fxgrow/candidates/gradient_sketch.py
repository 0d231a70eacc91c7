"""E[b V^T] where no window describes the way from producer to consumer: from the slope of units that put out nothing.

A unit with incoming weights alpha = 0 and outgoing weights omega leaves the function as it is, and there
-dL/dalpha = E[b (V . omega)] = N omega, whatever lies between: attention that mixes tokens, a gate, a recurrence. One
pass over a copy of the graph with random omega gives N's range (Halko, Martinsson and Tropp 2011, section 4); what
units of that range put out gives S there. For attention values b(t) = sum_s A(t, s) x(s) per head; a new head attends
like an old one until its values are found.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, fx

from fxgrow.analysis.analyse import AnalysedGraph
from fxgrow.analysis.widths import GrowableWidth
from fxgrow.candidates.zero_unit_graph import Group, Producer, WidthSketch, ZeroUnitGraph, incoming, start
from fxgrow.data.batches import Data
from fxgrow.data.loss import LossFn
from fxgrow.graph.unrolled_rnn import rnn_previous_state
from fxgrow.initialisers.registry import Proposal
from fxgrow.statistics.consumer_moments import ConsumerMoments
from fxgrow.statistics.factorisation import factor
from fxgrow.statistics.gram import mirrored
from fxgrow.statistics.top_singular import DROP

#: relative ridge on S
INPUT_RIDGE = 1.0
#: old units that new ones may be like in what has no slope, and copies of each
CONTEXTS, COPIES = 8, 2


def sketch(
    analysed: AnalysedGraph,
    hiddens: Sequence[GrowableWidth],
    consumers: Mapping[str, ConsumerMoments],
    updates: Mapping[str, Tensor],
    data: Data,
    loss_fn: LossFn | None,
    additions: Mapping[str, int],
    hold: bool,
    generator: torch.Generator,
) -> dict[str, Proposal]:
    """Incoming weights for widths without links.

    Args:
        analysed: the graph.
        hiddens: the widths.
        consumers: moments of the weights that read them.
        updates: what the existing weights can express, dW* per consumer.
        data: batches.
        loss_fn: see `fxgrow.data.loss.loss_of`.
        additions: units wanted per width.
        hold: leave the held-back batches out.
        generator: draws omega.

    Returns:
        Per width whose units have a slope at zero: at most that many units, best first.
    """
    process_group = data.process_group
    sketches = [start(h, analysed) for h in hiddens if _possible(h, consumers)]
    if not sketches:
        return {}
    copy = ZeroUnitGraph(analysed, consumers, updates, sketches, generator, process_group)
    first = data.first()
    copy.run([first], loss_fn)
    sketches = [s for s in sketches if copy.silent[s.name] and _keep_steep(s) and copy.reads_slots(s)]
    if not sketches:
        return {}
    for s in sketches:
        _size(s, additions[s.name] // s.hidden.step, consumers, generator)
    copy = ZeroUnitGraph(analysed, consumers, updates, sketches, generator, process_group)
    copy.run(data.fitting(hold), loss_fn)
    for s in sketches:
        s.groups = process_group.broadcast_from_rank0(partial(_groups, s))
    copy = ZeroUnitGraph(analysed, consumers, updates, sketches, generator, process_group)
    copy.probe(data.fitting(hold), loss_fn)
    return process_group.broadcast_from_rank0(
        lambda: {s.name: _solve(analysed.gm, s, additions[s.name] // s.hidden.step) for s in sketches}
    )


def _possible(h: GrowableWidth, consumers: Mapping[str, ConsumerMoments]) -> bool:
    written = {p.weight for p in h.producers}
    # of a recurrence what it reads of itself was there a step before
    apart = all(p.weight not in written or p.source.target is rnn_previous_state for p in h.consumers)
    known = bool(h.consumers) and all(p.weight in consumers for p in h.consumers)
    return apart and known and all(p.plain for p in h.producers)


def _keep_steep(s: WidthSketch) -> bool:
    """Notes which slots have a slope; whether one weight has them all, or a recurrent layer's two have the same."""
    for p in s.producers.values():
        if p.slope is None:
            return False
        p.steep = p.slope.abs().amax((0, 2)) > 0
    if len(s.steep) != 2:
        return len(s.steep) == 1
    first, second = s.steep
    added = second.use.source.target is rnn_previous_state and first.use.node in second.use.node.all_input_nodes
    return added and torch.equal(first.steep, second.steep)


def _size(s: WidthSketch, wanted: int, consumers: Mapping[str, ConsumerMoments], generator: torch.Generator) -> None:
    """How many candidates, and like which old units."""
    if all(p.steep.all() for p in s.producers.values()):
        outputs = sum(consumers[w].vh.shape[0] for w in {p.weight for p in s.hidden.consumers})
        s.atoms = min(2 * wanted + 4, outputs)
        return
    units = s.hidden.var.size
    chosen = torch.randperm(units, generator=generator)[: max(CONTEXTS, wanted)].tolist()
    s.contexts = [c for c in chosen for _ in range(COPIES)]
    s.atoms = len(s.contexts)


def _groups(s: WidthSketch) -> list[Group]:
    """Bases of (S + eps)^-1 N omega, for S of the inputs."""
    p = s.steep[0]
    # what two producers read together is left out: it only chooses the basis
    second = torch.block_diag(*(_second_moment(p) for p in s.steep))
    every = torch.cat([p.slope for p in s.steep if p.slope is not None], -1)
    root = factor(second, ridge=INPUT_RIDGE)
    like = torch.tensor(s.contexts or [-1] * s.atoms)
    groups = []
    for context in like.unique().tolist():
        atoms = (like == context).nonzero().flatten()
        for own in p.segment[p.steep].unique():
            slots = ((p.segment == own) & p.steep).nonzero().flatten()
            slope = every[atoms[:, None], slots].flatten(0, 1).mT
            basis = torch.linalg.qr(root.solve(slope)).Q
            basis = basis / (basis * (second @ basis)).sum(0).clamp_min(torch.finfo(basis.dtype).tiny).sqrt()
            wide = basis.new_zeros(len(basis), slope.shape[1])
            wide[:, : basis.shape[1]] = basis
            empty = basis.new_zeros(slope.shape[1], slope.shape[1])
            groups.append(Group(None if context < 0 else context, atoms, slots, wide, slope, empty))
    return groups


def _second_moment(p: Producer) -> Tensor:
    if p.s is None:
        raise RuntimeError("nothing was collected")
    return mirrored(p.s).div_(p.rows)


def _solve(gm: fx.GraphModule, s: WidthSketch, wanted: int) -> Proposal:
    """The best directions: left singular vectors of S^(-1/2) N omega in each group's basis, S of what is put out."""
    found = [(g, *_directions(g, wanted if g.context is None else 1)) for g in s.groups]
    contexts = list(dict.fromkeys(g.context for g in s.groups if g.context is not None))
    if contexts:
        worth = {c: sum(float(v.square().sum()) for g, _, v in found if g.context == c) for c in contexts}
        contexts = sorted(contexts, key=lambda c: -worth[c])[:wanted]
    atoms = len(contexts) or wanted
    alpha = {}
    for weight, p in s.producers.items():
        rows = incoming(gm, p, contexts, atoms)
        if p in s.steep:
            rows = rows.to(found[0][1])
            for g, directions, _ in found:
                own = s.split(directions)[s.steep.index(p)]
                if g.context is None:
                    rows[:, g.slots] = own
                elif g.context in contexts:
                    rows[contexts.index(g.context), g.slots] = own[0]
        alpha[weight] = rows.flatten(0, 1)
    return Proposal(alpha, {}, torch.cat([v for _, _, v in found]).sort(descending=True).values)


def _directions(g: Group, atoms: int) -> tuple[Tensor, Tensor]:
    """Rows for the group's slots, `[atoms, slots, P]` with unit mean square of what they put out, and their values."""
    root = factor(g.second, ridge=INPUT_RIDGE)
    u, values, _ = torch.linalg.svd(root.whiten(g.basis.mT @ g.slope), full_matrices=False)
    n = min(len(g.slots) * atoms, int((values > DROP * values[:1]).sum()))
    inner = root.unwhiten(u[:, :n])
    inner = inner / (inner * (g.second @ inner)).sum(0).clamp_min(torch.finfo(inner.dtype).tiny).sqrt()
    rows = inner.new_zeros(len(g.slots) * atoms, len(g.basis))
    rows[:n] = (g.basis @ inner).mT
    return rows.unflatten(0, (atoms, len(g.slots))), values[:n]
