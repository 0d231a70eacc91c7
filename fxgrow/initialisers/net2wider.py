"""Net2WiderNet: every new unit is a copy of an old one, and they share its outgoing weights.

Chen, Goodfellow, Shlens: "Net2Net: Accelerating Learning via Knowledge Transfer", ICLR 2016, arXiv 1511.05641, section
2.2. Incoming weights alpha `[k, P]` and all that follows on the path (biases, norms, depthwise kernels) are those of a
unit j drawn at random; outgoing weights omega `[k, taps, O]` of j are divided among j and its n copies. In the paper
each gets 1 / (n + 1), and noise on the copies tells them apart; here the shares are drawn at random, which tells them
apart and keeps the function.
"""

from __future__ import annotations

import torch

from fxgrow.analysis.widths import GrowableWidth
from fxgrow.initialisers.copies import CopyInitialiser
from fxgrow.initialisers.registry import InitialiserRequest, Outgoing, Proposal, initialiser
from fxgrow.rewriting.values import CopiedUnits, Values

#: shares are drawn between 1 and this, then divided by their sum
MOST = 3.0


@initialiser("net2wider", moments=False)
class Net2Wider(CopyInitialiser):
    """See the top of the file."""

    def write(self, request: InitialiserRequest, width: GrowableWidth, proposal: Proposal, values: Values) -> Outgoing:
        """Copies."""
        size, k, generator = width.var.size, request.additions[width.name], request.generator
        units = torch.randint(size, (k,), generator=generator)
        parts = 1 + (MOST - 1) * torch.rand(size + k, generator=generator, dtype=torch.float64)
        origin = torch.cat([torch.arange(size), units])
        shares = parts / torch.zeros(size, dtype=torch.float64).index_add_(0, origin, parts)[origin]
        values.copies[width.name] = CopiedUnits(units, shares)
        return []
