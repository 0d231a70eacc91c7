"""The options that modules were built with, to tell whether two models were built alike.

An option is a plain attribute that a class sets while it is built. What its forward pass writes is a counter or a
cache, and what only other methods write belongs to whoever calls them, unless it is an argument of the constructor.
What no code of the forward pass reads, such as a folder for logs or the step that training has reached, is none.
"""

from __future__ import annotations

import dis
import functools
import hashlib
import inspect
import types
from collections.abc import Collection, Iterator, Mapping
from dataclasses import is_dataclass
from typing import Any, NamedTuple

from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fxgrow.graph.code_lines import value_text

#: the entry with the name of the class
CLASS = "class"
#: what has no influence on the function: memory, speed, names
_SAME_FUNCTION = {
    "training", "inplace", "gradient_checkpointing", "grad_checkpointing", "use_checkpoint", "verbose", "name",
    "device", "dtype", "torch_dtype", "use_cache", "transformers_version", "architectures", "name_or_path",
}  # fmt: skip
#: methods that run when an object is read from a pickle
_READING = {"__setstate__"}
_LONGEST = 160
_MUTATORS = {"append", "extend", "insert", "pop", "popleft", "update", "setdefault", "add", "clear"}
_CONFIGURATIONS = ("config", "configuration", "cfg", "args", "namespace", "options", "hparams")


class OptionNames(NamedTuple):
    """The names of a class's options."""

    #: that are arguments of the constructor
    arguments: frozenset[str]
    others: frozenset[str]
    #: into whose values methods write
    written_into: frozenset[str]


def module_options(
    model: nn.Module, written: Collection[str], arguments_only: bool = False, unread_arguments: bool = True
) -> dict[str, dict[str, str]]:
    """Returns class and options of each module as text, by its path; those in a configuration are `config.heads`.

    A graph has no options itself, and what stands in it for functions is no module of the model. `unread_arguments`:
    also those that the forward pass does not read, where nothing else is known of what became of them; `written` are
    names of attributes that growth has set.
    """
    found = {}
    seen: set[int] = set()
    read = names_read(frozenset(map(type, model.modules()))) | set(written)
    for path, module in model.named_modules():
        if isinstance(module, fx.GraphModule) or type(module).__module__.startswith("fxgrow."):
            continue
        names = option_names(type(module))  # type: ignore[arg-type]
        arguments = names.arguments if unread_arguments else names.arguments & read
        wanted = [*sorted(arguments), *([] if arguments_only else sorted(names.others & read))]
        found[path] = {CLASS: _class_name(type(module))}
        for name in filter(vars(module).__contains__, wanted):
            value = vars(module)[name]
            if _is_option(value):
                found[path][name] = _short(value_text(value))
            elif name not in names.written_into and id(value) not in seen:  # modules share one
                seen.add(id(value))
                found[path] |= {
                    f"{name}{key}": _short(value_text(item))
                    for key, item in _configured(value)
                    if unread_arguments or not key or key[1:] in read
                }
    return found


def _class_name(cls: type) -> str:
    """A BatchNorm computes the same for images and for volumes, and synchronised or not."""
    return "BatchNorm" if issubclass(cls, _BatchNorm) and cls.__module__.startswith("torch.nn.") else cls.__name__


def _configured(value: Any) -> Iterator[tuple[str, Any]]:
    """Yields the options in a list, a dict or an object that holds a configuration."""
    if type(value) is list and value and all(map(_is_option, value)):  # an empty one may be a log
        yield "", tuple(value)
    entries = value if isinstance(value, dict) else {}
    if is_dataclass(value) or type(value).__name__.lower().endswith(_CONFIGURATIONS):
        entries = getattr(value, "__dict__", {})
    for key, item in entries.items():
        named = isinstance(key, str) and key.isidentifier() and len(key) < 100 and key[0] != "_"
        if named and key not in _SAME_FUNCTION and _is_option(item):
            yield f".{key}", item


def _short(text: str) -> str:
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}… {hashlib.sha256(text.encode()).hexdigest()[:12]}"


def _is_option(value: Any) -> bool:
    if isinstance(value, tuple):
        return all(map(_is_option, value))
    known = value is None or isinstance(value, (bool, int, float, complex, str, functools.partial)) or callable(value)
    return known and not isinstance(value, nn.Module)


