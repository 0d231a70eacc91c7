"""What a plan needs to choose and weigh units: outgoing weights of every consumer, a test for every width."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

from fxgrow.candidates.outgoing_weights import OutgoingWeightFit
from fxgrow.candidates.significance import SignificanceTest
from fxgrow.distributed import SINGLE_PROCESS, ProcessGroup


@dataclass
class Refit:
    """Everything a plan needs to choose and weigh units.

    Attributes:
        fits: outgoing weights, by consumer.
        tests: significance of the candidates, by width.
        samples: held-out samples that were read.
        loss: the sum of their losses.
    """

    fits: dict[str, OutgoingWeightFit] = field(default_factory=dict)
    tests: dict[str, SignificanceTest] = field(default_factory=dict)
    samples: int = 0
    loss: float = 0.0

    def of(self, width: str) -> list[OutgoingWeightFit]:
        """The consumers that read a width."""
        return [fit for fit in self.fits.values() if width in fit.new]

    def joint(self, width: str, k: int) -> float:
        """Predicted decrease by k unit groups and the update of existing weights together, p = max(s, 0)^2 / 2q."""
        test = self.tests[width]
        groups = test.order[:k].sort().values
        return decrease([fit.predict({width: groups}, True) for fit in self.of(width)]) / test.coherence

    def marginal(self, width: str, k: int) -> float:
        """Predicted decrease that k unit groups add to what updating the existing weights alone would bring.

        p(units + dW) - p(dW alone), fitted on one part of the data, measured on the other.
        """
        alone = decrease([fit.predict({}, True) for fit in self.of(width)]) / self.tests[width].coherence
        return max(0.0, self.joint(width, k) - alone)

    def rank(self, unit_groups: Mapping[str, int], process_group: ProcessGroup = SINGLE_PROCESS) -> None:
        """Orders the candidates of each width, so many each, by their part of the fitted slope."""
        self.tests |= process_group.broadcast_from_rank0(
            lambda: {width: self._ranked(width, k) for width, k in unit_groups.items()}
        )

    def _ranked(self, width: str, k: int) -> SignificanceTest:
        slopes = torch.zeros(k)
        for fit in self.of(width):
            weights, z, _ = fit.solution({width: torch.arange(k)}, True)
            slopes += (weights * fit.fit[1][:, z]).sum(0).view(k, -1).sum(1).float().cpu()
        return SignificanceTest(slopes.argsort(descending=True), torch.zeros(k), torch.zeros(k))

    def reduce(self, process_group: ProcessGroup) -> None:
        """Held-out samples, losses and sums of V [h, z]^T of all processes; the last become means."""
        samples, self.loss = process_group.sum_numbers(self.samples, self.loss)
        self.samples = int(samples)
        process_group.sum_([t for fit in self.fits.values() for t in fit.held_out])
        for fit in self.fits.values():
            vh, vz = fit.held_out
            fit.held_out = vh / max(1, self.samples), vz / max(1, self.samples)

    def join(self, other: Refit) -> None:
        """Adds other widths; of samples that were read twice one count is kept."""
        self.fits |= other.fits
        self.tests |= other.tests
        if other.samples:
            self.samples, self.loss = other.samples, other.loss


def decrease(terms: Sequence[tuple[float, float]]) -> float:
    """Largest decrease along a direction with these slopes and curvatures."""
    s, q = sum(t[0] for t in terms), sum(t[1] for t in terms)
    return 0.5 * max(s, 0.0) ** 2 / q if q > 0 else 0.0
