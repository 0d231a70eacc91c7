"""State that modules keep in ways of their own: `get_extra_state`, and what their `state_dict` has besides tensors.

Packed int8 weights are such entries: no parameters, but written by an override of `_save_to_state_dict`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fxgrow.errors import FileError
from fxgrow.graph.graph import copy_module

_QUANTIZED = "quantized"


def with_extra_state(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yields the modules that define `get_extra_state`."""
    default = nn.Module.get_extra_state
    return ((name, m) for name, m in model.named_modules() if type(m).get_extra_state is not default)


def own_entries(model: nn.Module, stored: Mapping[str, Tensor]) -> dict[str, Any]:
    """Returns the entries of `state_dict()` that are neither one of the stored tensors nor an extra state."""
    if not any(map(_has_own_entries, model.modules())):
        return {}
    known = set(map(_memory, stored.values()))
    entries = model.state_dict(keep_vars=True)
    return {
        name: value
        for name, value in entries.items()
        if not name.endswith("_extra_state") and not (isinstance(value, Tensor) and _memory(value) in known)
    }


def _has_own_entries(module: nn.Module) -> bool:
    cls = type(module)
    if cls.__module__.startswith("torch.distributed"):
        return False  # may wait for other processes
    default = nn.Module
    overridden = (cls._save_to_state_dict, cls.state_dict) != (default._save_to_state_dict, default.state_dict)
    return overridden or bool(module._state_dict_hooks)


def _memory(t: Tensor) -> Any:
    return id(t) if t.layout is not torch.strided or not t.numel() else (t.data_ptr(), t.shape)


def set_module_state(model: nn.Module, extra: Mapping[str, Any], entries: Mapping[str, Any]) -> None:
    """Gives modules their extra states, and the model its own entries; `FileError` where one is not taken."""
    try:
        for name, state in extra.items():
            model.get_submodule(name).set_extra_state(state)
        if entries:
            every = model.state_dict()  # has the versions of modules, in an attribute
            every.update(entries)
            model.load_state_dict(every)
    except Exception as error:
        raise FileError(f"The model does not take the state of its modules: {type(error).__name__}: {error}") from error


def copy_with_state(model: nn.Module, extra: Mapping[str, Any], entries: Mapping[str, Any]) -> nn.Module:
    """Returns a copy that has these states, which its code may read while it is traced; the model where there are none.

    States that do not fit before a growth are left out.
    """
    if not extra and not entries:
        return model
    out = copy_module(model, {})
    with contextlib.suppress(FileError):
        set_module_state(out, extra, entries)
    return out


def without_quantized(tree: Any) -> Any:
    """Replaces quantised tensors in a tree by their integers, scales and zero points; of rare kinds they stay."""
    if isinstance(tree, Tensor) and tree.is_quantized and tree.dtype in (torch.qint8, torch.quint8, torch.qint32):
        if tree.qscheme() == torch.per_tensor_affine:
            return (_QUANTIZED, tree.int_repr(), tree.q_scale(), tree.q_zero_point())
        if tree.qscheme() == torch.per_channel_affine:
            scales, zeros, axis = (
                tree.q_per_channel_scales(),
                tree.q_per_channel_zero_points(),
                tree.q_per_channel_axis(),
            )
            return (_QUANTIZED, tree.int_repr(), scales, zeros, axis)
    return _mapped(tree, without_quantized)


def with_quantized(tree: Any) -> Any:
    """The inverse of `without_quantized`."""
    if type(tree) is tuple and tree and type(tree[0]) is str and tree[0] == _QUANTIZED:
        make = torch._make_per_tensor_quantized_tensor if len(tree) == 4 else torch._make_per_channel_quantized_tensor
        try:
            return make(*tree[1:])
        except (TypeError, ValueError, RuntimeError, IndexError) as error:
            raise FileError(f"A quantised tensor of the file cannot be made: {error}") from error
    return _mapped(tree, with_quantized)


def _mapped(tree: Any, function: Callable[[Any], Any]) -> Any:
    if type(tree) in (list, tuple):
        return type(tree)(map(function, tree))
    return {key: function(value) for key, value in tree.items()} if type(tree) is dict else tree
