"""Normalisation. Per-channel norms follow a width; GroupNorm grows by groups; norms over units need an invariant."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from fxgrow.axes.axes import Axis, Dims, UnitVar, axis_of, fixed, is_fixed, length
from fxgrow.axes.structure import Constant
from fxgrow.ops.context import Context, Unsupported
from fxgrow.ops.infer_rule import keeps_units
from fxgrow.ops.registry import op

#: new entries of a per-channel norm: the identity
IDENTITY = {"weight": 1.0, "bias": 0.0, "running_mean": 0.0, "running_var": 1.0}


def _follow(ctx: Context, axis: Axis, parameters: dict[str, Dims | None]) -> None:
    for name, p in parameters.items():
        if p is not None:
            ctx.same(p[0], axis)
            ctx.fill(p, IDENTITY[name])


def _pin_normalised(ctx: Context, *axes: Axis) -> None:
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
    _pin_normalised(ctx, input[0], *input[2:])
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


@op("timm.layers.norm_act.BatchNormAct2d")
def channel_norm_and_activation(ctx: Context, x: Dims) -> Dims:
    """A batch norm with an activation and dropout inside."""
    for part in (ctx.module.drop, ctx.module.act):
        if any(True for _ in part.parameters()) or not keeps_units(part, (2, 4, 3, 3), 1):
            raise Unsupported(f"{type(ctx.module).__name__} with {type(part).__name__} inside", "norm")
    return channel_norm_module(ctx, x)


def _grouped(ctx: Context, x: Dims, groups: int, weight: Dims | None, bias: Dims | None) -> Axis:
    """Makes the channels `groups` units of `channels / groups` entries, and returns the axis of groups."""
    _pin_normalised(ctx, *x[2:])
    unit = axis_of(UnitVar(groups))
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


def norm_over_last(
    ctx: Context,
    x: Dims,
    n: int,
    kind: str,
    weight: Dims | None,
    bias: Dims | None,
    eps: float | None,
    **form: Any,
) -> Dims:
    """A norm over the last `n` axes; a single one may grow where its new units keep the statistics (`Invariant`)."""
    affine = [p for p in (weight, bias) if p is not None]
    if n != 1 or any(p.parameter is None for p in affine):
        _pin_normalised(ctx, *x[len(x) - n :])
        for p in affine:
            ctx.fix(p)
        return x
    _follow(ctx, x[-1], {"weight": weight, "bias": bias})
    if not is_fixed(x[-1]):
        given = eps if eps is not None else torch.finfo(ctx.value.dtype).eps
        source = ctx.node.args[0] if ctx.node.args else ctx.node.kwargs["input"]
        ctx.require_state(
            kind,
            source,  # type: ignore[arg-type]
            x[-1],
            weight=None if weight is None else weight.parameter,
            bias=None if bias is None else bias.parameter,
            eps=float(given),
            **form,
        )
    return x


@op(F.layer_norm)
def layer_norm(
    ctx: Context,
    input: Dims,
    normalized_shape: Any,
    weight: Dims | None = None,
    bias: Dims | None = None,
    eps: float = 1e-5,
) -> Dims:
    return _functional(ctx, input, normalized_shape, "layer", weight, bias, eps)


@op(F.rms_norm)
def rms_norm(
    ctx: Context, input: Dims, normalized_shape: Any, weight: Dims | None = None, eps: float | None = None
) -> Dims:
    return _functional(ctx, input, normalized_shape, "rms", weight, None, eps)


def _functional(ctx: Context, x: Dims, shape: Any, kind: str, weight: Any, bias: Any, eps: float | None) -> Dims:
    out = norm_over_last(ctx, x, len(shape), kind, weight, bias, eps)
    for i, size in enumerate(shape):
        path: tuple[Any, ...] = ("normalized_shape",) if "normalized_shape" in ctx.node.kwargs else (1,)
        ctx.size_argument(size, x[len(x) - len(shape) + i], *path, i)
    return out


@op(nn.LayerNorm, nn.RMSNorm)
def layer_norm_module(ctx: Context, x: Dims) -> Dims:
    m = ctx.module
    kind = "layer" if isinstance(m, nn.LayerNorm) else "rms"
    out = norm_over_last(ctx, x, len(m.normalized_shape), kind, ctx.parameter("weight"), ctx.parameter("bias"), m.eps)
    if len(m.normalized_shape) == 1:
        ctx.structure.constants.append(Constant((str(ctx.node.target), ("normalized_shape", 0)), x[-1]))
    return out


@op(nn.LocalResponseNorm, nn.CrossMapLRN2d, F.local_response_norm)
def local_response_norm(ctx: Context, x: Dims, *args: Any, **kwargs: Any) -> Dims:
    _pin_normalised(ctx, *x[1:])
    return x


@op(F.normalize)
def normalize(ctx: Context, input: Dims, p: Any = 2.0, dim: int = 1, *args: Any, **kwargs: Any) -> Dims:
    if p != 2 or is_fixed(input[dim]):
        _pin_normalised(ctx, input[dim])
    else:
        ctx.require_state("length", ctx.node.args[0], input[dim])  # type: ignore[arg-type]
    return input
