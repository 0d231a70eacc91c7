"""A copy of the graph with silent units, and passes over it.

requires: widths whose producers and consumers are known, and what their candidates' incoming weights are.
ensures:  the slope of the loss along incoming weights that are zero, and what units with given ones put out. The graph
          itself is left as it is.
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
from fxgrow.data.batches import Batch
from fxgrow.data.loss import LossFn
from fxgrow.distributed import SINGLE_PROCESS, ProcessGroup
from fxgrow.graph.conditional import runs_in_eval_mode
from fxgrow.graph.graph import lookup
from fxgrow.rewriting.size_change import SizeChange
from fxgrow.rewriting.values import Values
from fxgrow.rewriting.widened_graph import WidenedGraph
from fxgrow.statistics.consumer_moments import ConsumerMoments, like_weight, rows_for, some_rows
from fxgrow.statistics.cross_moment import patch_rows
from fxgrow.statistics.factorisation import factor
from fxgrow.statistics.forward_backward import BatchRecord, PassRequest, forward_backward
from fxgrow.statistics.gram import accumulating, add_gram
from fxgrow.statistics.producer_consumer_path import window

#: relative ridge on E[V V^T], as in `initialisers/default.py`
OUTPUT_RIDGE = 1e-2
#: batches on which new units are tried out
PROBES = 4


@dataclass(eq=False)
class Producer:
    """One weight that writes the width: its entries per unit, those that have a slope, and what was collected."""

    use: Projection
    #: positions of old units' entries in the weight, `[units, slots]`, and the segment of the axis that holds each slot
    old: Tensor
    segment: Tensor
    #: slots with a slope
    steep: Tensor
    #: sum of N omega, `[atoms, slots, P]`, with a trailing entry for the bias
    slope: Tensor | None = None
    #: second moment of the inputs
    s: Tensor | None = None
    rows: int = 0
    features: int = 0


@dataclass
class WidthSketch:
    """One width: its producers, and which old unit each candidate is like (none if all of a unit has a slope)."""

    hidden: GrowableWidth
    producers: dict[str, Producer]
    atoms: int = 1
    contexts: list[int] = field(default_factory=list)
    groups: list[Group] = field(default_factory=list)

    @property
    def name(self) -> str:
        return self.hidden.name

    @property
    def steep(self) -> list[Producer]:
        """Those with a slope: one, or two that are added up to make the same entries."""
        return [p for p in self.producers.values() if p.steep.any()]

    @property
    def slots(self) -> Tensor:
        """Which slots have a slope."""
        return self.steep[0].steep

    def split(self, rows: Tensor) -> list[Tensor]:
        """Incoming weights as rows of each producer that has a slope."""
        return list(rows.split([p.features for p in self.steep], -1))


@dataclass
class Group:
    """Entries of candidates that share N: one slot of all of them, or the dimensions of heads like one old head.

    `basis` spans the directions that matter, `[P, m]` for the m entries of `atoms` x `slots`, P over all producers that
    have a slope; `second` is the second moment of what units with these incoming weights put out, `[m, m]`.
    """

    context: int | None
    atoms: Tensor
    slots: Tensor
    basis: Tensor
    slope: Tensor
    second: Tensor


def start(h: GrowableWidth, analysed: AnalysedGraph) -> WidthSketch:
    """A width of which nothing is known yet: one candidate, zero in all that it is made of."""
    producers = {}
    for p in h.producers:
        axis = resolve(analysed.structure.parameters[p.weight][p.out_dim])
        own = [s.inner for s in axis if s.var is h.var]
        segment = torch.arange(len(own)).repeat_interleave(torch.tensor(own))
        producers[p.weight] = Producer(
            p, unit_entries(axis, h.var), segment, torch.ones(len(segment), dtype=torch.bool)
        )
    return WidthSketch(h, producers)


class ZeroUnitGraph(WidenedGraph):
    """A copy of a graph with new units whose output is zero, and passes over it."""

    def __init__(
        self,
        analysed: AnalysedGraph,
        consumers: Mapping[str, ConsumerMoments],
        updates: Mapping[str, Tensor],
        sketches: Sequence[WidthSketch],
        generator: torch.Generator,
        process_group: ProcessGroup = SINGLE_PROCESS,
    ) -> None:
        self.sketches, self.consumers, self.updates = sketches, consumers, updates
        self.generator, self.process_group = generator, process_group
        change = SizeChange(analysed, {s.name: s.atoms * s.hidden.step for s in sketches})
        values = Values(new_units_see_each_other=False)
        for s in sketches:
            self._put_incoming(change, s, values)
            if not s.groups:
                self._put_random_outgoing(change, s, values)
        super().__init__(change, values, generator)
        #: whether all that a width's readers saw of its new units was zero
        self.silent = {s.name: True for s in sketches}

    def _put_incoming(self, change: SizeChange, s: WidthSketch, values: Values) -> None:
        for p in s.producers.values():
            rows = incoming(change.gm, p, s.contexts, s.atoms)
            for group in s.groups if p in s.steep else []:
                alpha = s.split(group.basis.mT)[s.steep.index(p)].unflatten(0, (len(group.atoms), len(group.slots)))
                rows[group.atoms[:, None], group.slots] = alpha.to(rows)
            rows = rows.flatten(0, 1)
            put_rows(change.gm, p.use, s.name, rows, values)
            p.slope, p.s, p.rows, p.features = None, None, 0, rows.shape[1]

    def _put_random_outgoing(self, change: SizeChange, s: WidthSketch, values: Values) -> None:
        for p in {p.weight: p for p in s.hidden.consumers}.values():
            weight = lookup(change.gm, p.weight)
            n = len(change.new_indices[p.weight][s.name, p.in_dim])
            shape = [n if d == p.in_dim else size for d, size in enumerate(weight.shape)]
            c = self.consumers[p.weight]
            omega = torch.randn(shape, generator=self.generator, dtype=torch.float64)
            if c.g is not None:
                g = factor(c.curvature(), ridge=OUTPUT_RIDGE)
                omega = like_weight(g.unwhiten(c.matrix(omega).to(c.g)), weight, p)
            values.new.setdefault(p.weight, {})[s.name, p.in_dim] = omega

    def run(self, batches: Iterable[Batch], loss_fn: LossFn | None) -> None:
        """One pass; slopes and second moments are added to the producers."""
        producers = [(s, p) for s in self.sketches for p in s.producers.values()]
        names = {n for _, p in producers for n in (p.use.weight, p.use.bias) if n is not None}
        uses = [u for u in self.projections if runs_in_eval_mode(u.node)]
        written = {p.use.weight: [u for u in uses if u.weight == p.use.weight] for _, p in producers}
        readers: dict[fx.Node, list[tuple[WidthSketch, Projection]]] = {}
        for s in self.sketches:
            reads = {p.weight for p in s.hidden.consumers}
            for u in uses:
                if u.weight in reads:
                    readers.setdefault(u.source, []).append((s, u))

        def done(batch: Batch, seen: BatchRecord) -> None:
            for s, p in producers:
                self._add_slope(s, p, seen)
                for u in written[p.use.weight]:
                    self._add_inputs(p, u, seen.inputs[u.source])
            for node, own in readers.items():
                for s, u in own:
                    columns = self.new_indices[u.weight][s.name, u.in_dim].to(seen.inputs[node].device)
                    if seen.inputs[node].index_select(_channels(u), columns).any():
                        self.silent[s.name] = False

        request = PassRequest(
            {*readers, *(u.source for uses in written.values() for u in uses)},
            done,
            # a frozen bias too: new units may have any, and the copy is ours
            weights={n: lookup(self.gm, n).requires_grad_() for n in sorted(names)},
            corrections={node: partial(self._without_expressible, own) for node, own in readers.items()},
        )
        forward_backward(self.gm, batches, loss_fn, request)
        process_group = self.process_group
        process_group.sum_([t for _, p in producers for t in (p.slope, p.s) if t is not None])
        for _, p in producers:
            p.rows = int(process_group.sum_numbers(p.rows)[0])
        for s in self.sketches:
            self.silent[s.name] = not process_group.sum_numbers(not self.silent[s.name])[0]
        # what is drawn from here on is drawn alike
        self.generator.set_state(process_group.broadcast_from_rank0(self.generator.get_state))

    def reads_slots(self, s: WidthSketch) -> bool:
        """Whether what a reader takes of a unit comes apart into its slots."""
        p = s.hidden.consumers[0]
        return len(self.new_indices[p.weight][s.name, p.in_dim]) // s.atoms % int(s.slots.sum()) == 0

    def probe(self, batches: Iterable[Batch], loss_fn: LossFn | None) -> None:
        """What units with the groups' bases for incoming weights put out where they are read."""
        reads = {
            s.name: next(
                u for u in self.projections if u.weight == s.hidden.consumers[0].weight and runs_in_eval_mode(u.node)
            )
            for s in self.sketches
        }
        rows = dict.fromkeys(reads, 0)

        def done(batch: Batch, seen: BatchRecord) -> None:
            for s in self.sketches:
                u = reads[s.name]
                h = seen.inputs[u.source]
                z = h.index_select(_channels(u), self.new_indices[u.weight][s.name, u.in_dim].to(h.device))
                # entries of one slot at several positions, or read by several heads, are rows
                z = z.movedim(_channels(u), -1).unflatten(-1, (s.atoms, int(s.slots.sum()), -1)).movedim(-1, 0)
                z = accumulating(z).flatten(0, -3)
                place = s.slots.cumsum(0) - 1
                for group in s.groups:
                    own = z[:, group.atoms[:, None], place[group.slots]].flatten(1)
                    group.second = group.second + own.mT @ own
                rows[s.name] += len(z)

        few = list(itertools.islice(batches, PROBES))
        forward_backward(self.gm, few, loss_fn, PassRequest({u.source for u in reads.values()}, done))
        self.process_group.sum_([group.second for s in self.sketches for group in s.groups])
        for s in self.sketches:
            (total,) = self.process_group.sum_numbers(rows[s.name])
            for group in s.groups:
                group.second = group.second / total

    def _without_expressible(self, own: Sequence[tuple[WidthSketch, Projection]], h: Tensor, g: Tensor) -> Tensor:
        """The gradient g at what consumers read, h, where new units see V - dW* h instead of V."""
        g = g.clone()
        for u in {u.weight: u for _, u in own}.values():
            c, dim = self.consumers[u.weight], _channels(u) % h.dim()
            new = self._new(u.weight, u.in_dim).to(h.device)
            old = h.index_select(dim, self._old(u.weight, u.in_dim).to(h.device))
            moved = c.apply(self.updates[u.weight], c.layer_input(old))
            # its own new rows belong to other widths
            omega = lookup(self.gm, u.weight).detach().index_select(u.in_dim, new)
            omega = omega.index_select(u.out_dim, self._old(u.weight, u.out_dim).to(h.device))
            with torch.enable_grad():
                z = moved.new_zeros([len(new) if d == dim else n for d, n in enumerate(h.shape)], requires_grad=True)
                out = c.outgoing(c.matrix(omega).to(moved), c.layer_input(z))
                (back,) = torch.autograd.grad(out, z, moved)
            g.index_add_(dim, new, -back.to(g))
        return g

    def _add_slope(self, s: WidthSketch, p: Producer, seen: BatchRecord) -> None:
        use = p.use
        gradient = seen.gradients[use.weight]
        own = self.new_indices[use.weight][s.name, use.out_dim].to(gradient.device)
        rows = gradient.index_select(use.out_dim, own)
        rows = rows.index_select(use.in_dim, self._old(use.weight, use.in_dim).to(own.device))
        rows = rows.movedim(use.out_dim, 0).flatten(1)
        if use.bias is not None:
            rows = torch.cat([rows, seen.gradients[use.bias].index_select(0, own)[:, None]], 1)
        rows = accumulating(rows).unflatten(0, (s.atoms, -1))
        p.slope = rows if p.slope is None else p.slope + rows

    def _add_inputs(self, p: Producer, use: Projection, x: Tensor) -> None:
        x = x.index_select(_channels(use), self._old(use.weight, use.in_dim).to(x.device))
        x = x if use.kernel else x.reshape(x.shape[0], -1, x.shape[-1])
        limit = rows_for(p.features) - p.rows
        if limit <= 0:
            return
        if use.kernel:
            chosen = some_rows(len(x) * math.prod(use.node.meta["val"].shape[2:]), limit, self.generator, x.device)
        else:
            chosen = some_rows(len(x) * x.shape[1], limit, self.generator, x.device)
        rows = patch_rows(x, window(use), chosen)
        p.s = add_gram(p.s, rows, bias=use.bias is not None)
        p.rows += len(rows)

    def _new(self, weight: str, dim: int) -> Tensor:
        """Entries of a weight that the original does not have."""
        found = [positions for (_, d), positions in self.new_indices.get(weight, {}).items() if d == dim]
        return torch.cat([torch.zeros(0, dtype=torch.long), *found])

    def _old(self, weight: str, dim: int) -> Tensor:
        kept = torch.ones(lookup(self.gm, weight).shape[dim], dtype=torch.bool)
        kept[self._new(weight, dim)] = False
        return kept.nonzero().flatten()


def _channels(p: Projection) -> int:
    """The dimension of what it reads that its weight sums over."""
    return 1 if p.kernel else -1


def incoming(gm: fx.GraphModule, p: Producer, contexts: Sequence[int], atoms: int) -> Tensor:
    """Rows of `atoms` units, `[atoms, slots, P (+ 1)]`: those of their contexts, zero where there is a slope."""
    weight = lookup(gm, p.use.weight).detach()
    matrix = weight.movedim(p.use.out_dim, 0).flatten(1)
    if p.use.bias is not None:
        matrix = torch.cat([matrix, lookup(gm, p.use.bias).detach()[:, None]], 1)
    rows = matrix.new_zeros(atoms, len(p.steep), matrix.shape[1])
    if contexts:
        rows[:, ~p.steep] = matrix[p.old[contexts][:, ~p.steep]]
    return rows
