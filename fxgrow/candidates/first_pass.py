"""The first reading of the data: moments of every consumer and width, and the units that follow from them.

Widths whose matrices have no room beside each other take turns, with a reading of the data for each turn.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, fx

from fxgrow.analysis.analyse import AnalysedGraph
from fxgrow.analysis.widths import GrowableWidth
from fxgrow.candidates.gradient_sketch import sketch
from fxgrow.candidates.isolated import IsolatedPath, apart
from fxgrow.candidates.isolated_refit import HeldOutCache
from fxgrow.candidates.memory_turns import turns
from fxgrow.data.batches import HOLD_OUT_EVERY, Batch, Data
from fxgrow.data.loss import LossFn
from fxgrow.data.progress import progress as bar
from fxgrow.errors import ProfileError
from fxgrow.graph.graph import lookup
from fxgrow.initialisers.registry import Initialiser, Proposal
from fxgrow.statistics.all_reduce import sum_blocks
from fxgrow.statistics.collect import ISOLATED_CACHE_BYTES, WIDTH_CACHE_BYTES, Statistics
from fxgrow.statistics.factorisation import bottleneck
from fxgrow.statistics.forward_backward import BatchRecord, PassRequest, forward_backward
from fxgrow.statistics.mergeable import (
    InputCrossMoment,
    Moments,
    merge_into,
    mergeable_tensors,
    subtract_by_cross_moment,
)


@dataclass
class Measured:
    """What a first reading found.

    Attributes:
        updates: dW* per consumer.
        proposals: units per width.
        asked: per width, Psi and E|V|^2 of all its consumers.
        positions: per width, sampled positions behind its second moments.
        samples: how many were read.
        loss: the sum of their losses.
    """

    updates: dict[str, Tensor] = field(default_factory=dict)
    proposals: dict[str, Proposal] = field(default_factory=dict)
    asked: dict[str, tuple[float, float]] = field(default_factory=dict)
    positions: dict[str, int] = field(default_factory=dict)
    samples: int = 0
    loss: float = 0.0
    #: widths of which new units can be tried by themselves, and on what
    ways: dict[str, IsolatedPath] = field(default_factory=dict)
    stats: Statistics | None = None
    held: HeldOutCache = field(default_factory=HeldOutCache)
    #: means by name, where they are to be merged with others
    kept: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Reader:
    """How to read: the graph, the data, the method.

    Attributes:
        exact: every matrix from every position.
        generator: of the sampling.
        show: a progress bar.
        limit: bytes that matrices and remembered activations may take, or None.
        keep: means, so that those of other data can be added.
    """

    analysed: AnalysedGraph
    method: Initialiser
    data: Data
    loss_fn: LossFn | None
    exact: bool
    generator: torch.Generator
    show: bool = False
    limit: int | None = None
    keep: bool = False

    def measure(self, hiddens: Sequence[GrowableWidth], additions: Mapping[str, int]) -> Measured:
        """Moments of these widths, and up to so many units for each.

        Raises:
            ProfileError: a width has no room on its own.
        """
        out = Measured()
        found = turns(hiddens, self.analysed.gm, self.limit)
        for own in found:
            self._measure(own, additions, out, self.method.needs.refit and not self.exact and len(found) == 1)
        return out

    def merge(
        self, parts: Sequence[Moments], hiddens: Sequence[GrowableWidth], additions: Mapping[str, int]
    ) -> Measured:
        """The same from moments of several parts of the data."""
        out = Measured(samples=sum(part.samples for part in parts), loss=sum(part.loss for part in parts))
        stats = self._statistics(hiddens)
        crosses = merge_into(stats, parts, next(self.analysed.gm.parameters()).device)
        updates, psi = project(stats)
        if self.method.needs.project:
            subtract_by_cross_moment(stats, crosses, updates)
        self._propose(stats, hiddens, additions, updates, psi, out)
        return out

    def _statistics(self, hiddens: Sequence[GrowableWidth]) -> Statistics:
        needs = self.method.needs
        # an eighth of the memory is for caches
        limit = sys.maxsize if self.limit is None else self.limit // 8
        return Statistics(
            self.analysed,
            hiddens,
            exact=self.exact,
            width_moments=needs.moments,
            # with C all of N is formed at once
            project=needs.project and not self.keep,
            output_side=needs.output_side or needs.refit,
            width_cache_bytes=min(WIDTH_CACHE_BYTES, limit // max(1, len(hiddens))),
            isolated_cache_bytes=min(ISOLATED_CACHE_BYTES, limit),
            rows=needs.rows,
        )

    def _measure(
        self, hiddens: Sequence[GrowableWidth], additions: Mapping[str, int], out: Measured, tried: bool
    ) -> None:
        needs, stats = self.method.needs, self._statistics(hiddens)
        if tried:
            linked = [h for h in hiddens if h.name in stats.widths]
            out.ways, out.stats = apart(self.analysed, linked, stats.consumers), stats
            stats.cache_for_isolated(way.hidden for way in out.ways.values())
        out.loss = self.collect(stats, out.held)
        process_group = self.data.process_group
        stats.finish(self.generator, process_group)
        out.samples, (out.loss,) = int(stats.total), process_group.sum_numbers(out.loss)
        updates, psi = project(stats)
        if self.keep:
            out.kept |= mergeable_tensors(stats)
        if needs.project and stats.widths:
            self._subtract(stats, updates, out)
        sum_blocks(stats.widths.values(), process_group)
        # what is drawn from here on is drawn alike
        self.generator.set_state(process_group.broadcast_from_rank0(self.generator.get_state))
        self._propose(stats, hiddens, additions, updates, psi, out)

    def _propose(
        self,
        stats: Statistics,
        hiddens: Sequence[GrowableWidth],
        additions: Mapping[str, int],
        updates: Mapping[str, Tensor],
        psi: Mapping[str, tuple[float, float]],
        out: Measured,
    ) -> None:
        needs, process_group = self.method.needs, self.data.process_group
        wanted = {h.name: additions[h.name] for h in hiddens}
        out.proposals |= process_group.broadcast_from_rank0(lambda: self._proposals(stats, wanted))
        for name in wanted:
            found = stats.widths.get(name)
            out.positions[name] = 0 if found is None else found.rows
        if needs.sketch:
            rest = [h for h in hiddens if h.name not in stats.widths]
            out.proposals |= sketch(
                self.analysed, rest, stats.consumers, updates, self.data, self.loss_fn, wanted, needs.refit,
                self.generator,
            )  # fmt: skip
        for h in hiddens:
            read = {p.weight for p in h.consumers}
            own = [psi[key] for key, c in stats.consumers.items() if c.weight in read]
            out.asked[h.name] = sum(p for p, _ in own), sum(v for _, v in own)
        out.updates |= updates

    def _proposals(self, stats: Statistics, wanted: Mapping[str, int]) -> dict[str, Proposal]:
        found = {name: stats.widths.get(name) for name in wanted}
        propose = self.method.propose
        return {n: Proposal() if w is None else propose(w, stats.consumers, wanted[n]) for n, w in found.items()}

    def collect(self, stats: Statistics, held: HeldOutCache | None = None) -> float:
        """The first pass; returns the sum of the fitting batches' losses. What there is room for goes to `held`."""
        total = 0.0
        returned: dict[fx.Node, Tensor] = {}
        apart = False

        def batches() -> Iterator[Batch]:
            nonlocal apart
            for batch in self.data:
                apart = self.method.needs.refit and self.data.is_held_out(batch)
                # the first batch is none of these, and with it the room is known
                if not apart or stats.caches_isolated:
                    yield batch

        def read(seen: BatchRecord, node: fx.Node, v: Tensor) -> None:
            if apart:
                returned[node] = v
            else:
                stats.add_output_gradient(seen, node, v, batches=self.data.expected(seen.size))

        def done(batch: Batch, seen: BatchRecord) -> None:
            nonlocal total
            if not apart:
                total += seen.loss * seen.size
                stats.end_batch(seen)
            elif held is not None:
                held.cache.expected = max(1, self.data.expected(seen.size) // HOLD_OUT_EVERY)
                held.add(seen, stats.held_out_inputs, stats.isolated_targets, returned)
                returned.clear()

        gm, shown = self.analysed.gm, bar(batches(), "profiling", self.data.batches, self.show)
        weights = {n: lookup(gm, n) for n in stats.weights}
        needed = lambda: not (apart or stats.complete)  # noqa: E731
        forward_backward(gm, shown, self.loss_fn, PassRequest(stats.sources, done, stats.uses, read, weights, needed))
        (single,) = self.data.process_group.sum_numbers(self.data.batches == 1)
        if single not in (0, self.data.process_group.size):
            size = self.data.process_group.size
            raise ProfileError(
                f"{single:.0f} of {size} processes have a single batch: give each at least two, so "
                "that one can be held back, or each one alone."
            )
        return total

    def _subtract(self, stats: Statistics, updates: Mapping[str, Tensor], out: Measured) -> None:
        crossed = InputCrossMoment(stats) if self.keep else None
        if stats.exact:
            self._read_again(stats, updates, crossed)
        elif crossed is None:
            stats.subtract_expressible(updates)
        else:
            crossed.add_cached()
        if crossed is not None:
            out.kept |= crossed.tensors()
            subtract_by_cross_moment(stats, crossed.blocks(), updates)

    def _read_again(self, stats: Statistics, updates: Mapping[str, Tensor], crossed: InputCrossMoment | None) -> None:
        def done(batch: Batch, seen: BatchRecord) -> None:
            if crossed is None:
                stats.subtract_expressible_of(seen, updates)
            else:
                crossed.add(seen.inputs)

        batches = self.data.fitting(self.method.needs.refit)
        forward_backward(self.analysed.gm, batches, self.loss_fn, PassRequest(stats.sources, done))


def project(stats: Statistics) -> tuple[dict[str, Tensor], dict[str, tuple[float, float]]]:
    """Per consumer weight: dW*, and (Psi, E|V|^2)."""
    updates: dict[str, Tensor] = {}
    psi: dict[str, tuple[float, float]] = {}
    for name, c in stats.consumers.items():
        updates[name] = c.project(stats.exact)
        psi[name] = bottleneck(float(c.vv), c.vh, updates[name]), float(c.vv)
    return updates, psi
