"""Operators that change positions and keep channels: pooling, resizing, padding."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree

from fxgrow.axes.axes import Dims, fixed
from fxgrow.ops.context import Context
from fxgrow.ops.registry import Rule, op

RANKS = (1, 2, 3)
#: by number of spatial dimensions
MODULES = {
    nd: [
        getattr(nn, f"{name}{nd}d")
        for name in (
            "MaxPool AvgPool AdaptiveMaxPool AdaptiveAvgPool LPPool ZeroPad ReflectionPad ReplicationPad ConstantPad "
            "CircularPad"
        ).split()
    ]
    for nd in RANKS
}
FUNCTIONS = {
    nd: [
        getattr(space, f"{kind}_pool{nd}d{form}")
        for space in (F, torch)
        for kind in ("max", "avg", "adaptive_max", "adaptive_avg", "lp")
        for form in ("", "_with_indices")
        if hasattr(space, f"{kind}_pool{nd}d{form}")
    ]
    for nd in RANKS
}


def _positions(ctx: Context, input: Dims, nd: int) -> Any:
    """The last `nd` axes are positions, the channels come before; a pool with indices has two outputs alike."""
    for axis in input[-nd:]:
        ctx.pin(axis, "reduce", "neighbouring entries are pooled, padded or resized")
    return pytree.tree_map_only(
        torch.Tensor, lambda t: Dims((*input[:-nd], *(fixed(n) for n in t.shape[-nd:]))), ctx.value
    )


#: the rules of pools, one per number of spatial dimensions
POOLS: list[Rule] = []


def _enter(nd: int) -> None:
    @op(*MODULES[nd], *FUNCTIONS[nd])
    def pool(ctx: Context, input: Dims, *args: Any, **kwargs: Any) -> Any:
        return _positions(ctx, input, nd)

    POOLS.append(pool)


for _nd in RANKS:
    _enter(_nd)


@op(F.interpolate, F.upsample, nn.Upsample, nn.UpsamplingNearest2d, nn.UpsamplingBilinear2d)
def interpolate(ctx: Context, input: Dims, *args: Any, **kwargs: Any) -> Any:
    return _positions(ctx, input, len(input) - 2)


@op(F.pad)
def pad(ctx: Context, input: Dims, pad: Any, *args: Any, **kwargs: Any) -> Dims:
    out = list(input)
    for i in range(len(pad) // 2):
        if pad[2 * i] or pad[2 * i + 1]:
            axis = input[-1 - i]
            ctx.pin(axis, "size", "padded with a fixed number of entries")
            out[-1 - i] = fixed(ctx.shape[-1 - i], ctx.reason("size", "padded with a fixed number of entries"))
    return Dims(out)
