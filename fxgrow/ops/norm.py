"""Normalisations. Per-channel norms follow a width; norms over a group of units grow by whole groups or pin it."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.nn import functional as F

from fxgrow._axes import Axis, Dims, Var, axis_of, fixed, length
from fxgrow.ops.registry import Context, op

#: new entries of a per-channel norm: the identity
IDENTITY = {"weight": 1.0, "bias": 0.0, "running_mean": 0.0, "running_var": 1.0}


def _follow(ctx: Context, axis: Axis, parameters: dict[str, Dims | None]) -> None:
    for name, p in parameters.items():
        if p is not None:
            ctx.same(p[0], axis)
            ctx.fill(p, IDENTITY[name])


def _normalised(ctx: Context, *axes: Axis) -> None:
    for axis in axes:
        ctx.pin(axis, "norm", "normalised over the whole axis: new units would change the statistics of the old ones")


@op(F.batch_norm, F.instance_norm)
def channel_norm(
    ctx: Context,
    input: Dims,
    running_mean: Dims | None = None,
    running_var: Dims | None = None,
    weight: Dims | None = None,
    bias: Dims | None = None,
    *args: Any,
    **kwargs: Any,
) -> Dims:
    _normalised(ctx, input[0], *input[2:])
    _follow(ctx, input[1], dict(zip(IDENTITY, (weight, bias, running_mean, running_var), strict=True)))
    return input


@op(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
@op(nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)
def channel_norm_module(ctx: Context, x: Dims) -> Dims:
    if isinstance(ctx.module, nn.modules.instancenorm._InstanceNorm) and len(x) == ctx.module._get_no_batch_dim():
        x = Dims((fixed(1), *x))  # one sample without its batch dimension
    out = channel_norm(ctx, x, *(ctx.parameter(n) for n in ("running_mean", "running_var", "weight", "bias")))
    ctx.attribute("num_features", x[1])
    return Dims(out[-len(ctx.shape) :])


def _grouped(ctx: Context, x: Dims, groups: int, weight: Dims | None, bias: Dims | None) -> Axis:
    """Whole groups: the axis is `groups` units of `channels / groups` entries. Returns the axis of groups."""
    _normalised(ctx, *x[2:])
    unit = axis_of(Var(groups))
    ctx.same(x[1], tuple(s._replace(inner=length(x[1]) // groups) for s in unit), "grows by whole groups")
    _follow(ctx, x[1], {"weight": weight, "bias": bias})
    return unit


@op(F.group_norm)
def group_norm(
    ctx: Context, input: Dims, num_groups: int, weight: Dims | None = None, bias: Dims | None = None, eps: Any = 0
) -> Dims:
    groups = _grouped(ctx, input, num_groups, weight, bias)
    ctx.size_argument(num_groups, groups, "num_groups" if "num_groups" in ctx.node.kwargs else 1)
    return input


@op(nn.GroupNorm)
def group_norm_module(ctx: Context, x: Dims) -> Dims:
    groups = _grouped(ctx, x, ctx.module.num_groups, ctx.parameter("weight"), ctx.parameter("bias"))
    ctx.attribute("num_groups", groups)
    ctx.attribute("num_channels", x[1])
    return x


def _over(ctx: Context, x: Dims, n: int, *parameters: Dims | None) -> Dims:
    _normalised(ctx, *x[len(x) - n :])
    for p in parameters:
        ctx.fix(p or ())
    return x


@op(F.layer_norm, F.rms_norm)
def layer_norm(
    ctx: Context, input: Dims, normalized_shape: Any, weight: Dims | None = None, bias: Any = None, eps: Any = None
) -> Dims:
    return _over(ctx, input, len(normalized_shape), weight, bias if isinstance(bias, Dims) else None)


@op(nn.LayerNorm, nn.RMSNorm)
def layer_norm_module(ctx: Context, x: Dims) -> Dims:
    n = len(ctx.module.normalized_shape)
    return _over(ctx, x, n, ctx.parameter("weight"), ctx.parameter("bias"))


@op(nn.LocalResponseNorm, nn.CrossMapLRN2d, F.local_response_norm)
def local_response_norm(ctx: Context, x: Dims, *args: Any, **kwargs: Any) -> Dims:
    _normalised(ctx, *x[1:])
    return x


@op(F.normalize)
def normalize(ctx: Context, input: Dims, p: Any = 2.0, dim: int = 1, *args: Any, **kwargs: Any) -> Dims:
    _normalised(ctx, input[dim])
    return input
