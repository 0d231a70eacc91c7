"""Functions marked with `torch.fx.wrap` are followed like any other code.

The mark is there for tracers that see no values. A function that cannot be followed here either becomes one node as any
other would.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch.fx import _symbolic_trace

from fxgrow.ops.registry import is_described


@contextmanager
def marked_followed() -> Iterator[None]:
    """While open, the only marked functions that become nodes are operators: compiled, or described by a rule."""
    table = _symbolic_trace._wrapped_fns_to_patch
    taken = {entry: scope for entry, scope in table.items() if _is_code(scope.get(entry[1]))}
    for entry in taken:
        del table[entry]
    try:
        yield
    finally:
        table.update(taken)


def _is_code(function: Any) -> bool:
    if not hasattr(function, "__code__"):
        return False
    return not is_described(function) and not is_described(f"{function.__module__}.{function.__qualname__}")
