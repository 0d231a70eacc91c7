"""Views and permutations; size arguments are rewritten by the axis that they measure."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx, nn

from fxgrow.axes.axes import Axis, Dims, UnitVar, axis_of, fixed, is_fixed, length, product, resolve, variables
from fxgrow.axes.size_expressions import SizeExpr
from fxgrow.axes.structure import Structure
from fxgrow.ops.context import Context, Unsupported
from fxgrow.ops.elementwise import broadcast
from fxgrow.ops.registry import MAKES_AXES, find_rule, op

#: at most so many nodes after a view show which of its dimensions has the units
READERS = 8


@op("contiguous", "detach", "requires_grad_", "to", "type", "type_as", "float", "double", "half", "bfloat16")
@op("bool", "long", "int", "cpu", "cuda", "data", torch.detach)
def identity(ctx: Context, x: Dims, *args: Any, **kwargs: Any) -> Dims:
    # `F.linear(x, self.weight.to(x.dtype))` still uses the parameter
    return Dims.of(x, x.parameter)


def unpack_sizes(sizes: Sequence[Any], **named: Any) -> tuple[list[Any], list[tuple[Any, ...]]]:
    """Sizes given as `view(2, 3)`, `view((2, 3))` or by name, and the path to each in the node's arguments."""
    if named:
        ((key, given),) = named.items()
        return list(given), [(key, i) for i in range(len(given))]
    if len(sizes) == 1 and isinstance(sizes[0], (tuple, list)):
        return list(sizes[0]), [(1, i) for i in range(len(sizes[0]))]
    return list(sizes), [(1 + i,) for i in range(len(sizes))]


@op("view", "reshape", torch.reshape)
def reshape(ctx: Context, x: Dims, *sizes: Any, **kwargs: Any) -> Dims:
    if sizes and isinstance(sizes[0], torch.dtype):
        raise Unsupported("view as another dtype")
    given, paths = unpack_sizes(sizes, **kwargs)
    out = regroup(ctx, x, ctx.shape, given)
    infer = all(int(size) != -1 for size in given)
    for size, axis, path in zip(given, out, paths, strict=True):
        ctx.size_argument(size, axis, *path, infer=infer)
    return out


@op("view_as", "reshape_as")
def reshape_as(ctx: Context, x: Dims, other: Dims) -> Dims:
    out = regroup(ctx, x, ctx.shape, [SizeExpr.measure(a) for a in other])
    for a, b in zip(out, other, strict=True):
        ctx.same(a, b)
    return out


def regroup(ctx: Context, x: Dims, shape: Sequence[int], sizes: Sequence[Any]) -> Dims:
    """The axes of `x` viewed as `shape`, block by block of dimensions with equal products."""
    out: list[Axis] = []
    i = j = 0
    while i < len(x) or j < len(shape):
        a, b = i + 1, j + 1
        left = length(x[i]) if i < len(x) else 1
        right = shape[j] if j < len(shape) else 1
        while left != right:
            if (right == 0 or 0 < left < right) and a < len(x):
                left, a = left * length(x[a]), a + 1
            elif b < len(shape):
                right, b = right * shape[b], b + 1
            else:
                raise Unsupported("sizes do not match")
        merged = fixed(1)
        for axis in x[i:a]:
            merged = product(merged, axis, ctx.reason("size", "two widths flattened into one"))
        out += _spread(ctx, merged, shape, sizes, range(j, b)) if j < len(shape) else []
        i, j = min(a, len(x)), min(b, len(shape))
    return Dims(out)


def _spread(ctx: Context, axis: Axis, shape: Sequence[int], sizes: Sequence[Any], at: range) -> list[Axis]:
    """The dimensions `at` of an axis that is viewed as several: one has the units, the others are fixed."""
    big = [k for k in at if shape[k] > 1]
    if is_fixed(axis):
        return [fixed(shape[k], next((s.reason for s in axis if s.reason), None)) for k in at]
    keep = _growing(ctx, axis, shape, sizes, big) if len(big) > 1 else big[0] if big else at[0]
    if len(big) <= 1:
        return [axis if k == keep else fixed(1) for k in at]
    before, after = math.prod(shape[at[0] : keep]), math.prod(shape[keep + 1 : at[-1] + 1])
    unit = UnitVar(shape[keep])
    ctx.same(axis, axis_of(unit, after) * before, "viewed as several dimensions")
    return [resolve(axis_of(unit)) if k == keep else fixed(shape[k]) for k in at]


def _growing(ctx: Context, axis: Axis, shape: Sequence[int], sizes: Sequence[Any], big: list[int]) -> int:
    """Which dimension has the units: where flattening put them, else one with a computed size, else the last."""
    inner = math.gcd(*(s.inner for s in resolve(axis)))
    flattened = [k for k in big if math.prod(shape[k + 1 : big[-1] + 1]) == inner > 1]
    if flattened:
        return flattened[0]
    computed = [k for k in big if isinstance(sizes[k], SizeExpr) or (isinstance(sizes[k], int) and sizes[k] == -1)]
    mixed = _mixed_dimensions(ctx)
    return next((k for k in (*computed, *reversed(big)) if k not in mixed), [*computed, big[-1]][0])


