"""Axes: the abstract values a graph is run on to find its widths.

A tensor is a tuple of axes, an axis is a tuple of segments, and a segment is `inner` consecutive entries for each unit
of a `Var` (or a fixed number of entries). Operators unify axes, as types are inferred: what must have the same number
of units ends up as one variable, and a variable may turn out to be made of finer ones (`cat`, `chunk`, groups):

>>> a, b, whole = Var(2), Var(3), Var(5)
>>> unify(axis_of(whole), axis_of(a) + axis_of(b), why=Reason("size", "cat", "example"))
>>> resolve(axis_of(whole)) == axis_of(a) + axis_of(b)
True
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from fractions import Fraction
from typing import Any, NamedTuple

from fxgrow._records import Reason

#: an axis of more segments than this (tokens x channels flattened the wrong way round) is pinned
LIMIT = 4096


class Var:
    """An unknown number of units; `bound` once it is known to be made of other variables."""

    __slots__ = ("bound", "pinned", "size")

    def __init__(self, size: int, pinned: Reason | None = None) -> None:
        self.size = size
        self.pinned = pinned
        self.bound: Axis | None = None

    def __repr__(self) -> str:
        return f"Var({self.size}{', pinned' if self.pinned else ''})"


class Segment(NamedTuple):
    """`inner` entries per unit of `var`, or, without a variable, `inner` entries and the reason that fixes them."""

    var: Var | None
    inner: int = 1
    reason: Reason | None = None

    @property
    def length(self) -> int:
        return self.inner if self.var is None else self.var.size * self.inner


Axis = tuple[Segment, ...]


class Dims(tuple[Axis, ...]):
    """The axes of one tensor; `parameter` is its qualified name where the tensor is a parameter or buffer."""

    parameter: str | None = None

    @classmethod
    def of(cls, axes: Iterable[Axis], parameter: str | None = None) -> Dims:
        dims = cls(axes)
        dims.parameter = parameter
        return dims


def fixed(length: int, reason: Reason | None = None) -> Axis:
    return (Segment(None, length, reason),)


def axis_of(var: Var, inner: int = 1) -> Axis:
    return (Segment(var, inner),)


def length(axis: Axis) -> int:
    return sum(s.length for s in axis)


def resolve(axis: Axis) -> Axis:
    """Replaces bound variables by what they are made of, and joins neighbouring fixed segments."""
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


def variables(*axes: Axis) -> list[Var]:
    """The unbound variables of `axes`, in order, each once."""
    return list(dict.fromkeys(s.var for a in axes for s in resolve(a) if s.var is not None))


def is_fixed(axis: Axis) -> bool:
    return not variables(axis)


def multiplicity(axis: Axis) -> Counter[Var]:
    """How many entries of `axis` belong to one unit of each variable."""
    count: Counter[Var] = Counter()
    for s in resolve(axis):
        if s.var is not None:
            count[s.var] += s.inner
    return count


def pin(axis: Axis, why: Reason) -> None:
    for var in variables(axis):
        var.pinned = var.pinned or why


def _bind(var: Var, axis: Axis) -> None:
    if var.pinned:
        pin(axis, var.pinned)
    var.bound = axis


def cut(axis: Axis, at: int, why: Reason) -> tuple[Axis, Axis]:
    """Splits `axis` in front of entry `at`; a variable the cut goes through becomes two, or is pinned."""
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
            head, tail = Var(at // s.inner), Var(s.var.size - at // s.inner)
            _bind(s.var, (Segment(head), Segment(tail)))
            # the same variable may stand elsewhere in this axis
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
    left, right = resolve(a), resolve(b)
    while left and right:
        s, t = left[0], right[0]
        if s.length == t.length:
            _same(s, t, why)
            left, right = left[1:], right[1:]
        else:
            n = min(s.length, t.length)
            head_left, left = cut(left, n, why)
            head_right, right = cut(right, n, why)
            # the heads are shorter than before, so this ends; a cut may have refined variables of the other side
            unify(head_left, head_right, why)
        left, right = resolve(left), resolve(right)


def _same(s: Segment, t: Segment, why: Reason) -> None:
    if s.var is t.var:
        if s.var is not None and s.inner != t.inner:
            pin((s,), why)
    elif s.var is None:
        pin((t,), s.reason or why)
    elif t.var is None:
        pin((s,), t.reason or why)
    elif s.inner == t.inner:
        _bind(t.var, axis_of(s.var))
    elif t.inner == 1:
        _bind(t.var, (s,))
    elif s.inner == 1:
        _bind(s.var, (t,))
    else:
        pin((s, t), why)


def product(outer: Axis, inner: Axis, why: Reason) -> Axis:
    """The axis of `flatten(outer, inner)`: at most one of the two may have units, otherwise both are pinned."""
    n_outer, n_inner = length(outer), length(inner)
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
    pin(outer, why)
    pin(inner, why)
    return fixed(n_outer * n_inner, why)


class Size(int):
    """An integer that remembers which axes it measures: `const + sum(coefficient * len(axis))`.

    `x.shape[1] // 2 * 3` stays linear and can be checked against the axis it is used for; what does not stay linear is
    `opaque`: it pins the axes it came from wherever it is used as a size.
    """

    const: Fraction
    terms: tuple[tuple[Fraction, Axis], ...]
    opaque: bool

    @classmethod
    def make(
        cls, value: int, const: Fraction, terms: Iterable[tuple[Fraction, Axis]], opaque: bool = False
    ) -> int:
        terms = tuple((c, a) for c, a in terms if c)
        if not terms:
            return value
        self = cls(value)
        self.const, self.terms, self.opaque = const, terms, opaque
        return self

    @classmethod
    def measure(cls, axis: Axis) -> int:
        if is_fixed(axis):
            return length(axis)
        return cls.make(length(axis), Fraction(0), [(Fraction(1), axis)])

    @property
    def axes(self) -> tuple[Axis, ...]:
        return tuple(a for _, a in self.terms)

    def form(self) -> tuple[Fraction, dict[Var, Fraction]] | None:
        """The size as a linear form in units of unbound variables; None if opaque."""
        if self.opaque:
            return None
        total: dict[Var, Fraction] = {}
        const = self.const
        for c, axis in self.terms:
            const += c * sum(s.inner for s in resolve(axis) if s.var is None)
            for var, m in multiplicity(axis).items():
                total[var] = total.get(var, Fraction(0)) + c * m
        return const, {v: c for v, c in total.items() if c}

    def _linear(self, other: Any, sign: int, op: Callable[[int, int], int]) -> Any:
        if not isinstance(other, int):
            return NotImplemented
        value = op(int(self), int(other))
        const, terms, opaque = _parts(other)
        return Size.make(
            value,
            self.const + sign * const,
            [*self.terms, *((sign * c, a) for c, a in terms)],
            self.opaque or opaque,
        )

    def __add__(self, other: Any) -> Any:
        return self._linear(other, 1, operator.add)

    __radd__ = __add__

    def __sub__(self, other: Any) -> Any:
        return self._linear(other, -1, operator.sub)

    def __rsub__(self, other: Any) -> Any:
        negative = self * -1
        return negative + other

    def __mul__(self, other: Any) -> Any:
        if not isinstance(other, int):
            return NotImplemented
        const, terms, opaque = _parts(other)
        value = int(self) * int(other)
        if terms:
            return Size.make(value, Fraction(0), [*self.terms, *terms], True)
        return Size.make(value, self.const * const, [(c * const, a) for c, a in self.terms], self.opaque)

    __rmul__ = __mul__

    def __floordiv__(self, other: Any) -> Any:
        if not isinstance(other, int):
            return NotImplemented
        divisor = int(other)
        value = int(self) // divisor
        if isinstance(other, Size) or value * divisor != int(self):
            return Size.make(value, Fraction(0), [*self.terms, *_parts(other)[1]], True)
        return Size.make(
            value, self.const / divisor, [(c / divisor, a) for c, a in self.terms], self.opaque
        )

    def __hash__(self) -> int:
        return int.__hash__(self)


def _parts(x: int) -> tuple[Fraction, tuple[tuple[Fraction, Axis], ...], bool]:
    if isinstance(x, Size):
        return x.const, x.terms, x.opaque
    return Fraction(int(x)), (), False


def measured(value: Any) -> Iterator[Size]:
    """Every `Size` in nested tuples, lists, dicts and slices."""
    if isinstance(value, Size):
        yield value
    elif isinstance(value, Dims):
        return
    elif isinstance(value, (tuple, list)):
        for v in value:
            yield from measured(v)
    elif isinstance(value, dict):
        yield from measured(list(value.values()))
    elif isinstance(value, slice):
        yield from measured((value.start, value.stop, value.step))
