"""Operators: importing this package enters every rule into the table."""

from fxgrow.ops import conv, grn, join, linear, norm, own_norm, pointwise, pool, recurrent, reduce, shape, size
from fxgrow.ops.registry import op

__all__ = [
    "conv",
    "grn",
    "join",
    "linear",
    "norm",
    "op",
    "own_norm",
    "pointwise",
    "pool",
    "recurrent",
    "reduce",
    "shape",
    "size",
]
