"""Settings as text that is the same in every process, so that processes with different ones can be told apart."""

from __future__ import annotations

import re
import zlib
from collections.abc import Mapping
from functools import partial
from types import CodeType, FunctionType, MethodType
from typing import Any

from torch import Tensor, fx, nn
from torch.optim import Optimizer

from fxgrow.distributed import ProcessGroup, checksum

#: may differ between processes: what is shown, and what each has of its own
OWN = frozenset({"progress", "example_inputs", "process_group"})
ADDRESS = re.compile(r" at 0x[0-9a-fA-F]+")
PLAIN = (int, float, str, tuple, type(None))


def check_same_settings(process_group: ProcessGroup, settings: Mapping[str, Any]) -> None:
    """Raises an `FxgrowError` in every process where a setting differs between them."""
    if process_group.size > 1:
        process_group.check_same({name: description(s) for name, s in settings.items() if name not in OWN})


def description(value: Any) -> str:
    """Describes a setting by what it does: functions by name and code, modules and graphs by options, not weights."""
    if isinstance(value, fx.Graph):
        return "\n".join(map(_node, value.nodes))
    if isinstance(value, nn.Module):
        return "\n".join(f"{name}: {_module(m)}" for name, m in value.named_modules())
    if isinstance(value, Tensor):
        return f"{tuple(value.shape)} {value.dtype} {checksum(value)}"
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{key!r}: {description(v)}' for key, v in value.items())}}}"
    if isinstance(value, (tuple, list)):
        return f"({', '.join(map(description, value))})"
    if isinstance(value, partial):
        return f"{description(value.func)}{description((*value.args, value.keywords))}"
    if isinstance(value, MethodType):
        return f"{description(value.__func__)} of {description(value.__self__)}"
    if isinstance(value, Optimizer):  # the rates of its groups are a schedule's
        return f"{type(value).__qualname__} {description(value.defaults)}"
    if isinstance(value, FunctionType):
        cells = (cell.cell_contents for cell in value.__closure__ or () if _is_set(cell))
        own = (value.__defaults__, value.__kwdefaults__, [c for c in cells if _is_option(c)])
        return f"{_name(value)} {description(own)} {_code(value.__code__):08x}"
    if callable(value) and hasattr(value, "__qualname__"):
        return _name(value)
    # an object that is called, as a loss may be
    options = {k: v for k, v in getattr(value, "__dict__", {}).items() if isinstance(v, float) and callable(value)}
    return ADDRESS.sub("", f"{value!r}{options or ''}")


def _name(value: Any) -> str:
    return f"{value.__module__}.{value.__qualname__}"


def _module(module: nn.Module) -> str:
    """Describes a module by class and options; numbers and names in a class of the user may be of a rank or device."""
    own = vars(module)
    if type(module).__module__.startswith("torch.nn."):
        options = {k: v for k, v in own.items() if isinstance(v, PLAIN) and k != "training" and k[0] != "_"}
    else:
        options = {k: v for k, v in own.items() if isinstance(v, float)}
    return f"{type(module).__qualname__} {options}"


def _node(node: fx.Node) -> str:
    """Describes what a node computes, without sizes, which may follow those of a process's own inputs."""
    options = [a for a in (*node.args, *node.kwargs.values()) if isinstance(a, (float, bool, str, type(None)))]
    target = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", type(node.target))
    return f"{node.op} {target} {options}"


def _code(code: CodeType) -> int:
    inner = [_code(c) if isinstance(c, CodeType) else c for c in code.co_consts]
    return zlib.crc32(repr((code.co_code, code.co_names, inner)).encode())


def _is_set(cell: Any) -> bool:
    try:
        cell.cell_contents  # noqa: B018
    except ValueError:
        return False
    return True


def _is_option(value: Any) -> bool:
    """Whether a value that a function closes over is a setting; numbers of a device or a rank may differ."""
    return isinstance(value, (float, bool, nn.Module)) or callable(value)
