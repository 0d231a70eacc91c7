"""Functions and methods that look at data, kept whole: a call is one node, and the code around it is followed.

requires: the error of a trace.
ensures:  the next trace meets, in place of such a function, a module that calls it; the module holds no parameters.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from types import FrameType
from typing import Any, NamedTuple

from torch import nn

from fxgrow.tracing.source_location import is_user_code


class OpaqueFunction(nn.Module):
    """Calls a function, or a method of a module that is not its own."""

    def __init__(self, function: Callable[..., Any], owner: nn.Module | None) -> None:
        super().__init__()
        self.function = function
        # past nn.Module, which would take the owner's parameters for ours
        self.__dict__["owner"] = owner

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the function returns, in this module's mode."""
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
        """The function's name."""
        return self.function.__qualname__


class Call(NamedTuple):
    """A call that was under way: the function, the module it is a method of, and the globals that name it."""

    function: Callable[..., Any]
    owner: nn.Module | None
    names: tuple[tuple[dict[str, Any], str], ...]

    @property
    def key(self) -> tuple[int, int]:
        """Tells calls apart."""
        return id(self.function.__code__), id(self.owner)

    @property
    def has_parameters(self) -> bool:
        """Whether the method names parameters of its module, or parts that hold some: those must stay visible."""
        if self.owner is None:
            return False
        named = set(self.function.__code__.co_names)
        parts = {n for n, m in self.owner.named_children() if next(m.parameters(), None) is not None}
        return bool(named & (parts | {n for n, _ in self.owner.named_parameters(recurse=False)}))


def calls(error: BaseException) -> list[Call]:
    """The calls below the innermost `forward` that an error went through, outermost first."""
    frames: list[FrameType] = []
    trace = error.__traceback__
    while trace is not None:
        if is_user_code(trace.tb_frame):
            frames.append(trace.tb_frame)
        trace = trace.tb_next
    starts = [i for i, f in enumerate(frames) if f.f_code.co_name == "forward"]
    below = frames[starts[-1] :] if starts else []
    found = (_call(frame, caller) for caller, frame in zip(below, below[1:], strict=False))
    return [call for call in found if call is not None]


def _call(frame: FrameType, caller: FrameType) -> Call | None:
    code, name = frame.f_code, frame.f_code.co_name
    owner = frame.f_locals.get("self")
    if isinstance(owner, nn.Module):
        method = getattr(type(owner), name, None)
        return Call(method, owner, ()) if method is not None and getattr(method, "__code__", None) is code else None
    for scope in (frame.f_globals, caller.f_globals):
        names = [n for n, value in scope.items() if getattr(value, "__code__", None) is code]
        if names:
            function = scope[names[0]]
            places = ((s, n) for s in (frame.f_globals, caller.f_globals) for n, v in s.items() if v is function)
            return Call(function, None, tuple(places))
    return None


@contextlib.contextmanager
def in_place(wholes: Sequence[tuple[Call, OpaqueFunction]]) -> Iterator[None]:
    """Puts modules where the code looks for the functions; attributes of modules are for the caller to restore."""
    saved: list[tuple[dict[str, Any], str, Any]] = []
    try:
        for call, whole in wholes:
            if call.owner is not None:
                call.owner.__dict__[call.function.__name__] = _caller(whole)
            for scope, name in call.names:
                saved.append((scope, name, scope[name]))
                scope[name] = _caller(whole)
        yield
    finally:
        for scope, name, function in reversed(saved):
            scope[name] = function


def _caller(whole: OpaqueFunction) -> Callable[..., Any]:
    # a module among a module's attributes would become its part
    return lambda *args, **kwargs: whole(*args, **kwargs)
