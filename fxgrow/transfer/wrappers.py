"""What a model may be wrapped in: growth is of the module inside, and the new one is wrapped the same way."""

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
    """The module inside `torch.compile` and DistributedDataParallel, in any order, and what wraps another one alike.

    `torch.compile(model, ...)` keeps its options in the context that it calls its module in.

    Example:
        >>> import torch
        >>> net = torch.nn.Linear(2, 2)
        >>> inner, wrap = unwrapped(torch.compile(net, backend="eager"))
        >>> inner is net, type(wrap(torch.nn.Linear(2, 3))).__name__
        (True, 'OptimizedModule')
    """
    own: Callable[[nn.Module], nn.Module]
    if isinstance(model, DistributedDataParallel):
        inside: Any = model.module
        own = rewrapping(model)
    else:
        inside = getattr(model, "_orig_mod", None)
        if inside is None:
            return model, _plain
        context: Any = model.dynamo_ctx
        own = lambda new: _compiled(context, new, model.training)  # noqa: E731
    inside, within = unwrapped(inside)
    return inside, lambda new: own(within(new))


def group_of(model: nn.Module) -> Any:
    """The process group that a model is trained in, if it says so.

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
    """Says that `model.compile()` does not go on: it leaves nothing behind to compile a new module alike."""
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
    module.training = training  # of the wrapper alone; its module has its own
    return module


def _forget(new: nn.Module) -> None:
    """Drops what was compiled of the classes of the model: they compiled the sizes before.

    Dynamo counts what it has compiled of one piece of code and gives up at a limit, whatever model it was for. A graph
    has code of its own.
    """
    if isinstance(new, fx.GraphModule):
        return
    for kind in {type(module) for module in new.modules()}:
        if isinstance(code := getattr(kind.forward, "__code__", None), types.CodeType):
            torch._dynamo.eval_frame.remove_from_cache(code)
