"""Integers that remember which axes they measure, so that shape arithmetic can be followed.

>>> from fxgrow.axes.axes import UnitVar, axis_of
>>> channels = axis_of(UnitVar(8))
>>> size = SizeExpr.measure(channels) * 4 // 2
>>> int(size), size.form() == (0, {channels[0].var: 2})
(16, True)
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from fractions import Fraction
from typing import Any

from fxgrow.axes.axes import Axis, Dims, UnitVar, is_fixed, length, multiplicity, resolve

Terms = tuple[tuple[Fraction, Axis], ...]
Quotients = tuple[tuple[Fraction, Terms], ...]


class SizeExpr(int):
    """An integer that remembers which axes it measures: `const + sum(coefficient * len(axis))`.

    `x.shape[1] // 2 * 3` is linear and can be checked against the axis for which it is used.
    """

    const: Fraction
    terms: Terms = ()  # coefficients and axes
    opaque: bool = False  # not linear; used as a size, it pins the axes it came from
    quotients: Quotients = ()  # intermediate results of divisions, which must be integers at every number of units

    def __init__(self, value: int) -> None:
        """A size that measures no axis."""
        self.const = Fraction(value)

    @classmethod
    def make(cls, value: int, const: Fraction, terms: Any, opaque: bool = False, quotients: Quotients = ()) -> int:
        """A plain int where no axis is left among the terms."""
        terms = tuple((c, a) for c, a in terms if c)
        if not terms:
            return value
        self = cls(value)
        self.const, self.terms, self.opaque, self.quotients = const, terms, opaque, quotients
        return self

    @classmethod
    def measure(cls, axis: Axis) -> int:
        """The length of an axis."""
        if is_fixed(axis):
            return length(axis)
        return cls.make(length(axis), Fraction(0), [(Fraction(1), axis)])

    @property
    def axes(self) -> tuple[Axis, ...]:
        return tuple(a for _, a in self.terms)

    @property
    def measures_one(self) -> bool:
        """Whether it is the length of one axis and nothing else."""
        return not (self.opaque or self.quotients or self.const) and [c for c, _ in self.terms] == [1]

    def form(self) -> tuple[Fraction, dict[UnitVar, Fraction]] | None:
        """The size as a linear form in units of unbound variables; None if it is not one."""
        for const, terms in self.quotients:
            part, coefficients = _form(const, terms)
            if any(c.denominator > 1 for c in (part, *coefficients.values())):
                return None
        return None if self.opaque else _form(self.const, self.terms)

    def _linear(self, other: Any, sign: int, op: Callable[[int, int], int]) -> Any:
        if not isinstance(other, int):
            return NotImplemented
        value, right = op(int(self), int(other)), other if isinstance(other, SizeExpr) else SizeExpr(other)
        terms = (*self.terms, *((sign * c, a) for c, a in right.terms))
        opaque, quotients = self.opaque or right.opaque, self.quotients + right.quotients
        return SizeExpr.make(value, self.const + sign * right.const, terms, opaque, quotients)

    def __add__(self, other: Any) -> Any:
        return self._linear(other, 1, operator.add)

    __radd__ = __add__

    def __sub__(self, other: Any) -> Any:
        return self._linear(other, -1, operator.sub)

    def __rsub__(self, other: Any) -> Any:
        return self * -1 + other

    def __neg__(self) -> int:
        return self * -1  # type: ignore[no-any-return]

    def __mul__(self, other: Any) -> Any:
        if not isinstance(other, int):
            return NotImplemented
        value = int(self) * int(other)
        if isinstance(other, SizeExpr) and other.terms:
            return SizeExpr.make(value, Fraction(0), self.terms + other.terms, opaque=True)
        scaled = [(c * int(other), a) for c, a in self.terms]
        return SizeExpr.make(value, self.const * int(other), scaled, self.opaque, self.quotients)

    __rmul__ = __mul__

    def __floordiv__(self, other: Any) -> Any:
        if not isinstance(other, int):
            return NotImplemented
        divisor = int(other)
        value = int(self) // divisor
        if isinstance(other, SizeExpr) or value * divisor != int(self):
            return SizeExpr.make(value, Fraction(0), self.terms + getattr(other, "terms", ()), opaque=True)
        const, terms = self.const / divisor, tuple((c / divisor, a) for c, a in self.terms)
        return SizeExpr.make(value, const, terms, self.opaque, (*self.quotients, (const, terms)))

    def __hash__(self) -> int:
        return int.__hash__(self)


def _form(const: Fraction, terms: Terms) -> tuple[Fraction, dict[UnitVar, Fraction]]:
    total: dict[UnitVar, Fraction] = {}
    for c, axis in terms:
        const += c * sum(s.inner for s in resolve(axis) if s.var is None)
        for var, m in multiplicity(axis).items():
            total[var] = total.get(var, Fraction(0)) + c * m
    return const, {v: c for v, c in total.items() if c}


def measured(value: Any) -> Iterator[SizeExpr]:
    """Yields every `SizeExpr` in nested tuples, lists, dicts and slices."""
    if isinstance(value, SizeExpr):
        yield value
    elif isinstance(value, slice):
        yield from measured((value.start, value.stop, value.step))
    elif isinstance(value, (tuple, list, dict)) and not isinstance(value, Dims):
        for item in value.values() if isinstance(value, dict) else value:
            yield from measured(item)
