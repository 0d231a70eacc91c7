"""The namespaces of the model's code, as it sees them while it is traced.

Some questions reach no proxy: `type(x)` is asked of the interpreter, and `int(x.shape[0])` must be a plain number. The
names of the files with the model's code are bound to functions that answer as the model would be, or are recorded; they
do nothing else to values that are no proxies.
"""

from __future__ import annotations

import builtins
import functools
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from types import FunctionType, GenericAlias, MethodType, ModuleType
from typing import Any

import torch
from torch import nn
from torch.fx import _symbolic_trace

from fxgrow.ops.registry import described_functions
from fxgrow.tracing.checks import only_called
from fxgrow.tracing.intercept import FACTORIES, MATH, PACKING, Patch, is_tracing, patched, recorded, recording_tracer
from fxgrow.tracing.leaf_modules import has_rule
from fxgrow.tracing.model_state import contents, without_leftovers
from fxgrow.tracing.proxy import ValueProxy, is_instance, python_type
from fxgrow.tracing.surroundings import NUMBERS, Question

_LIBRARIES = {"torch", "fxgrow", "numpy", "builtins", *sys.stdlib_module_names}
_PLAIN = {bool, int, float, str, bytes, tuple, type, type(None), ModuleType, type(len)}
_LARGE, _DEPTH = 2000, 3  # of what is searched for containers
_CACHED = type(functools.lru_cache(int))

Scope = dict[str, Any]


class Namespaces:
    """Global names of the files of a model's classes and of those that they use, and what its code may keep there."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        #: what the code has looked at besides its inputs and state
        self.asked: set[Question] = set()
        self._classes = {cls for module in model.modules() for cls in type(module).__mro__ if _is_followed(cls)}
        self._packages = {_package(cls.__module__) for cls in self._classes}
        self._scopes = self._find_scopes()
        self._followed: set[str] = set()
        self._patches, self._containers = list(self._find_patches()), self._find_containers()

    @contextmanager
    def as_traced(self) -> Iterator[None]:
        """While open, the names stand for what a trace needs; what it puts into caches is taken out again."""
        with without_leftovers(self._containers), patched(self._patches):
            yield

    def unchanged(self) -> AbstractContextManager[None]:
        """While open, the model may run; what its code keeps outside of it is as before afterwards."""
        return without_leftovers(self._containers, of_trace=False)

    def follow_numbers(self, asked_in: Mapping[str, Scope]) -> list[Patch]:
        """Records numbers that files make of sizes as nodes; returns the new patches, for `forget`."""
        files = asked_in.keys() - self._followed
        self._followed |= files
        new = [
            (asked_in[file], name, stand_in)
            for file in files
            for name, stand_in in _NUMBERS.items()
            if name not in asked_in[file] and only_called(file, name)
        ]
        self._patches += new
        return new

    def forget(self, patches: list[Patch]) -> None:
        """Takes patches out again."""
        self._patches = [patch for patch in self._patches if patch not in patches]

    def _find_scopes(self) -> list[Scope]:
        # of generated code too, which is in no file
        scopes = [getattr(vars(cls).get("forward"), "__globals__", None) for cls in self._classes]
        found = {id(scope): scope for scope in scopes if scope is not None}
        waiting = [cls.__module__ for cls in self._classes]
        seen = set(waiting)
        while waiting:
            name = waiting.pop()
            package = _package(name)
            if package in _LIBRARIES or name not in sys.modules:
                continue
            scope = found[id(vars(sys.modules[name]))] = vars(sys.modules[name])
            for home in map(_home, list(scope.values())):
                # of a package that the model's code imports, not those that it imports in turn
                if home not in seen and (package in self._packages or package == _package(home)):
                    seen.add(home)
                    waiting.append(home)
        return list(found.values())

    def _find_patches(self) -> Iterator[Patch]:
        for module in self._model.modules():
            # a function with a cache as an attribute
            yield from ((vars(module), n, _uncached(v)) for n, v in vars(module).items() if type(v) is _CACHED)
            yield from ((vars(module), n, _looked_up(v)) for n, v in vars(module).items() if _is_apply(v))
        functions = {id(f) for f in (*FACTORIES, *MATH, *NUMBERS, *PACKING, *described_functions())}
        for scope in self._scopes:
            yield scope, "type", _Type
            yield scope, "isinstance", is_instance
            yield scope, "callable", _is_callable
            for name, value in scope.items():
                if id(value) in functions:
                    yield scope, name, recorded(value)
                elif type(value) is _CACHED:
                    yield scope, name, _uncached(value)
                elif _is_apply(value):
                    yield scope, name, _looked_up(value)
        for cls in self._classes:
            yield from ((cls, n, _uncached(v)) for n, v in vars(cls).items() if type(v) is _CACHED)
        for (_, name), scope in list(_symbolic_trace._wrapped_fns_to_patch.items()):
            function = scope.get(name, getattr(builtins, name, None))
            # functions marked with torch.fx.wrap are traced like other code, unless compiled or with a rule
            if function is not None and (not hasattr(function, "__code__") or has_rule(function)):
                yield scope, name, recorded(function)

    def _find_containers(self) -> list[Any]:
        """Scopes, classes, dicts, lists, sets and attributes of objects."""
        own = [scope for scope in self._scopes if _package(scope.get("__name__", "__main__")) in self._packages]
        found: dict[int, Any] = {id(owner): owner for owner in (*own, *self._classes)}
        values = [value for owner in (*own, *self._classes) for value in contents(owner)]
        for module in self._model.modules():
            values += [value for name, value in vars(module).items() if name[0] != "_"]
        for _ in range(_DEPTH):
            new = {id(kept): kept for value in values if type(value) not in _PLAIN for kept in _containers(value)}
            inside = {key: contents(kept) for key, kept in new.items() if key not in found}
            inside = {key: content for key, content in inside.items() if len(content) < _LARGE}
            found.update({key: new[key] for key in inside})
            values = [value for content in inside.values() for value in content]
        return list(found.values())


def _is_followed(cls: type) -> bool:
    """Whether the code of a class is that of a model, and not of PyTorch or Python."""
    return _package(str(cls.__module__)) not in _LIBRARIES


def _package(name: str) -> str:
    return name.partition(".")[0]


def _home(value: Any) -> str:
    if isinstance(value, ModuleType):
        return value.__name__
    home = (value if isinstance(value, (FunctionType, type, _CACHED)) else type(value)).__module__
    return home if type(home) is str else "builtins"


def _containers(value: Any) -> tuple[Any, ...]:
    """What a value, a function or an object keeps values in."""
    if isinstance(value, (dict, list, set)):
        return (value,)
    if type(value) is FunctionType:
        cells = [cell for cell in value.__closure__ or () if "empty" not in repr(cell)[:40]]
        kept = (*(value.__defaults__ or ()), *(cell.cell_contents for cell in cells))
        return tuple(v for v in kept if isinstance(v, (dict, list, set)))
    if isinstance(value, (type, nn.Module, ModuleType)) or not _is_followed(type(value)):
        return ()
    attributes = getattr(value, "__dict__", None)
    return (attributes, type(value)) if type(attributes) is dict else ()


def _is_callable(value: Any) -> bool:
    return callable(value.carried if type(value) is ValueProxy else value)


def _is_apply(value: Any) -> bool:
    """Whether a value is `MyFunction.apply` of an autograd function."""
    owner = value.__self__ if type(value) is MethodType else None
    return isinstance(owner, type) and issubclass(owner, torch.autograd.Function) and value.__name__ == "apply"


def _looked_up(apply: MethodType) -> Callable[..., Any]:
    """Returns an `apply` that is looked up when it is called: the class has another one while it is traced."""
    return lambda *args, **kwargs: apply.__self__.apply(*args, **kwargs)  # type: ignore[attr-defined]


def _uncached(cached: Any) -> Callable[..., Any]:
    """Returns a function with a cache as it is without, while it is traced: the user's cache keeps no proxies."""

    @functools.wraps(cached)
    def call(*args: Any, **kwargs: Any) -> Any:
        return (cached.__wrapped__ if is_tracing() else cached)(*args, **kwargs)

    for name in ("cache_info", "cache_clear", "cache_parameters"):
        setattr(call, name, getattr(cached, name))
    return call


