"""The default: the units of TINY whitened on both sides and normalised; their outgoing weights are refitted.

After Verbockhaven et al. 2024 (TMLR, arXiv 2405.19816, section 3; see `tiny.py`), with G = E[V V^T] on the output side:
(S + eps)^(-1/2) N (G + eps)^(-1/2) = U Lambda W^T, ridges relative to the mean eigenvalue. Incoming weights alpha
`[k, P]` are (S + eps)^(-1/2) u_k, scaled to E[(alpha^T b)^2] = 1; outgoing weights omega `[k, taps, O]` are left to
the refit on the activations of the units. Because of the scaling the ridge on S decides only which directions count: a
tenth of the mean eigenvalue is as good as any between a hundredth and all of it (`benchmarks/RESULTS.md`).
"""

from __future__ import annotations

from fxgrow.initialisers.registry import Consumers, Proposal, initialiser, split_rows
from fxgrow.statistics.factorisation import factor
from fxgrow.statistics.top_singular import top_units
from fxgrow.statistics.width_moments import WidthMoments

INPUT_RIDGE = 0.1
#: sampled rows of b per feature: with such a ridge more of them find no better units
ROWS = 0.75
#: applications of the operator: more of them find the same units, outgoing weights come from the refit
SWEEPS = 3
OUTPUT_RIDGE = 1e-2


@initialiser("default", output_side=True, rows=ROWS, sketch=True, refit=True)
def default(width: WidthMoments, consumers: Consumers, k: int) -> Proposal:
    """Units for one width; outgoing weights are left to the refit."""
    names = list(width.blocks)
    outputs = [factor(consumers[n].curvature().to(width.blocks[n].dtype), ridge=OUTPUT_RIDGE) for n in names]
    units = top_units([width.blocks[n] for n in names], width.factor(INPUT_RIDGE), outputs, k, sweeps=SWEEPS)
    return Proposal(split_rows(width.scaled(units.alpha), width), {}, units.values)
