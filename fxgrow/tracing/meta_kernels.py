"""Results of torch's own layers and functions on meta tensors, in a fraction of the time that a fake mode takes.

A fake mode knows more: devices, autocast, what looks at data. Where that could matter there is no answer here.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from fxgrow.ops.registry import recognised
from fxgrow.tracing.shapes import Like, shape_of

#: functions and methods whose results may lie on another device, or are no tensors
_ELSEWHERE = {"cpu", "cuda", "to", "type", "type_as", "item", "tolist", "numpy", "getattr", "__get__"}
_PLAIN = {bool, int, float, str, slice, type(None), type(...), torch.dtype, torch.Size, torch.memory_format}


class _Unknown(Exception):
    """What meta tensors do not describe."""


def run(target: nn.Module | Callable[..., Any] | str, args: Any, kwargs: Any, mode: FakeTensorMode) -> Any:
    """The value, in fake tensors, of a layer, of a function or of the method of a name; None if it is not known."""
    if not _is_torch(target):
        return None
    devices: set[torch.device] = set()
    try:
        given, named = _metas(args, devices), _metas(kwargs, devices)
        if isinstance(target, nn.Module):
            devices.update(
                t.device for kept in (target._parameters, target._buffers) for t in kept.values() if t is not None
            )
        if any(torch.is_autocast_enabled(device.type) for device in devices):
            return None
        like = shape_of(target, given, named)
        if like is not None:
            result = _empty(like)
        elif isinstance(target, nn.Module):
            with _state_on_meta(target):
                result = target.forward(*given, **named)
        elif isinstance(target, str):
            result = getattr(given[0], target)(*given[1:], **named)
        else:
            function: Callable[..., Any] = _OURS.get(target, target)
            result = function(*given, **named)
        (device,) = devices
        return _fakes(result, mode, device)
    except Exception:  # where the user's code is wrong, the fake mode says so again
        return None


def fake_tensor(tensor: torch.Tensor, mode: FakeTensorMode) -> torch.Tensor:
    """What `mode.from_tensor` gives for a tensor of the usual kind, without its history."""
    try:
        fake = FakeTensor(mode, _meta(tensor), tensor.device)
    except _Unknown:
        return mode.from_tensor(tensor)
    fake.requires_grad_(tensor.requires_grad)
    if isinstance(tensor, nn.Parameter):
        fake._is_param = True
    return fake


def _empty(like: Any) -> Any:
    if isinstance(like, Like):
        return torch.empty_strided(like.shape, like.stride, dtype=like.dtype, device="meta")
    return tuple(map(_empty, like))


def _grouped_mm(mat_a: torch.Tensor, mat_b: torch.Tensor, **options: Any) -> torch.Tensor:
    """A row times the matrix of its group; the registered kernel knows bfloat16 only."""
    if mat_a.dim() != 2 or mat_b.dim() != 3 or mat_a.shape[1] != mat_b.shape[1]:
        raise _Unknown
    return mat_a.new_empty(mat_a.shape[0], mat_b.shape[2])


_OURS = {getattr(F, "grouped_mm", None): _grouped_mm, getattr(torch, "_grouped_mm", None): _grouped_mm}


def _is_torch(target: Any) -> bool:
    if isinstance(target, nn.Module):
        plain = type(target).__module__.startswith("torch.nn.modules.") and not target._modules
        return plain or recognised(target) is not None
    name = target if isinstance(target, str) else getattr(target, "__name__", "_")
    # in place, a method may change the shape of its argument
    if name in _ELSEWHERE or name.endswith("_"):
        return False
    return isinstance(target, str) or (getattr(target, "__module__", None) or "torch").startswith(
        ("torch", "_operator")
    )


def _meta(tensor: torch.Tensor) -> torch.Tensor:
    plain = type(tensor) in (torch.Tensor, nn.Parameter, FakeTensor) and tensor.layout is torch.strided
    if not plain or tensor.is_quantized or tensor.is_conj() or tensor.is_neg() or tensor.is_nested:
        raise _Unknown
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")


def _metas(value: Any, devices: set[torch.device]) -> Any:
    kind = type(value)
    if isinstance(value, torch.Tensor):
        devices.add(value.device)
        return _meta(value)
    if isinstance(value, list) or kind is tuple:
        return kind([_metas(item, devices) for item in value])
    if isinstance(value, dict):
        return {name: _metas(item, devices) for name, item in value.items()}
    if kind in _PLAIN:
        return value
    raise _Unknown


def _fakes(value: Any, mode: FakeTensorMode, device: torch.device) -> Any:
    kind = type(value)
    if kind is torch.Tensor:
        return FakeTensor(mode, value, device)
    if kind is tuple or kind is list:
        return kind([_fakes(item, mode, device) for item in value])
    if kind is int or kind is torch.Size:
        return value
    raise _Unknown


@contextlib.contextmanager
def _state_on_meta(module: nn.Module) -> Iterator[None]:
    attributes = vars(module)
    saved = attributes["_parameters"], attributes["_buffers"]
    for kind, kept in zip(("_parameters", "_buffers"), saved, strict=True):
        attributes[kind] = {name: None if t is None else _meta(t) for name, t in kept.items()}
    try:
        yield
    finally:
        attributes["_parameters"], attributes["_buffers"] = saved
