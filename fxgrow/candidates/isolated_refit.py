"""New units tried by themselves: no pass over the widened network, and none at all where the first reading remembers.

requires: the statistics of a first reading, and the ways of widths whose new units can be run apart (`isolated.py`).
ensures:  the same readouts and evidence as `run_refit` gives from the widened network.

New units put out z, from what their producers read. Nobody reads them yet, so V and h are what they were: what a
refit needs beyond the first reading is E[V z^T], E[h z^T] and E[z z^T].
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, fx

from fxgrow.candidates.isolated import IsolatedPath
from fxgrow.candidates.outgoing_weights import OutgoingWeightFit
from fxgrow.candidates.refit import Refit
from fxgrow.candidates.significance import Tests
from fxgrow.data.batches import Batch, Data
from fxgrow.data.loss import LossFn
from fxgrow.graph.evaluate import eval_mode
from fxgrow.initialisers.registry import Proposal
from fxgrow.statistics.activation_cache import ActivationCache, Span
from fxgrow.statistics.collect import Statistics
from fxgrow.statistics.consumer_moments import ConsumerMoments
from fxgrow.statistics.forward_backward import BatchRecord, PassRequest, forward_backward
from fxgrow.statistics.gram import accumulating, matrix_product

#: by node, a tensor of some samples
Values = Mapping[fx.Node, Tensor]
#: called with how many samples, what entered weights and what came back to their outputs
Visit = Callable[[int, Values, Values], None]


@dataclass
class HeldOutCache:
    """Held-back batches that the first reading has remembered: inputs, V and the sum of the losses."""

    cache: ActivationCache = field(default_factory=ActivationCache)
    samples: int = 0
    loss: float = 0.0

    def add(self, seen: BatchRecord, sources: Iterable[fx.Node], targets: Iterable[fx.Node], updates: Values) -> None:
        """One batch: remembers what sources put out and what came back to targets."""
        self.samples += seen.size
        self.loss += seen.loss * seen.size
        for node in sources:
            self.cache.add_input(node, seen.inputs[node], seen.size)
        for node in targets:
            self.cache.add_output_gradient(node, updates[node], seen.size)


@dataclass
class IsolatedRefit:
    """New units of several widths, and what they are tried on.

    Attributes:
        ways: by width.
        proposals: by width, as many rows as units are to be tried.
        stats: of the first reading.
        held: what it remembers of held-back batches.
    """

    ways: Mapping[str, IsolatedPath]
    proposals: Mapping[str, Proposal]
    atoms: Mapping[str, int]
    stats: Statistics
    held: HeldOutCache
    data: Data
    loss_fn: LossFn | None

    def __post_init__(self) -> None:
        #: by consumer, the width that it reads
        self.reads: dict[str, str] = {}
        for name, way in self.ways.items():
            for p in way.hidden.consumers:
                self.reads[p.weight] = name
        #: what new units put out for batches that are remembered whole
        self.known: dict[tuple[str, Span], Values] = {}
        self.consumers = {name: self.stats.consumers[name] for name in self.reads}
        self.sources = list(dict.fromkeys(n for way in self.ways.values() for n in way.sources))
        self.targets = list(dict.fromkeys(p.node for c in self.consumers.values() for p in c.uses))
        self.inputs = list(dict.fromkeys([*self.sources, *(p.source for c in self.consumers.values() for p in c.uses)]))

    def run(self) -> Refit:
        """Fits on the fitting batches, tests on the held-back ones."""
        gm = next(iter(self.ways.values())).gm
        out = Refit()
        with eval_mode(gm):
            sums = self._fitted(gm)
            for name, c in self.consumers.items():
                out.readouts[name] = self._readout(c, *sums[name])
            self.known.clear()
            out.rank(self.atoms, self.data.process_group)
            self._test(gm, out)
        return out

    # -- fitting

    def _fitted(self, gm: fx.GraphModule) -> dict[str, tuple[Tensor, Tensor]]:
        """Per consumer E[V h^T] and E[V z^T]."""
        vz: dict[str, Tensor] = {}

        def visit(size: int, inputs: Values, updates: Values, span: Span | None = None) -> None:
            for width, way in self.ways.items():
                z = way.put_out(self.proposals[width], inputs)
                if span is not None and self.stats.complete:
                    self.known[width, span] = z
                for name in (n for n, w in self.reads.items() if w == width):
                    c = self.consumers[name]
                    for p in c.uses:
                        _add(vz, name, c.outer(c.output_gradient(updates[p.node]), c.layer_input(z[p.source])))

        if self.held.samples:
            for span, inputs, updates in self.stats.cache.groups(None, self.sources, self.targets):
                visit(len(inputs[self.sources[0]]), inputs, updates, span)
        else:
            self._read(gm, self.data.fitting(), self.sources, visit)
        # the first reading saw the same V and h
        self.data.process_group.sum_([vz[name] for name in self.consumers])
        return {name: (c.vh, vz[name] / self.stats.total) for name, c in self.consumers.items()}

    def _read(self, gm: fx.GraphModule, batches: Iterator[Batch], sources: list[fx.Node], visit: Visit) -> HeldOutCache:
        """A pass; returns samples and the sum of losses."""
        updates: dict[fx.Node, Tensor] = {}
        read = HeldOutCache()

        def done(batch: Batch, seen: BatchRecord) -> None:
            read.add(seen, (), (), {})
            visit(seen.size, seen.inputs, updates)
            updates.clear()

        request = PassRequest(sources, done, self.targets, lambda seen, node, v: updates.__setitem__(node, v))
        forward_backward(gm, batches, self.loss_fn, request)
        return read

    def _readout(self, c: ConsumerMoments, vh: Tensor, vz: Tensor) -> OutgoingWeightFit:
        if c.m is None:
            raise RuntimeError("no rows were added")
        width = self.reads[c.weight]
        hz, zz = self._second_moments(c, width)
        new = {width: torch.arange(vz.shape[1], device=vz.device).view(self.atoms[width], -1)}
        outputs = torch.arange(len(vh), device=vh.device)
        held = torch.zeros_like(vh), torch.zeros_like(vz)
        r = OutgoingWeightFit(c.weight, c.bias, c.uses[0], outputs, new, c.m, hz, zz, c.curvature(), (vh, vz), held)
        if self.held.samples:  # the same E[V h^T], so the same dW*
            r.root, r.move = c.input_factor, c.delta_w
        return r

    @torch.no_grad()
    def _second_moments(self, c: ConsumerMoments, width: str) -> tuple[Tensor, Tensor]:
        """E[h z^T] and E[z z^T], from the rows that E[h h^T] is from."""
        cache = self.stats.cache
        total: list[Tensor] = []
        for drawn in c.sampled:
            (h,) = cache.read([drawn.use.source], drawn.span, drawn.keep)
            known = self.known.get((width, drawn.span))
            if known is None:
                way = self.ways[width]
                sources = cache.read(way.sources, drawn.span, drawn.keep)
                known = way.put_out(self.proposals[width], dict(zip(way.sources, sources, strict=True)))
            z = known[drawn.use.source]
            for part in drawn.parts:
                right = accumulating(c.input_rows(c.layer_input(z), part))
                left = accumulating(c.input_rows(c.layer_input(h), part))
                moments = [matrix_product(left.mT, right), matrix_product(right.mT, right)]
                if c.bias is not None:
                    moments[0] = torch.cat([moments[0], right.sum(0, keepdim=True)])
                moments = [m.mul_(drawn.scale / self.stats.total) for m in moments]
                total = [a.add_(b) for a, b in zip(total, moments, strict=True)] if total else moments
        self.data.process_group.sum_(total)
        return total[0], total[1]

    # -- the held-back test

    def _test(self, gm: fx.GraphModule, out: Refit) -> None:
        tests = Tests(out.readouts, out.evidence, self.atoms)
        vh: dict[str, Tensor] = {}
        vz: dict[str, Tensor] = {}

        def visit(size: int, inputs: Values, updates: Values) -> None:
            uses = []
            for width, way in self.ways.items():
                z = way.put_out(self.proposals[width], inputs)
                for name in (n for n, w in self.reads.items() if w == width):
                    c = self.consumers[name]
                    for p in c.uses:
                        h, own, v = (
                            c.layer_input(inputs[p.source]),
                            c.layer_input(z[p.source]),
                            c.output_gradient(updates[p.node]),
                        )
                        _add(vh, name, c.products(h, v))
                        _add(vz, name, c.outer(v, own))
                        uses.append((name, c, h, own, v))
            tests.add(size, uses)

        held = self.held
        if held.samples:
            for _, inputs, updates in held.cache.groups(None, self.inputs, self.targets):
                visit(len(inputs[self.sources[0]]), inputs, updates)
        else:
            held = self._read(gm, self.data.held_out(), self.inputs, visit)
        out.samples, out.loss = held.samples, held.loss
        for name, r in out.readouts.items():
            if name in vh:
                r.held = vh[name], vz[name]
        out.share(self.data.process_group)
        tests.finish(self.data.process_group)


def _add(total: dict[str, Tensor], name: str, own: Tensor) -> None:
    total[name] = total[name].add_(own) if name in total else own
