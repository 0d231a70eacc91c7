"""Which modules stay one node of a captured graph."""

from __future__ import annotations

from torch import nn

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
