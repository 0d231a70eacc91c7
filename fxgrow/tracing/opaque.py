"""Code that no graph can follow: it stays one node, the smallest that holds the obstacle.

requires: a trace that failed, in which module and in which calls.
ensures:  the next trace keeps a function of that module whole, or else the module or the one around it; the node
          carries the reason under `node.meta["opaque"]`, and what it touches is pinned by it.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import fx, nn

from fxgrow.errors import CaptureError
from fxgrow.tracing.fake_values import FakeRunner
from fxgrow.tracing.leaf_modules import marked_followed
from fxgrow.tracing.opaque_functions import Call, OpaqueFunction, in_place


class OpaqueFallback:
    """What the traces of one model ran into so far.

    Attributes:
        reasons: the modules to keep whole, and why; functions kept whole are modules here.
        wholes: those functions, by the name of the module that stands for each in the model's place.
    """

    def __init__(self, model: nn.Module) -> None:
        """Nothing yet is in the way of tracing `model`."""
        self.model = model
        self.reasons: dict[nn.Module, str] = {}
        self.wholes: dict[str, tuple[Call, OpaqueFunction]] = {}
        self._first: dict[str, CaptureError] = {}

    def add(self, path: str, error: CaptureError, under_way: Sequence[Call]) -> None:
        """Keeps something else whole.

        Args:
            path: of the innermost module that the trace was in.
            error: what it ended with.
            under_way: calls in that module, outermost first: that one hides the most of what depends on data.

        Raises:
            CaptureError: the obstacle is in the model's own code, or the code does not run on real tensors either.
        """
        inside = path and self.model.get_submodule(path) in self.reasons
        if not inside:
            self._first.setdefault(path, error)
        known = {call.key for call, _ in self.wholes.values()}
        for call in under_way:
            if not inside and call.key not in known and not call.has_parameters:
                whole = OpaqueFunction(call.function, call.owner)
                self.wholes[self._name(call.function.__name__)] = call, whole
                self.reasons[whole] = _why(error)
                return
        for around in _outwards(path):
            module = self.model.get_submodule(around)
            if module not in self.reasons and not isinstance(module, (nn.ModuleList, nn.ModuleDict)):
                self.reasons[module] = _why(self._cause(path, error))
                return
        raise self._cause(path, error)

    def _cause(self, path: str, error: CaptureError) -> CaptureError:
        """The first error of the module, or of the innermost one in it; a node's own failure says less."""
        inner = [p for p in self._first if p == path or p.startswith(f"{path}.")] if path else []
        return self._first[max(inner, key=len)] if inner and path not in self._first else self._first.get(path, error)

    def _name(self, function: str) -> str:
        """A name that no part of the model has."""
        taken = {*self.wholes, *dir(self.model)}
        names = (f"{function}_whole{i or ''}" for i in itertools.count())
        return next(name for name in names if name not in taken)

    @contextmanager
    def in_the_way(self) -> Iterator[None]:
        """While a trace runs: the functions are modules of the model."""
        self.model._modules.update({name: whole for name, (_, whole) in self.wholes.items()})
        try:
            with in_place(list(self.wholes.values())), marked_followed():
                yield
        finally:
            for name in self.wholes:
                del self.model._modules[name]


def _outwards(path: str) -> Iterator[str]:
    """The path and those of the modules around it, without the root."""
    while path:
        yield path
        path = path.rpartition(".")[0]


def _why(error: CaptureError) -> str:
    """Module, line and problem, without what to do about it."""
    return re.split(r"\. (?=A graph |Check that )", str(error).removeprefix("Cannot capture "))[0]


def opaque_value(node: fx.Node, root: nn.Module, runner: FakeRunner) -> Any:
    """The value of an opaque node: on fake tensors, and where its code looks at data on random real ones."""
    try:
        return runner.call(node, root)
    except Exception:
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda source: source.meta["val"])
        module = root.get_submodule(str(node.target))
        with _own_buffers(module):
            return runner.guess(module.forward, args, kwargs)


@contextmanager
def _own_buffers(module: nn.Module) -> Iterator[None]:
    """Lends a module copies of its buffers: running statistics must not see random values."""
    saved = [(part, part._buffers) for part in module.modules()]
    for part, buffers in saved:
        part._buffers = {k: None if b is None else b.clone() for k, b in buffers.items()}
    try:
        yield
    finally:
        for part, buffers in saved:
            part._buffers = buffers
