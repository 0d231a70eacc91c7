"""TINY as published: alpha_k = sqrt(lambda_k) S^(-1/2) u_k, omega_k = sqrt(lambda_k) w_k for S^(-1/2) N = U Lambda W^T.

Verbockhaven, Rudkiewicz, Chevallier, Charpiat: "Growing Tiny Networks: Spotting Expressivity Bottlenecks and Fixing
Them Optimally", TMLR 2024, arXiv 2405.19816, section 3. N = E[b V^T] after the projection with dW* = E[V h^T] M^+.
Incoming weights alpha `[k, P]`, outgoing weights omega `[k, taps, O]`.
"""

from __future__ import annotations

from fxgrow.initialisers.registry import Consumers, Proposal, initialiser, split_rows
from fxgrow.statistics.top_singular import top_units
from fxgrow.statistics.width_moments import WidthMoments


@initialiser("tiny", symmetric=True)
def tiny(width: WidthMoments, consumers: Consumers, k: int) -> Proposal:
    """Incoming and outgoing weights of at most k units."""
    names = list(width.blocks)
    units = top_units([width.blocks[n] for n in names], width.factor(width.ridge), None, k)
    return Proposal(split_rows(units.alpha, width), dict(zip(names, units.omega, strict=True)), units.values)
