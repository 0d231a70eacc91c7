"""Operators: importing this package enters every rule into the table."""

from fxgrow.ops import conv, grn, join, linear, norm, pointwise, pool, recurrent, reduce, rms, shape, size
from fxgrow.ops.registry import op

__all__ = [
    "conv",
    "grn",
    "join",
    "linear",
    "norm",
    "op",
    "pointwise",
    "pool",
    "recurrent",
    "reduce",
    "rms",
    "shape",
    "size",
]
