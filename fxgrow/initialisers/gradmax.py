"""GradMax: incoming weights are the directions of the largest gradient, outgoing weights zero.

Evci, van Merrienboer, Unterthiner, Vladymyrov, Pedregosa: "GradMax: Growing Neural Networks using Gradient
Information", ICLR 2022, arXiv 2201.05125, section 3. E[b V^T] = U Lambda W^T, not whitened and not projected. Incoming
weights alpha `[k, P]` are u_k, scaled to E[(alpha^T b)^2] = 1. With outgoing weights omega `[k, taps, O]` of zero the
function stays, and their gradient is as large as any directions of this length allow. In the paper the other side is
zero: incoming weights, with outgoing ones W, which needs an activation with slope 1 at zero. The singular vectors are
the same; this side learns behind a ReLU too.
"""

from __future__ import annotations

import torch

from fxgrow.initialisers.registry import Consumers, Proposal, initialiser, split_rows
from fxgrow.statistics.width_moments import WidthMoments

#: singular values below this part of the largest are rounding
DROP = 1e-6


@initialiser("gradmax", project=False)
def gradmax(width: WidthMoments, consumers: Consumers, k: int) -> Proposal:
    """Incoming weights of at most k units."""
    moment = torch.cat([block.flatten(1) for block in width.blocks.values()], 1)
    u, values, _ = torch.linalg.svd(moment, full_matrices=False)
    alpha = width.scaled(u[:, values > DROP * values[:1]][:, :k])
    return Proposal(split_rows(alpha, width), {}, values)
