"""What held-back batches say of candidates: whether they are worth anything, and how many of them.

requires: outgoing weights that were fitted on other batches.
ensures:  where there is nothing to find, next to nothing is found (`benchmarks.nulls`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fxgrow._consumer import Consumer
from fxgrow._world import ALONE, World

if TYPE_CHECKING:
    from fxgrow._refit import Refit

#: units count where the held-back decrease of the first ones together is so many standard errors above zero
Z = 3.0


@dataclass
class Evidence:
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
        passed = self.z > Z
        return int(self.shares.cumsum(0).where(passed, -torch.inf).argmax()) + 1 if bool(passed.any()) else 0


def _per_sample(values: Tensor, size: int) -> Tensor:
    """Sums over what the model has put in a row for each sample: the frames of a clip, say."""
    return values.unflatten(0, (size, -1)).sum(1) if len(values) > size and len(values) % size == 0 else values


class Tests:
    """Per sample: the slope of the loss along each unit's fitted outgoing weights, and along a width's whole step.

    A unit is asked for what the existing weights cannot do: its slope is taken against V less what they can express.
    With V itself a network that is only badly calibrated would have every unit pass for a part of that.

    Args:
        out: readouts, fitted, and an order of the candidates of every width.
        atoms: how many those are.
        channels: per readout, where in what its weight reads the new channels of each width are.
    """

    def __init__(self, out: Refit, atoms: Mapping[str, int], channels: Mapping[str, Mapping[str, Tensor]]) -> None:
        self.out, self.channels = out, channels
        self.sums = {w: torch.zeros(k, dtype=torch.float64) for w, k in atoms.items()}
        self.squares = {w: torch.zeros(k, dtype=torch.float64) for w, k in atoms.items()}
        self.whole = dict.fromkeys(atoms, 0.0)
        self.count = 0
        self.steps: dict[tuple[str, str], Tensor] = {}
        self.expressible = {name: r.expressible() for name, r in out.readouts.items()}
        self.curvature = dict.fromkeys(atoms, 0.0)
        for width, k in atoms.items():
            for name, r in out.readouts.items():
                if width not in r.new:
                    continue
                every = {width: torch.arange(k)}
                weights, columns = r.solve(every, True)
                self.curvature[width] += r.predict(every, True)[1]
                step = weights.new_zeros(r.fit.shape)
                step[:, columns] = weights
                self.steps[width, name] = step

    def add(self, size: int, uses: Iterable[tuple[str, Consumer, Tensor, Tensor]]) -> None:
        units: dict[str, Tensor] = {}
        whole: dict[str, Tensor] = {}
        for name, c, h, v in uses:
            r = self.out.readouts[name]
            v = v if len(r.outputs) == v.shape[c.dim] else v.index_select(c.dim, r.outputs.to(v.device))
            v = v.to(r.fit.dtype)
            rest = v - c.apply(self.expressible[name], h)
            for width, positions in self.channels[name].items():
                step = self.steps[width, name]
                slope = _per_sample((c.apply(step, h) * v).flatten(1).sum(1), size)
                own = self._slopes(c, step[:, r.new[width].flatten()], positions, h.to(v.dtype), rest, r.new[width])
                own = _per_sample(own, size)
                units[width] = units[width] + own if width in units else own
                whole[width] = whole[width] + slope if width in whole else slope
        for width, t in units.items():
            t = t.double().cpu()[:, self.out.evidence[width].order].cumsum(1)
            self.sums[width] += t.sum(0)
            self.squares[width] += t.square().sum(0)
            self.whole[width] += float(whole[width].double().square().sum())
        self.count += next((len(t) for t in units.values()), 0)

    def _slopes(self, c: Consumer, weights: Tensor, positions: Tensor, h: Tensor, v: Tensor, new: Tensor) -> Tensor:
        """`[n, K]`: sum over positions of V . omega_k z_k, as z_k times the gradient of (omega z) . V."""
        dim = c.dim
        z = h.index_select(dim, positions.to(h.device)).requires_grad_()
        with torch.enable_grad():
            (pulled,) = torch.autograd.grad((c.outgoing(weights, z) * v).sum(), z)
        t = (z.detach() * pulled).movedim(dim, -1)
        t = t.flatten(1, -2).sum(1) if t.dim() > 2 else t
        return t.reshape(len(t), len(new), -1).sum(2)

    def finish(self, world: World = ALONE) -> None:
        self.count = int(world.total(self.count)[0])
        world.sum_([*self.sums.values(), *self.squares.values()])
        self.whole = dict(zip(self.whole, world.total(*self.whole.values()), strict=True))
        n = max(2, self.count)
        for width, e in self.out.evidence.items():
            mean = self.sums[width] / n
            error = ((self.squares[width] / n - mean.square()).clamp_min(0) / (n - 1)).sqrt()
            e.shares = mean.diff(prepend=mean.new_zeros(1))
            e.z = mean / error.clamp_min(1e-30)
            if self.curvature[width] > 0:
                e.coherence = max(1.0, self.whole[width] / n / self.curvature[width])
