"""What stays one node of a graph: layers of torch.nn, and modules and functions that have a rule."""

from __future__ import annotations

from typing import Any

from torch import nn

from fxgrow.ops.registry import is_described

#: made of other layers, which have the widths
_COMPOSITE = tuple(getattr(nn, name) for name in nn.modules.transformer.__all__)
#: what a subclass of a torch.nn layer may define and still compute what the layer computes
_HARMLESS = {"extra_repr", "reset_parameters"}


def is_layer(cls: type) -> bool:
    """Whether a module class has a rule, or is a layer of ``torch.nn`` or a subclass that changes nothing about one."""
    if has_rule(cls):
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


def has_rule(target: Any) -> bool:
    """Whether a class or a function has a rule, of its own or by its dotted name."""
    return is_described(target) or is_described(f"{target.__module__}.{target.__qualname__}")
