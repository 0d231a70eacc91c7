"""Firefly: splits and small new units, tried out together by a few gradient steps; those that help most are kept.

Wu, Liu, Stone, Liu: "Firefly Neural Architecture Descent: a General Approach for Growing Neural Networks", NeurIPS
2020, arXiv 2102.08574, section 2, the part that widens. Candidates are a split of every unit, theta + delta and theta -
delta with half the outgoing weights each, and as many new units as are asked for, with tiny outgoing weights omega.
First deltas `[units, D]`, incoming weights alpha `[k, D]` of new units and omega `[k, D']` alone take `STEPS` gradient
steps, kept within eps; then the loss is expanded to first order in how far each candidate is switched on, and those
with the largest predicted decrease stay.

A candidate's decrease is its slope integrated from off to on with the others on, as in the paper. Along delta the slope
is zero at zero and grows linearly, which makes -<dL/d delta, delta> / 2; along omega it is nearly constant, which makes
-<dL/d omega, omega>.

Here eps is `EPS` times the mean length of a width's weights (the paper: a constant), steps have a fixed length per unit
along its gradient (the paper: an optimiser), followers of a new unit (norms, depthwise kernels) are those of an old one
drawn at random, with running statistics of their own, and a line search scales deltas and omega together. New layers
are no candidates.
"""

from __future__ import annotations

import itertools
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional as F

from fxgrow.analysis.widths import GrowableWidth
from fxgrow.initialisers.registry import InitialiserRequest, Splits, initialiser
from fxgrow.initialisers.splits import SplitGraph, SplitInitialiser, gradients, unit_vectors

#: largest length of delta and omega, relative to incoming and outgoing weights of the width
EPS = 0.1
#: gradient steps on the candidates, each of this part of eps
STEPS, RATE = 12, 0.25


@initialiser("firefly", moments=False)
class Firefly(SplitInitialiser):
    """See the top of the file."""

    nothing = "no split and no new unit lowers the loss to first order"

    def splits(self, request: InitialiserRequest) -> tuple[dict[str, Splits], float]:
        """All candidates, after the gradient steps."""
        candidates = {w.name: _Candidates(request, w) for w in request.widths}
        leaves = [t for c in candidates.values() for t in c.leaves]

        def now() -> dict[str, Splits]:
            return {name: c.splits() for name, c in candidates.items()}

        graph = SplitGraph(request, now())
        for batch in itertools.islice(itertools.cycle(graph.batches()), STEPS):
            slopes = iter(gradients(graph.loss(graph.at(now()), batch), leaves))
            for c in candidates.values():
                c.step(list(itertools.islice(slopes, 3)))
        parameters = graph.at(now())
        loss, means = graph.means(parameters, lambda loss: gradients(loss, leaves))
        slopes, buffers = iter(means), graph.running_statistics(now(), parameters)
        return {
            name: replace(c.splits(), gains=c.gains(*itertools.islice(slopes, 3)), buffers=buffers[name])
            for name, c in candidates.items()
        }, loss


class _Candidates:
    """Of one width: deltas `[units, D]`, incoming `[k, D]` and outgoing weights `[k, D']` of new units."""

    def __init__(self, request: InitialiserRequest, width: GrowableWidth) -> None:
        k, size, generator = request.additions[width.name], width.var.size, request.generator
        into, out = unit_vectors(request.analysed, width)
        self.length = float(into.norm(dim=1).mean())
        self.eps = EPS * self.length, EPS * float(out.norm(dim=1).mean())
        self.origin = torch.cat([torch.arange(size), torch.randint(size, (k,), generator=generator)])
        self.fresh = torch.arange(size + k) >= size

        def draw(n: int) -> Tensor:
            rows = torch.randn(n, into.shape[1], generator=generator, dtype=torch.float64)
            return F.normalize(rows, dim=1).to(into)

        # at zero a split has no slope
        self.delta = (self.eps[0] / 2 * draw(size)).requires_grad_()
        self.alpha = (self.length * draw(k)).requires_grad_()
        self.omega = out.new_zeros(k, out.shape[1], requires_grad=True)
        #: what is optimised
        self.leaves = [self.delta, self.alpha, self.omega]

    def splits(self) -> Splits:
        """All of them as they are now."""
        omega = torch.cat([self.omega.new_zeros(len(self.delta), self.omega.shape[1]), self.omega])
        return Splits(self.origin, self.fresh, torch.cat([self.delta, self.alpha]), omega)

    @torch.no_grad()
    def step(self, slopes: list[Tensor]) -> None:
        """Against the gradient, unit by unit, within eps."""
        into, out = self.eps
        for t, g, eps in zip(self.leaves, slopes, (into, into, out), strict=True):
            t -= RATE * eps * F.normalize(g, dim=1)
        self.delta.renorm_(2, 0, into)
        self.alpha.copy_(self.length * F.normalize(self.alpha, dim=1))
        self.omega.renorm_(2, 0, out)

    def gains(self, delta: Tensor, alpha: Tensor, omega: Tensor) -> Tensor:
        """Predicted decrease by each, from the slopes."""
        split, new = -(delta * self.delta.detach()).sum(1) / 2, -(omega * self.omega.detach()).sum(1)
        return torch.cat([split, new]).double().cpu()
