"""What a model may be wrapped in: growth is of the module inside, and the new one is wrapped the same way."""

from __future__ import annotations

import logging
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import fx, nn

log = logging.getLogger("fxgrow")


def unwrapped(model: nn.Module) -> tuple[nn.Module, Callable[[nn.Module], nn.Module]]:
    """The module inside, and what wraps another one alike.

    `torch.compile(model, ...)` keeps its options in the context that it calls its module in.

    Example:
        >>> import torch
        >>> net = torch.nn.Linear(2, 2)
        >>> inner, wrap = unwrapped(torch.compile(net, backend="eager"))
        >>> inner is net, type(wrap(torch.nn.Linear(2, 3))).__name__
        (True, 'OptimizedModule')
    """
    inside: Any = getattr(model, "_orig_mod", None)
    if inside is None:
        return model, _plain
    context: Any = model.dynamo_ctx
    return inside, lambda new: _compiled(context, new, model.training)


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
