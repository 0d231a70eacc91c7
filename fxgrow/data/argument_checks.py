"""Arguments of public functions, checked before anything is read or allocated.

A name means one thing in every public function, so the checks are one table by name.
"""

from __future__ import annotations

import functools
import inspect
import numbers
import os
import reprlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from fxgrow.distributed import ProcessGroup, process_group_of
from fxgrow.errors import FxgrowError, PlanError, ProfileError

F = TypeVar("F", bound=Callable[..., Any])
_REPR = reprlib.Repr()
_REPR.maxstring = _REPR.maxother = 60
#: bytes of a file's name, on all common file systems
_LONGEST_NAME = 255
#: integers in C are below it
_INT64 = 2**63


class _Unusable(Exception):
    """Advice that is better than what the table says, or nothing."""


@dataclass(frozen=True)
class Kind:
    """What an argument may be: `read` returns the value to go on with."""

    read: Callable[[Any], Any]
    wanted: str
    #: None: that of the function
    error: type[FxgrowError] | None = None


def shown(value: Any) -> str:
    """A value as one short line."""
    if isinstance(value, type):
        return f"the class {value.__name__}"
    value = os.fspath(value) if isinstance(value, os.PathLike) else value
    plain = value is None or isinstance(value, (numbers.Number, str, bytes, list, tuple, dict, set))
    try:
        return " ".join(_REPR.repr(value).split()) if plain else f"a {type(value).__name__}"
    except ValueError:  # an integer of thousands of digits
        return f"a huge {type(value).__name__}"


def _instance(kind: type) -> Callable[[Any], Any]:
    def read(value: Any) -> Any:
        if not isinstance(value, kind):
            raise _Unusable
        return value

    return read


def an(kind: type) -> Kind:
    """An object of a class of the library."""
    return Kind(_instance(kind), f"give a fxgrow.{kind.__name__}")


