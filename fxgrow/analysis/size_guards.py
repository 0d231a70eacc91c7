"""What becomes of the model's decisions on sizes when a width grows: each is made again at other sizes.

ensures: a width may take only sizes at which every decision comes out as it did: all of them, multiples of a step (a
         divisibility check), or none other (the width is pinned). A number that a mere check compares with a size
         (`assert c == self.channels`) follows the width.
"""

from __future__ import annotations

import builtins
import math
import operator
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from fxgrow.axes.axes import Axis, Dims, UnitVar, axis_of, fixed, grown_length, pin, resolve, unify, variables
from fxgrow.axes.records import Reason
from fxgrow.axes.size_expressions import SizeExpr
from fxgrow.axes.structure import SizeReplacement, Structure
from fxgrow.graph.node_meta import CHECK

#: so many sizes are tried for each width
SIZES = 64
_SHAPE_METHODS = {"size", "numel", "nelement", "dim", "ndimension"}
_NUMBER_MODULES = {"_operator", "math", "builtins"}


class _Unknown(Exception):
    """A number that does not follow from sizes alone."""


def settle_guards(structure: Structure, guards: list[fx.Node]) -> None:
    """Pins, or coarsens to a step, the widths whose size a `guard`, or an assertion, looks at."""
    for node in guards:
        if node.args and isinstance(node.args[0], fx.Node):
            _settle(structure, node, node.args[0], True if node.target is torch._assert else node.args[1])


def _settle(structure: Structure, node: fx.Node, number: fx.Node, expected: Any) -> None:
    def outcome(grow: Mapping[UnitVar, int]) -> Any:
        try:
            value = _evaluate(structure, number, grow, {})
        except _Unknown:
            return None
        return bool(value) if type(expected) is bool else value

    asked = (*node.args, *node.kwargs.values())[-1]
    why = Reason("branch", node.name, f"the model's code branches on this size ({asked})")
    now = outcome({})
    if now is None:
        for axis in _measured_axes(structure, number):
            pin(axis, why)
        return
    for var in variables(*_measured_axes(structure, number)):
        if var.pinned is not None or var.bound is not None:
            continue
        same = [k for k in range(1, SIZES + 1) if outcome({var: k}) == now]
        if len(same) == SIZES:
            continue
        step = same[0] if same else 0
        if step and same == list(range(step, SIZES + 1, step)) and var.size % step == 0:
            unify(axis_of(var), axis_of(UnitVar(var.size // step), step), why)
        elif not ((node.meta.get(CHECK) or node.target is torch._assert) and _follow(structure, number, var)):
            pin(axis_of(var), why)


def _follow(structure: Structure, check: fx.Node, var: UnitVar) -> bool:
    """Lets the literal that a check compares with a size be that size, at any number of units."""
    if check.target not in (operator.eq, operator.ne) or len(check.args) != 2:
        return False
    followed: list[Axis] = []
    for place, (literal, size) in enumerate((check.args, check.args[::-1])):
        measured = structure.outputs.get(size) if isinstance(size, fx.Node) else None
        several = isinstance(literal, (tuple, list)) and isinstance(measured, (tuple, list))
        pairs: Any = zip(literal, measured, strict=False) if several else [(literal, measured)]  # type: ignore[arg-type]
        for i, (number, length) in enumerate(pairs):
            if type(number) is int and isinstance(length, SizeExpr) and length.measures_one and int(length) == number:
                axis = length.axes[0]
                path = (place, i) if several else (place,)
                structure.size_replacements.append(SizeReplacement(check, path, (axis,), axis))
                followed.append(axis)
    return any(variables(axis) == [var] for axis in followed)


def _evaluate(structure: Structure, node: fx.Node, grow: Mapping[UnitVar, int], known: dict[fx.Node, Any]) -> Any:
    """A number, or numbers, of the graph when widths have grown."""
    if node in known:
        return known[node]
    tensors = [n for n in node.all_input_nodes if isinstance(n.meta.get("val"), torch.Tensor)]
    if tensors:
        value = _shape_of(structure, node, grow)
    elif node.op == "placeholder" or not node.all_input_nodes:
        value = node.meta["val"]
    elif node.op == "call_function" and getattr(node.target, "__module__", "") in _NUMBER_MODULES:
        args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: _evaluate(structure, n, grow, known))
        try:
            value = node.target(*args, **kwargs)  # type: ignore[operator]
        except (TypeError, ValueError, ArithmeticError, LookupError) as error:
            raise _Unknown from error
    else:
        raise _Unknown
    known[node] = value
    return value


def _shape_of(structure: Structure, node: fx.Node, grow: Mapping[UnitVar, int]) -> Any:
    """What `x.shape`, `x.size(1)`, `len(x)` or `x.numel()` is."""
    tensor = node.args[0]
    dims = structure.outputs.get(tensor) if isinstance(tensor, fx.Node) else None
    if not isinstance(dims, Dims) or node.kwargs:
        raise _Unknown
    shape = torch.Size(grown_length(axis, grow) for axis in dims)
    rest = node.args[1:]
    if node.target is builtins.getattr and rest == ("shape",):
        return shape
    if node.target is builtins.len:
        return shape[0]
    if node.op == "call_method" and node.target in _SHAPE_METHODS and all(isinstance(r, int) for r in rest):
        if node.target == "size":
            return shape[rest[0]] if rest else shape  # type: ignore[index]
        return math.prod(shape) if node.target in ("numel", "nelement") else len(shape)
    raise _Unknown


def _measured_axes(structure: Structure, number: fx.Node) -> Iterator[Axis]:
    return (resolve(axis) for axis in _measured(structure, number))


def follows_from_widths(structure: Structure, number: fx.Node) -> bool:
    """Whether a number was computed from the sizes of widths alone, so that no input changes it."""
    axes = list(_measured(structure, number))
    # before it was cut or unified with others: an axis that was flattened has another length for other inputs
    return bool(axes) and all(len(a) == 1 and a[0].var is not None and a[0].inner == 1 for a in axes)


def _measured(structure: Structure, number: fx.Node) -> Iterator[Axis]:
    """The axes whose lengths a number was computed from; a fixed one for a number of the input."""
    queue = [number]
    for node in queue:
        for source in node.all_input_nodes:
            whole = node.target is not operator.getitem or not isinstance(node.args[1], int) or not _is_shape(source)
            tensor = source if whole else source.all_input_nodes[0]
            dims = structure.outputs.get(tensor)
            if isinstance(dims, Dims):
                read = _read_axes(node, dims) if whole else (dims[node.args[1]],)  # type: ignore[index]
                yield from read
            elif source not in queue:
                queue.append(source)
        if node.op == "placeholder":
            yield fixed(1)


def _is_shape(node: fx.Node) -> bool:
    """Whether a node is all sizes of a tensor."""
    return (
        node.args[1:] == ("shape",) if node.target is builtins.getattr else (node.target, len(node.args)) == ("size", 1)
    )


def _read_axes(node: fx.Node, dims: Dims) -> Sequence[Axis]:
    if node.target is builtins.len:
        return dims[:1]
    at = node.args[1] if node.target == "size" and len(node.args) > 1 else None
    return (dims[at],) if isinstance(at, int) else dims
