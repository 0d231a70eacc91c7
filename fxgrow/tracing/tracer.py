"""A tracer of torch.fx that runs every node on fake tensors as it records it."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from types import CodeType, FrameType, MappingProxyType
from typing import Any

import torch
from torch import fx, nn
from torch._subclasses.fake_tensor import DynamicOutputShapeException

from fxgrow.errors import CaptureError
from fxgrow.graph.node_functions import guard
from fxgrow.graph.node_meta import CHECK
from fxgrow.tracing.checks import raises_otherwise, unused_answer
from fxgrow.tracing.forward_hooks import call_with_hooks
from fxgrow.tracing.intercept import intercept
from fxgrow.tracing.leaf_modules import is_layer
from fxgrow.tracing.multihead_attention import multihead_attention
from fxgrow.tracing.node_recorder import PLAIN, NodeRecorder
from fxgrow.tracing.opaque_functions import Call, OpaqueFunction, calls_in
from fxgrow.tracing.outcomes import Outcomes
from fxgrow.tracing.proxy import INPLACE, ValueProxy
from fxgrow.tracing.size_decisions import Decision, Otherwise, SizeDecisions
from fxgrow.tracing.source_location import (
    asking_frames,
    failure,
    last_place,
    last_user_line,
    looks_at_data,
    source,
    user_frame,
)


class ValueTracer(NodeRecorder):
    """Records a model's forward pass; its proxies know their (fake) values."""

    def __init__(
        self,
        inputs: dict[str, Any],  # name and example value of each placeholder, in order
        call: Callable[[list[Any]], Any],  # the model's forward, given the placeholders' proxies
        leaves: frozenset[nn.Module],  # modules that become one node, besides those of torch.nn
        flipped: frozenset[str],  # paths of `training` flags that are read as their opposite
        opaque: Mapping[nn.Module, str],  # modules that become one node as their code cannot be traced, and why
        otherwise: Mapping[Decision, Otherwise] = MappingProxyType({}),  # decisions on sizes, and their outcomes here
    ) -> None:
        super().__init__(inputs, flipped, opaque)
        self.call, self.leaves = call, leaves
        #: path of the innermost module in which tracing failed, and the calls there, outermost first
        self.failed_in, self.failed_calls = "", list[Call]()
        #: opaque functions, as modules by name
        self.opaque_functions: dict[str, nn.Module] = {}
        self._traced_attention: set[nn.Module] = set()
        #: per `training` flag that the code branched on: path of the innermost module, the flag, module and line
        self.branches: dict[str, tuple[str, bool, str]] = {}
        self.decisions, self.outcomes = SizeDecisions(otherwise), Outcomes()
        #: attributes that the code set, and the modules
        self.written: set[tuple[str | None, str]] = set()
        #: guards on numbers that the code asked for, and the conversion of each
        self.numbers: dict[fx.Node, Callable[[Any], Any]] = {}
        #: the files whose code asked for them, and their global names
        self.asked_in: dict[str, dict[str, Any]] = {}
        self._guards: dict[tuple[str, str], fx.Node] = {}
        self._asked: dict[tuple[int, CodeType, int], tuple[str, str]] = {}

    def record(self, model: nn.Module) -> fx.Graph:
        """Traces the model; a CaptureError says that its code failed, or looked at data."""
        self._names |= {id(tensor): name for name, tensor in (*model.named_buffers(), *model.named_parameters())}
        grad = torch.is_grad_enabled()
        devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else []
        try:
            with torch.random.fork_rng(devices=devices):
                return self.trace(model)
        except Exception as error:
            self.failed_in, self.failed_calls = self._innermost()[0], calls_in(error)
            if isinstance(error, CaptureError):
                raise
            raise CaptureError(failure(error, self._module(), last_user_line(error))) from error
        finally:
            torch._C._set_grad_enabled(grad)

    def trace(self, root: nn.Module, concrete_args: Any = None) -> fx.Graph:  # type: ignore[override]
        """Records the model, with one placeholder per given input; the method of fx patches torch for all threads."""
        self.root, self.root_module_name, self.graph = root, type(root).__name__, fx.Graph(tracer_cls=type(self))
        self.submodule_paths = {module: name for name, module in root.named_modules()}
        self.tensor_attrs = {
            value: f"{path}.{name}" if path else name  # type: ignore[misc]
            for module, path in self.submodule_paths.items()
            for name, value in vars(module).items()
            if isinstance(value, (torch.Tensor, torch.ScriptObject, torch.Generator))
        }
        self._names = {**{id(tensor): name for tensor, name in self.tensor_attrs.items()}, **self._names}
        with intercept(self):
            inputs = [self._input(name, value) for name, value in self.inputs.items()]
            self.create_node("output", "output", (self.create_arg(self.call(inputs)),), {})
        return self.graph

    def _input(self, name: str, value: Any) -> Any:
        proxy = self.create_proxy("placeholder", name, (), {})
        node = next(reversed(self.graph.find_nodes(op="placeholder")))
        if isinstance(value, (list, tuple)) and not isinstance(value, torch.Size):  # the code gets the items
            length = self.create_node("call_function", len, (node,), {})
            self.create_node("call_function", guard, (length, len(value), f"the length of the input {name!r}"), {})
        if isinstance(value, PLAIN):  # strings, None, dtypes: the model's code sees them as they are
            self.create_node("call_function", guard, (node, value, f"the input {name!r}"), {})
        return proxy

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Layers of torch.nn, subclasses that change nothing about them, ``leaves`` and what is opaque."""
        one_node = m in self.leaves or m in self.opaque or is_layer(type(m))
        return one_node and m not in self._traced_attention

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Records a leaf as a node, and traces other modules, also those that are no part of the model."""
        path = None if self.runner.silent else self._path(m)
        if path is None:
            return (m.forward if self.runner.silent else forward)(*args, **kwargs)
        call = functools.partial(forward, *args, **kwargs)
        if type(m) is nn.MultiheadAttention and m.bias_k is None and not m.add_zero_attn:
            self._traced_attention.add(m)
            forward = functools.partial(multihead_attention, m)
        record = functools.partial(super().call_module, m, forward)
        hooked = vars(m).get("_forward_hooks") or vars(m).get("_forward_pre_hooks")
        if hooked and (m in self._traced_attention or self.is_leaf_module(m, path)):
            return call_with_hooks(m, call, record)
        return record(args, kwargs)

    def _path(self, m: nn.Module) -> str | None:
        functions: dict[str, nn.Module] = getattr(self.root._modules, "functions", {})
        return next((name for name, f in functions.items() if f is m), (self.submodule_paths or {}).get(m))

    def path_of_module(self, mod: nn.Module) -> str:
        return self._path(mod) or super().path_of_module(mod)

    def owns(self, value: Any) -> bool:
        """Whether there is a parameter or buffer of the model in nested tuples, lists and dicts."""
        if isinstance(value, torch.Tensor):
            return id(value) in self._names
        items = value.values() if type(value) is dict else value if type(value) in (tuple, list) else ()
        return any(self.owns(item) for item in items)

    def read(self, value: Any) -> Any:
        """Returns the node of a parameter or buffer that the model's code asks for; other attributes as they are."""
        return self._tensor(value) if isinstance(value, torch.Tensor) and self.owns(value) else value

    def assign(self, module: nn.Module, name: str, value: Any) -> bool:
        """Records ``self.buffer = value`` as a write into the buffer; False if there is no such buffer."""
        if not self.runner.silent:
            self.written.add((self._path(module), name))
        buffer = vars(module).get("_buffers", {}).get(name)
        if type(value) is not ValueProxy or buffer is None or id(buffer) not in self._names:
            return False
        old = self._tensor(buffer)
        node = value.node
        if node.op != "call_function" or node.args[:1] != (old.node,) or node.target not in INPLACE:
            self.create_proxy("call_method", "copy_", (old, value.detach()), {})
        return True

    def training(self, module: nn.Module, value: bool) -> Any:
        """Returns a node that reads the module's flag when the graph runs."""
        path = (self.submodule_paths or {}).get(module)
        if path is None:
            return value
        name = f"{path}.training" if path else "training"
        if name not in self._attributes:
            node = self.create_node("get_attr", name, (), {})
            self.dependence.flags[node] = frozenset((name,))
            self._attributes[name] = ValueProxy(node, self, value != (name in self.flipped))
        return self._attributes[name]

    def concrete(self, proxy: ValueProxy, convert: Callable[[Any], Any], asked_by: FrameType | None = None) -> Any:
        """Returns the plain value that the model's code asks for, with a guard if an input can change it."""
        node = proxy.node
        if convert is bool and self.outcomes.followed and node in self.dependence.drawn and not self.runner.silent:
            known = self._unused_answer(node, convert)
            return known if known is not None else self.outcomes.take(node, last_place(sys._getframe(1)))
        try:
            with self.runner.quiet():
                value = convert(proxy.carried)
        except (TypeError, ValueError, OverflowError):
            raise
        except Exception as error:
            if looks_at_data(error) and (answer := self._unused_answer(node, convert)) is not None:
                return answer
            raise CaptureError(failure(error, self._module(), last_place(sys._getframe(1)))) from error
        if isinstance(proxy.carried, torch.Tensor) or self.runner.silent:
            return value
        if node in self.dependence.data:
            if (answer := self._unused_answer(node, convert)) is not None:
                return answer
            unknown = DynamicOutputShapeException(torch.ops.aten.nonzero.default)
            raise CaptureError(failure(unknown, self._module(), last_place(sys._getframe(1))))
        for flag in self.dependence.flags.get(node, ()):
            current = self._attributes[flag].carried
            self.branches.setdefault(flag, (self._innermost()[0], current, self._where()))
        if node in self.dependence.constant:
            return value
        place = last_place(sys._getframe(1))
        if convert is bool and place and (taken := self.decisions.take(node, value, place)):
            if taken.bound is not None:
                bound = self.create_node("call_function", taken.bound[0], taken.bound[1:], {})
                message = f"a size is not beyond that of the example (`{source(*place)}` in {self._where()})"
                self.create_node("call_function", guard, (bound, True, message), {})
            return taken.outcome
        expected = value if convert is not hash else proxy.carried
        key = (node.name, repr(expected))
        if key not in self._guards:
            self._guards[key] = self._guard(node, expected)
            places = [(f.f_code.co_filename, f.f_lineno) for f in asking_frames(sys._getframe(1))]
            if any(raises_otherwise(*place, bool(expected)) for place in places):
                self._guards[key].meta[CHECK] = True
            user = user_frame(sys._getframe(1))
            if convert in (int, float) and user is not None:
                self.asked_in[user.f_code.co_filename] = user.f_globals
            if convert is not bool:
                self.numbers[self._guards[key]] = convert if convert is not hash else lambda number: number
            if asked_by is not None:
                self._asked[id(asked_by), asked_by.f_code, asked_by.f_lasti] = key
        return value

    def _unused_answer(self, node: fx.Node, convert: Callable[[Any], Any]) -> Any:
        """Returns an answer to a question about data on which no result depends; None where one does."""
        found = next(filter(None, (unused_answer(f, convert) for f in asking_frames(sys._getframe(1)))), None)
        # a graph checks its inputs as the model does; a check of hidden activations would bind widths
        if found and found.raises and node not in self.dependence.hidden:
            self._guard(node, found.value)
        return found and found.value

    def _guard(self, node: fx.Node, expected: Any) -> fx.Node:
        place = last_place(sys._getframe(1))
        condition = f"`{source(*place) if place else ''}` in {self._where()}"
        return self.create_node("call_function", guard, (node, expected, condition), {})

    def forget_question(self, frame: FrameType) -> None:
        """Drops the guard of an ``__index__`` that only the argument parser of this call asked for."""
        key = self._asked.pop((id(frame), frame.f_code, frame.f_lasti), None)
        if key is not None:
            self.graph.erase_node(self._guards.pop(key))

    def checkpointed(self, in_function: bool = False) -> AbstractContextManager[None]:
        """Nodes recorded inside the block are a part that is computed again in the backward pass."""
        return self._scopes.checkpointed(self.graph, in_function)

    def record_grad_mode(self, enabled: bool) -> None:
        """Records the beginning or the end of a block without, or with, gradients."""
        self._scopes.record_grad_mode(self.create_node, enabled)

    def _innermost(self) -> tuple[str, str]:
        stack = [(path, kind) for path, kind in self.module_stack.values() if kind is not OpaqueFunction]
        path, kind = stack[-1] if stack else ("", type(self.root))
        return path, getattr(kind, "__name__", str(kind))

    def _module(self) -> str:
        path, kind = self._innermost()
        return f"module {path!r} ({kind})" if path else f"the model ({kind})"

    def _where(self) -> str:
        place = last_place(sys._getframe(1))
        return self._module() + (f" at {place[0]}:{place[1]}" if place else "")
