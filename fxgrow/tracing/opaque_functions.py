"""Functions and methods that cannot be traced: a call is one node, and the code around it is traced.

ensures: the next trace finds, in place of such a function, a module that calls it; the module holds no parameters.
"""

from __future__ import annotations

import contextlib
import traceback
from collections.abc import Callable, Iterator, Sequence
from types import FrameType
from typing import Any, NamedTuple

from torch import nn

from fxgrow.tracing.intercept import is_tracing, patched
from fxgrow.tracing.source_location import is_user_code


class OpaqueFunction(nn.Module):
    """A module that calls a function, or a method of another module."""

    def __init__(self, function: Callable[..., Any], owner: nn.Module | None) -> None:
        super().__init__()
        self.function = function
        # past nn.Module.__setattr__, which would register the owner as a submodule
        self.__dict__["owner"] = owner

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        owner: nn.Module | None = self.__dict__["owner"]
        if owner is None:
            return self.function(*args, **kwargs)
        before = owner.training
        owner.__dict__["training"] = self.training
        try:
            return self.function(owner, *args, **kwargs)
        finally:
            owner.__dict__["training"] = before

    def extra_repr(self) -> str:
        return self.function.__qualname__


class Call(NamedTuple):
    """A call in which a trace failed."""

    function: Callable[..., Any]
    owner: nn.Module | None  # that the function is a method of
    names: tuple[tuple[dict[str, Any], str], ...]  # globals that hold the function, and its name there

    @property
    def key(self) -> tuple[int, int]:
        """Identifies the function and the module it is a method of."""
        return id(self.function.__code__), id(self.owner)

    @property
    def has_parameters(self) -> bool:
        """Whether the method names parameters of its module, or submodules with parameters, which must stay visible."""
        if self.owner is None:
            return False
        named = set(self.function.__code__.co_names)
        submodules = {n for n, m in self.owner.named_children() if next(m.parameters(), None) is not None}
        return bool(named & (submodules | {n for n, _ in self.owner.named_parameters(recurse=False)}))


def calls_in(error: BaseException) -> list[Call]:
    """Returns the calls below the innermost `forward` that an error went through, outermost first."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__) if is_user_code(frame)]
    starts = [i for i, f in enumerate(frames) if f.f_code.co_name == "forward"]
    below = frames[starts[-1] :] if starts else []
    calls = (_call(frame, caller) for caller, frame in zip(below, below[1:], strict=False))
    return [call for call in calls if call is not None]


def _call(frame: FrameType, caller: FrameType) -> Call | None:
    code, name = frame.f_code, frame.f_code.co_name
    owner = frame.f_locals.get("self")
    if isinstance(owner, nn.Module):
        method = getattr(type(owner), name, None)
        return Call(method, owner, ()) if method is not None and getattr(method, "__code__", None) is code else None
    scopes = frame.f_globals, caller.f_globals
    function = next((v for scope in scopes for v in scope.values() if getattr(v, "__code__", None) is code), None)
    names = tuple((scope, n) for scope in scopes for n, v in scope.items() if v is function)
    return None if function is None else Call(function, None, names)


@contextlib.contextmanager
def replace_functions(functions: Sequence[tuple[Call, OpaqueFunction]]) -> Iterator[None]:
    """Puts modules where the code looks for the functions; the caller restores attributes of modules."""
    for call, module in functions:
        if call.owner is not None:
            call.owner.__dict__[call.function.__name__] = _caller(module)
    with patched([(scope, name, _caller(module)) for call, module in functions for scope, name in call.names]):
        yield


def _caller(module: OpaqueFunction) -> Callable[..., Any]:
    # the module itself, as an attribute of another one, would become a submodule of it
    return lambda *args, **kwargs: (module if is_tracing() else module.function)(*args, **kwargs)
