"""Convolutions and transposed convolutions, with any stride, padding, dilation and groups.

A grouped convolution with g groups reads g equal blocks, so both of its axes are g copies of one variable: each group
gains the same number of channels. A depthwise convolution (one input channel per group) has a slice per unit and
follows its width.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import nn
from torch.nn import functional as F

from fxgrow.axes.axes import Axis, Dims, Segment, fixed, length
from fxgrow.ops.context import Context
from fxgrow.ops.registry import op
from fxgrow.ops.split_concat import equal_parts

_CONV = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
_CONV_TRANSPOSE = ("input", "weight", "bias", "stride", "padding", "output_padding", "groups", "dilation")
_DEFAULTS = {"bias": None, "stride": 1, "padding": 0, "dilation": 1, "groups": 1}
_GROUPS = "every group has the same number of channels"


class _Arguments(NamedTuple):
    """What a convolution is called with; the same for a function and for a module."""

    x: Dims
    weight: Dims
    bias: Dims | None
    groups: int
    #: kernel, stride, padding and dilation, one number per spatial dimension; without those given as a string
    window: dict[str, Any]

    @property
    def channels(self) -> Axis:
        return self.x[1 - len(self.weight)]

    @property
    def is_depthwise(self) -> bool:
        return 1 < self.groups == length(self.channels)


def _read(ctx: Context, names: tuple[str, ...], args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Arguments:
    """Arguments of a call, `names` being the function's parameters, or attributes of a module."""
    given = {**_DEFAULTS, **dict(zip(names, args, strict=False)), **kwargs}
    if (m := ctx.module) is not None:
        given |= {"weight": ctx.parameter("weight") or Dims(), "bias": ctx.parameter("bias"), "groups": m.groups}
        # a string marks a window that does not slide over one zero-padded map, as padding="same" does
        padding = m.padding if m.padding_mode == "zeros" else m.padding_mode
        given |= {"stride": m.stride, "padding": padding, "dilation": m.dilation}
    x, weight = given["input"], given["weight"]
    n = len(weight) - 2
    ctx.fix(weight[2:])
    for axis in x[-n:]:
        # the units stand there where a channels-last tensor was not permuted
        ctx.pin(axis, "reduce", "a kernel slides over it")
    window: dict[str, Any] = {"kernel": tuple(map(length, weight[2:]))}
    for name in ("stride", "padding", "dilation"):
        if not isinstance(value := given[name], str):
            window[name] = (int(value),) * n if isinstance(value, int) else tuple(map(int, value))
    return _Arguments(x, weight, given["bias"], given["groups"], window)


def _depthwise(ctx: Context, a: _Arguments, multiplier: int) -> Axis:
    """The output axis: `multiplier` entries for each input channel."""
    out = tuple(Segment(s.var, s.inner * multiplier, s.reason) for s in a.channels)
    ctx.fix(a.weight[1:2])
    ctx.fill(a.weight, "random")
    if a.bias is not None:
        ctx.same(a.bias[0], out)
    if ctx.module is None:
        ctx.size_argument(a.groups, a.channels, "groups" if "groups" in ctx.node.kwargs else 6)
    ctx.attribute("groups", a.channels)
    return out


def _output(ctx: Context, a: _Arguments, out: Axis) -> Dims:
    ctx.attribute("in_channels", a.channels)
    ctx.attribute("out_channels", out)
    n = len(a.weight) - 2
    return Dims((*a.x[: -n - 1], out, *(fixed(size) for size in ctx.shape[-n:])))


@op(F.conv1d, F.conv2d, F.conv3d, nn.Conv1d, nn.Conv2d, nn.Conv3d)
def conv(ctx: Context, *args: Any, **kwargs: Any) -> Dims:
    a = _read(ctx, _CONV, args, kwargs)
    if a.is_depthwise:
        out = _depthwise(ctx, a, length(a.weight[0]) // length(a.channels))
        ctx.same(a.weight[0], out)
        ctx.fill(a.bias, 0.0)
    else:
        out = a.weight[0]
        ctx.same(a.channels, a.weight[1] * a.groups)
        equal_parts(ctx, out, a.groups, _GROUPS)
        # statistics need groups that are whole blocks of plain windows
        slides = "padding" in a.window
        groups = a.groups if slides else 0
        ctx.project(a.weight, a.bias, out, plain=slides and a.groups == 1, groups=groups, **a.window)
    return _output(ctx, a, out)


@op(F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)
@op(nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
def conv_transpose(ctx: Context, *args: Any, **kwargs: Any) -> Dims:
    # a module may be called with `output_size` too, whose place is that of the weight here
    a = _read(ctx, _CONV_TRANSPOSE, args, kwargs)
    ctx.same(a.channels, a.weight[0])
    if a.is_depthwise:
        out = _depthwise(ctx, a, length(a.weight[1]))
    else:
        equal_parts(ctx, a.channels, a.groups, _GROUPS)
        out, transposed = a.weight[1] * a.groups, a.groups == 1
        ctx.project(a.weight, a.bias, out, out_dim=1, in_dim=0, plain=False, transposed=transposed, **a.window)
    return _output(ctx, a, out)
