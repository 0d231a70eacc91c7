"""Convolutions and transposed convolutions, with any stride, padding, dilation and groups.

A grouped convolution with g groups reads g equal blocks, so both of its axes are g copies of one variable: each group
gains the same number of channels. A depthwise convolution (one input channel per group) carries a slice per unit and
follows its width.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.nn import functional as F

from fxgrow.axes.axes import Axis, Dims, Segment, UnitVar, axis_of, fixed, length
from fxgrow.ops.context import Context, Unsupported
from fxgrow.ops.registry import op


def _spatial(value: Any, nd: int) -> tuple[int, ...]:
    return (int(value),) * nd if isinstance(value, int) else tuple(int(v) for v in value)


def _positions(ctx: Context, x: Dims, nd: int) -> None:
    """Channels-last tensors can come in the wrong way round: the kernel then slides over the units."""
    for axis in x[-nd:]:
        ctx.pin(axis, "reduce", "a kernel slides over it")


def _blocks(ctx: Context, axis: Axis, groups: int) -> Axis:
    """Makes `axis` be `groups` copies of one block, and returns the block."""
    if length(axis) % groups:
        raise Unsupported(f"{length(axis)} channels are not divisible by {groups} groups")
    block = axis_of(UnitVar(length(axis) // groups))
    ctx.same(axis, block * groups, "every group has the same number of channels")
    return block


def _depthwise(
    ctx: Context, channels: Axis, weight: Dims, bias: Dims | None, groups: int, groups_at: tuple[Any, ...]
) -> Axis:
    multiplier = length(weight[0]) // length(channels)
    out = tuple(Segment(s.var, s.inner * multiplier, s.reason) for s in channels)
    ctx.same(weight[0], out)
    ctx.fix(weight[1:])
    ctx.fill(weight, "random")
    if bias is not None:
        ctx.same(bias[0], out)
        ctx.fill(bias, 0.0)
    if groups_at:
        ctx.size_argument(groups, channels, *groups_at)
    ctx.attribute("groups", channels)
    return out


def _conv(
    ctx: Context,
    x: Dims,
    weight: Dims,
    bias: Dims | None,
    groups: int,
    groups_at: tuple[Any, ...],
    window: dict[str, Any],
) -> Dims:
    nd = len(weight) - 2
    channels = x[-nd - 1]
    ctx.fix(weight[2:])
    _positions(ctx, x, nd)
    if 1 < groups == length(channels):
        out = _depthwise(ctx, channels, weight, bias, groups, groups_at)
    else:
        out = weight[0]
        ctx.same(channels, weight[1] * groups)
        if groups > 1:
            _blocks(ctx, out, groups)
        kernel = tuple(length(a) for a in weight[2:])
        spatial: dict[str, Any] = {k: _spatial(v, nd) for k, v in window.items() if not isinstance(v, str)}
        slides = len(spatial) == len(window)
        # groups that are not whole blocks of plain windows have no statistics
        ctx.project(
            weight, bias, out, kernel=kernel, plain=slides and groups == 1, groups=groups if slides else 0, **spatial
        )
    ctx.attribute("in_channels", channels)
    ctx.attribute("out_channels", out)
    return Dims((*x[: -nd - 1], out, *(fixed(n) for n in ctx.shape[-nd:])))


@op(F.conv1d, F.conv2d, F.conv3d)
def conv(
    ctx: Context,
    input: Dims,
    weight: Dims,
    bias: Dims | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Dims:
    at: tuple[Any, ...] = ("groups",) if "groups" in ctx.node.kwargs else (6,)
    window = {"stride": stride, "padding": padding, "dilation": dilation}
    return _conv(ctx, input, weight, bias, groups, at, window)


@op(nn.Conv1d, nn.Conv2d, nn.Conv3d)
def conv_module(ctx: Context, x: Dims) -> Dims:
    m = ctx.module
    # padding with anything but zeros is no sliding window of one map: a string marks it, as "same" does
    padding = m.padding if m.padding_mode == "zeros" else m.padding_mode
    window = {"stride": m.stride, "padding": padding, "dilation": m.dilation}
    return _conv(ctx, x, ctx.parameter("weight") or Dims(), ctx.parameter("bias"), m.groups, (), window)


def _transposed(
    ctx: Context,
    x: Dims,
    weight: Dims,
    bias: Dims | None,
    groups: int,
    groups_at: tuple[Any, ...],
    window: dict[str, Any],
) -> Dims:
    nd = len(weight) - 2
    channels = x[-nd - 1]
    ctx.fix(weight[2:])
    _positions(ctx, x, nd)
    ctx.same(channels, weight[0])
    if 1 < groups == length(channels):
        multiplier = length(weight[1])
        out = tuple(Segment(s.var, s.inner * multiplier, s.reason) for s in channels)
        ctx.fix(weight[1:2])
        ctx.fill(weight, "random")
        if groups_at:
            ctx.size_argument(groups, channels, *groups_at)
        ctx.attribute("groups", channels)
        if bias is not None:
            ctx.same(bias[0], out)
    else:
        if groups > 1:
            _blocks(ctx, channels, groups)
        out = weight[1] * groups
        geometry: dict[str, Any] = {k: _spatial(v, nd) for k, v in window.items()}
        kernel = tuple(length(a) for a in weight[2:])
        ctx.project(weight, bias, out, out_dim=1, in_dim=0, kernel=kernel, plain=False, turned=groups == 1, **geometry)
    ctx.attribute("in_channels", channels)
    ctx.attribute("out_channels", out)
    return Dims((*x[: -nd - 1], out, *(fixed(n) for n in ctx.shape[-nd:])))


@op(F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)
def conv_transpose(
    ctx: Context,
    input: Dims,
    weight: Dims,
    bias: Dims | None = None,
    stride: Any = 1,
    padding: Any = 0,
    output_padding: Any = 0,
    groups: int = 1,
    dilation: Any = 1,
) -> Dims:
    at: tuple[Any, ...] = ("groups",) if "groups" in ctx.node.kwargs else (6,)
    window = {"stride": stride, "padding": padding, "dilation": dilation}
    return _transposed(ctx, input, weight, bias, groups, at, window)


@op(nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
def conv_transpose_module(ctx: Context, x: Dims, output_size: Any = None) -> Dims:
    m = ctx.module
    window = {"stride": m.stride, "padding": m.padding, "dilation": m.dilation}
    return _transposed(ctx, x, ctx.parameter("weight") or Dims(), ctx.parameter("bias"), m.groups, (), window)
