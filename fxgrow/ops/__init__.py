"""Operators: importing this package enters every rule into the table."""

from fxgrow.ops import (  # noqa: F401  (each file enters its rules)
    conv,
    elementwise,
    indexing,
    linear,
    normalization,
    pooling,
    recurrent,
    reductions,
    sizes_and_factories,
    split_concat,
    views,
)
from fxgrow.ops.registry import op

__all__ = ["op"]
