"""Functions that captured graphs call when they run.

They accept an ``fx.Proxy`` too, so that any other tracer can trace a captured graph.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import fx
from torch.fx.node import has_side_effect

from fxgrow.errors import CaptureError


def _traceable(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def wrapper(*args: Any) -> Any:
        proxy = next((arg for arg in args if isinstance(arg, fx.Proxy)), None)
        if proxy is not None:
            return proxy.tracer.create_proxy("call_function", wrapper, args, {})
        return function(*args)

    return wrapper


@has_side_effect
@_traceable
def guard(value: Any, expected: Any, message: str) -> None:
    """Refuses an input for which the line `message` of the model's code sees another value than the captured one."""
    if (bool(value) if type(expected) is bool else value) != expected:
        if isinstance(value, torch.Tensor):
            raise CaptureError(f"The model's code raises for this input: {message} gives {bool(value)}.")
        raise CaptureError(
            f"This graph was captured for inputs where {message} gives {expected!r}, but here it gives "
            f"{value!r}. Capture the model again with example inputs like these."
        )


@has_side_effect
@_traceable
def guard_mode(training: bool, expected: bool, message: str) -> None:
    """Refuses to run in the mode (train or eval) that the graph does not describe; `message` is module and line."""
    if training != expected:
        mode, now = ("train" if flag else "eval" for flag in (expected, training))
        raise CaptureError(
            f"This graph was captured in {mode} mode and is run in {now} mode, where the model computes something else "
            f"({message}). Capture the model again after calling .{now}() on it."
        )


@_traceable
def in_mode(training: bool, if_training: Any, if_eval: Any) -> Any:
    """Returns the value that belongs to the mode of the module, or to the outcome of a draw."""
    return if_training if training else if_eval


@has_side_effect
def draw(module: str, name: str, *args: Any, **kwargs: Any) -> Any:
    """Returns a number of a generator of the process, such as `random.random()`."""
    function: Any = functools.reduce(getattr, name.split("."), sys.modules[module])
    return function(*args, **kwargs)


@has_side_effect
@_traceable
def holds(value: Any) -> bool:
    """Returns the truth value of something random, on which the model's code branches."""
    return bool(value)


@has_side_effect
@_traceable
def set_grad_enabled(enabled: bool) -> bool:
    """Switches gradient recording and returns the state before, so that a later node can restore it."""
    before = torch.is_grad_enabled()
    torch._C._set_grad_enabled(bool(enabled))
    return before


@_traceable
def make_object(module: str, name: str, attributes: tuple[str, ...], *values: Any) -> Any:
    """Returns an object of a class, by its name, with these attributes."""
    cls: Any = functools.reduce(getattr, name.split("."), sys.modules[module])
    made = cls.__new__(cls)
    vars(made).update(zip(attributes, values, strict=True))
    return made


@functools.cache
def scripted_call(function: Any) -> Callable[..., Any]:
    """Returns a TorchScript function without Python code as a plain function that a graph can call by name."""

    def call(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    call.__name__ = call.__qualname__ = function.name
    return call


@functools.cache
def function_call(cls: type[torch.autograd.Function]) -> Callable[..., Any]:
    """Returns the ``apply`` of an autograd function as a plain function that a graph can call by name."""

    def call(*args: Any, **kwargs: Any) -> Any:
        return cls.apply(*args, **kwargs)

    call.__name__ = call.__qualname__ = f"{cls.__qualname__}.apply"
    call.__module__ = cls.__module__
    call.autograd_function = cls  # type: ignore[attr-defined]
    return call
