"""The default: TINY whitened on both sides, units normalised, outgoing weights refitted on what they really put out.

alpha = (S + eps)^(-1/2) u for the SVD (S + eps)^(-1/2) N (G + eps)^(-1/2) = U Lambda W^T, scaled to
E[(alpha^T b)^2] = 1. After Verbockhaven et al. 2024 (TMLR, arXiv 2405.19816), with G = E[V V^T] on the output side and
ridges relative to the mean eigenvalue. A large ridge on S wins less at the first step and more after further training:
with a small one incoming weights are two to three times too large. `newton` has the same units; their outgoing weights
are fitted on the curvature of the loss through the whole network.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from fxgrow._consumer import Consumer
from fxgrow._solve import factor, top_units
from fxgrow._width_moments import WidthMoments
from fxgrow.initialisers.registry import Proposal, initialiser, split_rows

INPUT_RIDGE = 1.0
OUTPUT_RIDGE = 1e-2


@initialiser("newton", output_side=True, sketch=True, refit=True, share=0.25, curved=True)
@initialiser("default", output_side=True, sketch=True, refit=True)
def default(width: WidthMoments, consumers: Mapping[str, Consumer], k: int) -> Proposal:
    """Units for one width; outgoing weights are left to the refit."""
    names = list(width.blocks)
    s = width.second_moment
    outputs = [factor(consumers[n].curvature().to(s.dtype), ridge=OUTPUT_RIDGE) for n in names]
    units = top_units([width.blocks[n] for n in names], factor(s, ridge=INPUT_RIDGE), outputs, k)
    mean_square = (units.alpha * (s @ units.alpha)).sum(0) / width.readings
    alpha = units.alpha / mean_square.clamp_min(torch.finfo(s.dtype).tiny).sqrt()
    return Proposal(split_rows(alpha, width), {}, units.values)
