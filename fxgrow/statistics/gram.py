"""Second moments of rows, formed block by block in float32 or float64, and products of narrow matrices."""

from __future__ import annotations

import torch
from torch import Tensor

#: side of the blocks: a multiple of the tiles of matrix products
BLOCK = 128
#: products with fewer columns are formed as their transpose: without it BLAS takes up to ten times as long
NARROW = 16


def accumulating(x: Tensor) -> Tensor:
    """The tensor in the dtype of sums: float32 for half precision, otherwise as it is."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def matrix_product(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """The product of two matrices ``[m, k]`` and ``[k, n]``."""
    if b.shape[1] >= NARROW:
        return torch.mm(a, b, out=out)
    product = (b.mT @ a.mT).mT
    return product if out is None else out.copy_(product)


def gram(rows: Tensor, weight: Tensor | None = None, bias: bool = False) -> Tensor:
    """Weighted second moment rows^T diag(weight) rows of rows ``[m, P]``: ``[P, P]``, exactly symmetric.

    ``bias``: as if every row had one more feature that is 1.
    """
    return mirrored(add_gram(None, rows, weight, bias))


def add_gram(
    total: Tensor | None, rows: Tensor, weight: Tensor | None = None, bias: bool = False, scale: float = 1.0
) -> Tensor:
    """Adds ``scale * gram(rows, weight, bias)`` to the upper triangle of ``total``; the rest is unspecified."""
    rows = accumulating(rows)
    ones = None if weight is None else weight.to(rows.dtype).sqrt()
    rows = rows if ones is None else rows * ones[:, None]
    size, beta = rows.shape[1], 0.0 if total is None else 1.0
    total = rows.new_zeros(size + bias, size + bias) if total is None else total
    # torch does not expose BLAS' symmetric product; the upper block triangle is little more than half the work
    for low in range(0, size, BLOCK):
        high = min(low + BLOCK, size)
        here = total[low:high, low:size]
        torch.addmm(here, rows[:, low:high].mT, rows[:, low:], beta=beta, alpha=scale, out=here)
    if bias:
        total[:size, size] += (rows.sum(0) if ones is None else rows.mT @ ones) * scale
        total[size, size] += (len(rows) if ones is None else ones @ ones) * scale
    return total


def mirrored(upper: Tensor) -> Tensor:
    """Copies the upper triangle to the lower one, in place."""
    size = len(upper)
    for low in range(0, size, BLOCK):
        high = min(low + BLOCK, size)
        upper[high:, low:high] = upper[low:high, high:].mT
        block = upper[low:high, low:high].triu()
        upper[low:high, low:high] = block + block.triu(1).mT
    return upper
