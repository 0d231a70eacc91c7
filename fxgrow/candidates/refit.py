"""What a plan needs to choose and weigh units: readouts of every consumer, evidence for every width.

Where units cannot be run by themselves (`isolated_refit.py`) the widened network is: once on the fitting batches, where
E[V [h, z]^T] is the weight gradient of the widened consumer, and once on the held-back ones, where each unit is tested.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, fx

from fxgrow.candidates.outgoing_weights import OutgoingWeightFit
from fxgrow.candidates.significance import SignificanceTest, Tests
from fxgrow.candidates.widened import Candidates
from fxgrow.data.batches import Batch, Data
from fxgrow.data.loss import LossFn
from fxgrow.distributed import SINGLE_PROCESS, ProcessGroup
from fxgrow.graph.graph import lookup
from fxgrow.statistics.all_reduce import sum_consumers
from fxgrow.statistics.consumer_moments import ConsumerMoments, consumers_of, uses_by_node
from fxgrow.statistics.forward_backward import BatchRecord, PassRequest, forward_backward

#: second moments of inputs are estimated from about so many samples
SAMPLES = 1024


@dataclass
class Refit:
    """Everything a plan needs to choose and weigh units."""

    readouts: dict[str, OutgoingWeightFit] = field(default_factory=dict)
    evidence: dict[str, SignificanceTest] = field(default_factory=dict)
    #: held-back samples that were read, and the sum of their losses
    samples: int = 0
    loss: float = 0.0

    def of(self, width: str) -> list[OutgoingWeightFit]:
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

    def rank(self, atoms: Mapping[str, int], process_group: ProcessGroup = SINGLE_PROCESS) -> None:
        """Orders the candidates of each width, so many each, by their part of the fitted slope."""
        self.evidence |= process_group.broadcast_from_rank0(lambda: self._ranked(atoms))

    def _ranked(self, atoms: Mapping[str, int]) -> dict[str, SignificanceTest]:
        found = {}
        for width, k in atoms.items():
            share = torch.zeros(k)
            for r in self.of(width):
                weights, z, _ = r.solution({width: torch.arange(k)}, True)
                share += (weights * r.fit[1][:, z]).sum(0).view(k, -1).sum(1).float().cpu()
            order = share.argsort(descending=True)
            found[width] = SignificanceTest(order, torch.zeros(k), torch.zeros(k))
        return found

    def share(self, process_group: ProcessGroup) -> None:
        """Held-back samples, losses and sums of V [h, z]^T of all processes; the last become means."""
        samples, self.loss = process_group.sum_numbers(self.samples, self.loss)
        self.samples = int(samples)
        process_group.sum_([t for r in self.readouts.values() for t in r.held])
        for r in self.readouts.values():
            r.held = r.held[0] / max(1, self.samples), r.held[1] / max(1, self.samples)

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
    graph, process_group = found.gm, data.process_group
    atoms = {w: k for w, k in found.unit_groups.items() if widths is None or w in widths}
    consumers = _consumers(found, atoms)
    if not consumers:
        return Refit()
    reads = uses_by_node(consumers)
    weights = {
        n: lookup(graph, n) for c in consumers.values() for n in ([c.weight] if c.bias is None else [c.weight, c.bias])
    }
    count = 0

    def read_fit(seen: BatchRecord, node: fx.Node, v: Tensor) -> None:
        batches = data.expected(seen.size)
        keep = math.ceil(SAMPLES / batches)
        for c, p in reads[node]:
            h = c.layer_input(seen.inputs[p.source][:keep])
            c.add_rows(h, c.output_gradient(v[:keep]), seen.size, generator, 1 / batches, process_group.size)

    def done(batch: Batch, seen: BatchRecord) -> None:
        nonlocal count
        count += seen.size
        for c in consumers.values():
            c.add_gradient(seen)

    sources, targets = {p.source for own in reads.values() for _, p in own}, list(reads)
    forward_backward(graph, data.fitting(), loss_fn, PassRequest(sources, done, targets, read_fit, weights))
    out = Refit()
    total = sum_consumers(consumers, count, process_group)
    sides = {name: _sides(c, found) for name, c in consumers.items()}
    for name, c in consumers.items():
        c.finish(total)
        out.readouts[name] = _readout(c, found, *_columns(c, *sides[name]))
        # the readout has what it needs of them
        c.vh, c.m, c.g = torch.zeros(0), None, None
    out.rank(atoms, process_group)
    tests = Tests(out.readouts, out.evidence, atoms)
    count = 0
    held: dict[fx.Node, Tensor] = {}

    def done_held(batch: Batch, seen: BatchRecord) -> None:
        done(batch, seen)
        out.samples += seen.size
        out.loss += seen.loss * seen.size
        uses = []
        for name, c in consumers.items():
            for p in c.uses:
                h, z = (c.layer_input(seen.inputs[p.source]).index_select(c.dim, side) for side in sides[name])
                uses.append((name, c, h, z, c.output_gradient(held[p.node])))
        tests.add(seen.size, uses)
        held.clear()

    request = PassRequest(sources, done_held, targets, lambda seen, node, v: held.__setitem__(node, v), weights)
    forward_backward(graph, data.held_out(), loss_fn, request)
    for name, c in consumers.items():
        if len(c.vh):
            r, (old, z) = out.readouts[name], _columns(c, *sides[name])
            r.held = c.vh[r.outputs][:, old], c.vh[r.outputs][:, z]
    out.share(process_group)
    tests.finish(process_group)
    return out


def _consumers(found: Candidates, wanted: Collection[str]) -> dict[str, ConsumerMoments]:
    readers = {
        p.weight for p in found.projections if any((w, p.in_dim) in found.new_indices.get(p.weight, {}) for w in wanted)
    }
    order = dict.fromkeys(p.weight for p in found.projections if p.weight in readers)
    return {name: c for weight in order for name, c in consumers_of(weight, found.projections).items()}


def _places(c: ConsumerMoments, found: Candidates) -> dict[str, Tensor]:
    """Of each width's new channels in what a weight reads."""
    return {w: at for (w, dim), at in found.new_indices[c.weight].items() if dim == c.uses[0].in_dim}


