"""Sizes of tensors, and tensors made of sizes."""

from __future__ import annotations

import math
from typing import Any

import torch

from fxgrow.axes.axes import Axis, Dims, fixed, length
from fxgrow.axes.size_expressions import SizeExpr
from fxgrow.ops.context import Context, Unsupported
from fxgrow.ops.registry import op


@op("size", getattr)
def size(ctx: Context, x: Any, which: Any = None, *default: Any) -> Any:
    if not isinstance(x, Dims):
        # `x.max(1).values`
        return getattr(x, str(which), ctx.value)
    shape = tuple(SizeExpr.measure(a) for a in x)
    if ctx.node.op == "call_method":
        return shape if which is None else shape[which]
    if which == "shape":
        return shape
    if isinstance(ctx.value, torch.Tensor):
        views = {"T": Dims(reversed(x)), "mT": Dims((*x[:-2], *reversed(x[-2:]))), "data": x}
        if which not in views:
            raise Unsupported(f"attribute {which!r}")
        return views[which]
    return ctx.value


@op(len)
def length_of(ctx: Context, x: Any) -> int:
    return SizeExpr.measure(x[0]) if isinstance(x, Dims) else len(x)


@op("numel", torch.numel)
def numel(ctx: Context, x: Dims) -> int:
    return math.prod(map(SizeExpr.measure, x))


@op("new_zeros", "new_ones", "new_empty", "new_full")
def new(ctx: Context, x: Dims, *sizes: Any, **kwargs: Any) -> Dims:
    return factory(ctx, *sizes, **kwargs)


@op(torch.zeros, torch.ones, torch.empty, torch.full, torch.rand, torch.randn)
def factory(ctx: Context, *sizes: Any, **kwargs: Any) -> Dims:
    """A new tensor: an axis for a size that measures one, fixed sizes otherwise."""
    given = list(sizes[0]) if sizes and isinstance(sizes[0], (tuple, list)) else list(sizes)
    out: list[Axis] = []
    for i, n in enumerate(ctx.shape):
        size_ = given[i] if i < len(given) else n
        if isinstance(size_, SizeExpr) and length(size_.axes[0]) == n:
            ctx.size_argument(size_, size_.axes[0])
            out.append(size_.axes[0])
        else:
            out.append(fixed(n))
    return Dims(out)
