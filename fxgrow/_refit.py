"""What a plan needs to choose and weigh units: readouts of every consumer, evidence for every width.

Where units cannot be run by themselves (`_trials.py`) the widened network is: once on the fitting batches, where
E[V [h, z]^T] is the weight gradient of the widened consumer, and once on the held-back ones, where each unit is tested.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, fx

from fxgrow._candidates import Candidates
from fxgrow._consumer import Consumer, consumers_of, reads_of
from fxgrow._data import Batch, Data, LossFn
from fxgrow._evidence import Evidence, Tests
from fxgrow._graph import lookup
from fxgrow._pass import Seen, run_pass
from fxgrow._readout import Readout
from fxgrow._sums import sum_consumers
from fxgrow._world import ALONE, World

#: second moments of inputs are estimated from about so many samples
SAMPLES = 1024


@dataclass
class Refit:
    """Everything a plan needs to choose and weigh units."""

    readouts: dict[str, Readout] = field(default_factory=dict)
    evidence: dict[str, Evidence] = field(default_factory=dict)
    #: held-back samples that were read, and the sum of their losses
    samples: int = 0
    loss: float = 0.0

    def of(self, width: str) -> list[Readout]:
        return [r for r in self.readouts.values() if width in r.new]

    def joint(self, width: str, k: int) -> float:
        """Predicted decrease by k atoms and the update of existing weights together, p = max(s, 0)^2 / 2q."""
        e = self.evidence[width]
        units = e.order[:k].sort().values
        return decrease([r.predict({width: units}, True) for r in self.of(width)]) / e.coherence

    def marginal(self, width: str, k: int) -> float:
        """Predicted decrease that k atoms add to what updating the existing weights alone would bring.

        p(units + dW) - p(dW alone), fitted on one part of the data, measured on the other.
        """
        alone = decrease([r.predict({}, True) for r in self.of(width)]) / self.evidence[width].coherence
        return max(0.0, self.joint(width, k) - alone)

    def rank(self, atoms: Mapping[str, int], world: World = ALONE) -> None:
        """Orders the candidates of each width, so many each, by their part of the fitted slope."""
        self.evidence |= world.first(lambda: self._ranked(atoms))

    def _ranked(self, atoms: Mapping[str, int]) -> dict[str, Evidence]:
        found = {}
        for width, k in atoms.items():
            share = torch.zeros(k)
            for r in self.of(width):
                weights, columns = r.solve({width: torch.arange(k)}, True)
                own = weights[:, len(r.old) :] * r.fit[:, columns[len(r.old) :]]
                share += own.sum(0).view(k, -1).sum(1).float().cpu()
            order = share.argsort(descending=True)
            found[width] = Evidence(order, torch.zeros(k), torch.zeros(k))
        return found

    def share(self, world: World) -> None:
        """Held-back samples, losses and sums of V [h, z]^T of all processes; the last become means."""
        samples, self.loss = world.total(self.samples, self.loss)
        self.samples = int(samples)
        world.sum_([r.held for r in self.readouts.values()])
        for r in self.readouts.values():
            r.held = r.held / max(1, self.samples)

    def join(self, other: Refit) -> None:
        """Adds other widths; of samples that were read twice one count is kept."""
        self.readouts |= other.readouts
        self.evidence |= other.evidence
        if other.samples:
            self.samples, self.loss = other.samples, other.loss


def decrease(terms: Sequence[tuple[float, float]]) -> float:
    """Largest decrease along a direction with these slopes and curvatures."""
    s, q = sum(t[0] for t in terms), sum(t[1] for t in terms)
    return 0.5 * max(s, 0.0) ** 2 / q if q > 0 else 0.0


def run_refit(
    found: Candidates,
    data: Data,
    loss_fn: LossFn | None,
    generator: torch.Generator,
    widths: Collection[str] | None = None,
) -> Refit:
    """Two passes over the candidate graph for these of its widths (None: all): fitting batches, then held-back ones."""
    graph, world = found.graph, data.world
    atoms = {w: k for w, k in found.atoms.items() if widths is None or w in widths}
    consumers = _consumers(found, atoms)
    if not consumers:
        return Refit()
    reads = reads_of(consumers)
    weights = {
        n: lookup(graph, n) for c in consumers.values() for n in ([c.weight] if c.bias is None else [c.weight, c.bias])
    }
    count = 0

    def read_fit(seen: Seen, node: fx.Node, v: Tensor) -> None:
        batches = data.expected(seen.size)
        keep = math.ceil(SAMPLES / batches)
        for c, p in reads[node]:
            h = c.taken(seen.inputs[p.source][:keep])
            c.add_rows(h, c.asked(v[:keep]), seen.size, generator, 1 / batches, world.size)

    def done(batch: Batch, seen: Seen) -> None:
        nonlocal count
        count += seen.size
        for c in consumers.values():
            c.add_gradient(seen)

    sources, targets = {p.source for own in reads.values() for _, p in own}, list(reads)
    run_pass(
        graph,
        data.fitting(),
        loss_fn,
        sources=sources,
        targets=targets,
        weights=weights,
        reader=read_fit,
        done=done,
    )
    out = Refit()
    total = sum_consumers(consumers, count, world)
    for name, c in consumers.items():
        c.finish(total)
        out.readouts[name] = _readout(c, found)
        c.vh = torch.zeros(0)
    out.rank(atoms, world)
    channels = {
        name: {w: places for (w, dim), places in found.places[c.weight].items() if dim == c.uses[0].in_dim}
        for name, c in consumers.items()
    }
    tests = Tests(out, atoms, channels)
    count = 0
    held: dict[fx.Node, Tensor] = {}

    def done_held(batch: Batch, seen: Seen) -> None:
        done(batch, seen)
        out.samples += seen.size
        out.loss += seen.loss * seen.size
        tests.add(
            seen.size,
            [
                (name, c, c.taken(seen.inputs[p.source]), c.asked(held[p.node]))
                for name, c in consumers.items()
                for p in c.uses
            ],
        )
        held.clear()

    run_pass(
        graph,
        data.held_back(),
        loss_fn,
        sources=sources,
        targets=targets,
        weights=weights,
        reader=lambda seen, node, v: held.__setitem__(node, v),
        done=done_held,
    )
    for r, c in zip(out.readouts.values(), consumers.values(), strict=True):
        r.held = c.vh[r.outputs] if len(c.vh) else torch.zeros_like(r.fit)
    out.share(world)
    tests.finish(world)
    return out


def _consumers(found: Candidates, wanted: Collection[str]) -> dict[str, Consumer]:
    readers = {
        p.weight for p in found.projections if any((w, p.in_dim) in found.places.get(p.weight, {}) for w in wanted)
    }
    order = dict.fromkeys(p.weight for p in found.projections if p.weight in readers)
    return {name: c for weight in order for name, c in consumers_of(weight, found.projections).items()}


def _readout(c: Consumer, found: Candidates) -> Readout:
    if c.m is None:
        raise RuntimeError("no rows were added")
    taps = c.window.taps
    new: dict[str, Tensor] = {}
    channels = torch.ones((c.vh.shape[1] - (c.bias is not None)) // taps, dtype=torch.bool)
    for (width, dim), positions in found.places[c.weight].items():
        if dim == c.uses[0].in_dim:
            channels[positions] = False
            columns = positions[:, None] * taps + torch.arange(taps)
            new[width] = columns.reshape(found.atoms[width], -1).to(c.vh.device)
    old = (channels.nonzero() * taps + torch.arange(taps)).flatten()
    if c.bias is not None:
        old = torch.cat([old, torch.tensor([c.vh.shape[1] - 1])])
    old = old.to(c.vh.device)
    groups = 1 if c.uses[0].experts else c.groups
    rows = torch.ones(len(c.vh) * groups, dtype=torch.bool)
    for (_, dim), positions in found.places[c.weight].items():
        if dim == c.uses[0].out_dim:
            rows[(positions[:, None] * c.fan + torch.arange(c.fan)).flatten()] = False
    rows = rows if groups == 1 else rows.unflatten(0, (groups, -1))[c.group]
    outputs, fit = rows.nonzero().flatten().to(c.vh.device), c.vh[rows.to(c.vh.device)]
    g = c.curvature()[outputs][:, outputs]
    z = torch.cat([n.flatten() for n in new.values()]) if new else old[:0]
    hh, hz, zz = c.m[old][:, old], c.m[old][:, z], c.m[z][:, z]
    return Readout(c.weight, c.bias, c.uses[0], outputs, old, new, hh, hz, zz, g, fit, torch.zeros_like(fit))