def _sides(c: ConsumerMoments, found: Candidates) -> tuple[Tensor, Tensor]:
    """Old and new channels in what a weight reads, the latter width by width."""
    new = torch.cat(list(_places(c, found).values()))
    old = torch.ones((c.vh.shape[1] - (c.bias is not None)) // c.window.taps, dtype=torch.bool)
    old[new] = False
    return old.nonzero().flatten().to(c.vh.device), new.to(c.vh.device)


def _columns(c: ConsumerMoments, *sides: Tensor) -> tuple[Tensor, Tensor]:
    """The same in the columns of the weight, and the bias with the old ones."""
    taps = torch.arange(c.window.taps, device=c.vh.device)
    old, new = ((side[:, None] * len(taps) + taps).flatten() for side in sides)
    return (old if c.bias is None else torch.cat([old, old.new_tensor([c.vh.shape[1] - 1])])), new


def _readout(c: ConsumerMoments, found: Candidates, old: Tensor, z: Tensor) -> OutgoingWeightFit:
    if c.m is None:
        raise RuntimeError("no rows were added")
    own = _places(c, found)
    parts = torch.arange(len(z), device=z.device).split([len(at) * c.window.taps for at in own.values()])
    new = {w: part.view(found.unit_groups[w], -1) for w, part in zip(own, parts, strict=True)}
    groups = 1 if c.uses[0].experts else c.groups
    rows = torch.ones(len(c.vh) * groups, dtype=torch.bool)
    for (_, dim), positions in found.new_indices[c.weight].items():
        if dim == c.uses[0].out_dim:
            rows[(positions[:, None] * c.kernel_taps + torch.arange(c.kernel_taps)).flatten()] = False
    rows = rows if groups == 1 else rows.unflatten(0, (groups, -1))[c.group]
    outputs = rows.nonzero().flatten().to(c.vh.device)
    g = c.curvature()[outputs][:, outputs]
    fit = c.vh[outputs][:, old], c.vh[outputs][:, z]
    held = torch.zeros_like(fit[0]), torch.zeros_like(fit[1])
    hh, hz, zz = c.m[old][:, old], c.m[old][:, z], c.m[z][:, z]
    return OutgoingWeightFit(c.weight, c.bias, c.uses[0], outputs, new, hh, hz, zz, g, fit, held)
