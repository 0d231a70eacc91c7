"""TINY as published: S^(-1/2) N = U Lambda W^T, alpha_k = sqrt(lambda_k) S^(-1/2) u_k, omega_k = sqrt(lambda_k) w_k.

N = E[b V^T] after the projection with dW* = E[V h^T] M^+. Verbockhaven, Rudkiewicz, Chevallier, Charpiat: "Growing Tiny
Networks: Spotting Expressivity Bottlenecks and Fixing Them Optimally", TMLR 2024, arXiv 2405.19816.
"""

from __future__ import annotations

from collections.abc import Mapping

from fxgrow.initialisers.registry import Proposal, initialiser, split_rows
from fxgrow.statistics.consumer_moments import ConsumerMoments
from fxgrow.statistics.factorisation import factor
from fxgrow.statistics.top_singular import top_units
from fxgrow.statistics.width_moments import WidthMoments


@initialiser("tiny", symmetric=True)
def tiny(width: WidthMoments, consumers: Mapping[str, ConsumerMoments], k: int) -> Proposal:
    """Incoming and outgoing weights of at most k units."""
    names = list(width.blocks)
    s = factor(width.upper, ridge=width.ridge)
    units = top_units([width.blocks[n] for n in names], s, None, k)
    return Proposal(split_rows(units.alpha, width), dict(zip(names, units.omega, strict=True)), units.values)