def _mixed_dimensions(ctx: Context) -> set[int]:
    """The dimensions in which the next readers of this node compare or sum entries: pieces of units, say."""
    axes = Dims(axis_of(UnitVar(n)) for n in ctx.shape)
    known: dict[fx.Node, Any] = {ctx.node: axes}
    structure = Structure(outputs=known)
    summed: list[Axis] = []
    queue = [ctx.node]
    for node in queue:
        for user in node.users:
            reader, before = Context(structure, ctx.gm, user), len(structure.invariants)
            rule = find_rule(user, reader.module)
            if rule is None or len(known) > READERS or any(n not in known for n in user.all_input_nodes):
                continue
            args, kwargs = fx.map_arg((user.args, user.kwargs), known.__getitem__)
            with contextlib.suppress(Unsupported, TypeError, IndexError, KeyError, ValueError):
                known[user] = rule(reader, *args, **kwargs)
                queue += [user] if isinstance(known[user], Dims) else []
                if isinstance(known[user], Dims) and len(known[user]) < len(known[node]):
                    summed += [i.axis for i in structure.invariants[before:]]
    return {d for d, a in enumerate(axes) if any(v.pinned or v in variables(*summed) for v in variables(a))}


@op("flatten", torch.flatten, nn.Flatten)
def flatten(ctx: Context, input: Dims, start_dim: int = 0, end_dim: int = -1) -> Dims:
    if ctx.module is not None:
        start_dim, end_dim = ctx.module.start_dim, ctx.module.end_dim
    start, end = start_dim % len(input), end_dim % len(input)
    merged = fixed(1)
    for axis in input[start : end + 1]:
        merged = product(merged, axis, ctx.reason("size", "two widths flattened into one"))
    return Dims((*input[:start], merged, *input[end + 1 :]))


@op("unflatten", torch.unflatten, nn.Unflatten)
def unflatten(ctx: Context, input: Dims, dim: int = 0, sizes: Any = ()) -> Dims:
    if ctx.module is not None:
        dim, sizes = ctx.module.dim, ctx.module.unflattened_size
        ctx.fix([input[dim]], "the sizes are attributes of nn.Unflatten")
    dim %= len(input)
    sizes = list(sizes)
    parts = _spread(ctx, input[dim], ctx.shape, [None] * dim + sizes, range(dim, dim + len(sizes)))
    if ctx.module is None:
        for i, (size, axis) in enumerate(zip(sizes, parts, strict=True)):
            ctx.size_argument(size, axis, "sizes" if "sizes" in ctx.node.kwargs else 2, i)
    return Dims((*input[:dim], *parts, *input[dim + 1 :]))


@op("squeeze", torch.squeeze)
def squeeze(ctx: Context, input: Dims, dim: Any = None) -> Dims:
    dims = range(len(input)) if dim is None else [dim] if isinstance(dim, int) else dim
    gone = {d % len(input) for d in dims if length(input[d]) == 1}
    ctx.fix([input[d] for d in gone], "squeezed, so its size stays 1")
    return Dims(a for i, a in enumerate(input) if i not in gone)


@op("unsqueeze", torch.unsqueeze)
def unsqueeze(ctx: Context, input: Dims, dim: int) -> Dims:
    out = list(input)
    out.insert(dim % (len(input) + 1), fixed(1))
    return Dims(out)


@op("expand", "broadcast_to", torch.broadcast_to)
def expand(ctx: Context, input: Dims, *sizes: Any) -> Dims:
    given, paths = unpack_sizes(sizes)
    lead = len(given) - len(input)
    out: list[Axis] = []
    for i, (size, n, path) in enumerate(zip(given, ctx.shape, paths, strict=True)):
        axis = input[i - lead] if i >= lead else fixed(1)
        if length(axis) != n:
            ctx.fix([axis], "one entry is repeated")
            # repeated over another width: the size tells which
            out.append(ctx.new_axis(size, n, *path))
            continue
        ctx.size_argument(size, axis, *path)
        out.append(axis)
    return Dims(out)


MAKES_AXES.add(expand)


@op("expand_as")
def expand_as(ctx: Context, input: Dims, other: Dims) -> Dims:
    return broadcast(ctx, input, other)


@op("permute", torch.permute)
def permute(ctx: Context, input: Dims, *dims: Any, **kwargs: Any) -> Dims:
    dims = kwargs.get("dims", dims)
    order = dims[0] if len(dims) == 1 and isinstance(dims[0], (tuple, list)) else dims
    return Dims(input[d] for d in order)


@op("transpose", "swapaxes", "swapdims", "t", torch.transpose, torch.swapaxes, torch.t)
def transpose(ctx: Context, input: Dims, dim0: int = 0, dim1: int = -1) -> Dims:
    out = list(input)
    out[dim0], out[dim1] = out[dim1], out[dim0]
    return Dims(out)


@op("movedim", "moveaxis", torch.movedim, torch.moveaxis)
def movedim(ctx: Context, input: Dims, source: Any, destination: Any) -> Dims:
    # a tensor whose sizes number its dimensions shows where they go
    numbered = torch.empty(tuple(range(len(input))), device="meta")
    return Dims(input[d] for d in numbered.movedim(source, destination).shape)
