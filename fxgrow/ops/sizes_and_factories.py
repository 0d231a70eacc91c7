"""Sizes of tensors, and tensors made of sizes."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import fx

from fxgrow.axes.axes import Dims, fixed, single_variable
from fxgrow.axes.size_expressions import SizeExpr
from fxgrow.axes.structure import Path
from fxgrow.graph.arguments import argument_leaves
from fxgrow.ops.context import Context, Unsupported
from fxgrow.ops.registry import MAKES_AXES, op


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
        views = {"T": Dims(reversed(x)), "mT": Dims((*x[:-2], *reversed(x[-2:]))), "data": x, "real": x, "imag": x}
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


@op("new_zeros", "new_ones", "new_empty", "new_full", "new")
def new(ctx: Context, x: Dims, *sizes: Any, **kwargs: Any) -> Dims:
    return _filled(ctx, sizes, kwargs, 1)


@op(torch.zeros, torch.ones, torch.empty, torch.full, torch.rand, torch.randn)
def factory(ctx: Context, *sizes: Any, **kwargs: Any) -> Dims:
    return _filled(ctx, sizes, kwargs, 0)


MAKES_AXES.update((new, factory))


@op(torch.tensor, torch.as_tensor, torch.scalar_tensor)
def constant(ctx: Context, data: Any, *args: Any, **kwargs: Any) -> Dims:
    """Numbers as a tensor: sizes that only a width gives keep their values, as in `x / torch.tensor(d).sqrt()`."""
    if isinstance(data, Dims):
        return data
    for path, leaf in argument_leaves(ctx.node):
        number = ctx.structure.outputs.get(leaf) if isinstance(leaf, fx.Node) else None
        if isinstance(number, SizeExpr) and number.measures_one and single_variable(number.axes[0]) is not None:
            ctx.followed.append(number)
            ctx.keep(int(number), number.axes, *path)
    return Dims(map(fixed, ctx.shape))


def _filled(ctx: Context, sizes: tuple[Any, ...], kwargs: dict[str, Any], first: int) -> Dims:
    """A new tensor, whose sizes stand in the arguments from position `first` on."""
    path: Path = ()
    given: Any = sizes
    if "size" in kwargs:
        given, path = kwargs["size"], ("size",)
    elif sizes and isinstance(sizes[0], (tuple, list)):
        given, path = sizes[0], (first,)
    places: list[Path] = [(*path, i) if path else (first + i,) for i in range(len(given))]
    if len(given) != len(ctx.shape):
        raise Unsupported("a new tensor whose sizes are not given one by one")
    return Dims(ctx.new_axis(size_, n, *at) for size_, n, at in zip(given, ctx.shape, places, strict=True))
