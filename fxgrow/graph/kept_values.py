"""What a model and its hooks keep of forward passes: activations, features, counts, logs."""

from __future__ import annotations

import contextlib
import functools
import types
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn

_STATE = "_parameters", "_buffers", "_modules", "_graph", "meta"
#: a larger collection is data
_LARGE = 10_000


def copies_of_activations(model: nn.Module) -> dict[int, Any]:
    """Copies, by id, of activations that modules or hooks have kept, which `copy.deepcopy` refuses."""
    kept = _kept_values(model).items()
    return {i: t.detach().clone() for i, t in kept if isinstance(t, Tensor) and not t.is_leaf}


@contextlib.contextmanager
def collections_kept(model: nn.Module) -> Iterator[None]:
    """Dicts, lists and sets that modules or hooks write into hold afterwards what they held before."""
    of_torch = vars(nn.Module()).keys()
    own = {id(value) for m in model.modules() for name, value in vars(m).items() if name in of_torch}
    kept = [v for i, v in _kept_values(model).items() if type(v) in (dict, list, set) and i not in own]
    before = [(value, value.copy(), _ids(value)) for value in kept]
    try:
        yield
    finally:
        for value, content, ids in before:
            if _ids(value) != ids:
                value.clear()
                value.extend(content) if isinstance(value, list) else value.update(content)


def _ids(value: Any) -> list[int]:
    return [id(item) for item in ((*value, *value.values()) if isinstance(value, dict) else value)]


def _kept_values(model: nn.Module) -> dict[int, Any]:
    """What can be reached from the attributes and the hooks of modules, by id."""
    queue: list[Any] = [value for m in model.modules() for name, value in vars(m).items() if name not in _STATE]
    found: dict[int, Any] = {}
    for value in queue:
        if id(value) not in found and not isinstance(value, (nn.Module, type, types.ModuleType)):
            found[id(value)] = value
            queue += _parts(value)
    return found


def _parts(value: Any) -> Any:
    if isinstance(value, (dict, list, tuple, set)):
        small = len(value) <= _LARGE
        return (value.values() if isinstance(value, dict) else value) if small else ()
    if isinstance(value, Mapping):
        return value.values()
    if isinstance(value, functools.partial):
        return value.func, value.args, value.keywords
    if isinstance(value, types.MethodType):
        return value.__self__, value.__func__
    if isinstance(value, types.FunctionType):
        named = (value.__globals__.get(name) for name in value.__code__.co_names)
        cells = (cell.cell_contents for cell in value.__closure__ or () if cell != types.CellType())
        return *cells, *(v for v in named if type(v) in (dict, list, set)), value.__defaults__
    return (vars(value),) if hasattr(value, "__dict__") else ()
