"""Axes: the abstract values on which a graph is run to find its widths.

A tensor is a tuple of axes (`Dims`), an axis is a tuple of segments, and a segment is `inner` consecutive entries for
each unit of a `UnitVar`, or a fixed number of entries. A `[batch, 8 channels, 5, 5]` map that is flattened has the axes
`batch` and `Segment(channels, inner=25)`. Operators unify axes, like types in type inference: two axes that must have
the same number of units become one variable, and a variable may become a sequence of others (`cat`, `chunk`, groups):

>>> a, b, joined = UnitVar(2), UnitVar(3), UnitVar(5)
>>> unify(axis_of(joined), axis_of(a) + axis_of(b), why=Reason("size", "cat", "example"))
>>> resolve(axis_of(joined)) == axis_of(a) + axis_of(b)
True
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from fxgrow.axes.records import Reason

#: an axis with more segments than this (tokens x channels, flattened with the channels last) is pinned
LIMIT = 4096


class UnitVar:
    """A number of units that may change; `pinned` says why it cannot, `bound` is the axis to which it is unified.

    `literal`: it is known from a number in the code alone, and from no other axis yet.
    """

    __slots__ = ("bound", "literal", "pinned", "size")

    def __init__(self, size: int, pinned: Reason | None = None, literal: bool = False) -> None:
        self.size, self.pinned, self.literal = size, pinned, literal
        self.bound: Axis | None = None

    def __repr__(self) -> str:
        return f"UnitVar({self.size}{', pinned' if self.pinned else ''})"


class Segment(NamedTuple):
    """`inner` entries for each unit of `var`; without a variable, `inner` entries that are fixed for a reason."""

    var: UnitVar | None
    inner: int = 1
    reason: Reason | None = None

    @property
    def length(self) -> int:
        return self.inner if self.var is None else self.var.size * self.inner


Axis = tuple[Segment, ...]
_ATOMS = {type(None), bool, int, float, str}


class Dims(tuple[Axis, ...]):
    """The axes of one tensor."""

    parameter: str | None = None  # qualified name, for a parameter or buffer
    is_weight: bool | None = False  # whether computed from parameters and no input; None: from neither

    @classmethod
    def of(cls, axes: Iterable[Axis], parameter: str | None = None) -> Dims:
        dims = cls(axes)
        dims.parameter = parameter
        return dims


def dims_in(value: Any) -> Iterator[Dims]:
    """Yields every `Dims` in a nested value."""
    if isinstance(value, Dims):
        yield value
    elif isinstance(value, (tuple, list, dict)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from dims_in(item)
    elif type(value) not in _ATOMS:
        leaves = pytree.tree_leaves(value, is_leaf=lambda x: isinstance(x, Dims))
        yield from (leaf for leaf in leaves if isinstance(leaf, Dims))


def axes_in(value: Any) -> Iterator[Axis]:
    """Yields every axis of every `Dims` in a nested value."""
    for dims in dims_in(value):
        yield from dims


def fixed(length: int, reason: Reason | None = None) -> Axis:
    """An axis of `length` entries that cannot change."""
    return (Segment(None, length, reason),)


def axis_of(var: UnitVar, inner: int = 1) -> Axis:
    """An axis of `inner` entries for each unit of one variable."""
    return (Segment(var, inner),)


def length(axis: Axis) -> int:
    return sum(s.length for s in axis)


def resolve(axis: Axis) -> Axis:
    """Replaces bound variables by their axes, and joins neighbouring fixed segments."""
    if len(axis) == 1 and axis[0].inner and (axis[0].var is None or axis[0].var.bound is None):
        return axis
    out: list[Segment] = []
    for s in axis:
        if s.var is not None and s.var.bound is not None:
            s.var.bound = resolve(s.var.bound)
            parts: Iterable[Segment] = (Segment(p.var, p.inner * s.inner, p.reason) for p in s.var.bound)
        else:
            parts = (s,)
        for p in parts:
            if p.var is None and out and out[-1].var is None:
                out[-1] = Segment(None, out[-1].inner + p.inner, out[-1].reason or p.reason)
            elif p.length:
                out.append(p)
    return tuple(out)


def single_variable(axis: Axis) -> UnitVar | None:
    """The variable of an axis that has one entry for each of its units and nothing else, or None."""
    segments = resolve(axis)
    return segments[0].var if len(segments) == 1 and segments[0].inner == 1 else None


def variables(*axes: Axis) -> list[UnitVar]:
    """The unbound variables of `axes`, in order, without duplicates."""
    return list(dict.fromkeys(s.var for a in axes for s in resolve(a) if s.var is not None))


def is_fixed(axis: Axis) -> bool:
    return all(s.var is None or (s.var.bound is not None and is_fixed(s.var.bound)) for s in axis)


def multiplicity(axis: Axis) -> Counter[UnitVar]:
    """How many entries of `axis` belong to one unit, by variable."""
    count: Counter[UnitVar] = Counter()
    for s in resolve(axis):
        if s.var is not None:
            count[s.var] += s.inner
    return count


def unit_entries(axis: Axis, var: UnitVar) -> Tensor:
    """Positions of each unit's entries in an axis, `[units, entries]`."""
    positions = [torch.empty(var.size, 0, dtype=torch.long)]
    at = 0
    for s in resolve(axis):
        if s.var is var:
            positions.append(torch.arange(at, at + s.length).view(var.size, s.inner))
        at += s.length
    return torch.cat(positions, 1)


