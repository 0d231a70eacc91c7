"""Example inputs as placeholders of a graph."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from fxgrow.errors import CaptureError


def bind_inputs(model: nn.Module, example_inputs: Any) -> tuple[dict[str, Any], Callable[[list[Any]], Any]]:
    """Returns placeholder names with their example values, and a call of forward that takes them in that order."""
    if isinstance(example_inputs, torch.Tensor):
        example_inputs = (example_inputs,)
    keywords = isinstance(example_inputs, Mapping)
    if not keywords and not isinstance(example_inputs, (tuple, list)):
        raise CaptureError(
            f"example_inputs is a {type(example_inputs).__name__}. Give a tuple of positional inputs, or a "
            "dict of keyword inputs."
        )
    forward = model.forward
    try:
        signature = inspect.signature(forward)
        bound = signature.bind(**example_inputs) if keywords else signature.bind(*example_inputs)
    except TypeError as error:
        raise CaptureError(
            f"{type(model).__name__}.forward{inspect.signature(forward)} cannot take the example inputs: {error}."
        ) from error
    inputs: dict[str, Any] = {}
    slots: list[tuple[str, str | None]] = []  # (placeholder, keyword or None)
    positional = True
    for name, value in bound.arguments.items():
        kind = signature.parameters[name].kind
        if kind is inspect.Parameter.VAR_POSITIONAL:
            slots += [(f"{name}_{i}", None) for i in range(len(value))]
            inputs.update({f"{name}_{i}": item for i, item in enumerate(value)})
        elif kind is inspect.Parameter.VAR_KEYWORD:
            slots += [(key, key) for key in value]
            inputs.update(value)
        else:
            before = list(signature.parameters)[: list(signature.parameters).index(name)]
            positional = (
                positional
                and kind is not inspect.Parameter.KEYWORD_ONLY
                and all(earlier in bound.arguments for earlier in before)
            )
            slots.append((name, None if positional else name))
            inputs[name] = value

    def call(values: list[Any]) -> Any:
        args = [value for value, (_, key) in zip(values, slots, strict=True) if key is None]
        kwargs = {key: value for value, (_, key) in zip(values, slots, strict=True) if key is not None}
        return forward(*args, **kwargs)

    return inputs, call
