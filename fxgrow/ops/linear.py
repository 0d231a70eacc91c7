"""Layers that write a fresh axis at every position: Linear, Embedding."""

from __future__ import annotations

from torch import nn
from torch.nn import functional as F

from fxgrow._axes import Dims
from fxgrow.ops.registry import Context, op


@op(F.linear)
def linear(ctx: Context, x: Dims, weight: Dims, bias: Dims | None = None) -> Dims:
    ctx.same(x[-1], weight[1])
    ctx.project(weight, bias, weight[0])
    return Dims((*x[:-1], weight[0]))


@op(nn.Linear)
def linear_module(ctx: Context, x: Dims) -> Dims:
    weight = ctx.parameter("weight") or Dims()
    ctx.attribute("out_features", weight[0])
    ctx.attribute("in_features", weight[1])
    return linear(ctx, x, weight, ctx.parameter("bias"))


@op(nn.Embedding)
def embedding(ctx: Context, index: Dims) -> Dims:
    weight = ctx.parameter("weight") or Dims()
    ctx.pin(weight[0], "input", "one entry per index that the input can hold")
    if ctx.module.max_norm is not None:
        ctx.pin(weight[1], "norm", "max_norm scales by the norm over the whole axis")
    ctx.attribute("embedding_dim", weight[1])
    ctx.project(weight, None, weight[1], out_dim=1, in_dim=0, plain=False)
    return Dims((*index, weight[1]))
