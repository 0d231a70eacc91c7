"""Example inputs as placeholders of a graph."""

from __future__ import annotations

import inspect
import keyword
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from fxgrow.errors import CaptureError


def bind_inputs(model: nn.Module, example_inputs: Any) -> tuple[dict[str, Any], Callable[[list[Any]], Any]]:
    """Returns placeholder names with their example values, and a call of forward that takes them in that order."""
    if isinstance(example_inputs, torch.Tensor):
        example_inputs = (example_inputs,)
    by_name = isinstance(example_inputs, Mapping)
    if not by_name and not isinstance(example_inputs, (tuple, list)):
        raise CaptureError(
            f"example_inputs is a {type(example_inputs).__name__}. Give a tuple of positional inputs, or a "
            "dict of keyword inputs."
        )
    forward = model.forward
    try:
        signature = inspect.signature(forward)
        bound = signature.bind(**example_inputs) if by_name else signature.bind(*example_inputs)
    except TypeError as error:
        raise CaptureError(
            f"{type(model).__name__}.forward{inspect.signature(forward)} cannot take the example inputs: {error}."
        ) from error
    inputs: dict[str, Any] = {}
    by_position = 0
    for name, value in bound.arguments.items():
        kind = signature.parameters[name].kind
        if kind is inspect.Parameter.VAR_POSITIONAL:
            inputs.update({f"{name}_{i}": item for i, item in enumerate(value)})
        else:
            inputs.update(value if kind is inspect.Parameter.VAR_KEYWORD else {name: value})
        # positional up to the first parameter that is left out or takes keywords alone
        by_keyword = kind in (inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.VAR_KEYWORD)
        if not by_keyword and list(signature.parameters).index(name) == list(bound.arguments).index(name):
            by_position = len(inputs)

    # forward may take any keywords, and the graph's code has these as names
    if odd := [name for name in inputs if not name.isidentifier() or keyword.iskeyword(name)]:
        raise CaptureError(f"The example inputs have the keyword {ascii(odd[0])[:60]}, which is no name in code.")

    def call(values: list[Any]) -> Any:
        # with the model's hooks, but `__call__` itself would make a model that is one layer one node
        run: Any = model._call_impl if model._forward_pre_hooks or model._forward_hooks else forward
        return run(*values[:by_position], **dict(zip(list(inputs)[by_position:], values[by_position:], strict=True)))

    return inputs, call
