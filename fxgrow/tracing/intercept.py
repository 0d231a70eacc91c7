"""Intercepts every torch call of the model's code, also those that would not reach a proxy by themselves.

ensures: what is patched acts in the thread that traces alone, and is restored; `CAPTURE_LOCK` keeps two of them apart.
"""

from __future__ import annotations

import builtins
import contextlib
import inspect
import math
import operator
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn
from torch.distributions import Distribution
from torch.fx import _symbolic_trace
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode, is_tensor_method_or_property
from torch.utils.checkpoint import checkpoint

from fxgrow.data.random_state import random_state_kept
from fxgrow.graph.node_functions import draw, function_call, scripted_call
from fxgrow.tracing.multihead_attention import multi_head_attention_forward
from fxgrow.tracing.proxy import KNOWS_CALLS, STATIC_METHODS, RecordingTracer, ValueProxy, has_proxy, is_instance
from fxgrow.tracing.source_location import is_user_code
from fxgrow.tracing.surroundings import ASKED_BY, CLOCKS, NUMBERS

_FACTORY_NAMES = (
    "zeros ones full empty rand randn randint randperm normal arange linspace logspace eye tril_indices "
    "triu_indices tensor as_tensor scalar_tensor"
)
# Calls that make a tensor from nothing: nodes even without a proxy, or noise would be drawn once and kept.
FACTORIES: dict[Callable[..., Any], str] = {getattr(torch, name): name for name in _FACTORY_NAMES.split()}
# Functions of numbers. Taken here, with those of Python and NumPy that they are traced as.
MATH = [function for name, function in vars(math).items() if callable(function) and not name.startswith("_")]
# Methods that take sizes one by one: with a proxy among them the argument parser gives up on its own.
_SIZE_METHODS = (
    "expand view reshape repeat permute tile new_zeros new_ones new_empty new_full flatten unflatten to"
).split()
_OPERATORS = (
    "getitem setitem add sub mul truediv floordiv matmul mod pow eq ne lt le gt ge and or xor iadd isub imul itruediv"
).split()
_CHECKPOINT_OPTIONS = {*inspect.signature(checkpoint).parameters, "preserve_rng_state"} - {"function", "args", "kwargs"}
#: look at the lengths of sequences inside of torch
PACKING = [getattr(nn.utils.rnn, name) for name in ("pack_padded_sequence", "pad_packed_sequence")]
_ASSERT: Any = torch._assert
_STATIC_FUNCTIONS = {torch.is_floating_point, torch.is_complex, torch.is_conj, torch.is_neg, torch.is_signed}

#: a class, module or dict of names, the name, and what is there for the time being
Patch = tuple[Any, str, Any]

MISSING: Any = object()
#: held by a capture; torch has settings of the process, and a model may be captured from two threads
CAPTURE_LOCK = threading.RLock()


class _Thread(threading.local):
    tracer: RecordingTracer | None = None


_thread = _Thread()


def recording_tracer() -> RecordingTracer | None:
    """The tracer that records what this thread does now; None in any other thread and where nothing is recorded."""
    tracer = _thread.tracer
    return None if tracer is None or tracer.runner.silent else tracer


def is_tracing() -> bool:
    """Whether this thread traces a model, or evaluates a node for that."""
    return _thread.tracer is not None


@contextlib.contextmanager
def intercept(tracer: RecordingTracer) -> Iterator[None]:
    """While open, torch calls with proxies, and calls that make tensors, become nodes of ``tracer``."""
    # torch keeps its tables of overridable functions for good: made now, they hold no patches
    is_tensor_method_or_property(torch.relu)
    outer = _thread.tracer
    with (
        CAPTURE_LOCK,
        patched([*_functions(), *_checkpointing(), *_module_methods(), *_distribution_checks(), *_questions()]),
    ):
        _thread.tracer = tracer
        try:
            with _Recorder(tracer):
                yield
        finally:
            _thread.tracer = outer


@contextlib.contextmanager
def patched(patches: Sequence[Patch]) -> Iterator[None]:
    """Sets attributes, or entries of dicts, for the time being."""
    saved = [(owner, name, entries(owner).get(name, MISSING)) for owner, name, _ in patches]
    try:
        for patch in patches:
            put_entry(*patch)
        yield
    finally:
        _put_back(saved)


def _put_back(saved: list[Patch]) -> None:
    """Sets all entries, the last one first, and only then raises an interrupt that came in between."""
    interrupt: BaseException | None = None
    for _ in range(2):
        try:
            while saved:
                put_entry(*saved[-1])
                saved.pop()
        except BaseException as error:
            interrupt = error
    if interrupt is not None:
        raise interrupt


