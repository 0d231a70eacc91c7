"""Concatenation and splitting: parts of an axis grow separately, together or not at all."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from fxgrow.axes.axes import Axis, Dims, UnitVar, axis_of, fixed, is_fixed, length, product, resolve
from fxgrow.graph.node_functions import in_mode
from fxgrow.ops.context import Context, Unsupported
from fxgrow.ops.registry import MAKES_AXES, op
from fxgrow.ops.views import unpack_sizes


@op(F.glu, nn.GLU)
def glu(ctx: Context, input: Dims, dim: int = -1) -> Dims:
    dim = int(ctx.module.dim) if ctx.module is not None else dim
    half = equal_parts(ctx, input[dim], 2)
    return Dims(half if i == dim % len(input) else a for i, a in enumerate(input))


def equal_parts(ctx: Context, axis: Axis, n: int, message: str = "split into equal parts") -> Axis:
    """Makes `axis` be `n` equal blocks, and returns the block."""
    if n == 1:
        return axis
    if length(axis) % n:
        raise Unsupported(f"{length(axis)} entries in {n} unequal parts", "size")
    if is_fixed(axis):
        return fixed(length(axis) // n)
    block = axis_of(UnitVar(length(axis) // n))
    ctx.same(axis, block * n, message)
    return block


@op(torch.cat, torch.concat, torch.concatenate)
def cat(ctx: Context, tensors: Sequence[Dims], dim: int = 0, axis: int | None = None) -> Dims:
    dim = int(axis if axis is not None else dim) % len(ctx.shape)
    tensors = [t for t in tensors if len(t) == len(ctx.shape)]
    for t in tensors[1:]:
        for i, (a, b) in enumerate(zip(tensors[0], t, strict=True)):
            if i != dim:
                ctx.same(a, b)
    first = tensors[0]
    return Dims(sum((t[dim] for t in tensors), ()) if i == dim else a for i, a in enumerate(first))


@op(in_mode)
def choose(ctx: Context, training: Any, if_training: Any, if_eval: Any) -> Dims:
    """One of two tensors, by the module's mode."""
    if not (isinstance(if_training, Dims) and isinstance(if_eval, Dims)) or len(if_training) != len(if_eval):
        raise Unsupported("its value has a different form in train and eval mode")
    for a, b in zip(if_training, if_eval, strict=True):
        ctx.same(a, b)
    return if_training


@op(torch.stack)
def stack(ctx: Context, tensors: Sequence[Dims], dim: int = 0) -> Dims:
    for t in tensors[1:]:
        for a, b in zip(tensors[0], t, strict=True):
            ctx.same(a, b)
    out = list(tensors[0])
    out.insert(dim % len(ctx.shape), fixed(len(tensors)))
    return Dims(out)


def _with(x: Dims, dim: int, parts: Sequence[Axis]) -> tuple[Dims, ...]:
    dim %= len(x)
    return tuple(Dims(part if i == dim else a for i, a in enumerate(x)) for part in parts)


@op("chunk", torch.chunk)
def chunk(ctx: Context, input: Dims, chunks: int, dim: int = 0) -> tuple[Dims, ...]:
    sizes = [v.shape[dim] for v in ctx.value]
    if is_fixed(input[dim]):
        return _with(input, dim, [fixed(n) for n in sizes])
    if len(set(sizes)) > 1 or len(sizes) != chunks:
        raise Unsupported("chunks of unequal size", "size")
    return _with(input, dim, [equal_parts(ctx, input[dim], len(sizes))] * len(sizes))


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
        parts = [equal_parts(ctx, input[dim], len(sizes))] * len(sizes)
        ctx.size_argument(given, parts[0], *path)
    else:
        # parts grow separately unless later nodes tie them: equal sizes may be a coincidence
        parts = [axis_of(UnitVar(n)) for n in sizes]
        ctx.same(input[dim], sum(parts, ()), "split into parts")
        for i, (size, part) in enumerate(zip(given, parts, strict=True)):
            ctx.size_argument(size, part, *path, i)
    return _with(input, dim, [resolve(p) for p in parts])


@op("tensor_split", torch.tensor_split)
def tensor_split(ctx: Context, input: Dims, indices_or_sections: Any, dim: int = 0) -> tuple[Dims, ...]:
    sizes = [v.shape[dim] for v in ctx.value]
    if is_fixed(input[dim]):
        return _with(input, dim, [fixed(n) for n in sizes])
    if isinstance(indices_or_sections, int):
        return _with(input, dim, [equal_parts(ctx, input[dim], len(sizes))] * len(sizes))
    parts = [axis_of(UnitVar(n)) for n in sizes]
    ctx.same(input[dim], sum(parts, ()), "split into parts")
    for i, end in enumerate(indices_or_sections):
        ctx.size_argument(end, sum(parts[: i + 1], ()), 1, i, part=True)
    return _with(input, dim, [resolve(p) for p in parts])


@op("unbind", torch.unbind)
def unbind(ctx: Context, input: Dims, dim: int = 0) -> tuple[Dims, ...]:
    ctx.fix([input[dim]], "unbound entry by entry")
    out = Dims(a for i, a in enumerate(input) if i != dim % len(input))
    return (out,) * len(ctx.value)


@op("repeat", "tile", torch.tile)
def repeat(ctx: Context, input: Dims, *times: Any, **kwargs: Any) -> Dims:
    counts, paths = unpack_sizes(times, **kwargs)
    lead = max(0, len(counts) - len(input))
    input = Dims((fixed(1),) * lead + tuple(input))
    out = list(input)
    for d, count, path in zip(range(len(input) - len(counts), len(input)), counts, paths, strict=True):
        if is_fixed(input[d]) and length(input[d]) == 1:
            out[d] = ctx.new_axis(count, int(count), *path)
        else:
            out[d] = product(fixed(int(count)), input[d], ctx.reason("size", "repeated"))
    return Dims(out)


MAKES_AXES.add(repeat)


@op("repeat_interleave", torch.repeat_interleave)
def repeat_interleave(ctx: Context, input: Dims, repeats: Any, dim: int | None = None, **kwargs: Any) -> Dims:
    if dim is None or type(repeats) is not int:
        raise Unsupported("repeat_interleave with computed repeats, or without a dimension")
    out = list(input)
    out[dim] = product(input[dim], fixed(repeats), ctx.reason("size", "repeated"))
    return Dims(out)
