"""Objects that a model makes of tensors, as a call that makes them again when the graph runs."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

from torch import fx, nn
from torch.nn.utils.rnn import PackedSequence

from fxgrow.graph.node_functions import make_object


class Made(NamedTuple):
    """A call that makes an object."""

    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


def made_object(value: Any) -> Made | None:
    """Returns how to make a dataclass, a packed sequence, a dict of another class, or an object with attributes.

    None of anything else. An object gets its attributes as they are (a distribution its mean and its scale), without a
    call of `__init__`.
    """
    cls = type(value)
    if cls is PackedSequence:
        return Made(cls, tuple(value), {})
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value) if field.init}
        return Made(cls, (), {name: item for name, item in fields.items() if item is not None})
    if isinstance(value, dict) and cls is not dict:
        return Made(cls, (dict(value),), {})
    if inspect.isroutine(value) or isinstance(value, (type, functools.partial, nn.Module, fx.Node, fx.Proxy)):
        return None
    state = getattr(value, "__getstate__", None)  # of every object from Python 3.11 on
    attributes = getattr(value, "__dict__", None) if state is None else state()
    if (
        not attributes
        or not isinstance(attributes, dict)
        or getattr(cls, "__slots__", None)
        or "<locals>" in cls.__qualname__
    ):
        return None
    return Made(make_object, (cls.__module__, cls.__qualname__, tuple(attributes), *attributes.values()), {})
