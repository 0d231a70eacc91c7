"""Wrappers of a model: growth is of the module inside, and the grown one is wrapped in the same way."""

from __future__ import annotations

import functools
import logging
import types
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import fx, nn
from torch.nn.parallel import DistributedDataParallel

from fxgrow.transfer.ddp import check_ddp, rewrapping
from fxgrow.transfer.device_mesh import group_of_mesh, sharded_modules

log = logging.getLogger("fxgrow")


def unwrapped(model: nn.Module) -> tuple[nn.Module, Callable[[nn.Module], nn.Module]]:
    """Returns the module inside `torch.compile` and DistributedDataParallel, and a function that wraps another.

    `torch.compile(model, ...)` keeps its options in the context that it calls its module in.
    """
    wrap: Callable[[nn.Module], nn.Module]
    if isinstance(model, DistributedDataParallel):
        around, wrap = model.module, rewrapping(model)
    elif hasattr(model, "_orig_mod"):
        around, wrap = model._orig_mod, functools.partial(_compiled, model.dynamo_ctx, training=model.training)
    else:
        return model, lambda new: new
    inside, wrap_inside = unwrapped(around)
    return inside, lambda new: wrap(wrap_inside(new))


def group_of(model: nn.Module) -> Any:
    """Returns the process group of a model in DistributedDataParallel or FSDP2; None for others."""
    if hasattr(model, "_orig_mod"):
        return group_of(cast(nn.Module, model._orig_mod))
    if isinstance(model, DistributedDataParallel):
        check_ddp(model)
        return model.process_group
    return group_of_mesh(model) if sharded_modules(model) else None


def check_compiled_in_place(model: nn.Module) -> None:
    """Warns that `model.compile()` is not carried over: its options cannot be read back."""
    if getattr(model, "_compiled_call_impl", None) is not None:
        log.warning(
            f"{type(model).__name__} was compiled in place by .compile(), with options that cannot be read back: after "
            "growth it runs as it is. Give torch.compile(model, ...) to the Grower instead, or compile in a callback "
            "of Grower.on_growth."
        )


def _compiled(context: Any, new: nn.Module, training: bool) -> nn.Module:
    """Compiles a grown module, and drops compiled code of its classes: it is for the old sizes.

    Dynamo counts how often it has compiled a code object, for whatever model, and gives up at a limit. Each graph has
    code of its own, so its count starts at zero.
    """
    if not isinstance(new, fx.GraphModule):
        for kind in {type(module) for module in new.modules()}:
            if isinstance(code := getattr(kind.forward, "__code__", None), types.CodeType):
                torch._dynamo.eval_frame.remove_from_cache(code)
    module: nn.Module = context(new)
    module.training = training  # of the wrapper only; its module has its own
    return module
