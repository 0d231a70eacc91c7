"""What stays one node of a graph: layers of torch.nn, and modules and functions that have a rule."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.fx import _symbolic_trace

from fxgrow.ops.registry import is_described

#: made of other layers, which have the widths
_COMPOSITE = tuple(getattr(nn, name) for name in nn.modules.transformer.__all__)
#: what a subclass of a torch.nn layer may define and still compute what the layer computes
_HARMLESS = {"extra_repr", "reset_parameters"}


def is_layer(cls: type) -> bool:
    """Whether a module class has a rule, or is a layer of ``torch.nn`` or a subclass that changes nothing about one."""
    if _has_rule(cls):
        return True
    if issubclass(cls, _COMPOSITE):
        return False
    for base in cls.__mro__:
        if base.__module__.startswith(("torch.nn", "torch.ao.nn")):
            return base is not nn.Module and not issubclass(base, nn.Sequential)
        defined = [name for name in vars(base) if not name.startswith("__") and name not in _HARMLESS]
        if any(callable(getattr(base, name)) for name in defined):
            return False
    return False


@contextmanager
def trace_marked_functions() -> Iterator[None]:
    """While open, functions marked with `torch.fx.wrap` are traced like other code, unless compiled or with a rule."""
    table = _symbolic_trace._wrapped_fns_to_patch
    functions = {entry: scope.get(entry[1]) for entry, scope in table.items()}
    traced = {entry: table[entry] for entry, f in functions.items() if hasattr(f, "__code__") and not _has_rule(f)}
    for entry in traced:
        del table[entry]
    try:
        yield
    finally:
        table.update(traced)


def _has_rule(target: Any) -> bool:
    return is_described(target) or is_described(f"{target.__module__}.{target.__qualname__}")
