"""Elementwise operators, with broadcasting."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from fxgrow.axes.axes import Axis, Dims, dims_in, is_fixed, length
from fxgrow.ops.context import Context
from fxgrow.ops.registry import op


def broadcast(ctx: Context, *tensors: Dims) -> Dims:
    """Aligns dimensions from the right; equal lengths are the same axis, an axis of length 1 repeats."""
    rank = max(len(t) for t in tensors)
    out: list[Axis] = []
    for i in range(-rank, 0):
        axes = [t[i] for t in tensors if len(t) >= -i]
        longest = max(axes, key=length)
        for axis in axes:
            if length(axis) == length(longest):
                ctx.same(axis, longest, "added or multiplied with an axis that does not change")
            elif not is_fixed(axis):
                ctx.pin(axis, "broadcast", f"one unit is repeated over {length(longest)} entries")
        # a fixed axis of the same length has no units: prefer one that has
        out.append(next((a for a in axes if length(a) == length(longest) and not is_fixed(a)), longest))
    return Dims(out)


UNARY_NAMES = (
    "abs acos acosh angle asin asinh atan atanh bernoulli bitwise_not ceil celu clamp clamp_max clamp_min clip clone "
    "cos cosh deg2rad digamma elu erf erfc erfinv exp exp2 expm1 fill_ floor frac gelu "
    "hardshrink hardsigmoid hardswish hardtanh isfinite isinf isnan leaky_relu lgamma log log10 log1p log2 logical_not "
    "logit logsigmoid mish nan_to_num neg negative positive rad2deg reciprocal relu relu6 round rrelu "
    "rsqrt selu sigmoid sign silu sin sinc sinh softplus softshrink softsign sqrt square tan tanh tanhshrink threshold "
    "trunc dropout alpha_dropout feature_dropout zero_ empty_like "
    "zeros_like ones_like full_like rand_like randn_like normal_ uniform_ exponential_"
).split()
BINARY_NAMES = (
    "add sub subtract mul multiply div divide true_divide floor_divide remainder fmod pow maximum minimum "
    "atan2 eq ne lt le gt ge logical_and logical_or logical_xor bitwise_and bitwise_or where lerp addcmul addcdiv "
    "masked_fill copysign hypot heaviside float_power copy_ rsub"
).split()


def _forms(names: list[str]) -> list[Any]:
    """A name's method, in-place method, torch function and functional form."""
    forms: list[Any] = []
    for name in names:
        for form in (name, name.rstrip("_") + "_"):
            forms += [form, *(getattr(space, form, None) for space in (torch, F, operator))]
    return [f for f in forms if f is not None]


UNARY_MODULES = [
    nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout,
    nn.ReLU, nn.ReLU6, nn.ELU, nn.CELU, nn.SELU, nn.GELU, nn.SiLU, nn.Mish, nn.Sigmoid, nn.Tanh, nn.Hardtanh,
    nn.Hardswish, nn.Hardsigmoid, nn.LeakyReLU, nn.LogSigmoid, nn.Softplus, nn.Softsign, nn.Tanhshrink,
    nn.Softshrink, nn.Hardshrink, nn.Threshold, nn.RReLU,
]  # fmt: skip
UNARY_FUNCTIONS = [
    F.dropout1d, F.dropout2d, F.dropout3d, F.feature_alpha_dropout,
    "torchvision.ops.stochastic_depth.stochastic_depth", "timm.layers.drop.DropPath",
]  # fmt: skip
BINARY_OPERATORS = [
    operator.add, operator.sub, operator.mul, operator.truediv, operator.floordiv, operator.pow, operator.mod,
    operator.iadd, operator.isub, operator.imul, operator.itruediv, operator.and_, operator.or_, operator.xor,
    operator.eq, operator.ne, operator.lt, operator.le, operator.gt, operator.ge,
]  # fmt: skip


@op(*_forms(BINARY_NAMES), *BINARY_OPERATORS)
@op(*_forms(UNARY_NAMES), *UNARY_MODULES, *UNARY_FUNCTIONS, operator.neg, operator.pos, operator.abs, operator.invert)
def elementwise(ctx: Context, *args: Any, **kwargs: Any) -> Dims:
    return broadcast(ctx, *dims_in((args, kwargs)))


@op(F.prelu, torch.prelu, "prelu", nn.PReLU)
def prelu(ctx: Context, input: Dims, weight: Dims | None = None) -> Dims:
    weight = weight or ctx.parameter("weight") or Dims()
    if length(weight[0]) == 1:
        ctx.fix(weight)
    else:
        ctx.same(weight[0], input[1])
        ctx.attribute("num_parameters", input[1])
    return input
