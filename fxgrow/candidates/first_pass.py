"""The first pass over the data: moments of every consumer and width, and the units that follow from them.

Widths whose matrices do not fit beside each other are measured in several passes.
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
from fxgrow.candidates.isolated import IsolatedPath, isolated_paths
from fxgrow.candidates.isolated_refit import HeldOutCache
from fxgrow.candidates.multiple_passes import split_into_passes
from fxgrow.candidates.zero_unit_graph import SketchContext
from fxgrow.data.batches import HOLD_OUT_EVERY, Batch, Data
from fxgrow.data.loss import LossFn
from fxgrow.data.progress import progress as bar
from fxgrow.errors import ProfileError
from fxgrow.graph.graph import lookup
from fxgrow.initialisers.registry import Initialiser, Proposal
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
class Measurements:
    """What a first pass measured.

    Attributes:
        delta_w: dW* per consumer.
        proposals: units per width.
        bottlenecks: per width, Psi and E|V|^2 of all its consumers.
        positions: per width, sampled positions behind its second moments.
        samples: how many were read.
        loss: the sum of their losses.
        paths: of widths whose new units can be tested isolated.
        stats: on what.
        held_out: the same of held-out batches.
        mergeable: means by name, where they are to be merged with others.
    """

    delta_w: dict[str, Tensor] = field(default_factory=dict)
    proposals: dict[str, Proposal] = field(default_factory=dict)
    bottlenecks: dict[str, tuple[float, float]] = field(default_factory=dict)
    positions: dict[str, int] = field(default_factory=dict)
    samples: int = 0
    loss: float = 0.0
    paths: dict[str, IsolatedPath] = field(default_factory=dict)
    stats: Statistics | None = None
    held_out: HeldOutCache = field(default_factory=HeldOutCache)
    mergeable: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class FirstPass:
    """The first pass over a graph's data.

    Attributes:
        analysed: the graph.
        method: whose needs are collected.
        data: the batches.
        loss_fn: see `fxgrow.profile`.
        exact: every matrix from every position.
        generator: of the sampling.
        show: a progress bar.
        limit: bytes that matrices and cached activations may take, or None.
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

    def measure(self, widths: Sequence[GrowableWidth], additions: Mapping[str, int]) -> Measurements:
        """Moments of these widths, and up to so many units for each.

        Raises:
            ProfileError: a width does not fit into the limit alone.
        """
        result = Measurements()
        passes = split_into_passes(widths, self.analysed.gm, self.limit)
        isolated = self.method.needs.refit and not self.exact and len(passes) == 1
        for part in passes:
            self._measure(part, additions, result, isolated)
        return result

    def merge(
        self, parts: Sequence[Moments], widths: Sequence[GrowableWidth], additions: Mapping[str, int]
    ) -> Measurements:
        """The same from moments of several parts of the data."""
        result = Measurements(samples=sum(part.samples for part in parts), loss=sum(part.loss for part in parts))
        stats = self._statistics(widths)
        cross_moments = merge_into(stats, parts, next(self.analysed.gm.parameters()).device)
        self._project(stats, widths, result)
        if self.method.needs.project:
            subtract_by_cross_moment(stats, cross_moments, result.delta_w)
        self._propose(stats, widths, additions, result)
        return result

    def _statistics(self, widths: Sequence[GrowableWidth]) -> Statistics:
        needs = self.method.needs
        # an eighth of the memory is for caches
        limit = sys.maxsize if self.limit is None else self.limit // 8
        return Statistics(
            self.analysed,
            widths,
            exact=self.exact,
            width_moments=needs.moments,
            # with C all of N is formed at once
            project=needs.project and not self.keep,
            output_side=needs.output_side or needs.refit,
            width_cache_bytes=min(WIDTH_CACHE_BYTES, limit // max(1, len(widths))),
            isolated_cache_bytes=min(ISOLATED_CACHE_BYTES, limit),
            rows=needs.rows,
        )

    def _measure(
        self, widths: Sequence[GrowableWidth], additions: Mapping[str, int], result: Measurements, isolated: bool
    ) -> None:
        stats, process_group = self._statistics(widths), self.data.process_group
        if isolated:
            measured = [w for w in widths if w.name in stats.widths]
            result.paths, result.stats = isolated_paths(self.analysed, measured, stats.consumers), stats
            stats.cache_for_isolated(path.width for path in result.paths.values())
        loss = self.collect(stats, result.held_out)
        stats.finish(self.generator, process_group)
        result.samples, (result.loss,) = int(stats.total), process_group.sum_numbers(loss)
        self._project(stats, widths, result)
        if self.keep:
            result.mergeable |= mergeable_tensors(stats)
        if self.method.needs.project and stats.widths:
            self._subtract_expressible(stats, result)
        process_group.sum_([block for w in stats.widths.values() for _, block in sorted(w.blocks.items())])
        # random numbers are the same in all processes from here on
        self.generator.set_state(process_group.broadcast_from_rank0(self.generator.get_state))
        self._propose(stats, widths, additions, result)

    def _project(self, stats: Statistics, widths: Sequence[GrowableWidth], result: Measurements) -> None:
        """Adds dW* per consumer and the bottlenecks of widths."""
        delta_w, psi = project(stats)
        for w in widths:
            weights = {p.weight for p in w.consumers}
            parts = [psi[key] for key, c in stats.consumers.items() if c.weight in weights]
            result.bottlenecks[w.name] = sum(p for p, _ in parts), sum(v for _, v in parts)
        result.delta_w |= delta_w

    def _propose(
        self, stats: Statistics, widths: Sequence[GrowableWidth], additions: Mapping[str, int], result: Measurements
    ) -> None:
        needs = self.method.needs
        measured = {w.name: stats.widths.get(w.name) for w in widths}
        result.positions |= {name: 0 if moments is None else moments.rows for name, moments in measured.items()}
        result.proposals |= self.data.process_group.broadcast_from_rank0(
            lambda: {
                name: Proposal() if moments is None else self.method.propose(moments, stats.consumers, additions[name])
                for name, moments in measured.items()
            }
        )
        if needs.sketch:
            context = SketchContext(
                self.analysed, stats.consumers, result.delta_w, self.data, self.loss_fn, needs.refit, self.generator
            )
            result.proposals |= sketch(context, {n: additions[n] for n, moments in measured.items() if moments is None})

    def collect(self, stats: Statistics, cache: HeldOutCache | None = None) -> float:
        """Reads the data once; returns the sum of the fitting batches' losses. Held-out batches go to the cache."""
        total, held_out = 0.0, False

        def batches() -> Iterator[Batch]:
            nonlocal held_out
            for batch in self.data:
                held_out = self.method.needs.refit and self.data.is_held_out(batch)
                # the first batch is never held out, and after it the cache's size is known
                if not held_out or stats.caches_isolated:
                    yield batch

        def on_output_gradient(record: BatchRecord, node: fx.Node, v: Tensor) -> None:
            if held_out:
                record.output_gradients[node] = v
            else:
                stats.add_output_gradient(record, node, v, batches=self.data.expected(record.size))

        def on_batch(batch: Batch, record: BatchRecord) -> None:
            nonlocal total
            if not held_out:
                total += record.loss * record.size
                stats.end_batch(record)
            elif cache is not None:
                cache.expected = max(1, self.data.expected(record.size) // HOLD_OUT_EVERY)
                cache.add(record, stats.held_out_inputs, stats.isolated_targets)

        gm = self.analysed.gm
        names = [n for c in stats.consumers.values() for n in (c.weight, c.bias) if n is not None]
        request = PassRequest(
            stats.sources,
            on_batch,
            stats.uses,
            on_output_gradient,
            weights={n: lookup(gm, n) for n in names},
            weights_needed=lambda: not (held_out or stats.complete),
        )
        forward_backward(gm, bar(batches(), "profiling", self.data.batches, self.show), self.loss_fn, request)
        size = self.data.process_group.size
        (single,) = self.data.process_group.sum_numbers(self.data.batches == 1)
        if single not in (0, size):
            raise ProfileError(
                f"{single:.0f} of {size} processes have a single batch: give each at least two, so "
                "that one can be held out, or each one alone."
            )
        return total

    def _subtract_expressible(self, stats: Statistics, result: Measurements) -> None:
        """Subtracts from E[b V^T] what dW* explains of V."""
        cross_moment = InputCrossMoment(stats) if self.keep else None

        def on_batch(batch: Batch, record: BatchRecord) -> None:
            if cross_moment is None:
                stats.subtract_expressible_of(record, result.delta_w)
            else:
                cross_moment.add(record.inputs)

        if stats.exact:
            batches = self.data.fitting(self.method.needs.refit)
            forward_backward(self.analysed.gm, batches, self.loss_fn, PassRequest(stats.sources, on_batch))
        elif cross_moment is None:
            stats.subtract_expressible(result.delta_w)
        else:
            cross_moment.add_cached()
        if cross_moment is not None:
            result.mergeable |= cross_moment.tensors()
            subtract_by_cross_moment(stats, result.mergeable, result.delta_w)


def project(stats: Statistics) -> tuple[dict[str, Tensor], dict[str, tuple[float, float]]]:
    """Per consumer weight: dW*, and (Psi, E|V|^2)."""
    delta_w: dict[str, Tensor] = {}
    psi: dict[str, tuple[float, float]] = {}
    for name, c in stats.consumers.items():
        delta_w[name] = c.project(stats.exact)
        psi[name] = bottleneck(float(c.vv), c.vh, delta_w[name]), float(c.vv)
    return delta_w, psi