def entries(owner: Any) -> Any:
    """Names and values of a dict, a class or a module."""
    return owner if isinstance(owner, dict) else vars(owner)


def put_entry(owner: Any, name: Any, value: Any) -> None:
    """Sets one of them, or removes it where the value is `MISSING`."""
    if value is MISSING and name not in entries(owner):
        return
    if not isinstance(owner, dict):
        delattr(owner, name) if value is MISSING else setattr(owner, name, value)
    elif value is MISSING:
        del owner[name]
    else:
        owner[name] = value


def recorded(function: Any) -> Callable[..., Any]:
    """Returns a function that becomes a node where it is called with a proxy, and of a factory in any case."""
    always = function in FACTORIES or function in NUMBERS

    def wrapper(*args: Any, **kwargs: Any) -> Any:
        tracer = recording_tracer()
        if tracer is None or not (always or has_proxy(args) or has_proxy(kwargs)):
            return function(*args, **kwargs)
        return _record(tracer, function, args, kwargs)

    return wrapper


def _functions() -> Iterator[Patch]:
    """Functions and methods that would not reach a proxy by themselves."""
    for function, name in FACTORIES.items():
        yield torch, name, recorded(function)
    for function, (home, name) in NUMBERS.items():
        yield sys.modules[home], name, recorded(function)
    yield torch, "broadcast_shapes", recorded(torch.broadcast_shapes)
    for function in MATH:
        yield math, function.__name__, recorded(function)
    for function in PACKING:
        yield nn.utils.rnn, function.__name__, recorded(function)
    for name in _SIZE_METHODS:
        yield torch.Tensor, name, recorded(getattr(torch.Tensor, name))
    check: Any = torch._check
    yield torch, "_check", lambda cond, message=None: check(bool(cond) if has_proxy(cond) else cond, message)
    apply = torch.autograd.Function.apply.__func__  # type: ignore[attr-defined]

    def apply_function(cls: Any, *args: Any, **kwargs: Any) -> Any:
        tracer = recording_tracer()
        if tracer is None or not has_proxy(args):
            return apply(cls, *args, **kwargs)
        if "checkpoint" in cls.__name__.lower():
            with tracer.checkpointed(in_function=True):
                return cls.forward(torch.autograd.function.FunctionCtx(), *args, **kwargs)
        # tracing through would lose the function's own backward
        return tracer.create_proxy("call_function", function_call(cls), args, kwargs)

    yield torch.autograd.Function, "apply", classmethod(apply_function)

    # whether a mask is the causal one decides which kernel runs, not what it computes
    yield nn.modules.transformer, "_detect_is_causal_mask", lambda mask, is_causal=None, size=None: is_causal is True
    call = torch.jit.ScriptFunction.__call__

    def call_scripted(function: Any, *args: Any, **kwargs: Any) -> Any:
        tracer = recording_tracer()
        if tracer is None or not (has_proxy(args) or has_proxy(kwargs)):
            return call(function, *args, **kwargs)
        original = getattr(function, "_torchdynamo_inline", None)  # the Python code that it was made from
        if original is not None:
            return original(*args, **kwargs)
        return tracer.create_proxy("call_function", scripted_call(function), args, kwargs)

    yield torch.jit.ScriptFunction, "__call__", call_scripted

    def variable(cls: Any, data: Any = None, *args: Any, **kwargs: Any) -> Any:
        return data.detach() if type(data) is ValueProxy else type.__call__(cls, data, *args, **kwargs)

    # not the class: code asks `isinstance(x, Variable)`
    yield type(torch.autograd.Variable), "__call__", variable


def _checkpointing() -> Iterator[Patch]:
    """Checkpointed functions are followed."""
    called = inspect.unwrap(checkpoint)
    run = getattr(called, "__dynamo_disable", None)

    def follow(function: Any, *args: Any, **kwargs: Any) -> Any:
        if not is_tracing():
            return (run or torch._dynamo.disable(called, wrapping=False))(function, *args, **kwargs)
        tracer = recording_tracer()
        given = {name: value for name, value in kwargs.items() if name not in _CHECKPOINT_OPTIONS}
        with contextlib.nullcontext() if tracer is None else tracer.checkpointed():
            return function(*args, **given)

    # what `checkpoint` calls, however the model's code has imported it
    yield called, "__dynamo_disable", follow


