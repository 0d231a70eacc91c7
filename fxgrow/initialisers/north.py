"""NORTH: incoming weights whose pre-activations are orthogonal to the existing ones, outgoing weights zero.

Maile, Rachelson, Luga, Wilson: "When, where, and how to add new neurons to ANNs", AutoML 2022, arXiv 2202.08539,
NORTH-Pre. Incoming weights alpha `[k, P]` are random rows, less the part that existing rows W explain: alpha - W^T
(W S W^T)^+ W S alpha, S = E[b b^T]; and orthogonal to each other. Outgoing weights omega `[k, taps, O]` are zero. With
as many rows as inputs no direction is left: those units stay random.
"""

from __future__ import annotations

import torch

from fxgrow.initialisers.registry import Consumers, Proposal, existing_rows, initialiser, split_rows
from fxgrow.statistics.width_moments import WidthMoments

#: what is left of a random row's square is rounding below this
LEFT = 1e-4


@initialiser("north", project=False)
def north(width: WidthMoments, consumers: Consumers, k: int) -> Proposal:
    """Incoming weights of k units."""
    s = width.second_moment.double()
    generator = torch.Generator().manual_seed(width.features)
    drawn = torch.randn(width.features, k, generator=generator, dtype=torch.float64).to(s)
    known = existing_rows(width).to(s)
    alpha, before = drawn.clone(), (drawn * (s @ drawn)).sum(0)
    for i in range(k):
        for _ in range(2):  # once more for what rounding left
            overlap = known.mT @ s @ known
            alpha[:, i] -= known @ (torch.linalg.pinv(overlap, hermitian=True) @ (known.mT @ (s @ alpha[:, i])))
        if alpha[:, i] @ s @ alpha[:, i] < LEFT * before[i]:
            alpha[:, i] = drawn[:, i]
        else:
            known = torch.cat([known, alpha[:, i : i + 1]], 1)
    alpha /= ((alpha * (s @ alpha)).sum(0) / width.positions_per_sample).clamp_min(1e-30).sqrt()
    return Proposal(split_rows(alpha.to(width.second_moment), width))
