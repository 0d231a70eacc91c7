"""Decisions of the model's code on sizes of its inputs that can be taken the other way without another result.

A cache on the module (`if self.size != x.shape[-1]: self.grid = make(...)`), padding to a multiple (`if h % 8: pad`), a
faster way for the size that a mask was made for: where the code finds a size *equal* to a number, the other way is what
it does for every other size. If that way gives the same for the example too, with other weights than the model's as
well, it is right at all sizes, and the graph needs no guard. A cache that holds another size than that of the example
is compared after a call of the model, which fills it; where one for a greater size is used, the other way must fill it.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from torch import fx

from fxgrow.tracing.checks import kept_between_calls, raises_otherwise

#: the sizes for which the other way is right, where the size that the code found is the number
_BOUNDS: dict[Any, Callable[..., Any]] = {
    operator.gt: operator.ge, operator.le: operator.ge, operator.lt: operator.le, operator.ge: operator.le,
}  # fmt: skip
_SWAPPED: dict[Any, Any] = {
    operator.gt: operator.lt,
    operator.lt: operator.gt,
    operator.ge: operator.le,
    operator.le: operator.ge,
}
_NUMBERS = (int, float)


class Decision(NamedTuple):
    """A comparison of a size with a number, at one line; `operator.truth` where a number is asked whether it is 0."""

    file: str
    line: int
    comparison: Any


class Otherwise(NamedTuple):
    """What a trace takes for a decision; `bounded` adds a guard on the sizes for which it was made."""

    outcome: bool
    bounded: bool


class Taken(NamedTuple):
    """An outcome, and the comparison that must be true for it: the function and its arguments."""

    outcome: bool
    bound: tuple[Any, fx.Node, Any] | None


class SizeDecisions:
    """The decisions of one trace."""

    def __init__(self, otherwise: Mapping[Decision, Otherwise]) -> None:
        self.otherwise = otherwise
        #: those that may be taken the other way
        self.open: dict[Decision, Otherwise] = {}
        #: those that could be, were the number another one, such as the size of the last call
        self.unequal: set[Decision] = set()

    def take(self, node: fx.Node, value: bool, place: tuple[str, int]) -> Taken | None:
        """Returns the outcome that this trace takes instead of `value`, or None."""
        if (compared := _compared(node)) is None:
            return None
        comparison, size, number = compared
        decision, bound = Decision(*place, comparison), _BOUNDS.get(comparison)
        if decision in self.otherwise:
            outcome, bounded = self.otherwise[decision]
            return Taken(outcome, (bound, size, number) if bounded else None)
        if size.meta["val"] == number and value is (comparison in (operator.eq, operator.le, operator.ge)):
            if not raises_otherwise(*place, value):
                self.open[decision] = Otherwise(not value, bound is not None)
        elif comparison is not operator.truth:
            self.unequal.add(decision)
            if bound is not None and kept_between_calls(*place):
                self.open[decision] = Otherwise(not value, bounded=True)
        return None


def _compared(node: fx.Node) -> tuple[Any, fx.Node, Any] | None:
    """Returns the comparison that a node makes of a size with a number, with the size on the left."""
    if type(node.meta["val"]) in _NUMBERS:
        return operator.truth, node, 0
    if node.op != "call_function" or node.target not in (operator.eq, operator.ne, *_BOUNDS) or len(node.args) != 2:
        return None
    left, right = node.args
    if isinstance(left, fx.Node) and _is_number(right):
        return node.target, left, right
    if isinstance(right, fx.Node) and _is_number(left):
        return _SWAPPED.get(node.target, node.target), right, left
    return None


def _is_number(value: Any) -> bool:
    if isinstance(value, (tuple, list)):
        return bool(value) and all(map(_is_number, value))
    return type(value) in _NUMBERS
