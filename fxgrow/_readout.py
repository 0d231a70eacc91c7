"""Outgoing weights and the update of existing ones, fitted together: one consumer's moments and what follows from them.

W = (G / mean eigenvalue + g)^-1 E[V [h, z]^T] (M + eps)^-1: ridge least squares of V on [h, z], preconditioned by the
output-side Fisher matrix G. M = E[[h, z] [h, z]^T] is eliminated block by block: of E[h h^T], the large one, a single
solve serves every choice of units.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fxgrow._solve import Factor, factor
from fxgrow.ops.registry import Projection

#: ridge on E[h h^T] and on E[z z^T], each relative to its own mean eigenvalue
RIDGE = 1e-1
#: the same on G
OUTPUT_RIDGE = 1e-1
#: ridge on E[h h^T] for what existing weights can express: no more than keeps the solution finite
EXPRESSIBLE_RIDGE = 1e-2


@dataclass
class Readout:
    """One consumer that reads new units: moments of V, h and z, and which columns of [h, z] are whose.

    Attributes:
        weight: name of its weight.
        bias: name of its bias.
        use: how the weight is stored; everything here is [out, in].
        outputs: rows of the weight that are not new units themselves.
        old: columns of h (the bias last).
        new: per width `[K, columns per atom]`; an atom is the least that can be added, `step` units.
        hh: E[h h^T].
        hz: E[h z^T], z in the order of `new`.
        zz: E[z z^T].
        g: E[V V^T] per position.
        fit: E[V [h, z]^T] on the fitting batches.
        held: the same on the held-back ones.
    """

    weight: str
    bias: str | None
    use: Projection
    outputs: Tensor
    old: Tensor
    new: dict[str, Tensor]
    hh: Tensor
    hz: Tensor
    zz: Tensor
    g: Tensor
    fit: Tensor
    held: Tensor
    _solved: dict[Any, tuple[Tensor, Tensor, float]] = field(default_factory=dict, repr=False)
    #: dW* with `RIDGE`, where it is known already, and the factor that it came from
    move: Tensor | None = field(default=None, repr=False)
    root: Factor | None = field(default=None, repr=False)
    _parts: tuple[Tensor, Tensor, Tensor, Tensor] | None = field(default=None, repr=False)

    def solve(self, chosen: Mapping[str, Tensor], update_existing: bool) -> tuple[Tensor, Tensor]:
        """Weights `[O, columns]` for the chosen units of each width, and their columns (old ones first)."""
        weights, columns, _ = self._solution(chosen, update_existing)
        return weights, columns

    def predict(self, chosen: Mapping[str, Tensor], update_existing: bool) -> tuple[float, float]:
        """Held-back slope s and curvature q along what is solved for the same units."""
        weights, columns, curvature = self._solution(chosen, update_existing)
        return (weights * self.held[:, columns]).sum().item(), curvature

    def _solution(self, chosen: Mapping[str, Tensor], update_existing: bool) -> tuple[Tensor, Tensor, float]:
        key = (update_existing, *((w, tuple(u.tolist())) for w, u in chosen.items() if w in self.new))
        if key not in self._solved:
            parts = [self.new[w][units].flatten() for w, units in chosen.items() if w in self.new]
            columns = torch.cat(parts) if parts else self.old[:0]
            weights, curvature = self._fitted(columns, update_existing)
            self._solved[key] = weights, torch.cat([self.old, columns]) if update_existing else columns, curvature
        return self._solved[key]

    def _fitted(self, columns: Tensor, update_existing: bool) -> tuple[Tensor, float]:
        """W, and the second order of the loss along d = W [h, z], q = E[d^T G d].

        Moving by gamma d lowers the loss by about gamma s - gamma^2 q / 2 with s = E[V . d].
        """
        mean = self.g.diagonal().mean()
        count = len(self.old) * update_existing + len(columns)
        if not mean > 0:  # no gradient reaches the consumer: there is nothing to fit
            return self.fit.new_zeros(len(self.fit), count), 0.0
        if self._parts is None:
            # few and well conditioned: products with the inverse take half the time of solves
            eye = torch.eye(len(self.g)).to(self.g)
            output = factor(self.g / mean + OUTPUT_RIDGE * eye).solve(eye)
            root = self.root or factor(self.hh, ridge=RIDGE)
            move = root.solve(self.fit[:, self.old].mT).mT if self.move is None else self.move
            move = output @ move
            self._parts = move, self.g @ move, root.solve(self.hz), output @ self.fit
            self.root = self.move = None
        move, bent, shadow, damped = self._parts
        zi = self._positions()[columns]
        zz = self.zz[zi][:, zi]
        ridge = RIDGE * self.zz.diagonal().mean() * torch.eye(len(zi)).to(zz)
        asked = damped[:, columns]
        # W M without the product: W (M + eps) is what was solved for; and G W without one of its size
        eps = RIDGE * self.hh.diagonal().mean()
        if not update_existing:
            new = factor(zz + ridge).solve(asked.mT).mT if len(zi) else asked
            return new, _inner(self.g @ new, asked - new @ ridge)
        if not len(zi):
            return move, _inner(bent, damped[:, self.old] - move * eps)
        shadow, hz = shadow[:, zi], self.hz[:, zi]
        new = factor(zz + ridge - hz.mT @ shadow).solve((asked - move @ hz).mT).mT
        old, curved = move - new @ shadow.mT, self.g @ new
        curvature = _inner(bent - curved @ shadow.mT, damped[:, self.old] - old * eps)
        return torch.cat([old, new], 1), curvature + _inner(curved, asked - new @ ridge)

    def _positions(self) -> Tensor:
        """For each column where it stands in z."""
        every = torch.cat([n.flatten() for n in self.new.values()])
        return (
            torch.zeros_like(every, dtype=torch.long)
            .new_zeros(self.fit.shape[1])
            .index_copy(0, every, torch.arange(len(every), device=every.device))
        )

    def expressible(self) -> Tensor:
        """The best move of the existing weights by themselves, `[O, H]`, zero at the new columns."""
        move = self.fit.new_zeros(self.fit.shape)
        move[:, self.old] = factor(self.hh, ridge=EXPRESSIBLE_RIDGE).solve(self.fit[:, self.old].mT).mT
        return move


def _inner(a: Tensor, b: Tensor) -> float:
    return float((a * b).sum())
