"""Data movement: views, permutations, splits and joins; sizes are rewritten by the axis they mean."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from fxgrow._axes import Axis, Dims, Segment, Size, Var, axis_of, fixed, is_fixed, length, product, resolve
from fxgrow.ops.registry import Context, Unsupported, op


@op("contiguous", "clone", "detach", "requires_grad_", "to", "type", "type_as", "float", "double", "half", "bfloat16")
@op("bool", "long", "int", "cpu", "cuda", "data", torch.clone, torch.detach)
def identity(ctx: Context, x: Dims, *args: Any, **kwargs: Any) -> Dims:
    return x


def halves(ctx: Context, axis: Axis, n: int) -> Axis:
    """`axis` in `n` equal blocks that stay equal: returns the block."""
    if length(axis) % n:
        raise Unsupported(f"{length(axis)} entries in {n} unequal parts", "size")
    if is_fixed(axis):
        return fixed(length(axis) // n)
    block = axis_of(Var(length(axis) // n))
    ctx.same(axis, block * n, "split into equal parts")
    return block


# -- reshaping


def _sizes(ctx: Context, sizes: Sequence[Any], out: Sequence[Axis], path: tuple[Any, ...], start: int) -> None:
    """Size arguments of view, reshape and expand: `start` is the index of the first."""
    for i, (size, axis) in enumerate(zip(sizes, out, strict=True)):
        ctx.size_argument(size, axis, *path, start + i)


def _flat(sizes: Sequence[Any]) -> tuple[list[Any], tuple[Any, ...], int]:
    """`view(2, 3)` and `view((2, 3))` alike: the sizes, the path to them and the index of the first."""
    if len(sizes) == 1 and isinstance(sizes[0], (tuple, list)):
        return list(sizes[0]), (1,), 0
    return list(sizes), (), 1


@op("view", "reshape", torch.reshape)
def reshape(ctx: Context, x: Dims, *sizes: Any, **kwargs: Any) -> Dims:
    if kwargs:
        sizes, path, start = list(kwargs["shape"]), ("shape",), 0
    elif sizes and isinstance(sizes[0], torch.dtype):
        raise Unsupported("view as another dtype")
    else:
        sizes, path, start = _flat(sizes)
    out = regroup(ctx, x, ctx.shape, sizes)
    _sizes(ctx, sizes, out, path, start)
    return out


@op("view_as", "reshape_as")
def reshape_as(ctx: Context, x: Dims, other: Dims) -> Dims:
    out = regroup(ctx, x, ctx.shape, [Size.measure(a) for a in other])
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
            if left < right and a < len(x):
                left, a = left * length(x[a]), a + 1
            elif b < len(shape):
                right, b = right * shape[b], b + 1
            else:
                raise Unsupported("sizes do not match")
        # dimensions of size 1 join the block in front of them only where nothing else takes them
        merged = fixed(1)
        for axis in x[i:a]:
            merged = product(merged, axis, ctx.reason("size", "two widths flattened into one"))
        out += _spread(ctx, merged, shape[j:b], sizes[j:b]) if j < len(shape) else []
        i, j = min(a, len(x)), min(b, len(shape))
    return Dims(out)


def _spread(ctx: Context, axis: Axis, shape: Sequence[int], sizes: Sequence[Any]) -> list[Axis]:
    """One axis viewed as several dimensions: one of them carries the units, the others are fixed."""
    big = [k for k, n in enumerate(shape) if n > 1]
    if is_fixed(axis):
        reason = next((s.reason for s in axis if s.reason), None)
        return [fixed(n, reason) for n in shape]
    if len(big) <= 1:
        keep = big[0] if big else 0
        return [axis if k == keep else fixed(1) for k in range(len(shape))]
    keep = _growing(axis, shape, sizes, big)
    before, after = math.prod(shape[:keep]), math.prod(shape[keep + 1 :])
    unit = axis_of(Var(shape[keep]))
    ctx.same(axis, tuple(Segment(s.var, after) for s in unit) * before, "viewed as several dimensions")
    return [resolve(unit) if k == keep else fixed(n) for k, n in enumerate(shape)]


def _growing(axis: Axis, shape: Sequence[int], sizes: Sequence[Any], big: list[int]) -> int:
    """Which dimension the units are in: where flattening put them, else the computed size, else the last."""
    inner = math.gcd(*(s.inner for s in resolve(axis)))
    if inner > 1:
        for k in big:
            if math.prod(shape[k + 1 :]) == inner:
                return k
    for k in big:
        if isinstance(sizes[k], Size) or (isinstance(sizes[k], int) and sizes[k] == -1):
            return k
    return big[-1]


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
    parts = _spread(ctx, input[dim], ctx.shape[dim : dim + len(sizes)], sizes)
    if ctx.module is None:
        _sizes(ctx, sizes, parts, ("sizes",) if "sizes" in ctx.node.kwargs else (2,), 0)
    return Dims((*input[:dim], *parts, *input[dim + 1 :]))


@op("squeeze", torch.squeeze)
def squeeze(ctx: Context, input: Dims, dim: Any = None) -> Dims:
    dims = range(len(input)) if dim is None else [dim] if isinstance(dim, int) else dim
    gone = {d % len(input) for d in dims if length(input[d]) == 1}
    ctx.fix([input[d] for d in gone], "squeezed away, so it stays 1")
    return Dims(a for i, a in enumerate(input) if i not in gone)


@op("unsqueeze", torch.unsqueeze)
def unsqueeze(ctx: Context, input: Dims, dim: int) -> Dims:
    out = list(input)
    out.insert(dim % (len(input) + 1), fixed(1))
    return Dims(out)


@op("expand", "expand_as", "broadcast_to", torch.broadcast_to)
def expand(ctx: Context, input: Dims, *sizes: Any) -> Dims:
    if sizes and isinstance(sizes[0], Dims):
        sizes = tuple(Size.measure(a) for a in sizes[0])
        path, start = None, 0
    else:
        sizes, path, start = _flat(sizes)
    lead = len(sizes) - len(input)
    out: list[Axis] = []
    for i, (size, n) in enumerate(zip(sizes, ctx.shape, strict=True)):
        axis = input[i - lead] if i >= lead else fixed(1)
        if length(axis) != n:
            ctx.fix([axis], "one entry is repeated")
            # repeated over another width: the size says over which
            whole = isinstance(size, Size) and len(size.axes) == 1 and length(size.axes[0]) == n
            axis = size.axes[0] if whole else fixed(n)
        out.append(axis)
    if path is not None:
        _sizes(ctx, sizes, out, path, start)
    return Dims(out)


# -- permuting


@op("permute", torch.permute)
def permute(ctx: Context, input: Dims, *dims: Any) -> Dims:
    order = dims[0] if len(dims) == 1 and isinstance(dims[0], (tuple, list)) else dims
    return Dims(input[d] for d in order)


@op("transpose", "swapaxes", "swapdims", torch.transpose, torch.swapaxes)
def transpose(ctx: Context, input: Dims, dim0: int, dim1: int) -> Dims:
    out = list(input)
    out[dim0], out[dim1] = out[dim1], out[dim0]
    return Dims(out)


@op("t", torch.t)
def t(ctx: Context, input: Dims) -> Dims:
    return Dims(reversed(input))


@op("movedim", "moveaxis", torch.movedim, torch.moveaxis)
def movedim(ctx: Context, input: Dims, source: Any, destination: Any) -> Dims:
    order = _order(len(input), lambda x: x.movedim(source, destination))
    return Dims(input[d] for d in order)


def _order(rank: int, move: Any) -> list[int]:
    """Where each dimension comes from, by moving a tensor whose sizes are their numbers."""
    return [n - 2 for n in move(torch.empty(tuple(range(2, rank + 2)), device="meta")).shape]


# -- joining and splitting


@op(torch.cat, torch.concat, torch.concatenate)
def cat(ctx: Context, tensors: Sequence[Dims], dim: int = 0) -> Dims:
    dim = ctx.node.kwargs.get("axis", dim) % len(ctx.shape)  # type: ignore[operator]
    tensors = [t for t in tensors if len(t) == len(ctx.shape)]
    for t in tensors[1:]:
        for i, (a, b) in enumerate(zip(tensors[0], t, strict=True)):
            if i != dim:
                ctx.same(a, b)
    first = tensors[0]
    return Dims(sum((t[dim] for t in tensors), ()) if i == dim else a for i, a in enumerate(first))


@op(torch.stack)
def stack(ctx: Context, tensors: Sequence[Dims], dim: int = 0) -> Dims:
    for t in tensors[1:]:
        for a, b in zip(tensors[0], t, strict=True):
            ctx.same(a, b)
    out = list(tensors[0])
    out.insert(dim % len(ctx.shape), fixed(len(tensors)))
    return Dims(out)


def _with(x: Dims, dim: int, parts: Sequence[Axis]) -> tuple[Dims, ...]:
    return tuple(Dims(part if i == dim % len(x) else a for i, a in enumerate(x)) for part in parts)


@op("chunk", torch.chunk)
def chunk(ctx: Context, input: Dims, chunks: int, dim: int = 0) -> tuple[Dims, ...]:
    sizes = [v.shape[dim] for v in ctx.value]
    if is_fixed(input[dim]):
        return _with(input, dim, [fixed(n) for n in sizes])
    if len(set(sizes)) > 1:
        raise Unsupported("chunks of unequal size", "size")
    return _with(input, dim, [halves(ctx, input[dim], len(sizes))] * len(sizes))


@op("split", "split_with_sizes", torch.split, torch.split_with_sizes)
def split(ctx: Context, input: Dims, split_size: Any = None, dim: int = 0, **kwargs: Any) -> tuple[Dims, ...]:
    key = next((k for k in ("split_size", "split_sizes", "split_size_or_sections") if k in ctx.node.kwargs), None)
    given = split_size if key is None or key == "split_size" else kwargs[key]
    path: tuple[Any, ...] = (1,) if key is None else (key,)
    sizes = [v.shape[dim] for v in ctx.value]
    if is_fixed(input[dim]):
        parts = [fixed(n) for n in sizes]
    elif isinstance(given, int):
        if len(set(sizes)) > 1:
            raise Unsupported("the last part is smaller", "size")
        parts = [halves(ctx, input[dim], len(sizes))] * len(sizes)
        ctx.size_argument(given, parts[0], *path)
    else:
        # equal literal sizes are equal parts (q, k and v); different ones grow apart
        unit = axis_of(Var(sizes[0])) if len(set(sizes)) == 1 else None
        parts = [unit or axis_of(Var(n)) for n in sizes]
        ctx.same(input[dim], sum(parts, ()), "split into parts")
        for i, (size, part) in enumerate(zip(given, parts, strict=True)):
            ctx.size_argument(size, part, *path, i)
    return _with(input, dim, [resolve(p) for p in parts])


@op("unbind", torch.unbind)
def unbind(ctx: Context, input: Dims, dim: int = 0) -> tuple[Dims, ...]:
    ctx.fix([input[dim]], "taken apart entry by entry")
    out = Dims(a for i, a in enumerate(input) if i != dim % len(input))
    return (out,) * len(ctx.value)


@op("narrow", torch.narrow)
def narrow(ctx: Context, input: Dims, dim: int, start: int, length: int) -> Dims:
    ctx.fix([input[dim]], "a part of it is cut out")
    return Dims(fixed(n) if i == dim % len(input) else a for (i, a), n in zip(enumerate(input), ctx.shape, strict=True))


@op("select", torch.select)
def select(ctx: Context, input: Dims, dim: int, index: int) -> Dims:
    ctx.fix([input[dim]], "one entry is picked out")
    return Dims(a for i, a in enumerate(input) if i != dim % len(input))


@op("repeat", "tile", torch.tile)
def repeat(ctx: Context, input: Dims, *times: Any) -> Dims:
    counts, _, _ = _flat(times)
    ctx.used_as_number(counts)
    counts = [1] * (len(input) - len(counts)) + counts
    input = Dims((fixed(1),) * (len(counts) - len(input)) + tuple(input))
    return Dims(
        product(fixed(int(n)), a, ctx.reason("size", "repeated")) for n, a in zip(counts, input, strict=True)
    )


# -- indexing and sizes


@op(operator.getitem, "__getitem__")
def getitem(ctx: Context, x: Any, index: Any) -> Any:
    if not isinstance(x, Dims):
        return x[index]
    items = list(index) if isinstance(index, tuple) else [index]
    if any(isinstance(i, (Dims, list)) for i in items):
        return _gather(ctx, x, items)
    if Ellipsis in items:
        at = items.index(Ellipsis)
        missing = len(x) - sum(i is not None and i is not Ellipsis for i in items)
        items[at : at + 1] = [slice(None)] * missing
    rest = list(x)
    out: list[Axis] = []
    for item in items:
        if item is None:
            out.append(fixed(1))
        elif isinstance(item, slice):
            out.append(_slice(ctx, rest.pop(0), item))
        else:
            ctx.used_as_number(item)
            ctx.fix([rest.pop(0)], "one entry is picked out")
    return Dims((*out, *rest))


def _slice(ctx: Context, axis: Axis, item: slice) -> Axis:
    n = length(axis)
    start, stop, step = item.indices(n)
    if (start, stop, step) == (0, n, 1) and not isinstance(item.stop, Size):
        if isinstance(item.stop, int) and item.stop >= 0:
            ctx.fix([axis], "sliced up to a fixed entry")
        return axis
    if is_fixed(axis):
        return fixed(len(range(start, stop, step)), next((s.reason for s in axis if s.reason), None))
    ctx.fix([axis], "a part of it is cut out")
    return fixed(len(range(start, stop, step)), ctx.reason("size", "a part of a width"))


def _gather(ctx: Context, x: Dims, items: list[Any]) -> Dims:
    """Indexing with a tensor: allowed along fixed axes when one index tensor stands alone."""
    if len(items) != 1 and any(not isinstance(i, (Dims, slice)) for i in items):
        raise Unsupported("indexing with tensors and numbers at once")
    tensors = [k for k, i in enumerate(items) if isinstance(i, Dims)]
    if len(tensors) != 1 or any(isinstance(i, slice) and i != slice(None) for i in items):
        raise Unsupported("indexing with several tensors")
    at = tensors[0]
    ctx.fix([x[at]], "indexed with a tensor")
    rank = len(ctx.shape) - len(x) + 1
    return Dims((*x[:at], *(fixed(n) for n in ctx.shape[at : at + rank]), *x[at + 1 :]))


@op("size", getattr)
def size(ctx: Context, x: Any, which: Any = None, *default: Any) -> Any:
    if not isinstance(x, Dims):
        return ctx.value
    shape = tuple(Size.measure(a) for a in x)
    if ctx.node.op == "call_method":
        return shape if which is None else shape[which]
    if which == "shape":
        return shape
    if isinstance(ctx.value, torch.Tensor):
        if which == "T":
            return Dims(reversed(x))
        if which == "mT":
            return Dims((*x[:-2], x[-1], x[-2]))
        if which == "data":
            return x
        raise Unsupported(f"attribute {which!r}")
    return ctx.value


@op("numel", torch.numel)
def numel(ctx: Context, x: Dims) -> int:
    total: int = 1
    for a in x:
        total = total * Size.measure(a)
    return total


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
        whole = isinstance(size_, Size) and len(size_.axes) == 1 and length(size_.axes[0]) == n
        out.append(size_.axes[0] if whole else fixed(n))
    return Dims(out)


@op(torch.arange, torch.linspace, torch.eye, torch.tensor, torch.meshgrid, torch.tril, torch.triu, "tril", "triu")
def index_tensor(ctx: Context, *args: Any, **kwargs: Any) -> Any:
    """Positions and masks: what they are as long as is fixed."""
    ctx.used_as_number(args)
    for a in args:
        ctx.fix(a if isinstance(a, Dims) else ())
    return pytree.tree_map_only(torch.Tensor, lambda t: Dims(fixed(n) for n in t.shape), ctx.value)
