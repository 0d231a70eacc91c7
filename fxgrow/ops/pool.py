"""Operators that change positions and keep channels: pooling, resizing."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from fxgrow._axes import Dims, fixed
from fxgrow.ops.registry import Context, op

_NAMES = [
    f"{adaptive}{kind}{nd}"
    for adaptive in ("", "Adaptive")
    for kind in ("MaxPool", "AvgPool")
    for nd in ("1d", "2d", "3d")
]
POOL_MODULES = [getattr(nn, n) for n in _NAMES] + [
    nn.LPPool1d, nn.LPPool2d, nn.Upsample, nn.UpsamplingNearest2d, nn.UpsamplingBilinear2d,
    nn.ZeroPad1d, nn.ZeroPad2d, nn.ZeroPad3d, nn.ReflectionPad1d, nn.ReflectionPad2d, nn.ReflectionPad3d,
    nn.ReplicationPad1d, nn.ReplicationPad2d, nn.ReplicationPad3d, nn.ConstantPad1d, nn.ConstantPad2d,
    nn.ConstantPad3d, nn.CircularPad1d, nn.CircularPad2d, nn.CircularPad3d,
]  # fmt: skip
POOL_FUNCTIONS = [
    getattr(space, f"{adaptive}{kind}_pool{nd}", None)
    for space in (F, torch)
    for adaptive in ("", "adaptive_")
    for kind in ("max", "avg")
    for nd in ("1d", "2d", "3d")
] + [F.interpolate, F.upsample, F.lp_pool1d, F.lp_pool2d]


@op(*POOL_MODULES, *(f for f in POOL_FUNCTIONS if f is not None))
def pool(ctx: Context, input: Dims, *args: Any, **kwargs: Any) -> Any:
    """Channels stand in front of the positions; a pool that returns indices gives the same axes twice."""

    def axes(value: torch.Tensor) -> Dims:
        changed = [i for i, (a, n) in enumerate(zip(input, value.shape, strict=True))]
        return Dims(input[i] if i < 2 and len(input) > 2 else fixed(value.shape[i]) for i in changed)

    return torch.utils._pytree.tree_map_only(torch.Tensor, axes, ctx.value)


@op(F.pad, torch.nn.functional.pad, "pad")
def pad(ctx: Context, input: Dims, pad: Any, *args: Any, **kwargs: Any) -> Dims:
    ctx.used_as_number(pad)
    out = list(input)
    for i in range(len(pad) // 2):
        if pad[2 * i] or pad[2 * i + 1]:
            axis = input[-1 - i]
            ctx.pin(axis, "size", "padded with a fixed number of entries")
            out[-1 - i] = fixed(ctx.shape[-1 - i], ctx.reason("size", "padded with a fixed number of entries"))
    return Dims(out)
