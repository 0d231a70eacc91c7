"""Indexing: slices that cut an axis into parts, entries picked by numbers and tensors, and writes at such places."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import fx

from fxgrow.axes.axes import Axis, Dims, UnitVar, axis_of, cut, fixed, is_fixed, length
from fxgrow.axes.size_expressions import SizeExpr
from fxgrow.axes.structure import Path, SizeReplacement
from fxgrow.graph.arguments import get_argument
from fxgrow.ops.context import Context, Unsupported
from fxgrow.ops.elementwise import broadcast
from fxgrow.ops.registry import op

_GET, _SET = (operator.getitem, "__getitem__"), (operator.setitem, "__setitem__")
_NARROW, _SELECT = ("narrow", torch.narrow), ("select", torch.select)


@op(*_GET)
def getitem(ctx: Context, x: Any, index: Any) -> Any:
    if not isinstance(x, Dims):
        return x[index]
    return _indexed(ctx, x, index, lambda from_right: ctx.shape[-from_right])


@op(*_SET)
def setitem(ctx: Context, x: Dims, index: Any, value: Any) -> None:
    """Writes into whole axes, parts of them or fixed entries, or under a mask over axes."""
    if isinstance(index, Dims) and _is_mask(ctx.node.args[1]) and not _axes_of(value):
        broadcast(ctx, Dims(x[: len(index)]), index)
        return
    _write(ctx, x, index, value)


@op("index_put", "index_put_", torch.index_put, torch.index_put_)
def index_put(ctx: Context, input: Dims, indices: Any, values: Any, accumulate: bool = False) -> Dims:
    _write(ctx, input, tuple(indices), values)
    return input


def _write(ctx: Context, x: Dims, index: Any, value: Any) -> None:
    given = _axes_of(value)
    part = _indexed(ctx, x, index, lambda k: length(given[-k]) if len(given) >= k else 1)
    # leading dimensions of one entry are no part of the place
    broadcast(ctx, part, Dims(given[max(0, len(given) - len(part)) :]))


def _axes_of(value: Any) -> Dims:
    """The axes of a tensor; none for a number or a tensor of one."""
    return value if isinstance(value, Dims) else Dims()


def _forms(*names: str) -> list[Any]:
    return [f for n in names for m in (n, n + "_") for f in (m, getattr(torch, m, None)) if f is not None]


@op(*_forms("scatter", "scatter_add", "scatter_reduce"))
def scatter(ctx: Context, input: Dims, dim: int, index: Dims, src: Any = None, *args: Any, **options: Any) -> Dims:
    """Writes, or adds, along one dimension; the others are kept apart."""
    for other in (index, _axes_of(src)):
        for d, (axis, along) in enumerate(zip(input, other, strict=False)):
            if d == dim % len(input):
                ctx.fix([axis, along], "written at positions given by a tensor")
            elif length(axis) == length(along):
                ctx.same(axis, along)
            else:
                ctx.fix([axis, along], "only some of its entries are written")
    return input


@op(*_forms("index_add", "index_copy", "index_reduce", "index_fill"))
def index_add(ctx: Context, input: Dims, dim: int, index: Dims, source: Any = None, *args: Any, **options: Any) -> Dims:
    ctx.fix(index, "written at positions given by a tensor")
    return scatter(ctx, input, dim, Dims(), source)


@op(*_NARROW)
def narrow(ctx: Context, input: Dims, dim: int, start: Any, length: Any) -> Dims:
    first = int(start) if start >= 0 else int(start) + sum(s.length for s in input[dim])
    left, part = _range(ctx, input, dim, first, int(length))
    if not is_fixed(input[dim]):
        _bound(ctx, start, left, input[dim], _place(ctx.node, 2, "start"))
        _bound(ctx, length, part, input[dim], _place(ctx.node, 3, "length"))
    return Dims(part if i == dim % len(input) else a for i, a in enumerate(input))


@op(*_SELECT)
def select(ctx: Context, input: Dims, dim: int, index: Any) -> Dims:
    _entry(ctx, input, dim % len(input), index, _place(ctx.node, 2, "index"))
    return Dims(a for i, a in enumerate(input) if i != dim % len(input))


def _place(node: fx.Node, position: int, name: str) -> Path:
    return (position,) if len(node.args) > position else (name,)


def _indexed(ctx: Context, x: Dims, index: Any, entries: Callable[[int], int]) -> Dims:
    """The axes of `x[index]`; `entries` of a mask are those of the result, or of what is written, at a dimension."""
    several = isinstance(index, tuple) and not isinstance(index, Dims)
    items: list[Any] = list(index) if several else [index]
    masks = [_is_mask(get_argument(ctx.node, (1, k) if several else (1,))) for k in range(len(items))]
    taken = [0 if i is None or i is ... else len(i) if mask else 1 for i, mask in zip(items, masks, strict=True)]
    out: list[Axis] = []
    picked: list[Dims | None] = []
    places: list[int] = []
    d = 0
    for k, item in enumerate(items):
        path = (1, k) if several else (1,)
        if item is None:
            out.append(fixed(1))
        elif item is ...:
            taken[k] = len(x) - sum(taken)
            out += x[d : d + taken[k]]
        elif isinstance(item, slice):
            out.append(_slice(ctx, x, d, item, path))
        elif isinstance(item, (Dims, list)):
            ctx.fix(x[d : d + taken[k]], "indexed with a tensor")
            picked.append(None if masks[k] else item if isinstance(item, Dims) else _list_axes(item))
            places.append(len(out))
        else:
            _entry(ctx, x, d, item, path)
        d += taken[k]
    out += x[d:]
    if not picked:
        return Dims(out)
    # torch puts what tensors pick at their place, or first where they are apart
    at = places[0] if len(set(places)) == 1 else 0
    rows = fixed(entries(len(out) - at + 1)) if None in picked else ()
    block = broadcast(ctx, *(Dims((rows,)) if p is None else p for p in picked))
    return Dims((*out[:at], *block, *out[at:]))


def _list_axes(item: list[Any]) -> Dims:
    if any(isinstance(i, (Dims, bool)) for i in item):
        raise Unsupported("indexing with a list of tensors or truth values")
    return Dims(map(fixed, torch.tensor(item).shape))


def _is_mask(argument: Any) -> bool:
    value = argument.meta["val"] if isinstance(argument, fx.Node) else None
    return isinstance(value, torch.Tensor) and value.dtype in (torch.bool, torch.uint8)


def _slice(ctx: Context, x: Dims, d: int, item: slice, path: Path) -> Axis:
    axis, every = x[d], item.step
    start, stop, _ = item.indices(length(axis))
    n = len(range(*item.indices(length(axis))))
    if is_fixed(axis):
        return fixed(n, next((s.reason for s in axis if s.reason), None))
    if every not in (None, 1):
        if type(every) is int and every > 1 and item.stop is None and n * every == length(axis):
            unit = UnitVar(n)
            ctx.same(axis, axis_of(unit, every), f"units are read {every} entries at a time")
            return axis_of(unit)
        return _sliced_out(ctx, axis, n)
    left, part = _range(ctx, x, d, start, n)
    if not is_fixed(part):
        _bound(ctx, item.start, left, axis, (*path, 0))
        _bound(ctx, item.stop, left + part, axis, (*path, 1))
    return part


def _entry(ctx: Context, x: Dims, d: int, index: Any, path: Path) -> None:
    """One entry of an axis, which stays that one where the others are read by themselves."""
    at = int(index) % max(1, length(x[d]))
    left, entry = _range(ctx, x, d, at, 1)
    ctx.fix([entry], "one entry is selected")
    if not is_fixed(left):
        _bound(ctx, index, left, x[d], path)


def _range(ctx: Context, x: Dims, d: int, start: int, n: int) -> tuple[Axis, Axis]:
    """`n` entries of dimension `d` and those before: parts by themselves where all entries are read somewhere."""
    axis = x[d]
    if not is_fixed(axis) and not _is_part(ctx.node.all_input_nodes[0], d % len(x), length(axis), (start, start + n)):
        return fixed(start), _sliced_out(ctx, axis, n)
    why = ctx.reason("size", "a part of it is sliced out")
    left, rest = cut(axis, start, why)
    return left, cut(rest, n, why)[0]


def _sliced_out(ctx: Context, axis: Axis, n: int) -> Axis:
    ctx.fix([axis], "a part of it is sliced out")
    return fixed(n, ctx.reason("size", "a part of a width"))


def _bound(ctx: Context, value: Any, before: Axis, axis: Axis, path: Path) -> None:
    """Says that a bound of a slice is the length of `before`, the part of `axis` up to it."""
    if value is None or int(value) == length(before) == 0:
        return
    if isinstance(get_argument(ctx.node, path), fx.Node) and not isinstance(value, SizeExpr):
        ctx.fix([axis], "sliced at a number of entries that is computed from other sizes")
    elif int(value) > length(axis):
        ctx.fix([axis], "sliced at a fixed number of entries")
    elif int(value) >= 0:
        ctx.size_argument(value, before, *path, part=True)
    elif isinstance(value, SizeExpr):
        ctx.followed.append(value)
        ctx.size_argument(value + SizeExpr.measure(axis), before, *path, part=True)
    else:
        # counted from the end; from the start it is a length
        ctx.structure.size_replacements.append(SizeReplacement(ctx.node, path, (axis,), before))


def _is_part(source: fx.Node, d: int, n: int, part: tuple[int, int]) -> bool:
    """Whether the parts of a dimension that are read or written by themselves do not overlap, and none is left out."""
    found = list(_parts(source, d, n))
    parts = sorted({part, *found} - {(0, n)})
    ends = [0, *(stop for _, stop in parts)]
    apart = all(start >= end for (start, _), end in zip(parts, ends, strict=False))
    return apart and ((0, n) in (part, *found) or sum(stop - start for start, stop in parts) == n)


def _parts(source: fx.Node, d: int, n: int) -> Iterator[tuple[int, int]]:
    rank = source.meta["val"].dim()
    for user in source.users:
        args: Any
        kwargs: Any
        args, kwargs = fx.map_arg((user.args, user.kwargs), lambda node: node.meta.get("val"))
        item: Any = slice(None)
        if user.target in _GET + _SET and user.args[0] is source:
            items = _expanded(args[1] if isinstance(args[1], tuple) else (args[1],), rank)
            item = items[d] if d < len(items) else item
        elif user.target in _NARROW + _SELECT and (args[1:2] or [kwargs.get("dim")])[0] in (d, d - rank):
            given = [*args[2:], *(kwargs[k] for k in ("start", "length", "index") if k in kwargs)]
            item = slice(given[0], given[0] + given[1] or None) if user.target in _NARROW else given[0]
        if isinstance(item, slice) and item.step in (None, 1):
            start, stop, _ = item.indices(n)
            read = isinstance(user.meta.get("val"), (torch.Tensor, tuple, list)) and user.target is not getattr
            if read or (start, stop) != (0, n):
                yield start, max(start, stop)
        elif isinstance(item, int):
            yield item % n, item % n + 1


def _expanded(items: Sequence[Any], rank: int) -> list[Any]:
    """One item of an index per dimension, as far as it goes; None for one that a tensor picks from."""
    out: list[Any] = []
    for k, item in enumerate(items):
        if item is ...:
            later = sum(i is not None for i in items[k + 1 :])
            out += [slice(None)] * (rank - len(out) - later)
        elif isinstance(item, torch.Tensor):
            out += [None] * (item.dim() if item.dtype == torch.bool else 1)
        elif item is not None:
            out.append(item)
    return out