def _distribution_checks() -> Iterator[Patch]:
    """Checks of the arguments and samples of distributions: they look at data and compute nothing."""
    init, validate = Distribution.__init__, Distribution._validate_sample

    def initialise(self: Any, *args: Any, **kwargs: Any) -> None:
        given = inspect.signature(init).bind(self, *args, **kwargs).arguments
        init(**given | ({"validate_args": False} if is_tracing() else {}))
        if is_tracing():
            vars(self).pop("_validate_args")
            if given.get("validate_args") is not None:
                self._validate_args = given["validate_args"]

    def check(self: Any, value: Any) -> None:
        if not is_tracing():
            validate(self, value)

    yield Distribution, "__init__", initialise
    yield Distribution, "_validate_sample", check


def _module_methods() -> Iterator[Patch]:
    """Calls of modules, writes of buffers, and reads of parameters and of `training`."""
    call, get_attribute, set_attribute = nn.Module.__call__, nn.Module.__getattr__, nn.Module.__setattr__

    def record_call(module: nn.Module, /, *args: Any, **kwargs: Any) -> Any:
        if _thread.tracer is None:
            return call(module, *args, **kwargs)
        return _thread.tracer.call_module(module, lambda *a, **k: call(module, *a, **k), args, kwargs)

    def read(module: nn.Module, name: str) -> Any:
        value, tracer = get_attribute(module, name), recording_tracer()
        return value if tracer is None else tracer.read(value)

    def assign(module: nn.Module, name: str, value: Any) -> None:
        tracer = recording_tracer()
        if tracer is None or not tracer.assign(module, name, value):
            set_attribute(module, name, value)

    def training(module: nn.Module) -> Any:
        try:
            value = vars(module)["training"]
        except KeyError:
            raise AttributeError("training") from None  # a scripted module keeps it elsewhere
        tracer = recording_tracer()
        return value if tracer is None else tracer.training(module, value)

    yield nn.Module, "__call__", record_call
    yield nn.Module, "__getattr__", read
    yield nn.Module, "__setattr__", assign
    yield nn.Module, "training", property(training, lambda module, flag: vars(module).update(training=flag))


class _Tracing:
    """True in the thread that traces: what torch reads to find out whether fx does."""

    def __bool__(self) -> bool:
        return is_tracing()


def _noted(home: Any, name: str) -> Any:
    """Returns a question about the state of torch, or the time, which notes that the model's code asks it."""
    original: Any = getattr(home, name)

    def ask() -> Any:
        tracer = recording_tracer()
        if tracer is not None and is_user_code(sys._getframe(1)):
            tracer.runner.asked.add(ASKED_BY[name])
        return original()

    return ask


def _questions() -> Iterator[Patch]:
    for name in ("is_grad_enabled", "is_inference_mode_enabled"):
        yield torch, name, _noted(torch, name)
    yield from ((time, name, _noted(time, name)) for name in CLOCKS)
    yield _symbolic_trace, "_is_fx_tracing_flag", _Tracing()
    if not KNOWS_CALLS:
        yield builtins, "isinstance", is_instance


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
            if func in FACTORIES or has_proxy(args) or has_proxy(kwargs) or tracer.owns(args) or tracer.owns(kwargs):
                tracer.forget_question(sys._getframe(1))
                return _record(tracer, func, args, kwargs)
        return func(*args, **kwargs)


def _record(tracer: RecordingTracer, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Returns a proxy for a call of a torch function or a tensor method; a plain value where no size can change it."""
    if function is _ASSERT and args and isinstance(getattr(args[0], "carried", None), torch.Tensor):
        return _ASSERT(bool(args[0]), *args[1:], **kwargs)  # guarded like the `assert` of Python
    if function is F.multi_head_attention_forward and (parts := multi_head_attention_forward(*args, **kwargs)):
        return parts
    if function in NUMBERS:
        return _draw(tracer, function, args, kwargs)
    name = getattr(function, "__name__", "")
    if name == "__get__":  # an attribute of a parameter
        return getattr(tracer.read(args[0]), function.__self__.__name__)
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


def _draw(tracer: RecordingTracer, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Returns a proxy for a number that is drawn in train mode; another one is drawn once, which is noted."""
    if tracer.outcomes.followed and any(training for _, training, _ in tracer.branches.values()):
        with random_state_kept():
            number = has_proxy(args) or isinstance(function(*args, **kwargs), float)
        if number:
            return tracer.create_proxy("call_function", draw, (*NUMBERS[function], *args), kwargs)
    return function(*args, **kwargs)