def _number(function: Any, value: Any) -> Any:
    """Returns a number that is made of sizes as a node, else what Python makes of it."""
    tracer = recording_tracer()
    if type(value) is not ValueProxy or tracer is None or not isinstance(value.carried, _OF_SIZES[function]):
        return function(value)
    if type(value.carried) is function and tracer.dependence.is_size(value.node):
        return value
    sized = function is len or tracer.dependence.is_size(value.node)
    return tracer.create_proxy("call_function", function, (value,), {}) if sized else function(value)


def _length(value: Any) -> Any:
    """Stands for `len`."""
    return _number(len, value)


class _Answers(type):
    """A type as the model's code sees it; classes and values are instances of what it stands for."""

    stands_for: Any

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        if len(args) != 1 or kwargs or type(args[0]) is not ValueProxy:
            return cls.stands_for(*args, **kwargs)
        return python_type(args[0]) if cls.stands_for is type else _number(cls.stands_for, args[0])

    def __instancecheck__(cls, value: Any) -> bool:
        return isinstance(value, cls.stands_for)

    def __subclasscheck__(cls, kind: type) -> bool:
        return issubclass(kind, cls.stands_for)

    def __eq__(cls, other: object) -> bool:
        return other is cls or other is cls.stands_for

    def __hash__(cls) -> int:
        return hash(cls.stands_for)


class _Type(type, metaclass=_Answers):
    """Stands for `type` in the scopes of a model."""

    stands_for = type
    __class_getitem__: Any = classmethod(GenericAlias)


class _Int(int, metaclass=_Answers):
    stands_for = int


class _Float(float, metaclass=_Answers):
    stands_for = float


#: what makes a number, and of which values
_NUMBERS: dict[str, Any] = {"int": _Int, "float": _Float, "len": _length}
_OF_SIZES: dict[Any, tuple[type, ...]] = {int: (bool, int, float), float: (bool, int, float), len: (torch.Tensor,)}