def whole_number(value: Any, least: int = -_INT64) -> int:
    """Returns an integer of Python or NumPy that fits 64 bits; raises for others, and for True and False."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or not least <= int(value) < _INT64:
        raise _Unusable
    return int(value)


def _positive(value: Any) -> int:
    return whole_number(value, 1)


def _bytes(value: Any) -> int:
    """As an integer; `2e9` is one too."""
    whole = isinstance(value, float) and value.is_integer()
    return _positive(int(value) if whole else value)


def _loss(value: Any) -> Any:
    if isinstance(value, Tensor):
        if value.is_complex() or value.is_meta or not value.numel():
            raise _Unusable
        return value
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise _Unusable
    try:
        return float(value)
    except OverflowError:
        raise _Unusable from None


def _number(value: Any) -> float:
    if isinstance(_loss(value), Tensor) and value.numel() > 1:
        raise _Unusable
    return float(value)


def _tolerance(value: Any) -> float:
    if not _number(value) > 0:  # nan would accept all
        raise _Unusable
    return float(value)


def _budget(value: Any) -> Any:
    whole = isinstance(value, numbers.Integral) and not isinstance(value, bool)
    return value if isinstance(value, str) else int(value) if whole else _number(value)


def _flag(value: Any) -> bool:
    if type(value).__name__ not in ("bool", "bool_"):  # Python's and NumPy's
        raise _Unusable
    return bool(value)


def units_per_width(value: Any) -> dict[str, int]:
    """Reads units by the names of widths."""
    if not isinstance(value, Mapping) or not all(isinstance(name, str) for name in value):
        raise _Unusable
    return {name: whole_number(k) for name, k in value.items()}


def _units(value: Any) -> Any:
    if isinstance(value, Mapping):
        read = units_per_width(value)
        for k in read.values():
            _positive(k)
        return read
    return _positive(value)


def _module(value: Any) -> Any:
    if isinstance(value, type) and issubclass(value, nn.Module):
        raise _Unusable(f"make an object of it first, {value.__name__}(...)")
    if not isinstance(value, nn.Module):
        raise _Unusable(f"this needs a torch.nn.Module, not a {type(value).__name__}")
    for name, tensor in (*value.named_parameters(), *value.named_buffers()):
        if is_lazy(tensor):
            raise _Unusable(f"{name} has no shape yet. Run the model once on a batch first")
    return value


def _optimizer(value: Any) -> Any:
    if isinstance(value, type) and issubclass(value, Optimizer):
        raise _Unusable(f"make one first, torch.optim.{value.__name__}(model.parameters(), ...)")
    return _instance(Optimizer)(value)


def _function(value: Any) -> Any:
    if isinstance(value, type) and issubclass(value, nn.Module):
        raise _Unusable(f"make an object of it first, {value.__name__}()")
    if not callable(value):
        raise _Unusable
    return value


def _path(value: Any) -> Any:
    if not isinstance(value, (str, os.PathLike)):
        raise _Unusable
    try:
        encoded = os.fsencode(value)
    except UnicodeError:
        encoded = b""
    if not encoded or b"\0" in encoded or max(map(len, encoded.split(b"/"))) > _LONGEST_NAME:
        raise _Unusable("no file can have such a name")
    return value


def _new_file(value: Any) -> Any:
    folder = os.path.dirname(_path(value)) or os.curdir
    if not os.path.isdir(folder):
        raise _Unusable(f"it could not be written, the folder {folder[:200]} does not exist; create it first")
    if os.path.isdir(value):
        raise _Unusable("this is a folder; give the name of a file in it")
    if os.path.exists(value) and not os.path.isfile(value):
        raise _Unusable("this is a device, which would be replaced by a file")
    return value


def _names(value: Any) -> list[str]:
    if isinstance(value, (str, bytes, Mapping, Tensor, type)) or not hasattr(value, "__iter__"):
        raise _Unusable
    return [_instance(str)(name) for name in value]


PER_WIDTH = Kind(units_per_width, "give whole numbers of units per width, such as {'fc': 8}", PlanError)
NAME = Kind(_instance(str), "give a name", ProfileError)
COUNT = Kind(_positive, "give a positive number", PlanError)
PATH = Kind(_path, "give the path of a file")
NEW_FILE = Kind(_new_file, "give the path of a file")
MODULE = Kind(_module, "")
_UNITS = Kind(_units, "give a positive number of units, or units per width such as {'fc': 8}", PlanError)
_SWITCH = Kind(_flag, "give True or False", FxgrowError)
_KINDS: dict[str, Kind] = {
    **dict.fromkeys(("model", "gm", "module"), MODULE),
    **dict.fromkeys(("neurons", "units"), _UNITS),
    **dict.fromkeys(("progress", "update_existing", "keep_moments", "dynamic_batch", "check", "strict"), _SWITCH),
    **dict.fromkeys(("metric", "value"), Kind(_number, "give a number")),
    "tolerance": Kind(_tolerance, "give a number above 0"),
    **dict.fromkeys(("callback", "batch"), Kind(_function, "give a function", FxgrowError)),
    **dict.fromkeys(("method", "positions"), NAME),
    "cost": Kind(_instance(str), "choose 'parameters', 'multiply-adds' or 'latency'", PlanError),
    "budget": Kind(_budget, "give a number, or a share such as '+10%'", PlanError),
    "multiple": Kind(_positive, "give a positive number, 1 for any size", PlanError),
    "samples": Kind(_positive, "at least one sample is needed to profile, as a whole number", ProfileError),
    "memory_limit": Kind(_bytes, "give a positive number of bytes", ProfileError),
    "opset": Kind(_positive, "give a positive whole number"),
    "seed": Kind(whole_number, "give a whole number below 2**63", PlanError),
    "widths": Kind(_names, "give a list of names of widths", PlanError),
    "loss": Kind(_loss, "give a number or a tensor"),
    "loss_fn": Kind(_function, "give a function of (output, targets), such as nn.CrossEntropyLoss()", ProfileError),
    "optimizer": Kind(_optimizer, "give a torch.optim.Optimizer", FxgrowError),
    "path": PATH,
    "state": Kind(_instance(Mapping), "give what state_dict() returned"),
    "into": Kind(_instance(str), 'take "graph" or "module"', PlanError),
}


def read_argument(name: str, value: Any, kind: Kind, error: type[FxgrowError] = FxgrowError) -> Any:
    """Returns a value as its kind reads it; raises an error that says what to give instead."""
    try:
        return kind.read(value)
    except _Unusable as unusable:
        advice = str(unusable) or kind.wanted
        raise (kind.error or error)(f"{name}={shown(value)}: {advice}.") from None


def read_arguments(
    given: Mapping[str, Any],
    defaults: Mapping[str, Any],
    error: type[FxgrowError] = FxgrowError,
    kinds: Mapping[str, Kind | None] = {},  # noqa: B006
) -> dict[str, Any]:
    """Returns arguments by name as the table reads them; defaults are right, and so is what has no entry.

    `error` is raised where the table names none; `kinds` replace those of the table, None leaves one unchecked.
    """
    read = {}
    for name, value in given.items():
        kind = kinds.get(name, _KINDS.get(name))
        unchecked = kind is None or value is defaults.get(name, inspect.Parameter.empty)
        read[name] = value if unchecked or kind is None else read_argument(name, value, kind, error)
    return read


def checked_arguments(error: type[FxgrowError] = FxgrowError, **kinds: Kind | None) -> Callable[[F], F]:
    """Checks the arguments of a public function by their names, see `read_arguments`; all processes raise."""

    def with_checks(function: F) -> F:
        defaults = {name: p.default for name, p in inspect.signature(function).parameters.items()}
        positional = list(defaults)

        @functools.wraps(function)
        def with_checked_arguments(*args: Any, **keywords: Any) -> Any:
            given = dict(zip(positional, args, strict=False))
            rest = args[len(given) :]
            try:
                read = read_arguments({**given, **keywords}, defaults, error, kinds)
            except FxgrowError as unusable:
                with _group({**given, **keywords}).session():
                    raise unusable from None
            return function(*(read[n] for n in given), *rest, **{n: read[n] for n in keywords})

        return with_checked_arguments  # type: ignore[return-value]

    return with_checks


def _group(given: Mapping[str, Any]) -> ProcessGroup:
    """The processes that make the same call."""
    group = given.get("process_group", getattr(given.get("self"), "_process_group", None))
    return process_group_of(group)
