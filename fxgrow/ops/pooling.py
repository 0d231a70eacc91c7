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

_NAMES = (
    "MaxPool AvgPool AdaptiveMaxPool AdaptiveAvgPool LPPool "
    "max_pool avg_pool adaptive_max_pool adaptive_avg_pool lp_pool"
).split()
_PADS = ("Zero", "Constant", "Reflection", "Replication", "Circular")
#: number of spatial dimensions of modules and functions
POOLS: dict[Any, int] = {
    getattr(space, name): nd
    for nd in (1, 2, 3)
    for kind in _NAMES
    for name in (f"{kind}{nd}d", f"{kind}{nd}d_with_indices")
    for space in (nn, F, torch)
    if hasattr(space, name)
}


def _change_positions(ctx: Context, input: Dims, nd: int) -> Any:
    """The last `nd` axes are positions, the channels come before; a pool with indices has two outputs alike."""
    for axis in input[-nd:]:
        ctx.pin(axis, "reduce", "neighbouring entries are pooled, padded or resized")
    return pytree.tree_map_only(
        torch.Tensor, lambda t: Dims((*input[:-nd], *(fixed(n) for n in t.shape[-nd:]))), ctx.value
    )


@op(*POOLS)
def pool(ctx: Context, input: Dims, *args: Any, **kwargs: Any) -> Any:
    targets = (ctx.node.target,) if ctx.module is None else type(ctx.module).__mro__
    return _change_positions(ctx, input, next(POOLS[t] for t in targets if t in POOLS))


@op(F.interpolate, F.upsample, nn.Upsample, nn.UpsamplingNearest2d, nn.UpsamplingBilinear2d)
def interpolate(ctx: Context, input: Dims, *args: Any, **kwargs: Any) -> Any:
    return _change_positions(ctx, input, len(input) - 2)


@op(F.pad, *(getattr(nn, f"{kind}Pad{nd}d") for kind in _PADS for nd in (1, 2, 3)))
def pad(ctx: Context, input: Dims, pad: Any = None, *args: Any, **kwargs: Any) -> Dims:
    if ctx.module is not None:
        pad = ctx.module.padding
    out = list(input)
    why = "padded with a fixed number of entries"
    for i in range(len(pad) // 2):
        if pad[2 * i] or pad[2 * i + 1]:
            ctx.fix([input[-1 - i]], why)
            out[-1 - i] = fixed(ctx.shape[-1 - i], ctx.reason("size", why))
    return Dims(out)
