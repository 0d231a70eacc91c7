"""Which modules stay one node of a captured graph."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.fx import _symbolic_trace

from fxgrow.ops.registry import is_described

# Made of other layers, which have the widths.
_COMPOSITE = (
    nn.Transformer,
    nn.TransformerEncoder,
    nn.TransformerDecoder,
    nn.TransformerEncoderLayer,
    nn.TransformerDecoderLayer,
)
# What a subclass of a torch.nn layer may have and still compute what the layer computes.
_HARMLESS = {"extra_repr", "reset_parameters"}


def is_layer(cls: type) -> bool:
    """Whether a module class is a layer of ``torch.nn`` (or changes nothing about one), or described by a rule."""
    if is_described(cls) or is_described(f"{cls.__module__}.{cls.__qualname__}"):
        return True
    if issubclass(cls, _COMPOSITE):
        return False
    for base in cls.__mro__:
        if base.__module__.startswith(("torch.nn", "torch.ao.nn")):
            return base is not nn.Module and not issubclass(base, nn.Sequential)
        own = [name for name in vars(base) if not name.startswith("__") and name not in _HARMLESS]
        if any(callable(getattr(base, name)) for name in own):
            return False
    return False


# Functions marked with `torch.fx.wrap` are followed like any other code.


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
