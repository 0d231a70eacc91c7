"""What held-back batches say of candidates: whether they are worth anything, and how many of them.

requires: outgoing weights that were fitted on other batches.
ensures:  where there is nothing to find, next to nothing is found (`benchmarks.false_positives`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fxgrow.candidates.outgoing_weights import OutgoingWeightFit
from fxgrow.distributed import SINGLE_PROCESS, ProcessGroup
from fxgrow.statistics.consumer_moments import ConsumerMoments

#: units count where the held-back decrease of the first ones together is so many standard errors above zero
Z_THRESHOLD = 3.0


@dataclass
class SignificanceTest:
    """Candidates of one width, best first, and what the held-back batches say of them.

    Attributes:
        order: candidate numbers, best first.
        z: held-back decrease of the first ones together, in standard errors, of what existing weights cannot express.
        shares: held-back slope of each, of the same.
        coherence: curvature of whole samples over that of independent positions: neighbouring positions of a map
            move together, so a direction is worth less than its positions one by one.
    """

    order: Tensor
    z: Tensor
    shares: Tensor
    coherence: float = 1.0

    @property
    def significant(self) -> int:
        """How many of the first atoms decrease the loss most, of the numbers that do so beyond doubt.

        One by one few units of a small sample stand out from the noise; together they do, and noise still does not.
        """
        passed = self.z > Z_THRESHOLD
        return int(self.shares.cumsum(0).where(passed, -torch.inf).argmax()) + 1 if bool(passed.any()) else 0


def _per_sample(values: Tensor, size: int) -> Tensor:
    """Sums over what the model has put in a row for each sample: the frames of a clip, say."""
    return values.unflatten(0, (size, -1)).sum(1) if len(values) > size and len(values) % size == 0 else values


class Tests:
    """Per sample: the slope of the loss along each unit's fitted outgoing weights, and along a width's whole step.

    A unit is asked for what the existing weights cannot do: its slope is taken against V less what they can express.
    With V itself a network that is only badly calibrated would have every unit pass for a part of that.

    Args:
        readouts: fitted, by consumer.
        evidence: per width, with an order of its candidates; filled by `finish`.
        atoms: how many those are.
    """

    def __init__(
        self,
        readouts: Mapping[str, OutgoingWeightFit],
        evidence: Mapping[str, SignificanceTest],
        atoms: Mapping[str, int],
    ) -> None:
        self.readouts, self.evidence = readouts, evidence
        self.sums = {w: torch.zeros(k, dtype=torch.float64) for w, k in atoms.items()}
        self.squares = {w: torch.zeros(k, dtype=torch.float64) for w, k in atoms.items()}
        self.whole = dict.fromkeys(atoms, 0.0)
        self.count = 0
        #: per width and readout, the move of existing weights and the weights of new ones
        self.steps: dict[tuple[str, str], tuple[Tensor, Tensor]] = {}
        self.expressible: dict[tuple[str, str], Tensor] = {}
        self.curvature = dict.fromkeys(atoms, 0.0)
        for width, k in atoms.items():
            for name, r in readouts.items():
                if width not in r.new:
                    continue
                every = {width: torch.arange(k)}
                self.curvature[width] += r.solution(every, True)[2]
                self.steps[width, name] = r.solve(every, True)

    def add(self, size: int, uses: Iterable[tuple[str, ConsumerMoments, Tensor, Tensor, Tensor]]) -> None:
        """One batch: by readout, h and z as `taken`, the latter width by width, and V as `asked`."""
        units: dict[str, Tensor] = {}
        whole: dict[str, Tensor] = {}
        for name, c, h, z, v in uses:
            r = self.readouts[name]
            v = v if len(r.outputs) == v.shape[c.dim] else v.index_select(c.dim, r.outputs.to(v.device))
            v = v.to(r.hh.dtype)
            parts = z.to(v.dtype).split([n.numel() // c.window.taps for n in r.new.values()], c.dim)
            for (width, new), part in zip(r.new.items(), parts, strict=True):
                if (width, name) not in self.steps:
                    continue
                move, weights = self.steps[width, name]
                step = c.apply(move, h).add_(c.outgoing(weights, part))
                slope = _per_sample(step.mul_(v).flatten(1).sum(1), size)
                own = part * self._asked(name, width, c, weights, h, part, v)
                own = own.movedim(c.dim, -1).flatten(1, -2).sum(1) if own.dim() > 2 else own
                own = _per_sample(own.reshape(len(own), len(new), -1).sum(2), size)
                units[width] = units[width] + own if width in units else own
                whole[width] = whole[width] + slope if width in whole else slope
        for width, t in units.items():
            t = t.double().cpu()[:, self.evidence[width].order].cumsum(1)
            self.sums[width] += t.sum(0)
            self.squares[width] += t.square().sum(0)
            self.whole[width] += float(whole[width].double().square().sum())
        self.count += next((len(t) for t in units.values()), 0)

    def _asked(
        self, name: str, width: str, c: ConsumerMoments, weights: Tensor, h: Tensor, z: Tensor, v: Tensor
    ) -> Tensor:
        """What comes back to z of V less what the existing weights can express of it."""
        r, key = self.readouts[name], (width, name)
        if key not in self.expressible:
            # of a dense layer no more than these weights send back
            self.expressible[key] = r.expressible(None if c.window.kernel else weights)
        if c.window.kernel:
            return c.back(weights, v - c.apply(self.expressible[key], h), z)
        return c.back(weights, v, z).sub_(c.apply(self.expressible[key], h))

    def finish(self, process_group: ProcessGroup = SINGLE_PROCESS) -> None:
        self.count = int(process_group.sum_numbers(self.count)[0])
        process_group.sum_([*self.sums.values(), *self.squares.values()])
        self.whole = dict(zip(self.whole, process_group.sum_numbers(*self.whole.values()), strict=True))
        n = max(2, self.count)
        for width, e in self.evidence.items():
            mean = self.sums[width] / n
            error = ((self.squares[width] / n - mean.square()).clamp_min(0) / (n - 1)).sqrt()
            e.shares = mean.diff(prepend=mean.new_zeros(1))
            e.z = mean / error.clamp_min(1e-30)
            if self.curvature[width] > 0:
                e.coherence = max(1.0, self.whole[width] / n / self.curvature[width])
