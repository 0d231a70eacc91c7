"""Proxies that carry their (fake) value, so that Python code can look at it."""

from __future__ import annotations

import dis
import functools
import math
import operator
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from types import CodeType, FrameType
from typing import Any, Protocol

import torch
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensor

from fxgrow.tracing.checks import catches
from fxgrow.tracing.dependence import Dependence
from fxgrow.tracing.fake_values import FakeRunner
from fxgrow.tracing.outcomes import Outcomes
from fxgrow.tracing.surroundings import ASKED_BY

#: methods whose results do not depend on the sizes of the tensor
STATIC_METHODS = {
    "dim", "ndimension", "is_floating_point", "is_complex", "is_signed", "is_contiguous", "get_device",
    "element_size", "is_inference", "is_conj", "is_neg",
}  # fmt: skip
# By name: NumPy's functions of numbers. Taken here, since torch.fx puts others into `math` while it traces.
_NUMPY_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "add": operator.add, "subtract": operator.sub, "multiply": operator.mul, "divide": operator.truediv,
    "floor_divide": operator.floordiv, "remainder": operator.mod, "power": operator.pow, "negative": operator.neg,
    "absolute": abs, "sqrt": math.sqrt, "log": math.log, "log2": math.log2, "log10": math.log10, "exp": math.exp,
    "ceil": math.ceil, "floor": math.floor,
}  # fmt: skip
_isinstance = isinstance
#: whether it is known which call an instruction makes: from Python 3.11, unless it runs with -X no_debug_ranges
KNOWS_CALLS = hasattr(CodeType, "co_positions") and None not in next(iter((lambda: 0).__code__.co_positions()))
_INPLACE = ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul", "and_", "or_", "xor")


