"""Normalisation. Per-channel norms follow a width; GroupNorm grows by groups; norms over units need an invariant."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from fxgrow.axes.axes import Axis, Dims, UnitVar, axis_of, fixed, is_fixed, length
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


@op(F.batch_norm, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
@op(F.instance_norm, nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)
def channel_norm(ctx: Context, input: Dims, *args: Any, **kwargs: Any) -> Dims:
    if isinstance(ctx.module, nn.modules.instancenorm._InstanceNorm) and len(input) == ctx.module._get_no_batch_dim():
        input = Dims((fixed(1), *input))  # one sample without its batch dimension
    _pin_normalised(ctx, input[0], *input[2:])
    given = {**dict(zip(("running_mean", "running_var", "weight", "bias"), args, strict=False)), **kwargs}
    _follow(ctx, input[1], {name: given.get(name) or ctx.parameter(name) for name in IDENTITY})
    ctx.attribute("num_features", input[1])
    return Dims(input[-len(ctx.shape) :])


@op("timm.layers.norm_act.BatchNormAct2d")
def channel_norm_and_activation(ctx: Context, x: Dims) -> Dims:
    """A batch norm with an activation and dropout inside."""
    for part in (ctx.module.drop, ctx.module.act):
        if any(True for _ in part.parameters()) or not keeps_units(part, (2, 4, 3, 3), 1):
            raise Unsupported(f"{type(ctx.module).__name__} with {type(part).__name__} inside", "norm")
    return channel_norm(ctx, x)


@op(F.group_norm, nn.GroupNorm)
def group_norm(
    ctx: Context, input: Dims, num_groups: int = 0, weight: Dims | None = None, bias: Dims | None = None, eps: Any = 0
) -> Dims:
    """Makes the channels units of `channels / groups` entries each."""
    num_groups = num_groups or ctx.module.num_groups
    _pin_normalised(ctx, *input[2:])
    unit = UnitVar(num_groups)
    groups = axis_of(unit)
    ctx.same(input[1], axis_of(unit, length(input[1]) // num_groups), "grows by whole groups")
    _follow(ctx, input[1], {"weight": weight or ctx.parameter("weight"), "bias": bias or ctx.parameter("bias")})
    if ctx.module is None:
        ctx.size_argument(num_groups, groups, "num_groups" if "num_groups" in ctx.node.kwargs else 1)
    ctx.attribute("num_groups", groups)
    ctx.attribute("num_channels", input[1])
    return input


@op(F.layer_norm, nn.LayerNorm)
def layer_norm(
    ctx: Context, input: Dims, normalized_shape: Any = (), weight: Any = None, bias: Any = None, eps: float = 1e-5
) -> Dims:
    return _norm_of_shape(ctx, "layer", input, normalized_shape, weight, bias, eps)


@op(F.rms_norm, nn.RMSNorm)
def rms_norm(ctx: Context, input: Dims, normalized_shape: Any = (), weight: Any = None, eps: Any = None) -> Dims:
    return _norm_of_shape(ctx, "rms", input, normalized_shape, weight, None, eps)


def _norm_of_shape(ctx: Context, kind: str, x: Dims, shape: Any, weight: Any, bias: Any, eps: float | None) -> Dims:
    """A norm over the last axes; a single one may grow where its new units keep the statistics (`Invariant`)."""
    if (m := ctx.module) is not None:
        shape, eps, weight, bias = m.normalized_shape, m.eps, ctx.parameter("weight"), ctx.parameter("bias")
        if len(shape) == 1:
            ctx.attribute("normalized_shape", x[-1], 0)
    else:
        for i, (size, axis) in enumerate(zip(shape, x[len(x) - len(shape) :], strict=True)):
            ctx.size_argument(size, axis, "normalized_shape" if "normalized_shape" in ctx.node.kwargs else 1, i)
    affine = [p for p in (weight, bias) if p is not None]
    if len(shape) != 1 or any(p.parameter is None for p in affine):
        _pin_normalised(ctx, *x[len(x) - len(shape) :])
        for p in affine:
            ctx.fix(p)
        return x
    _follow(ctx, x[-1], {"weight": weight, "bias": bias})
    if not is_fixed(x[-1]):
        names = {"weight": weight and weight.parameter, "bias": bias and bias.parameter}
        eps = float(eps if eps is not None else torch.finfo(ctx.value.dtype).eps)
        ctx.require_state(kind, ctx.argument(0, "input"), x[-1], eps=eps, **names)
    return x


@op(nn.LocalResponseNorm, nn.CrossMapLRN2d, F.local_response_norm)
def local_response_norm(ctx: Context, x: Dims, *args: Any, **kwargs: Any) -> Dims:
    _pin_normalised(ctx, *x[1:])
    return x


@op(F.normalize)
def normalize(ctx: Context, input: Dims, p: Any = 2.0, dim: int = 1, *args: Any, **kwargs: Any) -> Dims:
    if p != 2 or is_fixed(input[dim]):
        _pin_normalised(ctx, input[dim])
    else:
        ctx.require_state("length", ctx.argument(0, "input"), input[dim])
    return input
