"""Random units: Kaiming-normal incoming weights; outgoing ones zero (the usual baseline), or refitted.

He et al. 2015, eq. 10. `random` changes nothing at first; `random-refit` separates what the directions of the default
bring from what the refit brings.
"""

from __future__ import annotations

from collections.abc import Mapping

from fxgrow.initialisers.registry import Proposal, initialiser
from fxgrow.statistics.consumer_moments import ConsumerMoments
from fxgrow.statistics.width_moments import WidthMoments


@initialiser("random", moments=False)
@initialiser("random-refit", moments=False, refit=True)
def random(width: WidthMoments, consumers: Mapping[str, ConsumerMoments], k: int) -> Proposal:
    """Leaves the rows to the rewrite, which draws them."""
    return Proposal()