class RecordingTracer(Protocol):
    """What proxies and intercepted calls need of the tracer that records them; `ValueTracer` describes it."""

    runner: FakeRunner
    outcomes: Outcomes
    dependence: Dependence
    branches: dict[str, tuple[str, bool, str]]

    def create_proxy(self, kind: str, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any: ...
    def concrete(self, proxy: ValueProxy, convert: Callable[[Any], Any], asked_by: FrameType | None = None) -> Any: ...
    def owns(self, value: Any) -> bool: ...
    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any: ...
    def read(self, value: Any) -> Any: ...
    def assign(self, module: nn.Module, name: str, value: Any) -> bool: ...
    def training(self, module: nn.Module, value: bool) -> Any: ...
    def record_grad_mode(self, enabled: bool) -> None: ...
    def checkpointed(self, in_function: bool = ...) -> AbstractContextManager[None]: ...
    def forget_question(self, frame: FrameType) -> None: ...


class ValueProxy(fx.Proxy):
    """A proxy with a value: it answers ``bool``, ``len``, ``int``, iteration and attributes.

    ``__class__`` is that of the value where Python code reads it; the C++ argument parser would take a proxy that
    claims to be a ``torch.Tensor`` for one, and read memory that does not exist.
    """

    tracer: RecordingTracer  # type: ignore[assignment]

    def __init__(self, node: fx.Node, tracer: RecordingTracer, value: Any) -> None:
        super().__init__(node, tracer)  # type: ignore[arg-type]
        self.carried = value

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        frame = sys._getframe(1)
        return python_type(self) if _asks_for_class(frame.f_code, frame.f_lasti) else ValueProxy

    def __repr__(self) -> str:
        return f"ValueProxy({self.node.name}={self.carried!r})"

    def __str__(self) -> str:
        return str(self.carried)

    def __format__(self, spec: str) -> str:
        # an activation has no values yet, and a message is no part of the graph
        return format(float("nan") if isinstance(self.carried, torch.Tensor) and spec else self.carried, spec)

    def __bool__(self) -> bool:
        return bool(self.tracer.concrete(self, bool))

    def __int__(self) -> int:
        return int(self.tracer.concrete(self, int))

    def __index__(self) -> int:
        # the argument parser of torch calls __index__ only to find out whether an overload fits
        return int(self.tracer.concrete(self, operator.index, asked_by=sys._getframe(1)))

    def __float__(self) -> float:
        return float(self.tracer.concrete(self, float))

    def __complex__(self) -> complex:
        return complex(self.tracer.concrete(self, complex))

    def __hash__(self) -> int:
        if isinstance(self.carried, (bool, int, float)):
            frame = sys._getframe(1)
            if catches(frame.f_code.co_filename, frame.f_lineno, "TypeError"):
                raise TypeError("A size of an input has no hash.")  # such code (einops) has a way without its cache
            return int(self.tracer.concrete(self, hash))
        return id(self)

    def __len__(self) -> int:
        if isinstance(self.carried, torch.Size):
            return len(self.carried)  # the number of dimensions is static
        with self.tracer.runner.quiet():
            len(self.carried)  # raises for what has no length
        return int(self.tracer.create_proxy("call_function", len, (self,), {}))

    def __iter__(self) -> Iterator[Any]:
        frame = sys._getframe(1)
        unpacks = dis.opname[frame.f_code.co_code[frame.f_lasti]] == "UNPACK_SEQUENCE"
        fixed = unpacks or isinstance(self.carried, torch.Size)
        with self.tracer.runner.quiet():
            length = len(self.carried)
        # `a, b = x.chunk(2)` checks the number itself; a loop needs a guard on it
        return iter([self[i] for i in range(length if fixed else len(self))])  # type: ignore[index]

    def __contains__(self, item: Any) -> bool:
        return any(bool(entry == item) for entry in self)

    def __eq__(self, other: Any) -> Any:
        return _compare(operator.eq, self, other)

    def __ne__(self, other: Any) -> Any:
        return _compare(operator.ne, self, other)

    def __round__(self, digits: int | None = None) -> Any:
        return self.tracer.create_proxy("call_function", round, (self, digits), {})

    def __array_ufunc__(self, ufunc: Any, method: str, *inputs: Any, **options: Any) -> Any:
        """Of numbers, NumPy's function is that of `math` or of `operator`: `np.sqrt(x.shape[-1])`."""
        if method == "reduce" and ufunc.__name__ in ("add", "multiply") and isinstance(self.carried, torch.Size):
            return functools.reduce(_NUMPY_FUNCTIONS[ufunc.__name__], list(self))
        function = _NUMPY_FUNCTIONS.get(ufunc.__name__)
        if method != "__call__" or options or function is None or isinstance(self.carried, torch.Tensor):
            return NotImplemented
        return self.tracer.create_proxy("call_function", function, inputs, {})

    def __rmul__(self, other: Any) -> Any:
        if _isinstance(other, (list, tuple)) and has_proxy(other):
            return other * operator.index(self)  # a list of activations
        return self.tracer.create_proxy("call_function", operator.mul, (other, self), {})

    def __divmod__(self, other: Any) -> Any:
        return self // other, self % other

    def __rdivmod__(self, other: Any) -> Any:
        return other // self, other % self

    def __setitem__(self, index: Any, value: Any) -> None:
        self.tracer.create_proxy("call_function", operator.setitem, (self, index, value), {})

    @property
    def data(self) -> Any:
        return self.__getattr__("data")

    @data.setter
    def data(self, value: Any) -> None:
        self.data.copy_(value)  # of a parameter or buffer too

    def __getattr__(self, name: str) -> Any:
        if name in ASKED_BY:
            self.tracer.runner.asked.add(ASKED_BY[name])
        with self.tracer.runner.quiet():
            value = getattr(self.carried, name)
        if callable(value) and not isinstance(value, torch.Tensor):
            return functools.partial(_call_method, self, name)
        kinds: tuple[type, ...] = (torch.Tensor, torch.Size, torch.device)
        if not isinstance(self.carried, (torch.Tensor, torch.device)):
            # and numbers, and lists of them, that another input would change
            kinds += (bool, int, float, complex, list, tuple, dict)
        return (
            self.tracer.create_proxy("call_function", getattr, (self, name), {}) if isinstance(value, kinds) else value
        )


@functools.cache
def _asks_for_class(code: CodeType, offset: int) -> bool:
    """Whether an instruction is `x.__class__`, `case Class():` or a call of `isinstance`, and no other call."""
    if dis.opname[code.co_code[offset]] in ("LOAD_ATTR", "LOAD_METHOD", "MATCH_CLASS"):
        return True
    if not KNOWS_CALLS or "isinstance" not in code.co_names:
        return False
    # a call starts where the name of the function does
    starts = [(line, column) for line, _, column, _ in code.co_positions()]
    loads = [i for i in dis.get_instructions(code) if i.argval == "isinstance"]
    return any(starts[load.offset // 2] == starts[offset // 2] for load in loads)


def python_type(proxy: ValueProxy) -> type:
    """The type that the value of a proxy has where the model runs."""
    carried = proxy.carried
    if type(carried) is not FakeTensor:
        return type(carried)
    return nn.Parameter if getattr(carried, "_is_param", False) else torch.Tensor


def is_instance(value: Any, kinds: Any) -> bool:
    """`isinstance` for values that may be proxies; classes that look for methods would see those of the proxy."""
    if type(value) is not ValueProxy:
        return _isinstance(value, kinds)
    # torch.fx asks for its own class
    of_fx = any(kind in (fx.Proxy, ValueProxy) for kind in (kinds if type(kinds) is tuple else (kinds,)))
    return _isinstance(value.carried, kinds) or of_fx


def _compare(function: Callable[..., Any], proxy: ValueProxy, other: Any) -> Any:
    if isinstance(proxy.carried, torch.device):
        return function(proxy.carried, other.carried if type(other) is ValueProxy else other)
    return proxy.tracer.create_proxy("call_function", function, (proxy, other), {})


def _call_method(proxy: ValueProxy, name: str, /, *args: Any, **kwargs: Any) -> Any:
    if name in STATIC_METHODS:
        with proxy.tracer.runner.quiet():
            return getattr(proxy.carried, name)(*args, **kwargs)
    return proxy.tracer.create_proxy("call_method", name, (proxy, *args), kwargs)


def _inplace(name: str) -> Callable[..., Any]:
    def method(self: ValueProxy, other: Any) -> Any:
        # only a tensor changes in place; on a number `+=` is plain arithmetic
        prefix = "i" if isinstance(self.carried, torch.Tensor) else ""
        target = getattr(operator, prefix + (name.rstrip("_") if prefix else name))
        return self.tracer.create_proxy("call_function", target, (self, other), {})

    return method


INPLACE = {getattr(operator, f"i{_name.rstrip('_')}") for _name in _INPLACE}
for _name in _INPLACE:
    setattr(ValueProxy, f"__i{_name.rstrip('_')}__", _inplace(_name))


def has_proxy(value: Any) -> bool:
    """Whether there is a proxy in nested tuples, lists, dicts and slices."""
    kind = type(value)
    if kind is ValueProxy:
        return True
    if issubclass(kind, (tuple, list)):
        return any(has_proxy(item) for item in value)
    if kind is dict:
        return any(has_proxy(item) for item in value.values())
    if kind is slice:
        return has_proxy((value.start, value.stop, value.step))
    return False
