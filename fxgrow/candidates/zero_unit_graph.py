"""A copy of the graph with new units whose output is zero, and passes over it.

requires: widths whose producers and consumers are known, and their candidates' incoming weights.
ensures:  the gradient of the loss in incoming weights that are zero, and second moments of the activations of units
          with given ones. The graph itself is left as it is.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, fx

from fxgrow.analysis.analyse import AnalysedGraph
from fxgrow.analysis.widths import GrowableWidth
from fxgrow.axes.axes import resolve, unit_entries
from fxgrow.axes.structure import Projection
from fxgrow.candidates.widened import put_rows
from fxgrow.data.batches import Batch, Data
from fxgrow.data.loss import LossFn
from fxgrow.graph.conditional import runs_in_eval_mode
from fxgrow.graph.graph import lookup
from fxgrow.rewriting.size_change import SizeChange
from fxgrow.rewriting.values import Values
from fxgrow.rewriting.widened_graph import WidenedGraph
from fxgrow.statistics.batch_dimension import as_maps
from fxgrow.statistics.consumer_moments import ConsumerMoments, like_weight, rows_for, some_rows
from fxgrow.statistics.cross_moment import patch_rows
from fxgrow.statistics.factorisation import factor
from fxgrow.statistics.forward_backward import BatchRecord, PassRequest, forward_backward
from fxgrow.statistics.gram import accumulating, add_gram
from fxgrow.statistics.producer_consumer_path import window

#: relative ridge on E[V V^T], as in `initialisers/default.py`
OUTPUT_RIDGE = 1e-2
#: batches from which second moments of activations are formed
PROBES = 4


@dataclass(frozen=True)
class SketchContext:
    """What all passes of a sketch share.

    Attributes:
        analysed: the graph.
        consumers: moments of the weights that read its widths.
        delta_w: what the existing weights can express, dW* per consumer.
        data: batches.
        loss_fn: see `fxgrow.data.loss.loss_of`.
        hold_out: leave the held-out batches out.
        generator: draws omega.
    """

    analysed: AnalysedGraph
    consumers: Mapping[str, ConsumerMoments]
    delta_w: Mapping[str, Tensor]
    data: Data
    loss_fn: LossFn | None
    hold_out: bool
    generator: torch.Generator


@dataclass(eq=False)
class Producer:
    """One weight that writes the width.

    Attributes:
        use: of the weight.
        old: positions of old units' entries ("slots" of a unit) in the weight, `[units, slots]`.
        segment: the segment of the axis that holds each slot.
        has_gradient: slots in which the gradient at zero is not zero.
        gradient: sum of N omega, `[unit groups, slots, P]`, with a trailing entry for the bias.
        second_moment: of the inputs, a sum over `rows`.
        rows: how many.
        features: P.
    """

    use: Projection
    old: Tensor
    segment: Tensor
    has_gradient: Tensor
    gradient: Tensor | None = None
    second_moment: Tensor | None = None
    rows: int = 0
    features: int = 0


@dataclass
class SlotGroup:
    """Entries of candidates that share N: one slot of all of them, or the dimensions of heads like one old head.

    Attributes:
        context: the old unit that they are like, if there is one.
        unit_groups: numbers of the candidates.
        slots: of each.
        basis: spans the directions that matter, `[P, m]` for the m entries of `unit_groups` x `slots`, P over all
            producers that have a gradient.
        gradient: N omega, `[P, m]`.
        second_moment: of the activations of units with the basis as incoming weights, `[m, m]`.
    """

    context: int | None
    unit_groups: Tensor
    slots: Tensor
    basis: Tensor
    gradient: Tensor
    second_moment: Tensor


@dataclass
class WidthSketch:
    """One width and its candidates.

    Attributes:
        width: the width.
        producers: by weight.
        unit_groups: how many candidates.
        contexts: the old unit that each is like where it has no gradient; empty if all of a unit has one.
        groups: entries that share N.
    """

    width: GrowableWidth
    producers: dict[str, Producer]
    unit_groups: int = 1
    contexts: list[int] = field(default_factory=list)
    groups: list[SlotGroup] = field(default_factory=list)

    @classmethod
    def of(cls, width: GrowableWidth, analysed: AnalysedGraph) -> WidthSketch:
        """A width of which nothing is known yet: one candidate, with zero incoming weights."""
        producers = {}
        for p in width.producers:
            axis = resolve(analysed.structure.parameters[p.weight][p.out_dim])
            sizes = [s.inner for s in axis if s.var is width.var]
            segment = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
            every_slot = torch.ones(len(segment), dtype=torch.bool)
            producers[p.weight] = Producer(p, unit_entries(axis, width.var), segment, every_slot)
        return cls(width, producers)

    @property
    def name(self) -> str:
        return self.width.name

    @property
    def with_gradient(self) -> list[Producer]:
        """Producers that have a gradient: one, or two whose outputs are added."""
        return [p for p in self.producers.values() if p.has_gradient.any()]

    @property
    def slots(self) -> Tensor:
        """Which slots have a gradient."""
        return self.with_gradient[0].has_gradient

    def split(self, rows: Tensor) -> list[Tensor]:
        """Incoming weights as rows of each producer that has a gradient."""
        return list(rows.split([p.features for p in self.with_gradient], -1))


class ZeroUnitGraph(WidenedGraph):
    """A copy of a graph with new units whose output is zero, and passes over it.

    Args:
        context: the graph and its data.
        sketches: of the widths that get units; what was collected for them before is dropped. With random outgoing
            weights, or, once a sketch has groups, with zero ones and the groups' bases as incoming weights.
    """

    def __init__(self, context: SketchContext, sketches: Sequence[WidthSketch]) -> None:
        self.context, self.sketches = context, sketches
        change = SizeChange(context.analysed, {s.name: s.unit_groups * s.width.step for s in sketches})
        values = Values(new_units_see_each_other=False)
        for s in sketches:
            self._put_incoming(change, s, values)
            if not s.groups:
                self._put_random_outgoing(change, s, values)
        super().__init__(change, values, context.generator)
        #: uses of weights that run in this mode
        self.uses = [u for u in self.projections if runs_in_eval_mode(u.node)]
        #: whether all that a width's consumers saw of its new units was zero
        self.zero_output = {s.name: True for s in sketches}

    def _put_incoming(self, change: SizeChange, s: WidthSketch, values: Values) -> None:
        for p in s.producers.values():
            rows = incoming_rows(change.gm, p, s.contexts, s.unit_groups)
            for g in s.groups if p in s.with_gradient else []:
                alpha = s.split(g.basis.mT)[s.with_gradient.index(p)]
                rows[g.unit_groups[:, None], g.slots] = alpha.unflatten(0, (-1, len(g.slots))).to(rows)
            rows = rows.flatten(0, 1)
            put_rows(change.gm, p.use, s.name, rows, values)
            p.gradient, p.second_moment, p.rows, p.features = None, None, 0, rows.shape[1]

    def _put_random_outgoing(self, change: SizeChange, s: WidthSketch, values: Values) -> None:
        for p in {p.weight: p for p in s.width.consumers}.values():
            weight, c = lookup(change.gm, p.weight), self.context.consumers[p.weight]
            n = len(change.new_indices[p.weight][s.name, p.in_dim])
            shape = [n if d == p.in_dim else size for d, size in enumerate(weight.shape)]
            omega = torch.randn(shape, generator=self.context.generator, dtype=torch.float64)
            if c.g is not None and bool(c.g.any()):  # zero where no gradient comes back
                g = factor(c.curvature(), ridge=OUTPUT_RIDGE)
                omega = like_weight(g.unwhiten(c.matrix(omega).to(c.g)), weight, p)
            values.new.setdefault(p.weight, {})[s.name, p.in_dim] = omega

    def collect(self, batches: Iterable[Batch]) -> None:
        """One pass; gradients and second moments are added to the producers."""
        producers = [(s, p) for s in self.sketches for p in s.producers.values()]
        names = {n for _, p in producers for n in (p.use.weight, p.use.bias) if n is not None}
        writes = {p.use.weight: [u for u in self.uses if u.weight == p.use.weight] for _, p in producers}
        reads: dict[fx.Node, list[tuple[WidthSketch, Projection]]] = {}
        for s in self.sketches:
            consumers = {p.weight for p in s.width.consumers}
            for u in self.uses:
                if u.weight in consumers:
                    reads.setdefault(u.source, []).append((s, u))

        def on_batch(batch: Batch, record: BatchRecord) -> None:
            for s, p in producers:
                self._add_gradient(s, p, record)
                for u in writes[p.use.weight]:
                    self._add_inputs(p, u, record.inputs[u.source])
            for node, uses in reads.items():
                for s, u in uses:
                    columns = self.new_indices[u.weight][s.name, u.in_dim].to(record.inputs[node].device)
                    if record.inputs[node].index_select(_channels(u), columns).any():
                        self.zero_output[s.name] = False

        without = {node: partial(self._without_expressible, [u for _, u in uses]) for node, uses in reads.items()}
        request = PassRequest(
            {*reads, *(u.source for uses in writes.values() for u in uses)},
            on_batch,
            # a frozen bias too: new units may have any, and the copy is ours
            weights={n: lookup(self.gm, n).requires_grad_() for n in sorted(names)},
            corrections=without,
        )
        forward_backward(self.gm, batches, self.context.loss_fn, request)
        process_group, generator = self.context.data.process_group, self.context.generator
        process_group.sum_([t for _, p in producers for t in (p.gradient, p.second_moment) if t is not None])
        for _, p in producers:
            p.rows = int(process_group.sum_numbers(p.rows)[0])
        for s in self.sketches:
            self.zero_output[s.name] = not process_group.sum_numbers(not self.zero_output[s.name])[0]
        # random numbers are the same in all processes from here on
        generator.set_state(process_group.broadcast_from_rank0(generator.get_state))

    def reads_slots(self, s: WidthSketch) -> bool:
        """Whether what a consumer reads of a unit can be divided into its slots."""
        p = s.width.consumers[0]
        return len(self.new_indices[p.weight][s.name, p.in_dim]) // s.unit_groups % int(s.slots.sum()) == 0

    def probe(self, batches: Iterable[Batch]) -> None:
        """Second moments of activations where they are read, of units with the groups' bases as incoming weights."""
        first_use = {u.weight: u for u in reversed(self.uses)}
        reads = {s.name: first_use[s.width.consumers[0].weight] for s in self.sketches}
        rows = dict.fromkeys(reads, 0)

        def on_batch(batch: Batch, record: BatchRecord) -> None:
            for s in self.sketches:
                u = reads[s.name]
                h = record.inputs[u.source]
                z = h.index_select(_channels(u), self.new_indices[u.weight][s.name, u.in_dim].to(h.device))
                # entries of one slot at several positions, or read by several heads, are rows
                z = z.movedim(_channels(u), -1).unflatten(-1, (s.unit_groups, int(s.slots.sum()), -1)).movedim(-1, 0)
                z = accumulating(z).flatten(0, -3)
                place = s.slots.cumsum(0) - 1
                for g in s.groups:
                    part = z[:, g.unit_groups[:, None], place[g.slots]].flatten(1)
                    g.second_moment = g.second_moment + part.mT @ part
                rows[s.name] += len(z)

        few, sources = itertools.islice(batches, PROBES), {u.source for u in reads.values()}
        forward_backward(self.gm, list(few), self.context.loss_fn, PassRequest(sources, on_batch))
        process_group = self.context.data.process_group
        process_group.sum_([g.second_moment for s in self.sketches for g in s.groups])
        for s in self.sketches:
            (total,) = process_group.sum_numbers(rows[s.name])
            for g in s.groups:
                g.second_moment = g.second_moment / total

    def _without_expressible(self, uses: Sequence[Projection], h: Tensor, g: Tensor) -> Tensor:
        """The gradient g at what consumers read, h, where new units see V - dW* h instead of V."""
        g = g.clone()
        for u in {u.weight: u for u in uses}.values():
            c, dim, axes = self.context.consumers[u.weight], _channels(u) % h.dim(), self.change.parameters[u.weight]
            new = torch.cat(list(axes[u.in_dim].new.values())).to(h.device)
            old = h.index_select(dim, axes[u.in_dim].moved.to(h.device))
            expressible = c.apply(self.context.delta_w[u.weight], c.layer_input(old))
            # new rows of the consumer belong to other widths
            omega = lookup(self.gm, u.weight).detach().index_select(u.in_dim, new)
            omega = omega.index_select(u.out_dim, axes[u.out_dim].moved.to(h.device))
            with torch.enable_grad():
                shape = [len(new) if d == dim else n for d, n in enumerate(h.shape)]
                z = expressible.new_zeros(shape, requires_grad=True)
                out = c.outgoing(c.matrix(omega).to(expressible), c.layer_input(z))
                (back,) = torch.autograd.grad(out, z, expressible)
            g.index_add_(dim, new, -back.to(g))
        return g

    def _add_gradient(self, s: WidthSketch, p: Producer, record: BatchRecord) -> None:
        use, gradient = p.use, record.gradients[p.use.weight]
        new = self.new_indices[use.weight][s.name, use.out_dim].to(gradient.device)
        rows = gradient.index_select(use.out_dim, new)
        rows = rows.index_select(use.in_dim, self.change.parameters[use.weight][use.in_dim].moved.to(new.device))
        rows = rows.movedim(use.out_dim, 0).flatten(1)
        if use.bias is not None:
            rows = torch.cat([rows, record.gradients[use.bias].index_select(0, new)[:, None]], 1)
        rows = accumulating(rows).unflatten(0, (s.unit_groups, -1))
        p.gradient = rows if p.gradient is None else p.gradient + rows

    def _add_inputs(self, p: Producer, use: Projection, x: Tensor) -> None:
        x = x.index_select(_channels(use), self.change.parameters[use.weight][use.in_dim].moved.to(x.device))
        x = as_maps(x, len(use.kernel)) if use.kernel else x.reshape(x.shape[0], -1, x.shape[-1])
        limit = rows_for(p.features) - p.rows
        if limit <= 0:
            return
        count = len(x) * (math.prod(use.node.meta["val"].shape[2:]) if use.kernel else x.shape[1])
        rows = patch_rows(x, window(use), some_rows(count, limit, self.context.generator, x.device))
        p.second_moment = add_gram(p.second_moment, rows, bias=use.bias is not None)
        p.rows += len(rows)


def _channels(p: Projection) -> int:
    """The dimension of its input that a weight sums over."""
    return -1 - len(p.kernel)


def incoming_rows(gm: fx.GraphModule, p: Producer, contexts: Sequence[int], unit_groups: int) -> Tensor:
    """Rows of new units, `[unit groups, slots, P (+ 1)]`: those of their contexts, zero where there is a gradient."""
    weight = lookup(gm, p.use.weight).detach()
    matrix = weight.movedim(p.use.out_dim, 0).flatten(1) * (p.use.scale or 1.0)
    if p.use.bias is not None:
        matrix = torch.cat([matrix, lookup(gm, p.use.bias).detach()[:, None]], 1)
    rows = matrix.new_zeros(unit_groups, len(p.has_gradient), matrix.shape[1])
    if contexts:
        rows[:, ~p.has_gradient] = matrix[p.old[contexts][:, ~p.has_gradient]]
    return rows
