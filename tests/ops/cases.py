"""The one table of operators: a row here enters an operator form into every test of widths and of the rewrite.

Rows stand with their family: `layers.py`, `values.py`, `shapes.py`; what belongs to none of them can stand here.
"""

from __future__ import annotations

from tests.ops import layers, shapes, values
from tests.ops.table import Case, T

__all__ = ["CASES", "Case", "layers", "shapes", "values"]

CASES = T.rows
