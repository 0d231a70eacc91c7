"""Axes unify as types do, and sizes keep track of what they measure."""

from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fxgrow.axes.axes import (
    Axis,
    Segment,
    UnitVar,
    axis_of,
    cut,
    fixed,
    is_fixed,
    length,
    multiplicity,
    product,
    resolve,
    unify,
    variables,
)
from fxgrow.axes.records import Reason
from fxgrow.axes.size_expressions import SizeExpr, measured

WHY = Reason("size", "node", "a test")


def test_equal_axes_become_one_variable() -> None:
    a, b = UnitVar(4), UnitVar(4)
    unify(axis_of(a), axis_of(b), WHY)
    assert resolve(axis_of(a)) == resolve(axis_of(b))
    assert len(variables(axis_of(a), axis_of(b))) == 1


def test_a_fixed_axis_pins_and_gives_its_reason() -> None:
    a, why = UnitVar(4), Reason("input", "x", "an input")
    unify(axis_of(a), fixed(4, why), WHY)
    assert a.pinned == why


def test_a_pinned_variable_pins_what_it_is_made_of() -> None:
    whole, a, b = UnitVar(5, WHY), UnitVar(2), UnitVar(3)
    unify(axis_of(whole), axis_of(a) + axis_of(b), WHY)
    assert a.pinned == b.pinned == WHY


def test_product_pins_one_entry_or_a_literal_alone() -> None:
    for one in (UnitVar(1), UnitVar(4, literal=True)):
        a = UnitVar(3)
        assert product(axis_of(a), axis_of(one), WHY) == (Segment(a, one.size),)
        assert a.pinned is None and one.pinned == WHY
    a, b, literal = UnitVar(3), UnitVar(4), UnitVar(4, literal=True)
    unify(axis_of(literal), axis_of(b), WHY)
    assert is_fixed(product(axis_of(literal), axis_of(a), WHY))


def test_equal_blocks_tie_the_parts_of_a_sum() -> None:
    """[3 | 5] seen as two equal blocks of 4: 3 + 1 and 4, so 1 is shared out and nothing is lost."""
    a, b, block = UnitVar(3), UnitVar(5), UnitVar(4)
    unify(axis_of(a) + axis_of(b), axis_of(block) * 2, WHY)
    assert resolve(axis_of(a) + axis_of(b)) == resolve(axis_of(block) * 2)
    assert sum(v.size * m for v, m in multiplicity(axis_of(block)).items()) == 4


@pytest.mark.parametrize(("left", "right", "units"), [(2, 6, 4), (6, 2, 4), (4, 6, 2), (1, 3, 8), (3, 1, 8)])
def test_entries_per_unit_meet_in_their_least_common_multiple(left: int, right: int, units: int) -> None:
    a, b = UnitVar(24 // left), UnitVar(24 // right)
    unify(axis_of(a, left), axis_of(b, right), WHY)
    (segment,) = resolve(axis_of(a, left))
    assert segment.var is not None and (segment.var.size, segment.inner) == (units, 24 // units)
    assert resolve(axis_of(b, right)) == (segment,)
    assert segment.var.pinned is None


def test_units_that_do_not_fit_are_pinned() -> None:
    a, b = UnitVar(5), UnitVar(2)
    unify(axis_of(a, 2), axis_of(b, 5), WHY)  # 10 entries, common units of 10: one unit
    assert multiplicity(axis_of(a, 2)) == multiplicity(axis_of(b, 5))
    c, d = UnitVar(3), UnitVar(2)
    unify(axis_of(c, 2) + fixed(4), axis_of(d, 5), WHY)
    assert c.pinned and d.pinned


def test_cut_through_a_unit_pins() -> None:
    a = UnitVar(3)
    left, right = cut(axis_of(a, 4), 6, WHY)
    assert a.pinned == WHY and is_fixed(left) and is_fixed(right) and (length(left), length(right)) == (6, 6)


def test_cut_splits_a_variable_everywhere() -> None:
    a = UnitVar(5)
    twice = axis_of(a) + axis_of(a)
    left, right = cut(twice, 2, WHY)
    assert [s.length for s in resolve(left)] == [2]
    assert [s.length for s in resolve(right)] == [3, 2, 3]


def test_product_keeps_the_order_of_entries() -> None:
    a = UnitVar(3)
    assert product(axis_of(a), fixed(4), WHY) == (Segment(a, 4),)
    assert product(fixed(4), axis_of(a), WHY) == (Segment(a, 1),) * 4
    assert product(fixed(1), axis_of(a), WHY) == axis_of(a)


def test_product_of_two_widths_pins_both() -> None:
    a, b = UnitVar(3), UnitVar(4)
    assert is_fixed(product(axis_of(a), axis_of(b), WHY))
    assert a.pinned == b.pinned == WHY


@st.composite
def partitions(draw: st.DrawFn, total: int) -> list[int]:
    parts: list[int] = []
    while sum(parts) < total:
        parts.append(draw(st.integers(1, total - sum(parts))))
    return parts


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_unify_ends_with_equal_axes_of_the_same_length(data: st.DataObject) -> None:
    """Whatever is unified in whatever order: lengths stay, and axes without pins are the same afterwards."""
    total = 12
    pool = [UnitVar(n) for n in range(1, 7) for _ in range(2)]
    axes: list[Axis] = []
    for _ in range(3):
        axis: Axis = ()
        for n in data.draw(partitions(total)):
            inner = data.draw(st.sampled_from([d for d in (1, 2, 3) if n % d == 0]))
            same = [v for v in pool if v.size == n // inner]
            axis += axis_of(data.draw(st.sampled_from(same)) if same else UnitVar(n // inner), inner)
        axes.append(axis)
    for a, b in data.draw(st.permutations([(0, 1), (1, 2), (0, 2)])):
        unify(axes[a], axes[b], WHY)
    assert [length(resolve(a)) for a in axes] == [total] * 3
    if not any(v.pinned for v in variables(*axes)):
        assert resolve(axes[0]) == resolve(axes[1]) == resolve(axes[2])


def test_sizes_stay_linear() -> None:
    a = UnitVar(6)
    channels = SizeExpr.measure(axis_of(a) + fixed(2))
    size = (channels * 3 - 6) // 2
    assert int(size) == 9
    assert size.form() == (Fraction(0), {a: Fraction(3, 2)}) or size.form() is None
    half = channels // 2
    assert int(half) == 4
    assert half.form() is None  # with one unit more the division leaves a remainder
    b = UnitVar(3)
    unify(axis_of(a), axis_of(b) * 2, WHY)
    assert half.form() == (Fraction(1), {b: Fraction(1)})  # in pairs it does not


def test_sizes_that_are_not_linear_are_opaque() -> None:
    size = SizeExpr.measure(axis_of(UnitVar(6)))
    assert (size * size).form() is None
    assert (size // 4).form() is None
    assert (12 + size - size).form() == (Fraction(12), {})
    assert not isinstance(size % 4, SizeExpr)


def test_a_fixed_axis_measures_a_plain_number() -> None:
    assert type(SizeExpr.measure(fixed(5))) is int


def test_measured_looks_into_containers_and_slices() -> None:
    size = SizeExpr.measure(axis_of(UnitVar(6)))
    found = list(measured((1, [size], {"a": slice(None, size)}, axis_of(UnitVar(2)))))
    assert [s is size for s in found] == [True, True]
