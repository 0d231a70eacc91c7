"""The options of `grow` and `Grower`: names, types and defaults in one place."""

from __future__ import annotations

import inspect
import typing
from collections.abc import Callable, Mapping
from typing import Any, Literal, TypedDict, TypeVar

import torch

from fxgrow.data.loss import LossFn
from fxgrow.errors import OptionError

F = TypeVar("F", bound=Callable[..., object])


class Options(TypedDict, total=False):
    """What `fxgrow.grow` and `fxgrow.Grower` both take by keyword, explained in `fxgrow.grow`."""

    loss_fn: LossFn | None
    example_inputs: tuple[Any, ...] | dict[str, Any] | None
    budget: str | float | None
    neurons: int | Mapping[str, int] | None
    method: str
    cost: str
    multiple: int
    samples: int | None
    batch: Callable[[Any], Any] | None
    memory_limit: int | None
    update_existing: bool
    progress: bool
    seed: int


class CopyOptions(Options, total=False):
    """What `fxgrow.grow` takes besides, and a Grower by other parameters."""

    optimizer: torch.optim.Optimizer | None
    process_group: Any


class GrowOptions(CopyOptions, total=False):
    """All of `fxgrow.grow`: the kind of its result too."""

    into: Literal["graph", "module"]


#: of every option, in the order in which signatures show them
DEFAULTS: GrowOptions = {
    "loss_fn": None, "example_inputs": None, "budget": None, "neurons": None, "method": "default",
    "cost": "parameters", "multiple": 1, "samples": None, "batch": None, "memory_limit": None, "optimizer": None,
    "update_existing": True, "progress": True, "seed": 0, "into": "graph", "process_group": None,
}  # fmt: skip


def with_defaults(options: Mapping[str, Any]) -> GrowOptions:
    """All options: those that are not given have their defaults."""
    unknown = [name for name in options if name not in DEFAULTS]
    if unknown:
        raise OptionError(f"unexpected keyword argument {unknown[0]!r}; options are {', '.join(DEFAULTS)}")
    return typing.cast(GrowOptions, {**DEFAULTS, **options})


def takes_options(**other_defaults: object) -> Callable[[F], F]:
    """Shows the options, some with other defaults, in the signature of a function with `**options`, for `help`."""
    types = typing.get_type_hints(GrowOptions)
    keyword = inspect.Parameter.KEYWORD_ONLY

    def with_signature(function: F) -> F:
        signature = inspect.signature(function)
        own = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
        required = [p for p in own if p.kind is not keyword or p.default is p.empty]
        options = [
            inspect.Parameter(name, keyword, default=default, annotation=types[name])
            for name, default in {**DEFAULTS, **other_defaults}.items()
            if name not in signature.parameters
        ]
        parameters = [*required, *options, *(p for p in own if p not in required)]
        function.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
        return function

    return with_signature
