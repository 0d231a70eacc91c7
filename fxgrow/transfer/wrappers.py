"""Wrappers of a model: growth is of the module inside, and the grown one is wrapped in the same way."""

from __future__ import annotations

import logging
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import fx, nn
from torch.nn.parallel import DistributedDataParallel

from fxgrow.transfer.ddp import check_ddp, rewrapping
from fxgrow.transfer.device_mesh import group_of_mesh, is_sharded

log = logging.getLogger("fxgrow")


def unwrapped(model: nn.Module) -> tuple[nn.Module, Callable[[nn.Module], nn.Module]]:
    """Returns the module inside `torch.compile` and DistributedDataParallel, and a function that wraps another.

    `torch.compile(model, ...)` keeps its options in the context that it calls its module in.

    Example:
        >>> import torch
        >>> net = torch.nn.Linear(2, 2)
        >>> inner, wrap = unwrapped(torch.compile(net, backend="eager"))
        >>> inner is net, type(wrap(torch.nn.Linear(2, 3))).__name__
        (True, 'OptimizedModule')
    """
    wrap: Callable[[nn.Module], nn.Module]
    if isinstance(model, DistributedDataParallel):
        inside: Any = model.module
        wrap = rewrapping(model)
    else:
        inside = getattr(model, "_orig_mod", None)
        if inside is None:
            return model, _plain
        context: Any = model.dynamo_ctx
        wrap = lambda new: _compiled(context, new, model.training)  # noqa: E731
    inside, wrap_inside = unwrapped(inside)
    return inside, lambda new: wrap(wrap_inside(new))


def group_of(model: nn.Module) -> Any:
    """Returns the process group of a model in DistributedDataParallel or FSDP2; None for others.

    Raises:
        FxgrowError: it is wrapped with options that cannot be carried over.
    """
    while not isinstance(model, DistributedDataParallel):
        inside: Any = getattr(model, "_orig_mod", None)
        if inside is None:
            return group_of_mesh(model) if is_sharded(model) else None
        model = inside
    check_ddp(model)
    return model.process_group


def check_compiled_in_place(model: nn.Module) -> None:
    """Warns that `model.compile()` is not carried over: its options cannot be read back."""
    if getattr(model, "_compiled_call_impl", None) is not None:
        log.warning(
            "%s was compiled in place by .compile(), with options that cannot be read back: after growth it runs as it "
            "is. Give torch.compile(model, ...) to the Grower instead, or compile in a callback of Grower.on_growth.",
            type(model).__name__,
        )


def _plain(new: nn.Module) -> nn.Module:
    return new


def _compiled(context: Any, new: nn.Module, training: bool) -> nn.Module:
    _forget(new)
    module: nn.Module = context(new)
    module.training = training  # of the wrapper only; its module has its own
    return module


def _forget(new: nn.Module) -> None:
    """Drops compiled code of the model's classes: it is for the old sizes.

    Dynamo counts how often it has compiled a code object, for whatever model, and gives up at a limit. Each graph has
    code of its own, so its count starts at zero.
    """
    if isinstance(new, fx.GraphModule):
        return
    for kind in {type(module) for module in new.modules()}:
        if isinstance(code := getattr(kind.forward, "__code__", None), types.CodeType):
            torch._dynamo.eval_frame.remove_from_cache(code)
