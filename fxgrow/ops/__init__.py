"""Operators: importing this package enters every rule into the table."""

from fxgrow.ops import conv, grn, linear, recurrent
from fxgrow.ops import custom_norm_modules as own_norm
from fxgrow.ops import elementwise as pointwise
from fxgrow.ops import normalization as norm
from fxgrow.ops import pooling as pool
from fxgrow.ops import reductions as reduce
from fxgrow.ops import sizes_and_factories as size
from fxgrow.ops import split_concat as join
from fxgrow.ops import views as shape
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