def names_read(classes: Collection[type]) -> set[str]:
    """Returns the names in the code that a forward pass of modules of these classes may run.

    That is `forward`, methods of any of the classes that are named in it, and functions that it calls.
    """
    methods: dict[str, list[types.FunctionType]] = {}
    for base in {base for cls in classes for base in cls.__mro__ if base not in (nn.Module, object)}:
        for name, value in vars(base).items():
            methods.setdefault(name, []).extend(_functions(value))
    names = {"forward"}
    functions = list(methods.get("forward", ()))
    followed = set(functions)
    for function in functions:
        parts = list(_parts(function.__code__))
        # a string may be the name of an attribute in getattr
        used = {n for part in parts for n in (*part.co_names, *part.co_consts) if isinstance(n, str)}
        names |= used
        called = [f for n in used if n != "__init__" for f in methods.get(n, ())]
        for f in (*called, *_called_functions(function, used)):
            if f not in followed:
                followed.add(f)
                functions.append(f)
    return names


def _called_functions(function: types.FunctionType, used: Collection[str]) -> Iterator[types.FunctionType]:
    """Yields functions outside of torch that a function finds by name, in a module, or around it."""
    found = [function.__globals__[n] for n in used if n in function.__globals__]
    found += [vars(v)[n] for v in found if isinstance(v, types.ModuleType) for n in used if n in vars(v)]
    for value in (*found, *(cell.cell_contents for cell in function.__closure__ or () if cell != types.CellType())):
        f = inspect.unwrap(value) if isinstance(value, types.FunctionType) else None
        if isinstance(f, types.FunctionType) and not f.__module__.startswith("torch."):
            yield f


@functools.cache
def option_names(cls: type) -> OptionNames:
    """Returns the names of a module class's options, from the code of its methods."""
    bases = [base for base in cls.__mro__ if base not in (nn.Module, object)]
    methods: dict[str, list[types.CodeType]] = {}
    arguments: set[str] = set()
    for base in bases:
        for name, value in vars(base).items():
            methods.setdefault(name, []).extend(f.__code__ for f in _functions(value))
    for code in methods.get("__init__", ()):
        arguments |= set(code.co_varnames[1 : code.co_argcount + code.co_kwonlyargcount])
    built, run = _reached(methods, "__init__"), _reached(methods, "forward")
    written_by_others = [n for n in methods if n not in built and n not in _READING]
    set_in_building, changed = (set(_written(methods, names)) for names in (built, written_by_others))
    arguments -= set(_written(methods, run)) | _SAME_FUNCTION
    others = set_in_building - changed - arguments - _SAME_FUNCTION
    codes = [part for name in written_by_others for code in methods[name] for part in _parts(code)]
    into = {name for code in codes if _writes_items(code) for name in code.co_names}
    return OptionNames(frozenset(arguments), frozenset(others), frozenset(into))


def _writes_items(code: types.CodeType) -> bool:
    return not _MUTATORS.isdisjoint(code.co_names) or any(
        i.opname == "STORE_SUBSCR" for i in dis.get_instructions(code)
    )


def _functions(value: Any) -> Iterator[types.FunctionType]:
    """Yields the functions of a method, a property or a static method."""
    for part in (value.fget, value.fset) if isinstance(value, property) else (getattr(value, "__func__", value),):
        function = inspect.unwrap(part) if isinstance(part, types.FunctionType) else None
        if isinstance(function, types.FunctionType):
            yield function


def _reached(methods: Mapping[str, list[types.CodeType]], start: str) -> list[str]:
    """Returns the names of the methods that a method calls, itself included."""
    names = [start]
    for name in names:
        used = {n for code in methods.get(name, ()) for part in _parts(code) for n in part.co_names}
        names += [n for n in methods if n in used and n not in names and n not in ("__init__", "forward")]
    return names


def _parts(code: types.CodeType) -> Iterator[types.CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _parts(constant)


def _written(methods: Mapping[str, list[types.CodeType]], names: list[str]) -> Iterator[str]:
    """Yields the names of the attributes that the code of methods assigns."""
    for name in names:
        for code in methods.get(name, ()):
            for part in _parts(code):
                yield from (str(i.argval) for i in dis.get_instructions(part) if i.opname == "STORE_ATTR")
