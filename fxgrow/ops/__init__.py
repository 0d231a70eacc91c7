"""Operators: importing this package enters every rule into the table."""

from fxgrow.ops import conv, linear, norm, pointwise, pool, reduce, shape
from fxgrow.ops.registry import op

__all__ = ["conv", "linear", "norm", "op", "pointwise", "pool", "reduce", "shape"]
