"""Intercepts every torch call of the model's code, also those that would not reach a proxy by themselves."""

from __future__ import annotations

import builtins
import contextlib
import inspect
import operator
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode, is_tensor_method_or_property
from torch.utils.checkpoint import checkpoint

from fxgrow.graph.node_functions import function_call, scripted_call
from fxgrow.tracing.proxy import STATIC_METHODS, RecordingTracer, ValueProxy, has_proxy

_FACTORY_NAMES = (
    "zeros ones full empty rand randn randint randperm normal arange linspace logspace eye tril_indices "
    "triu_indices tensor as_tensor scalar_tensor"
)
# Calls that make a tensor from nothing: nodes even without a proxy, or noise would be drawn once and kept.
FACTORIES: dict[Callable[..., Any], str] = {getattr(torch, name): name for name in _FACTORY_NAMES.split()}
# Methods that take sizes one by one: with a proxy among them the argument parser gives up on its own.
_SIZE_METHODS = (
    "expand view reshape repeat permute tile new_zeros new_ones new_empty new_full flatten unflatten to"
).split()
_OPERATORS = (
    "getitem setitem add sub mul truediv floordiv matmul mod pow eq ne lt le gt ge and or xor iadd isub imul itruediv"
).split()
_CHECKPOINT_OPTIONS = {*inspect.signature(checkpoint).parameters, "preserve_rng_state"} - {"function", "args", "kwargs"}
_CHECKS = {torch._assert}
_STATIC_FUNCTIONS = {torch.is_floating_point, torch.is_complex, torch.is_conj, torch.is_neg, torch.is_signed}

Patch = tuple[Any, str, Any]


@contextlib.contextmanager
def intercept(tracer: RecordingTracer) -> Iterator[None]:
    """While open, torch calls with proxies, and calls that make tensors, become nodes of ``tracer``."""
    # torch keeps its tables of overridable functions for good: made now, they hold no patches and thus no model
    is_tensor_method_or_property(torch.relu)
    with _patched([*_functions(tracer), *_module_attributes(tracer), _isinstance()]), _Recorder(tracer):
        yield


@contextlib.contextmanager
def _patched(patches: Sequence[Patch]) -> Iterator[None]:
    """Sets attributes for the time being."""
    saved = [(owner, name, vars(owner).get(name), name in vars(owner)) for owner, name, _ in patches]
    try:
        for owner, name, new in patches:
            setattr(owner, name, new)
        yield
    finally:
        for owner, name, old, defined in reversed(saved):
            setattr(owner, name, old) if defined else delattr(owner, name)


def _functions(tracer: RecordingTracer) -> Iterator[Patch]:
    """Functions and methods that would not reach a proxy by themselves."""

    def recording(function: Any, always: bool) -> Any:
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            if tracer.runner.silent or not (always or has_proxy(args) or has_proxy(kwargs)):
                return function(*args, **kwargs)
            return _record(tracer, function, args, kwargs)

        return wrapper

    for function, name in FACTORIES.items():
        yield torch, name, recording(function, always=True)
    for name in _SIZE_METHODS:
        yield torch.Tensor, name, recording(getattr(torch.Tensor, name), always=False)
    apply = torch.autograd.Function.apply.__func__  # type: ignore[attr-defined]

    def apply_function(cls: Any, *args: Any, **kwargs: Any) -> Any:
        if tracer.runner.silent or not has_proxy(args):
            return apply(cls, *args, **kwargs)
        if "checkpoint" in cls.__name__.lower():
            with tracer.checkpointed(in_function=True):
                return cls.forward(torch.autograd.function.FunctionCtx(), *args, **kwargs)
        # tracing through would lose the function's own backward
        return tracer.create_proxy("call_function", function_call(cls), args, kwargs)

    yield torch.autograd.Function, "apply", classmethod(apply_function)

    call = torch.jit.ScriptFunction.__call__

    def call_scripted(function: Any, *args: Any, **kwargs: Any) -> Any:
        if tracer.runner.silent or not (has_proxy(args) or has_proxy(kwargs)):
            return call(function, *args, **kwargs)
        original = getattr(function, "_torchdynamo_inline", None)  # the Python code that it was made from
        if original is not None:
            return original(*args, **kwargs)
        return tracer.create_proxy("call_function", scripted_call(function), args, kwargs)

    yield torch.jit.ScriptFunction, "__call__", call_scripted

    def follow(function: Any, *args: Any, **kwargs: Any) -> Any:
        given = {name: value for name, value in kwargs.items() if name not in _CHECKPOINT_OPTIONS}
        with contextlib.nullcontext() if tracer.runner.silent else tracer.checkpointed():
            return function(*args, **given)

    # what `checkpoint` calls, however the model's code has imported it
    yield inspect.unwrap(checkpoint), "__dynamo_disable", follow


def _module_attributes(tracer: RecordingTracer) -> Iterator[Patch]:
    """Writes of buffers, and reads of `training`."""
    set_attribute = nn.Module.__setattr__

    def assign(module: nn.Module, name: str, value: Any) -> None:
        if not tracer.assign(module, name, value):
            set_attribute(module, name, value)

    def training(module: nn.Module) -> Any:
        try:
            value = vars(module)["training"]
        except KeyError:
            raise AttributeError("training") from None  # a scripted module keeps it elsewhere
        return value if tracer.runner.silent else tracer.training(module, value)

    yield nn.Module, "__setattr__", assign
    yield nn.Module, "training", property(training, lambda module, flag: vars(module).update(training=flag))


def _isinstance() -> Patch:
    """`isinstance(x, torch.Tensor)` must be true of a proxy, and `__class__` may not say so (see ValueProxy)."""
    original = builtins.isinstance

    def is_instance(value: Any, kinds: Any) -> bool:
        return original(value, kinds) or (type(value) is ValueProxy and original(value.carried, kinds))

    return builtins, "isinstance", is_instance


class _Recorder(TorchFunctionMode):
    def __init__(self, tracer: RecordingTracer) -> None:
        self.tracer = tracer

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs, tracer = kwargs or {}, self.tracer
        if not tracer.runner.silent:
            if func is torch._C._set_grad_enabled:
                return tracer.record_grad_mode(args[0])
            if func in FACTORIES or has_proxy(args) or has_proxy(kwargs):
                tracer.forget_question(sys._getframe(1))
                return _record(tracer, func, args, kwargs)
        return func(*args, **kwargs)


def _record(tracer: RecordingTracer, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Returns a proxy for a call of a torch function or a tensor method; a plain value where no size can change it."""
    if function in _CHECKS and isinstance(getattr(args[0], "carried", None), torch.Tensor):
        return function(bool(args[0]), *args[1:], **kwargs)  # guarded like the `assert` of Python
    name = getattr(function, "__name__", "")
    method = function not in FACTORIES and is_tensor_method_or_property(function)
    if function in _STATIC_FUNCTIONS or (method and name in STATIC_METHODS):
        with tracer.runner.quiet():
            return function(*(arg.carried if type(arg) is ValueProxy else arg for arg in args), **kwargs)
    if not method:
        return tracer.create_proxy("call_function", function, args, kwargs)
    bare = name.strip("_")
    if name != bare and bare in _OPERATORS:
        target = getattr(operator, bare, None) or getattr(operator, bare + "_")
        return tracer.create_proxy("call_function", target, args, kwargs)
    return tracer.create_proxy("call_method", name, args, kwargs)
