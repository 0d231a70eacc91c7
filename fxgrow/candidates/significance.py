"""What held-out batches say of candidates: whether they lower the loss, and how many of them.

requires: outgoing weights that were fitted on other batches.
ensures:  where there is nothing to find, next to nothing is found (`benchmarks.false_positives`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from fxgrow.candidates.outgoing_weights import OutgoingWeightFit
from fxgrow.distributed import SINGLE_PROCESS, ProcessGroup
from fxgrow.statistics.consumer_moments import ConsumerMoments

#: units count where the held-out decrease of the first ones together is so many standard errors above zero
Z_THRESHOLD = 3.0


@dataclass
class SignificanceTest:
    """Candidates of one width, best first, and what the held-out batches say of them.

    Attributes:
        order: numbers of the candidate unit groups, best first.
        z: held-out decrease of the first ones together, in standard errors, of what existing weights cannot express.
        shares: held-out slope of each, of the same.
        coherence: curvature of samples over that of independent positions: neighbouring positions of a map move
            together, so a direction gains less than its positions one by one.
    """

    order: Tensor
    z: Tensor
    shares: Tensor
    coherence: float = 1.0

    @property
    def significant(self) -> int:
        """How many of the first groups decrease the loss most, of the numbers that do so beyond doubt.

        One by one few units of a small sample stand out from the noise; together they do, and noise still does not.
        """
        passed = self.z > Z_THRESHOLD
        return int(self.shares.cumsum(0).where(passed, -torch.inf).argmax()) + 1 if bool(passed.any()) else 0


class ConsumerBatch(NamedTuple):
    """One use of a consumer's weight in one batch: layer input, activations of new units in it, output gradient.

    Their rows belong to so many samples: one where they are not laid out by sample.
    """

    consumer: ConsumerMoments
    h: Tensor
    z: Tensor
    v: Tensor
    samples: int


class HeldOutSlopes:
    """Per sample: slopes of the loss along each unit group's fitted outgoing weights, and along a width's whole step.

    A unit is tested on what the existing weights cannot do: its slope is that of V less what they can express. With V
    itself a network that is only badly calibrated would have every unit pass for a part of that.

    Args:
        fits: by consumer.
        tests: per width, with an order of its candidates; filled by `finish`.
        unit_groups: how many candidates those are.
    """

    def __init__(
        self,
        fits: Mapping[str, OutgoingWeightFit],
        tests: Mapping[str, SignificanceTest],
        unit_groups: Mapping[str, int],
    ) -> None:
        self.fits, self.tests = fits, tests
        self.sums = {w: torch.zeros(k, dtype=torch.float64) for w, k in unit_groups.items()}
        self.squares = {w: torch.zeros(k, dtype=torch.float64) for w, k in unit_groups.items()}
        self.step_squares = dict.fromkeys(unit_groups, 0.0)
        self.samples = 0
        #: per width, the slopes that were added: one per sample, or one per batch where a use has no samples
        self.counts = dict.fromkeys(unit_groups, 0)
        #: per width and consumer, the update of existing weights and the weights of new units
        self.steps: dict[tuple[str, str], tuple[Tensor, Tensor]] = {}
        self.expressible: dict[tuple[str, str], Tensor] = {}
        self.curvature = dict.fromkeys(unit_groups, 0.0)
        for width, k in unit_groups.items():
            for name, fit in fits.items():
                if width in fit.new:
                    groups = {width: torch.arange(k)}
                    self.curvature[width] += fit.solution(groups, True)[2]
                    self.steps[width, name] = fit.solve(groups, True)

    def add(self, size: int, uses: Iterable[tuple[str, ConsumerBatch]]) -> None:
        """Adds one batch of `size` samples: uses by consumer, z width by width."""
        slopes: dict[str, tuple[Tensor, Tensor]] = {}
        for name, use in uses:
            for width, unit, step in self._slopes(name, use):
                before = slopes.get(width, (torch.zeros_like(unit), torch.zeros_like(step)))
                slopes[width] = _sum(before[0], unit), _sum(before[1], step)
        for width, (unit, step) in slopes.items():
            t = unit.double().cpu()[:, self.tests[width].order].cumsum(1)
            self.sums[width] += t.sum(0)
            self.squares[width] += t.square().sum(0)
            self.step_squares[width] += float(step.double().square().sum())
            self.counts[width] += len(unit)
        self.samples += size if slopes else 0

    def _slopes(self, name: str, use: ConsumerBatch) -> Iterable[tuple[str, Tensor, Tensor]]:
        """Yields width, slope of each unit group and slope of the step, per sample."""
        fit, (c, h, z, v, samples) = self.fits[name], use
        v = v if len(fit.outputs) == v.shape[c.dim] else v.index_select(c.dim, fit.outputs.to(v.device))
        v = v.to(fit.hh.dtype)
        parts = z.to(v.dtype).split([n.numel() // c.window.taps for n in fit.new.values()], c.dim)
        for (width, columns), part in zip(fit.new.items(), parts, strict=True):
            if (width, name) not in self.steps:
                continue
            delta_w, weights = self.steps[width, name]
            step = c.apply(delta_w, h).add_(c.outgoing(weights, part)).mul_(v)
            unit = part * self._unit_gradient(name, width, ConsumerBatch(c, h, part, v, samples))
            unit = unit.movedim(c.dim, -1).flatten(1, -2).sum(1) if unit.dim() > 2 else unit
            unit = unit.reshape(len(unit), len(columns), -1).sum(2).unflatten(0, (samples, -1)).sum(1)
            yield width, unit, step.reshape(samples, -1).sum(1)

    def _unit_gradient(self, name: str, width: str, use: ConsumerBatch) -> Tensor:
        """The gradient at z of V less what the existing weights can express of it."""
        (c, h, z, v, _), weights, key = use, self.steps[width, name][1], (width, name)
        if key not in self.expressible:
            # of a dense layer no more than these weights send back
            self.expressible[key] = self.fits[name].expressible(None if c.window.kernel else weights)
        if c.window.kernel:
            return c.back(weights, v - c.apply(self.expressible[key], h), z)
        return c.back(weights, v, z).sub_(c.apply(self.expressible[key], h))

    def finish(self, process_group: ProcessGroup = SINGLE_PROCESS) -> None:
        """Fills the tests from the sums of all processes."""
        process_group.sum_([*self.sums.values(), *self.squares.values()])
        squares = process_group.sum_numbers(*self.step_squares.values())
        samples, *counts = process_group.sum_numbers(self.samples, *self.counts.values())
        for (width, test), square, count in zip(self.tests.items(), squares, counts, strict=True):
            n = max(2, int(count))
            mean = self.sums[width] / n
            error = ((self.squares[width] / n - mean.square()).clamp_min(0) / (n - 1)).sqrt()
            test.shares = mean.diff(prepend=mean.new_zeros(1))
            test.z = mean / error.clamp_min(1e-30)
            if self.curvature[width] > 0:
                test.coherence = max(1.0, square / max(2.0, samples) / self.curvature[width])


def _sum(a: Tensor, b: Tensor) -> Tensor:
    """Adds slopes of the same samples, or of whole batches where one of them has no samples."""
    return a + b if len(a) == len(b) else a.sum(0, keepdim=True) + b.sum(0, keepdim=True)
