"""An fx tracer that runs every node on fake tensors while it records it."""

from __future__ import annotations

import builtins
import contextlib
import dataclasses
import enum
import linecache
import operator
import os
import sys
from collections.abc import Callable, Iterator
from types import CodeType, FrameType
from typing import Any

import torch
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.passes.shape_prop import _extract_tensor_metadata
from torch.overrides import TorchFunctionMode, is_tensor_method_or_property

from fxgrow._errors import CaptureError
from fxgrow._proxy import STATIC_METHODS, ValueProxy, has_proxy
from fxgrow._runtime import guard, set_grad_enabled

_INTERNAL = (os.path.dirname(torch.__file__) + os.sep, os.path.dirname(os.path.abspath(__file__)) + os.sep)
_PLAIN = (type(None), str, torch.dtype, torch.layout, torch.memory_format, type, enum.Enum)
# Calls that make a tensor from nothing: nodes even without a proxy, or noise would be drawn once and kept.
_FACTORY_NAMES = (
    "zeros ones full empty rand randn randint randperm normal arange linspace logspace eye tril_indices triu_indices "
    "tensor as_tensor scalar_tensor"
).split()
FACTORIES = {getattr(torch, name): name for name in _FACTORY_NAMES}
# Methods that take sizes one by one: with a proxy among them the argument parser gives up before anybody is asked.
_SIZE_METHODS = "expand view reshape repeat permute tile new_zeros new_ones new_empty new_full flatten unflatten to".split()
_OPERATORS = {"getitem", "setitem", "add", "sub", "mul", "truediv", "floordiv", "matmul", "mod", "pow",
              "eq", "ne", "lt", "le", "gt", "ge", "and", "or", "xor", "iadd", "isub", "imul", "itruediv"}  # fmt: skip
_STATIC_FUNCTIONS = {torch.is_floating_point, torch.is_complex, torch.is_conj, torch.is_neg, torch.is_signed}
_SIZES = {"shape", "size", "numel", "nelement", "device"}
# nn.Module methods a subclass of a torch.nn layer may have and still compute what the layer computes.
_HARMLESS = {"extra_repr", "reset_parameters"}
DATA_HINT = (
    "A graph cannot follow a decision on the data: write it with torch.where, or move it into a function of its own "
    "marked with torch.fx.wrap."
)


