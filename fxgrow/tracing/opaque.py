"""Code that cannot be traced stays one opaque node, the smallest that contains it.

requires: a trace that failed, with the module and the calls in which it failed.
ensures:  the next trace makes one node of a function of that module, or else of the module or the one around it; the
          node has the reason in `node.meta["opaque"]`, which pins the widths that it touches.
"""

from __future__ import annotations

import contextlib
import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import fx, nn
from torch.jit import ScriptModule

from fxgrow.errors import CaptureError
from fxgrow.graph.evaluate import lent_buffers
from fxgrow.tracing.example_values import example_arguments
from fxgrow.tracing.fake_values import FakeRunner, argument_values, real_values
from fxgrow.tracing.namespaces import Namespaces
from fxgrow.tracing.opaque_functions import Call, OpaqueFunction, replace_functions

_SCRIPTED = "a TorchScript module has no Python code (build the model with the module that it was made from)"


class OpaqueFallback:
    """The opaque modules and functions that the traces of one model have needed so far."""

    def __init__(self, model: nn.Module, namespaces: Namespaces) -> None:
        self.model, self._namespaces = model, namespaces
        #: why each module is opaque; an opaque function is a module here
        self.reasons: dict[nn.Module, str] = {m: _SCRIPTED for m in model.modules() if isinstance(m, ScriptModule)}
        #: by the name of the module that stands for each in the graph
        self.functions: dict[str, tuple[Call, OpaqueFunction]] = {}
        self._first: dict[str, CaptureError] = {}

    def add(self, path: str, error: CaptureError, calls: Sequence[Call]) -> None:
        """Makes the outermost call in the module at `path`, or a module, opaque; raises the error if neither can be."""
        already_opaque = path and self.model.get_submodule(path) in self.reasons
        if not already_opaque:
            self._first.setdefault(path, error)
        known = {call.key for call, _ in self.functions.values()}
        for call in calls:
            if not already_opaque and call.key not in known and not call.has_parameters:
                function = OpaqueFunction(call.function, call.owner)
                taken, name = {*self.functions, *dir(self.model)}, f"{call.function.__name__}_opaque"
                name = next(free for free in (f"{name}{i or ''}" for i in itertools.count()) if free not in taken)
                self.functions[name] = call, function
                self.reasons[function] = _reason(error)
                return
        cause, outer = self._cause(path, error), path
        while outer:
            module = self.model.get_submodule(outer)
            if module not in self.reasons and not isinstance(module, (nn.ModuleList, nn.ModuleDict)):
                self.reasons[module] = _reason(cause)
                return
            outer = outer.rpartition(".")[0]
        raise cause

    def _cause(self, path: str, error: CaptureError) -> CaptureError:
        """Returns the first error in a module or the innermost one below it; that of an opaque node says less."""
        if path in self._first or not path:
            return self._first.get(path, error)
        inner = [p for p in self._first if p.startswith(f"{path}.")]
        return self._first[max(inner, key=len)] if inner else error

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """While a trace runs, the opaque functions are modules of the model."""
        modules = self.model._modules
        self.model._modules = _WithFunctions(modules, {name: f for name, (_, f) in self.functions.items()})
        try:
            with self._namespaces.as_traced(), replace_functions(list(self.functions.values())):
                yield
        finally:
            self.model._modules = modules


class _WithFunctions(dict[str, Any]):
    """The modules of a model; opaque functions are found by name, but a loop over the modules does not meet them."""

    def __init__(self, modules: Mapping[str, Any], functions: Mapping[str, OpaqueFunction]) -> None:
        super().__init__(modules)
        self.functions = functions

    def __contains__(self, name: object) -> bool:
        return super().__contains__(name) or name in self.functions

    def __missing__(self, name: str) -> OpaqueFunction:
        return self.functions[name]


def _reason(error: CaptureError) -> str:
    """Returns module, line and problem of a message, without its advice."""
    return re.split(r"\. (?=A graph |Check that )", str(error).removeprefix("Cannot capture "))[0]


def opaque_value(node: fx.Node, root: nn.Module, runner: FakeRunner, inputs: Mapping[str, Any]) -> Any:
    """Returns the value of an opaque node: on fake tensors, and where its code looks at data, on real ones.

    They are those of the example where they follow from its inputs, else random.
    """
    module = root.get_submodule(str(node.target))
    if not isinstance(module, ScriptModule):  # whose buffers cannot be exchanged for fake ones
        with contextlib.suppress(Exception):
            return runner.call(node, root)
    with lent_buffers(module):

        def on_example() -> Any:
            args, kwargs = real_values(example_arguments(node, inputs))
            return module.forward(*args, **kwargs)

        with contextlib.suppress(Exception):
            return runner.guess(on_example, (), {})
        return runner.guess(module.forward, *argument_values(node))
