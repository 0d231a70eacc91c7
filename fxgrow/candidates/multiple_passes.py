"""Widths in several passes over the data where memory is limited."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import fx

from fxgrow.analysis.widths import GrowableWidth
from fxgrow.axes.structure import Projection
from fxgrow.errors import ProfileError
from fxgrow.graph.graph import accumulation_dtype, lookup

#: matrices like S or M that exist at once while one is solved for: itself, its factor, and what the solver copies
COPIES = 3


def split_into_passes(
    widths: Sequence[GrowableWidth], gm: fx.GraphModule, limit: int | None
) -> list[list[GrowableWidth]]:
    """Widths that are measured together, so that their matrices take at most three quarters of the limit.

    Raises:
        ProfileError: a width does not fit alone.
    """
    if limit is None:
        return [list(widths)]
    passes: list[list[GrowableWidth]] = []
    taken: dict[str, int] = {}
    for width in widths:
        needs = _bytes(width, gm)
        alone = sum(needs.values())
        if alone > 0.75 * limit:
            raise ProfileError(
                f"The moments of width {width.name!r} take {alone / 2**20:,.0f} MiB, more than three quarters of "
                f"memory_limit={limit:,} bytes: raise it to at least {math.ceil(alone / 0.75):,}, or leave the width "
                "out with widths=."
            )
        if not passes or sum((taken | needs).values()) > 0.75 * limit:
            passes.append([])
            taken = {}
        passes[-1].append(width)
        taken |= needs
    return passes


def _bytes(width: GrowableWidth, gm: fx.GraphModule) -> dict[str, int]:
    """Bytes of the matrices of a width and of its consumers, by weight: neighbours share those of a consumer."""

    def sides(p: Projection) -> tuple[int, int, int, int]:
        """How many matrices a weight is, the inputs and the outputs of each, and the size of a number."""
        weight, many = lookup(gm, p.weight), max(1, p.groups)
        outputs = weight.shape[p.out_dim] // (1 if p.experts else many)
        return many, weight.numel() // (many * outputs) + 1, outputs, accumulation_dtype(weight).itemsize

    needs = {}
    features = sum(sides(p)[1] for p in width.producers)
    size = max((sides(p)[3] for p in width.producers), default=4)
    for p in width.consumers:
        many, inputs, outputs, own_size = sides(p)
        needs[p.weight] = many * (COPIES * (inputs**2 + outputs**2) + 2 * inputs * outputs) * own_size
        needs[f"{p.weight} after {width.name}"] = 2 * features * math.prod(p.kernel) * many * outputs * own_size
    return needs | {width.name: COPIES * features**2 * size}
