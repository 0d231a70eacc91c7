"""Variance transfer: new units in pairs that cancel, incoming (V, V), outgoing (Z, -Z).

V and Z are Kaiming-normal for the width as it will be (Yuan, Savarese, Maire: "Accelerated Training via Incrementally
Growing Neural Networks using Variance Transfer and Learning Rate Adaptation", NeurIPS 2023, arXiv 2306.12700, section
3.1). There old weights are rescaled as well, so that activations keep their variance when the new units no longer
cancel, and each stage has its learning rate; here the function stays and the learning rate is the user's.
"""

from __future__ import annotations

import math

import torch

from fxgrow.analysis.analyse import AnalysedGraph
from fxgrow.analysis.widths import GrowableWidth
from fxgrow.errors import PlanError
from fxgrow.initialisers.copies import check_copies, places, rows_of
from fxgrow.initialisers.registry import Written, writer


@writer("variance-transfer")
def variance_transfer(analysed: AnalysedGraph, h: GrowableWidth, k: int, generator: torch.Generator) -> Written:
    """New entries for `k` units, an even number."""
    if k % 2:
        raise PlanError(
            f"method='variance-transfer' adds units in pairs: {k} more at width {h.name!r}, give an even number "
            f"of its steps ({h.step})."
        )
    check_copies(analysed, h, "variance-transfer")
    # what follows on the way is that of one old unit for both of a pair
    units = torch.randint(h.var.size, (k // 2,), generator=generator).repeat_interleave(2)
    reads = {(p.weight, p.in_dim): p.out_dim for p in h.consumers}
    writes = {(p.weight, p.out_dim) for p in h.producers}
    biases = {(p.bias, 0) for p in h.producers}
    experts = {p.weight for p in (*h.producers, *h.consumers) if p.experts}
    out = Written()
    for name, dim, entries in places(analysed, h):
        rows = rows_of(analysed.gm, name, dim, entries, units)
        split = rows.unflatten(dim, (k // 2, 2, -1))
        if (name, dim) in writes or (name, dim) in reads:
            fan = (
                rows.numel() // rows.shape[dim] if (name, dim) in writes else _fan_in(rows, dim, reads[name, dim], h, k)
            )
            fan //= len(rows) if name in experts else 1
            one = split.select(dim + 1, 0)
            drawn = torch.randn(one.shape, generator=generator, dtype=torch.float64).to(rows) * math.sqrt(2 / fan)
            split = torch.stack([drawn, -drawn if (name, dim) in reads else drawn], dim + 1)
        elif (name, dim) in biases:
            split = torch.zeros_like(split)
        out.new[name, dim] = split.flatten(dim, dim + 2)
    return out


def _fan_in(rows: torch.Tensor, dim: int, out_dim: int, h: GrowableWidth, k: int) -> int:
    """Inputs of a reader when the width has grown."""
    rest = rows.numel() // rows.shape[dim] // rows.shape[out_dim]
    return (h.var.size + k) * (rows.shape[dim] // k) * rest