def grown_length(axis: Axis, grow: Mapping[UnitVar, int]) -> int:
    """The length of an axis when variables have so many more units."""
    return length(axis) + sum(grow.get(s.var, 0) * s.inner for s in resolve(axis) if s.var is not None)


def pin(axis: Axis, why: Reason) -> None:
    """Pins the variables of an axis; the first reason stays."""
    for var in variables(axis):
        var.pinned = var.pinned or why


def _bind(var: UnitVar, axis: Axis) -> None:
    if var.pinned:
        pin(axis, var.pinned)
    for other in () if var.literal else variables(axis):
        other.literal = False
    var.bound = axis


def cut(axis: Axis, at: int, why: Reason) -> tuple[Axis, Axis]:
    """Splits `axis` before entry `at`; a variable is split into two there, or pinned."""
    left: list[Segment] = []
    rest = list(resolve(axis))
    while rest and at > 0:
        s = rest.pop(0)
        if s.length <= at:
            left.append(s)
            at -= s.length
            continue
        if s.var is None:
            first, second = Segment(None, at, s.reason), Segment(None, s.inner - at, s.reason)
        elif at % s.inner == 0:
            head, tail = UnitVar(at // s.inner), UnitVar(s.var.size - at // s.inner)
            _bind(s.var, (Segment(head), Segment(tail)))
            # the same variable may occur elsewhere in this axis
            left, rest = list(resolve(tuple(left))), list(resolve(tuple(rest)))
            first, second = Segment(head, s.inner), Segment(tail, s.inner)
        else:
            pin((s,), why)
            first, second = Segment(None, at, why), Segment(None, s.length - at, why)
        left.append(first)
        rest.insert(0, second)
        at = 0
    return tuple(left), tuple(rest)


def unify(a: Axis, b: Axis, why: Reason) -> None:
    """Makes two axes of equal length the same axis; where that is impossible, pins both with `why`."""
    # stacks, since a segment must be resolved after the ones before it: binding those may bind its variable
    left, right = list(reversed(a)), list(reversed(b))
    while (s := _next(left)) and (t := _next(right)):
        if s.length == t.length:
            _same(s, t, why)
        elif s.length > t.length:
            _meet(s, left, t, right, why)
        else:
            _meet(t, right, s, left, why)


def _next(stack: list[Segment]) -> Segment | None:
    """Pops the next segment; its variable is unbound."""
    while stack:
        s = stack.pop()
        if s.var is not None and s.var.bound is not None:
            stack.extend(reversed(resolve((s,))))
        elif s.length:
            return s
    return None


def _meet(s: Segment, left: list[Segment], t: Segment, right: list[Segment], why: Reason) -> None:
    """Unifies segment `s` with shorter ones, `t` and those after it: it is bound to them, or cut."""
    run, total = [t], t.length
    # stop at the first segment that cannot be part of it: thousands may follow
    while s.var and _part_of(s, run[-1]) and total < s.length and (u := _next(right)):
        run.append(u)
        total += u.length
    if s.var and total == s.length and _part_of(s, run[-1]):
        _bind(s.var, tuple(Segment(u.var, u.inner // s.inner) for u in run))
        return
    right.extend(reversed(run))
    first, second = cut((s,), t.length, why)
    left.extend(reversed(first + second))


def _part_of(s: Segment, u: Segment) -> bool:
    return u.var not in (None, s.var) and u.inner % s.inner == 0


def _same(s: Segment, t: Segment, why: Reason) -> None:
    if s.var is t.var:
        if s.var is not None and s.inner != t.inner:
            pin((s,), why)
    elif s.var is None or t.var is None:
        pin((s, t), s.reason or t.reason or why)
    elif s.inner % t.inner == 0:
        _bind(t.var, axis_of(s.var, s.inner // t.inner))
    elif t.inner % s.inner == 0:
        _bind(s.var, axis_of(t.var, t.inner // s.inner))
    else:
        # 6 entries per unit of one and 4 per unit of the other: both become units of 12 entries
        entries = math.lcm(s.inner, t.inner)
        if s.length % entries:
            pin((s, t), why)
            return
        unit = UnitVar(s.length // entries)
        _bind(s.var, axis_of(unit, entries // s.inner))
        _bind(t.var, axis_of(unit, entries // t.inner))


def _rigid(axis: Axis) -> Axis:
    """Replaces an axis whose variables are all pinned by a fixed one."""
    reasons = [var.pinned for var in variables(axis)]
    return fixed(length(axis), reasons[0]) if reasons and all(reasons) else axis


def product(outer: Axis, inner: Axis, why: Reason) -> Axis:
    """The axis of `flatten(outer, inner)`; where both have units, both are pinned."""
    n_outer, n_inner = length(outer), length(inner)
    if not is_fixed(outer) and not is_fixed(inner):
        for axis in (outer, inner):
            if length(axis) == 1 or all(var.literal for var in variables(axis)):
                pin(axis, why)  # one entry or a number of repetitions, not a width
    outer, inner = _rigid(outer), _rigid(inner)
    if n_inner == 1 and is_fixed(inner):
        return outer
    if n_outer == 1 and is_fixed(outer):
        return inner
    if is_fixed(outer) and is_fixed(inner):
        return fixed(n_outer * n_inner, next((s.reason for s in (*outer, *inner) if s.reason), None))
    if is_fixed(inner):
        return tuple(Segment(s.var, s.inner * n_inner, s.reason) for s in resolve(outer))
    if is_fixed(outer) and n_outer * len(resolve(inner)) <= LIMIT:
        return resolve(inner) * n_outer
    pin(outer + inner, why)
    return fixed(n_outer * n_inner, why)
