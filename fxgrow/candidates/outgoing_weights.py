"""Outgoing weights and the update of existing ones, fitted together, from the moments of one consumer.

W = (G / mean eigenvalue + g)^-1 E[V [h, z]^T] (M + eps)^-1: ridge least squares of V on [h, z], preconditioned by the
output-side Fisher matrix G. Here h is the consumer's old input, z the activations of new units in it, V the negative
gradient at its output. M = E[[h, z] [h, z]^T] is eliminated block by block: of E[h h^T], the large one, a single solve
serves every choice of units.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fxgrow.axes.structure import Projection
from fxgrow.statistics.factorisation import Factor, factor

#: ridge on E[h h^T] and on E[z z^T], each relative to its own mean eigenvalue
RIDGE = 1e-1
#: the same on G
OUTPUT_RIDGE = 1e-1
#: ridge on E[h h^T] for what existing weights can express: no more than keeps the solution finite
EXPRESSIBLE_RIDGE = 1e-2


class _Eliminated(NamedTuple):
    """The system for new units once E[h h^T] is eliminated; columns are those of z.

    Attributes:
        delta_w: update of the existing weights without new units, `[O, H]`.
        curvature: along it.
        regression: of z on h, (E[h h^T] + eps)^-1 E[h z^T], `[H, Z]`.
        target: preconditioned E[V z^T], `[O, Z]`.
        residual: the same less what `delta_w` explains of it.
        predicted: `delta_w` times the regression, `[O, Z]`.
        eps: the ridge.
    """

    delta_w: Tensor
    curvature: float
    regression: Tensor
    target: Tensor
    residual: Tensor
    predicted: Tensor
    eps: Tensor


@dataclass
class OutgoingWeightFit:
    """One consumer that reads new units: moments of V, h and z.

    Attributes:
        weight: name of its weight.
        bias: name of its bias, if it has a trained one.
        use: how the weight is stored; everything here is `[out, in]`.
        outputs: rows of the weight that are not new units themselves.
        new: per width, the columns of z of each unit group, `[K, columns]`.
        hh: E[h h^T] (the bias last).
        hz: E[h z^T].
        zz: E[z z^T].
        g: G = E[V V^T] per position.
        fit: E[V h^T] and E[V z^T] on the fitting batches.
        held_out: the same on the held-out ones.
        delta_w: E[V h^T] (E[h h^T] + eps)^-1 with `RIDGE`, where it is known already.
        input_factor: the factor that it came from.
    """

    weight: str
    bias: str | None
    use: Projection
    outputs: Tensor
    new: dict[str, Tensor]
    hh: Tensor
    hz: Tensor
    zz: Tensor
    g: Tensor
    fit: tuple[Tensor, Tensor]
    held_out: tuple[Tensor, Tensor] = field(init=False)
    delta_w: Tensor | None = field(default=None, repr=False)
    input_factor: Factor | None = field(default=None, repr=False)
    _solutions: dict[Any, tuple[Tensor, Tensor, float]] = field(default_factory=dict, repr=False)
    _system: _Eliminated | None = field(default=None, repr=False)
    _slopes: tuple[float, Tensor] | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        self.held_out = torch.zeros_like(self.fit[0]), torch.zeros_like(self.fit[1])

    def solve(self, chosen: Mapping[str, Tensor], update_existing: bool) -> tuple[Tensor, Tensor]:
        """The update of the existing weights `[O, H]`, and the weights `[O, columns]` of the chosen unit groups."""
        new, z, _ = self.solution(chosen, update_existing)
        if not update_existing:
            return torch.zeros_like(self.fit[0]), new
        system = self._eliminated()
        return system.delta_w - new @ system.regression[:, z].mT, new

    def predict(self, chosen: Mapping[str, Tensor], update_existing: bool) -> tuple[float, float]:
        """Held-out slope s and curvature q along what is solved for the same units."""
        new, z, curvature = self.solution(chosen, update_existing)
        vh, vz = self.held_out
        if not update_existing:
            return _inner(new, vz[:, z]), curvature
        if self._slopes is None:
            system = self._eliminated()
            self._slopes = _inner(system.delta_w, vh), vz - vh @ system.regression
        slope, residual = self._slopes
        return slope + _inner(new, residual[:, z]), curvature

    def solution(self, chosen: Mapping[str, Tensor], update_existing: bool) -> tuple[Tensor, Tensor, float]:
        """Weights of the chosen units, their columns of z, and the curvature along W with the existing weights' part.

        The second order of the loss along d = W [h, z] is q = E[d^T G d]: moving by gamma d lowers the loss by about
        gamma s - gamma^2 q / 2 with s = E[V . d].
        """
        key = (update_existing, *((w, tuple(u.tolist())) for w, u in chosen.items() if w in self.new))
        if key not in self._solutions:
            columns = [self.new[w][units].flatten() for w, units in chosen.items() if w in self.new]
            z = torch.cat(columns) if columns else torch.arange(0, device=self.zz.device)
            self._solutions[key] = self._solve(z, update_existing)
        return self._solutions[key]

    def _solve(self, z: Tensor, update_existing: bool) -> tuple[Tensor, Tensor, float]:
        system = self._eliminated()
        if not len(z):
            return self.fit[1][:, :0], z, system.curvature * update_existing
        target, inner = (system.residual if update_existing else system.target)[:, z], self.zz[z][:, z]
        ridge, regression = RIDGE * self.zz.diagonal().mean(), system.regression[:, z]
        if update_existing:
            inner = inner - self.hz[:, z].mT @ regression
        inner.diagonal().add_(ridge)
        new = factor(inner).solve(target.mT).mT
        # W M without the product: W (M + eps) is what was solved for
        along = target - new * ridge
        if not update_existing:
            return new, z, _inner(self.g @ new, along)
        along += (2 * system.predicted[:, z] - new @ (regression.mT @ regression)) * system.eps
        return new, z, system.curvature + _inner(self.g @ new, along)

    def expressible(self, along: Tensor | None = None) -> Tensor:
        """The best update of the existing weights alone, `[O, H]`, or of combinations `[O, c]` of its rows."""
        vh = self.fit[0] if along is None else along.mT @ self.fit[0]
        return factor(self.hh, ridge=EXPRESSIBLE_RIDGE).solve(vh.mT).mT

    def _eliminated(self) -> _Eliminated:
        if self._system is None:
            vh, vz = self.fit
            mean, eps = self.g.diagonal().mean(), RIDGE * self.hh.diagonal().mean()
            eye = torch.eye(len(self.g)).to(self.g)
            if mean > 0:
                # few and well conditioned: products with the inverse take half the time of solves
                precondition = factor(self.g / mean + OUTPUT_RIDGE * eye).solve(eye)
            else:  # no gradient reaches the consumer: there is nothing to fit
                precondition = torch.zeros_like(eye)
            root = self.input_factor or factor(self.hh, ridge=RIDGE)
            plain = root.solve(vh.mT).mT if self.delta_w is None else self.delta_w
            delta_w, regression, target = precondition @ plain, root.solve(self.hz), precondition @ vz
            g_delta_w = (plain - OUTPUT_RIDGE * delta_w) * mean
            curvature = _inner(g_delta_w, precondition @ vh - delta_w * eps)
            residual, predicted = target - delta_w @ self.hz, delta_w @ regression
            self._system = _Eliminated(delta_w, curvature, regression, target, residual, predicted, eps)
            self.input_factor = self.delta_w = None
        return self._system


def _inner(a: Tensor, b: Tensor) -> float:
    return float((a * b).sum())