class ValueTracer(fx.Tracer):
    """Records a model's forward pass; its proxies know their (fake) values.

    Args:
        inputs: name and example value of each placeholder, in order.
        call: calls the model's forward, given the placeholders' proxies.
        leaves: modules to keep whole, besides those of ``torch.nn``.
        flipped: paths of ``training`` flags to read as their opposite.
    """

    def __init__(
        self,
        inputs: dict[str, Any],
        call: Callable[[list[Any]], Any],
        leaves: frozenset[nn.Module] = frozenset(),
        flipped: frozenset[str] = frozenset(),
    ) -> None:
        super().__init__(autowrap_functions=tuple(FACTORIES))
        self.inputs, self.call, self.leaves, self.flipped = inputs, call, leaves, flipped
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)
        self.constants: dict[str, torch.Tensor] = {}
        self.branches: dict[str, tuple[str, bool, str]] = {}  # flag -> (innermost module, value, where)
        self._silent = False
        self._names: dict[int, str] = {}  # id of parameter, buffer or tensor attribute -> qualified name
        self._attributes: dict[str, ValueProxy] = {}
        self._seen: dict[tuple[Any, ...], Any] = {}
        self._fixed: set[fx.Node] = set()  # nodes that no input can change
        self._flags: dict[fx.Node, frozenset[str]] = {}  # numbers that depend on a `training` flag
        self._guards: dict[tuple[str, str], fx.Node] = {}
        self._asked: dict[tuple[int, CodeType, int], tuple[tuple[str, str], fx.Node]] = {}
        self._grad_modes: list[tuple[bool, fx.Node]] = []

    # -- running -------------------------------------------------------------------------------

    def record(self, model: nn.Module) -> fx.Graph:
        """Trace the model.

        Raises:
            CaptureError: the model's code failed, or looked at data.
        """
        for holder in (model.named_buffers(), model.named_parameters()):
            self._names.update((id(tensor), name) for name, tensor in holder)
        grad = torch.is_grad_enabled()
        try:
            with self._patches(), _Recorder(self), torch.random.fork_rng(devices=_cuda_devices()):
                return self.trace(model)
        except CaptureError:
            raise
        except Exception as error:
            raise CaptureError(self._explain(error)) from error
        finally:
            torch._C._set_grad_enabled(grad)

    def create_args_for_root(self, root_fn: Any, is_module: bool, concrete_args: Any = None) -> tuple[Any, list[Any]]:
        """One placeholder per given input, whatever the signature of forward."""
        del root_fn, is_module, concrete_args
        self._names = {**{id(tensor): name for tensor, name in self.tensor_attrs.items()}, **self._names}  # type: ignore[attr-defined]

        def forward(*proxies: Any) -> Any:
            with self._training_at_run_time(self.root, ""):
                return self.call(list(proxies))

        return forward, [self.create_proxy("placeholder", name, (), {}) for name in self.inputs]

    @contextlib.contextmanager
    def quiet(self) -> Iterator[None]:
        """Run torch code on values: nothing is recorded, no hooks run, no gradients are kept."""
        before, self._silent = self._silent, True
        try:
            with self.fake, torch.no_grad():
                yield
        finally:
            self._silent = before

    @property
    def silent(self) -> bool:
        return self._silent

    @contextlib.contextmanager
    def _patches(self) -> Iterator[None]:
        saved: list[tuple[Any, str, Any, bool]] = []

        def replace(owner: Any, name: str, new: Any) -> None:
            saved.append((owner, name, getattr(owner, name), name in vars(owner)))
            setattr(owner, name, new)

        def recording(function: Any, always: bool) -> Any:
            def wrapper(*args: Any, **kwargs: Any) -> Any:
                if self._silent or not (always or has_proxy(args) or has_proxy(kwargs)):
                    return function(*args, **kwargs)
                return self.record_call(function, args, kwargs)

            return wrapper

        real = builtins.isinstance

        def is_instance(value: Any, kinds: Any) -> bool:
            if type(value) is ValueProxy:
                return real(value.carried, kinds) or real(value, kinds)
            return real(value, kinds)

        try:
            for function, name in FACTORIES.items():
                replace(torch, name, recording(function, always=True))
            for name in _SIZE_METHODS:
                replace(torch.Tensor, name, recording(getattr(torch.Tensor, name), always=False))
            # `isinstance(x, torch.Tensor)` must be true, and `__class__` may not say so (see ValueProxy).
            replace(builtins, "isinstance", is_instance)
            yield
        finally:
            for owner, name, old, own in reversed(saved):
                if own:
                    setattr(owner, name, old)
                else:
                    delattr(owner, name)

    # -- nodes and their values ----------------------------------------------------------------

    def record_call(self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A node for a torch function or tensor method that was called with proxies."""
        if function in _STATIC_FUNCTIONS:
            with self.quiet():
                return function(*(arg.carried if type(arg) is ValueProxy else arg for arg in args), **kwargs)
        if function not in FACTORIES and is_tensor_method_or_property(function):
            name = function.__name__
            bare = name.strip("_")
            if name != bare and bare in _OPERATORS:
                target = getattr(operator, bare, None) or getattr(operator, bare + "_")
                return self.create_proxy("call_function", target, args, kwargs)
            if name in STATIC_METHODS:
                with self.quiet():
                    return getattr(args[0].carried, name)(*args[1:], **kwargs)
            return self.create_proxy("call_method", name, args, kwargs)
        return self.create_proxy("call_function", function, args, kwargs)

    def create_proxy(
        self,
        kind: str,
        target: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        name: str | None = None,
        type_expr: Any = None,
        proxy_factory_fn: Any = None,
    ) -> Any:
        """A node and what stands for its value: a proxy, or plain Python where that is static."""
        node_args, node_kwargs = self.create_arg(args), self.create_arg(kwargs)
        key = self._arithmetic_key(kind, target, node_args, node_kwargs)
        if key is not None and key in self._seen:
            return self._seen[key]
        node = self.create_node(kind, target, node_args, node_kwargs, name, type_expr)
        result = self._present(node, node.meta["val"], whole=kind in ("call_function", "call_method"))
        if key is not None:
            self._seen[key] = result
        return result

    def create_node(
        self,
        kind: str,
        target: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        name: str | None = None,
        type_expr: Any = None,
    ) -> fx.Node:
        """A node with its value in ``meta["val"]``, ``meta["tensor_meta"]`` and the user's line."""
        node = super().create_node(kind, target, args, kwargs, name, type_expr)
        try:
            value = self._run(node)
        except BaseException:
            self.graph.erase_node(node)
            raise
        set_value(node, value)
        frame = _user_frame(sys._getframe(1))
        if frame is not None:
            file, line = frame.f_code.co_filename, frame.f_lineno
            node.stack_trace = f'File "{file}", line {line}, in {frame.f_code.co_name}\n    {_source(file, line)}'
        sources = node.all_input_nodes
        if kind != "placeholder" and all(source in self._fixed for source in sources):
            self._fixed.add(node)
        flags = frozenset().union(*(self._flags.get(source, frozenset()) for source in sources))
        if flags and not isinstance(value, torch.Tensor):
            self._flags[node] = flags
        return node

    def _run(self, node: fx.Node) -> Any:
        if node.op == "placeholder":
            return self._faked(self.inputs[str(node.target)])
        with self.quiet():
            args = fx.node.map_arg(node.args, lambda source: source.meta["val"])
            kwargs = fx.node.map_arg(node.kwargs, lambda source: source.meta["val"])
            if node.op == "output":
                return args[0]
            if node.op == "get_attr":
                return self._attribute(str(node.target))
            if node.op == "call_method":
                return getattr(args[0], str(node.target))(*args[1:], **kwargs)
            if node.op == "call_module":
                # Not __call__: hooks are the user's and must not see fake tensors.
                return self.root.get_submodule(str(node.target)).forward(*args, **kwargs)
            if node.target is guard or node.target is set_grad_enabled:
                return None
            return node.target(*args, **kwargs)  # type: ignore[operator]

    def _attribute(self, name: str) -> Any:
        if name in self.constants:
            return self._faked(self.constants[name])
        path, _, attribute = name.rpartition(".")
        owner = self.root.get_submodule(path)
        value = getattr(owner, attribute)
        if type(value) is ValueProxy:  # a `training` flag
            value = value.carried
        return self._faked(value)

    def _faked(self, value: Any) -> Any:
        kind = type(value)
        if isinstance(value, torch.Tensor):
            return value if isinstance(value, FakeTensor) else self.fake.from_tensor(value)
        if isinstance(value, tuple) and hasattr(value, "_fields"):
            return kind(*(self._faked(item) for item in value))
        if isinstance(value, (list, tuple)) and not isinstance(value, torch.Size):
            return kind(self._faked(item) for item in value)
        if isinstance(value, dict):
            return {name: self._faked(item) for name, item in value.items()}
        return value

    def _present(self, node: fx.Node, value: Any, whole: bool) -> Any:
        """What the model's code gets: structures come apart, so that `type(x) is tuple` and `**x` work."""
        if isinstance(value, _PLAIN):
            return value
        proxy = ValueProxy(node, self, value)
        if whole:
            return proxy
        if type(value) is dict:
            return {name: proxy[name] for name in value}
        if isinstance(value, (tuple, list)) and not isinstance(value, torch.Size):
            items = [proxy[i] for i in range(len(value))]
            if node.op == "placeholder" or node.op == "call_module":
                items = [self._reopen(item) for item in items]
            return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
        return proxy

    def _reopen(self, item: Any) -> Any:
        return self._present(item.node, item.carried, whole=False) if type(item) is ValueProxy else item

    def create_arg(self, a: Any) -> Any:
        """Nodes for proxies, tensors and the containers fx would flatten into another type."""
        if type(a) is ValueProxy:
            if a.tracer is not self:
                raise CaptureError(f"{a!r} was kept by the model from an earlier capture.")
            return a.node
        if isinstance(a, torch.Tensor):
            return self._tensor(a).node
        if type(a) is torch.Size:
            return tuple(self.create_arg(item) for item in a)
        if dataclasses.is_dataclass(a) and not isinstance(a, type):
            fields = {field.name: getattr(a, field.name) for field in dataclasses.fields(a) if field.init}
            given = {name: item for name, item in fields.items() if item is not None}
            return self.create_node("call_function", type(a), (), self.create_arg(given))
        if isinstance(a, dict) and type(a) is not dict:
            return self.create_node("call_function", type(a), (super().create_arg(dict(a)),), {})
        return super().create_arg(a)

    def _tensor(self, tensor: torch.Tensor) -> ValueProxy:
        """The one ``get_attr`` node of a parameter, a buffer, or a constant kept beside the model."""
        name = self._names.get(id(tensor))
        if name is None:
            if isinstance(tensor, FakeTensor):
                raise CaptureError("A tensor made during capture reached the graph without being recorded.")
            count = len(self.constants)
            while hasattr(self.root, name := f"_tensor_constant{count}"):
                count += 1
            self.constants[name] = tensor
            self._names[id(tensor)] = name
        if name not in self._attributes:
            node = self.create_node("get_attr", name, (), {})
            self._attributes[name] = ValueProxy(node, self, node.meta["val"])
        return self._attributes[name]

    def _arithmetic_key(self, kind: str, target: Any, args: Any, kwargs: Any) -> tuple[Any, ...] | None:
        """Equal keys mean equal numbers: half of a raw trace is the same sizes computed again."""
        name = args[1] if target is getattr else target
        sources = [arg for arg in args if isinstance(arg, fx.Node)]
        values = [source.meta["val"] for source in sources]
        if (target is getattr or kind == "call_method") and name in _SIZES and isinstance(values[0], torch.Tensor):
            return target, repr(args), repr(kwargs), tuple(values[0].shape)
        if kind == "call_function" and getattr(target, "__module__", "") == "_operator" and values:
            if all(isinstance(value, (bool, int, float, torch.Size)) for value in values):
                return target, repr(args), repr(kwargs)
        return None

    # -- modules and attributes ----------------------------------------------------------------

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Layers of torch.nn, subclasses that change nothing about them, and ``leaves``."""
        if m in self.leaves:
            return True
        for cls in type(m).__mro__:
            if cls.__module__.startswith(("torch.nn", "torch.ao.nn")):
                return cls is not nn.Module and not issubclass(cls, nn.Sequential)
            if any(not name.startswith("__") and name not in _HARMLESS and callable(getattr(cls, name)) for name in vars(cls)):
                return False
        return False

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A node for a leaf; other modules, and those outside the model's tree, are traced through."""
        if self._silent:
            return m.forward(*args, **kwargs)
        path = (self.submodule_paths or {}).get(m)
        if path is None:
            return forward(*args, **kwargs)
        if self.is_leaf_module(m, path):
            return super().call_module(m, forward, args, kwargs)
        with self._training_at_run_time(m, path):
            return super().call_module(m, forward, args, kwargs)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        """Parameters and buffers of the model become nodes when its code asks for them."""
        del attr, parameter_proxy_cache
        if not self._silent and isinstance(attr_val, torch.Tensor) and id(attr_val) in self._names:
            return self._tensor(attr_val)
        return attr_val

    @contextlib.contextmanager
    def _training_at_run_time(self, module: nn.Module, path: str) -> Iterator[None]:
        """Let ``self.training`` read the module's flag when the graph runs, not when it is captured."""
        before = module.__dict__["training"]
        if type(before) is not ValueProxy:
            name = f"{path}.training" if path else "training"
            if name not in self._attributes:
                node = self.create_node("get_attr", name, (), {})
                value = bool(before) != (name in self.flipped)
                set_value(node, value)
                self._flags[node] = frozenset((name,))
                self._attributes[name] = ValueProxy(node, self, value)
            module.__dict__["training"] = self._attributes[name]
        try:
            yield
        finally:
            module.__dict__["training"] = before

    # -- decisions -----------------------------------------------------------------------------

    def concrete(self, proxy: ValueProxy, convert: Callable[[Any], Any], asked_by: FrameType | None = None) -> Any:
        """The plain value the model's code asks for, remembered as a guard if an input can change it."""
        node = proxy.node
        try:
            with self.quiet():
                value = convert(proxy.carried)
        except (TypeError, ValueError, OverflowError):
            raise
        except Exception as error:
            raise CaptureError(self._explain(error, "its code looks at the values of a tensor", DATA_HINT)) from error
        if isinstance(proxy.carried, torch.Tensor) or self._silent:
            return value
        if node in self._flags:
            for flag in self._flags[node]:
                current = self._attributes[flag].carried
                self.branches.setdefault(flag, (self._innermost()[0], current, self._where()))
        if node in self._fixed:
            return value
        expected = value if convert is not hash else proxy.carried
        key = (node.name, repr(expected))
        if key not in self._guards:
            condition = f"`{_source_of(asked_by or sys._getframe(2))}` in {self._where()}"
            self._guards[key] = self.create_node("call_function", guard, (node, expected, condition), {})
            if asked_by is not None:
                self._asked[id(asked_by), asked_by.f_code, asked_by.f_lasti] = (key, self._guards[key])
        return value

    def forget_question(self, frame: FrameType) -> None:
        """Drop the guard of an ``__index__`` that only the argument parser of this very call asked for."""
        key, node = self._asked.pop((id(frame), frame.f_code, frame.f_lasti), (None, None))
        if key is not None and node is not None:
            del self._guards[key]
            self.graph.erase_node(node)

    def record_grad_mode(self, enabled: bool) -> None:
        """``with torch.no_grad():`` as two nodes, the second restoring what the first found."""
        if self._grad_modes and self._grad_modes[-1][0] == enabled:
            argument: Any = self._grad_modes.pop()[1]
        else:
            argument = enabled
        node = self.create_node("call_function", set_grad_enabled, (argument,), {})
        if argument is enabled:
            self._grad_modes.append((torch.is_grad_enabled(), node))
        torch._C._set_grad_enabled(enabled)

    # -- words ---------------------------------------------------------------------------------

    def _innermost(self) -> tuple[str, str]:
        if not self.module_stack:
            return "", type(self.root).__name__
        path, kind = next(reversed(self.module_stack.values()))
        return path, getattr(kind, "__name__", str(kind))

    def _where(self) -> str:
        path, kind = self._innermost()
        frame = _user_frame(sys._getframe(1))
        place = f" at {frame.f_code.co_filename}:{frame.f_lineno}" if frame is not None else ""
        return f"module {path or '(the model itself)'} ({kind}){place}"

    def _explain(self, error: Exception, problem: str = "", hint: str = "") -> str:
        path, kind = self._innermost()
        file, line = "", 0
        frames: list[tuple[str, int]] = []
        trace = error.__traceback__
        while trace is not None:
            frames.append((trace.tb_frame.f_code.co_filename, trace.tb_lineno))
            trace = trace.tb_next
        frame: FrameType | None = _user_frame(sys._getframe(1))
        if frame is not None:
            frames.append((frame.f_code.co_filename, frame.f_lineno))
        users = [entry for entry in frames if not entry[0].startswith(_INTERNAL)]
        if users and problem:
            file, line = users[-1]
        elif users:
            file, line = [entry for entry in users if entry != users[-1]][-1] if frame and len(users) > 1 else users[-1]
        kinds = type(error).__name__
        if not problem:
            problem = f"its code raises {kinds}: {str(error).strip().splitlines()[0][:300] if str(error).strip() else ''}"
            if "DataDependent" in kinds or "DynamicOutputShape" in kinds:
                problem, hint = f"the sizes or values of a result depend on the data ({kinds})", DATA_HINT
            elif isinstance(error, NotImplementedError) and "argument of type" in str(error):
                hint = "A graph holds tensors, numbers, strings and nested tuples, lists, dicts and dataclasses of them."
            else:
                hint = "Check that the model runs on these example inputs without fxgrow."
        place = f" at {file}:{line}: `{_source(file, line)}`" if file else ""
        return f"Cannot capture module {path or '(the model itself)'} ({kind}){place}: {problem}. {hint}".strip()


class _Recorder(TorchFunctionMode):
    """Sees every torch call of the model's code, also those that hold no proxy in their first place."""

    def __init__(self, tracer: ValueTracer) -> None:
        self.tracer = tracer

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tracer = self.tracer
        if tracer.silent:
            return func(*args, **kwargs)
        if func is torch._C._set_grad_enabled:
            return tracer.record_grad_mode(args[0])
        if func in FACTORIES or has_proxy(args) or has_proxy(kwargs):
            tracer.forget_question(sys._getframe(1))
            return tracer.record_call(func, args, kwargs)
        return func(*args, **kwargs)


def set_value(node: fx.Node, value: Any) -> None:
    """Store a node's value, and its tensor metadata in the form ``ShapeProp`` writes."""
    node.meta["val"] = value
    node.meta["type"] = type(value)
    found = False

    def extract(item: Any) -> Any:
        nonlocal found
        if isinstance(item, torch.Tensor):
            found = True
            return _extract_tensor_metadata(item)
        return item

    meta = fx.node.map_aggregate(value, extract)
    if found:
        node.meta["tensor_meta"] = meta


def _cuda_devices() -> list[int]:
    return list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []


def _user_frame(frame: FrameType | None) -> FrameType | None:
    while frame is not None and frame.f_code.co_filename.startswith(_INTERNAL):
        frame = frame.f_back
    return frame


def _source(file: str, line: int) -> str:
    return linecache.getline(file, line).strip()


def _source_of(frame: FrameType) -> str:
    user = _user_frame(frame)
    return _source(user.f_code.co_filename, user.f_lineno) if user is not None else ""
