"""Outgoing weights and the update of existing ones, fitted together: one consumer's moments and what follows from them.

W = (G / mean eigenvalue + g)^-1 E[V [h, z]^T] (M + eps)^-1: ridge least squares of V on [h, z], preconditioned by the
output-side Fisher matrix G. M = E[[h, z] [h, z]^T] is eliminated block by block: of E[h h^T], the large one, a single
solve serves every choice of units.
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
    """What is left of the existing weights once E[h h^T] is eliminated; columns are those of z.

    Attributes:
        move: of the existing weights alone, `[O, H]`.
        curvature: along it.
        shadow: (E[h h^T] + eps)^-1 E[h z^T], `[H, Z]`: what h says of z.
        alone: what new units are asked for, `[O, Z]`.
        rest: the same without what `move` does of it.
        moved: `move` on what h says of z, `[O, Z]`.
        eps: the ridge.
    """

    move: Tensor
    curvature: float
    shadow: Tensor
    alone: Tensor
    rest: Tensor
    moved: Tensor
    eps: Tensor


@dataclass
class OutgoingWeightFit:
    """One consumer that reads new units: moments of V, h and z, and which columns of z are whose.

    Attributes:
        weight: name of its weight.
        bias: name of its bias.
        use: how the weight is stored; everything here is [out, in].
        outputs: rows of the weight that are not new units themselves.
        new: per width `[K, columns of z per atom]`; an atom is the least that can be added, `step` units.
        hh: E[h h^T] (the bias last).
        hz: E[h z^T].
        zz: E[z z^T].
        g: E[V V^T] per position.
        fit: E[V h^T] and E[V z^T] on the fitting batches.
        held: the same on the held-back ones.
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
    held: tuple[Tensor, Tensor]
    #: dW* with `RIDGE`, where it is known already, and the factor that it came from
    move: Tensor | None = field(default=None, repr=False)
    root: Factor | None = field(default=None, repr=False)
    _solved: dict[Any, tuple[Tensor, Tensor, float]] = field(default_factory=dict, repr=False)
    _parts: _Eliminated | None = field(default=None, repr=False)
    _slopes: tuple[float, Tensor] | None = field(default=None, repr=False)

    def solve(self, chosen: Mapping[str, Tensor], update_existing: bool) -> tuple[Tensor, Tensor]:
        """The move of the existing weights `[O, H]`, and the weights `[O, columns]` of each width's chosen units."""
        new, z, _ = self.solution(chosen, update_existing)
        if not update_existing:
            return torch.zeros_like(self.fit[0]), new
        parts = self._eliminated()
        return parts.move - new @ parts.shadow[:, z].mT, new

    def predict(self, chosen: Mapping[str, Tensor], update_existing: bool) -> tuple[float, float]:
        """Held-back slope s and curvature q along what is solved for the same units."""
        new, z, curvature = self.solution(chosen, update_existing)
        vh, vz = self.held
        if not update_existing:
            return _inner(new, vz[:, z]), curvature
        if self._slopes is None:
            parts = self._eliminated()
            self._slopes = _inner(parts.move, vh), vz - vh @ parts.shadow
        alone, rest = self._slopes
        return alone + _inner(new, rest[:, z]), curvature

    def solution(self, chosen: Mapping[str, Tensor], update_existing: bool) -> tuple[Tensor, Tensor, float]:
        """Weights of the chosen units, their columns of z, and the curvature along W with the existing weights' part.

        The second order of the loss along d = W [h, z] is q = E[d^T G d]: moving by gamma d lowers the loss by about
        gamma s - gamma^2 q / 2 with s = E[V . d].
        """
        key = (update_existing, *((w, tuple(u.tolist())) for w, u in chosen.items() if w in self.new))
        if key not in self._solved:
            own = [self.new[w][units].flatten() for w, units in chosen.items() if w in self.new]
            z = torch.cat(own) if own else torch.arange(0, device=self.zz.device)
            self._solved[key] = self._fitted(z, update_existing)
        return self._solved[key]

    def _fitted(self, z: Tensor, update_existing: bool) -> tuple[Tensor, Tensor, float]:
        parts = self._eliminated()
        if not len(z):
            return self.fit[1][:, :0], z, parts.curvature * update_existing
        asked, inner = (parts.rest if update_existing else parts.alone)[:, z], self.zz[z][:, z]
        ridge, shadow = RIDGE * self.zz.diagonal().mean(), parts.shadow[:, z]
        if update_existing:
            inner = inner - self.hz[:, z].mT @ shadow
        inner.diagonal().add_(ridge)
        new = factor(inner).solve(asked.mT).mT
        # W M without the product: W (M + eps) is what was solved for
        along = asked - new * ridge
        if not update_existing:
            return new, z, _inner(self.g @ new, along)
        along += (2 * parts.moved[:, z] - new @ (shadow.mT @ shadow)) * parts.eps
        return new, z, parts.curvature + _inner(self.g @ new, along)

    def expressible(self, along: Tensor | None = None) -> Tensor:
        """The best move of the existing weights by themselves, `[O, H]`, or of combinations `[O, c]` of its rows."""
        vh = self.fit[0] if along is None else along.mT @ self.fit[0]
        return factor(self.hh, ridge=EXPRESSIBLE_RIDGE).solve(vh.mT).mT

    def _eliminated(self) -> _Eliminated:
        if self._parts is None:
            vh, vz = self.fit
            mean, eps = self.g.diagonal().mean(), RIDGE * self.hh.diagonal().mean()
            eye = torch.eye(len(self.g)).to(self.g)
            if mean > 0:
                # few and well conditioned: products with the inverse take half the time of solves
                output = factor(self.g / mean + OUTPUT_RIDGE * eye).solve(eye)
            else:  # no gradient reaches the consumer: there is nothing to fit
                output = torch.zeros_like(eye)
            root = self.root or factor(self.hh, ridge=RIDGE)
            fitted = root.solve(vh.mT).mT if self.move is None else self.move
            move, shadow, alone = output @ fitted, root.solve(self.hz), output @ vz
            bent = (fitted - OUTPUT_RIDGE * move) * mean  # G move
            curvature = _inner(bent, output @ vh - move * eps)
            self._parts = _Eliminated(move, curvature, shadow, alone, alone - move @ self.hz, move @ shadow, eps)
            self.root = self.move = None
        return self._parts


def _inner(a: Tensor, b: Tensor) -> float:
    return float((a * b).sum())
