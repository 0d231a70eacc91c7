"""Net2WiderNet: every new unit is a copy of an old one, and they share its outgoing weights.

Incoming weights, and all that follows on the way (biases, norms, depthwise kernels), are those of a unit j drawn at
random; outgoing weights of j are divided among j and its n copies (Chen, Goodfellow, Shlens: "Net2Net: Accelerating
Learning via Knowledge Transfer", ICLR 2016, arXiv 1511.05641, section 2.2). There each gets 1 / (n + 1), and noise on
the copies tells them apart; here the shares are drawn at random, which tells them apart and keeps the function.
"""

from __future__ import annotations

import torch

from fxgrow.analysis.analyse import AnalysedGraph
from fxgrow.analysis.widths import GrowableWidth
from fxgrow.initialisers.copies import check_copies
from fxgrow.initialisers.registry import Written, writer
from fxgrow.rewriting.copied_units import CopiedUnits

#: shares are drawn between 1 and this, then divided by their sum
MOST = 3.0


@writer("net2wider")
def net2wider(analysed: AnalysedGraph, h: GrowableWidth, k: int, generator: torch.Generator) -> Written:
    """Copies for `k` units."""
    check_copies(analysed, h, "net2wider")
    size = h.var.size
    units = torch.randint(size, (k,), generator=generator)
    parts = 1 + (MOST - 1) * torch.rand(size + k, generator=generator, dtype=torch.float64)
    origin = torch.cat([torch.arange(size), units])
    shares = parts / torch.zeros(size, dtype=torch.float64).index_add_(0, origin, parts)[origin]
    return Written(copies=CopiedUnits(units, shares))
