"""Operators that change positions and keep channels: pooling, resizing, padding."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree

from fxgrow.axes.axes import Dims, fixed
from fxgrow.ops.context import Context
from fxgrow.ops.registry import op

_MODULES = (
    "MaxPool AvgPool AdaptiveMaxPool AdaptiveAvgPool LPPool "
    "ZeroPad ReflectionPad ReplicationPad ConstantPad CircularPad"
).split()
_FUNCTIONS = "max avg adaptive_max adaptive_avg lp".split()
#: by number of spatial dimensions
POOLS: dict[int, list[Any]] = {
    nd: [
        *(getattr(nn, f"{name}{nd}d") for name in _MODULES),
        *(
            getattr(space, name)
            for space in (F, torch)
            for kind in _FUNCTIONS
            for name in (f"{kind}_pool{nd}d", f"{kind}_pool{nd}d_with_indices")
            if hasattr(space, name)
        ),
    ]
    for nd in (1, 2, 3)
}


def _change_positions(ctx: Context, input: Dims, nd: int) -> Any:
    """The last `nd` axes are positions, the channels come before; a pool with indices has two outputs alike."""
    for axis in input[-nd:]:
        ctx.pin(axis, "reduce", "neighbouring entries are pooled, padded or resized")
    return pytree.tree_map_only(
        torch.Tensor, lambda t: Dims((*input[:-nd], *(fixed(n) for n in t.shape[-nd:]))), ctx.value
    )


@op(*POOLS[1], *POOLS[2], *POOLS[3])
def pool(ctx: Context, input: Dims, *args: Any, **kwargs: Any) -> Any:
    targets = (ctx.node.target,) if ctx.module is None else type(ctx.module).__mro__
    return _change_positions(ctx, input, next(nd for nd, pools in POOLS.items() if any(t in pools for t in targets)))


@op(F.interpolate, F.upsample, nn.Upsample, nn.UpsamplingNearest2d, nn.UpsamplingBilinear2d)
def interpolate(ctx: Context, input: Dims, *args: Any, **kwargs: Any) -> Any:
    return _change_positions(ctx, input, len(input) - 2)


@op(F.pad)
def pad(ctx: Context, input: Dims, pad: Any, *args: Any, **kwargs: Any) -> Dims:
    out = list(input)
    for i in range(len(pad) // 2):
        if pad[2 * i] or pad[2 * i + 1]:
            axis = input[-1 - i]
            ctx.pin(axis, "size", "padded with a fixed number of entries")
            out[-1 - i] = fixed(ctx.shape[-1 - i], ctx.reason("size", "padded with a fixed number of entries"))
    return Dims(out)
