"""Makes plain numbers that were computed from sizes of the inputs nodes of the graph again.

A number that `len(x)`, `int(x.shape[0])`, `math` or NumPy made has no history. The model is traced again on inputs of
other sizes: a literal that differs was computed from a size that differs. It becomes a formula of a number that the
code looked at, where one fits in every trace, and the guard on that number goes; other numbers keep their guard.
"""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from fxgrow.errors import CaptureError
from fxgrow.graph.arguments import Path, argument_leaves, set_argument
from fxgrow.graph.evaluate import equal_constants
from fxgrow.graph.node_functions import guard
from fxgrow.graph.node_meta import set_value
from fxgrow.tracing.tracer import ValueTracer

#: added to a size in the further traces, times the smallest power of 2 that the model accepts; no common divisor
STEPS = (1, 3, 8)
LARGEST_POWER = 128
#: and far away, where a remainder starts again and a condition is met: the first one that the model accepts
FAR_STEPS = (1009, 61)
#: a function and its arguments after the first
Function = tuple[Callable[..., Any], tuple[float, ...]]
#: of a size, besides itself, in formulas of floats
FUNCTIONS: tuple[Function, ...] = (*((operator.pow, (p,)) for p in (-1, 0.5, -0.5, 2)), (math.log, ()))
#: `factor * f(convert(node)) + offset`: node, conversion, functions, factor and offset
Formula = tuple[fx.Node, Callable[[Any], Any], tuple[Function, ...], float, float]
#: traces the model on other inputs; with the error if the trace was not completed
Retrace = Callable[[dict[str, Any]], tuple[ValueTracer, CaptureError | None]]
#: from the nodes of one trace to those of another
NodeMap = Mapping[fx.Node, fx.Node]


@dataclass(frozen=True)
class SizeGroup:
    """Dimensions of the inputs that change together: the batch dimension, or all others of one size."""

    batch: bool
    size: int

    def changed(self, inputs: Mapping[str, Any], step: int, more: int = 0) -> dict[str, Any]:
        """Returns inputs with `step` more entries in the first of these dimensions, and `more` others in each next."""
        steps = itertools.count(step, more)
        return {k: pytree.tree_map_only(Tensor, lambda t: self._longer(t, steps), v) for k, v in inputs.items()}

    def dims(self, x: Any) -> list[int]:
        """Returns the dimensions of one tensor; none of anything else."""
        shape = x.shape if isinstance(x, Tensor) else ()
        return [d for d, n in enumerate(shape) if n == self.size and (d == 0) == self.batch]

    def in_graph(self, graph: fx.Graph) -> list[tuple[fx.Node, int]]:
        """Returns the placeholders and dimensions."""
        return [(node, d) for node in graph.find_nodes(op="placeholder") for d in self.dims(node.meta["val"])]

    def _longer(self, x: Tensor, steps: Iterator[int]) -> Tensor:
        dims = self.dims(x)
        if not dims or x.layout is not torch.strided:
            return x
        shape = [n + next(steps) if d in dims else n for d, n in enumerate(x.shape)]
        return torch.zeros((), dtype=x.dtype, device=x.device).expand(shape)


def keep_input_sizes(tracer: ValueTracer, retrace: Retrace) -> None:
    """Makes the graph of a finished trace independent of input sizes that its code only turned into numbers."""
    nodes = set(tracer.graph.nodes)
    numbers = {node: convert for node, convert in tracer.numbers.items() if node in nodes}
    if not numbers:
        return
    bound: dict[fx.Node, list[SizeGroup]] = {node: [] for node in numbers}
    steps: set[fx.Node] = set()
    replacements: dict[tuple[fx.Node, Path], Formula] = {}
    for group in _groups(tracer.inputs):
        changing, in_steps = _keep_group(tracer, retrace, group, numbers, replacements)
        steps |= in_steps
        for node in changing:
            bound[node].append(group)
    # not before the last trace is compared with the graph
    for (node, path), number in replacements.items():
        set_argument(node, path, _as_nodes(tracer.graph, number))
    for number_guard, groups in bound.items():
        if not any(group.batch for group in groups) and (groups or number_guard not in steps):
            for group in groups:
                _guard_inputs(tracer.graph, group.in_graph(tracer.graph), group.size, number_guard)
            tracer.graph.erase_node(number_guard)


def _guard_inputs(
    graph: fx.Graph, dims: Sequence[tuple[fx.Node, int]], expected: tuple[fx.Node, int] | int, number_guard: fx.Node
) -> None:
    """Guards the sizes of dimensions of the inputs themselves, before the guard on a number."""
    what = "the size from which" if isinstance(expected, int) else "the equality of two sizes from which"
    for place in dims:
        with graph.inserting_before(number_guard):
            size: Any = graph.call_method("size", place)
            value = size.meta["val"] = place[0].meta["val"].shape[place[1]]
            if not isinstance(expected, int):
                other = graph.call_method("size", expected)
                other.meta["val"], size = value, graph.call_function(operator.eq, (size, other))
                value = size.meta["val"] = True
            set_value(graph.call_function(guard, (size, value, f"{what} {number_guard.args[2]}")), None)


def _groups(inputs: Mapping[str, Any]) -> list[SizeGroup]:
    tensors = [t for t in pytree.tree_leaves(list(inputs.values())) if isinstance(t, Tensor) and t.dim()]
    batches = [t.shape[0] for t in tensors]
    groups = [SizeGroup(True, size) for size in sorted(set(batches), key=batches.count, reverse=True)[:1]]
    return groups + [SizeGroup(False, n) for n in dict.fromkeys(n for t in tensors for n in t.shape[1:])]


def _keep_group(
    tracer: ValueTracer,
    retrace: Retrace,
    group: SizeGroup,
    numbers: Mapping[fx.Node, Callable[[Any], Any]],
    replacements: dict[tuple[fx.Node, Path], Formula],
) -> tuple[list[fx.Node], set[fx.Node]]:
    """Enters replacements of the literals that change with a group of dimensions; returns the guards that must stay.

    The second ones are on numbers that did not change though sizes did from which they are computed: they may change
    in steps, as a length rounded up to a multiple does.
    """
    traces: list[NodeMap] = []
    steps: list[int] = []
    for step, other, error in _traces(tracer, retrace, group):
        steps.append(step)
        traces.append(pairs := _aligned(tracer.graph, other.graph))
        complete = error is None and _same_code(tracer, other, pairs)
        if not complete or not any(_differs(n, convert, pairs) for n, convert in numbers.items()):
            break
    changing = [n for n, convert in numbers.items() if any(_differs(n, convert, pairs) for pairs in traces)]
    others = numbers.keys() - set(changing)
    in_steps = {n for n in others if any(_sources_differ(n, pairs) for pairs in traces)}
    at = group.in_graph(tracer.graph)
    dims = sum(len(group.dims(t)) for t in pytree.tree_leaves(list(tracer.inputs.values())))
    equal = bool(changing) and complete and dims > 1 and not group.batch
    if equal:  # height and width, say, of a square
        other, error = retrace(group.changed(tracer.inputs, steps[0], steps[0]))
        pairs = _aligned(tracer.graph, other.graph)
        if error is None and _same_code(tracer, other, pairs):
            traces.append(pairs)
            equal = False
        complete = not equal or len(at) == dims  # sizes of nested inputs have no guards
    new = _replacements(tracer, traces, numbers) if changing and complete else None
    if new is None or not new.keys().isdisjoint(replacements):  # a literal that two groups change
        return changing, in_steps
    if equal:
        _guard_inputs(tracer.graph, at[1:], at[0], changing[0])
    replacements.update(new)
    return [], in_steps


def _traces(
    tracer: ValueTracer, retrace: Retrace, group: SizeGroup
) -> Iterator[tuple[int, ValueTracer, CaptureError | None]]:
    """Yields steps and traces at other sizes; one that failed only if the model accepts none of the first ones."""
    power, nodes = 1, 0
    first = retrace(group.changed(tracer.inputs, 1))
    while first[1] is not None and not group.batch and 2 * power <= min(group.size, LARGEST_POWER):
        nodes += len(first[0].graph.nodes)
        if nodes > 3 * len(tracer.graph.nodes):
            break  # each fails late: enough time spent
        power *= 2
        first = retrace(group.changed(tracer.inputs, power))
    yield power, *first
    for step in STEPS[1:]:
        yield step * power, *retrace(group.changed(tracer.inputs, step * power))
    for choices in (-(group.size // 2 // power),), FAR_STEPS:
        tried = ((step * power, *retrace(group.changed(tracer.inputs, step * power))) for step in choices if step)
        if accepted := next((trace for trace in tried if trace[2] is None), None):
            yield accepted


def _aligned(graph: fx.Graph, other: fx.Graph) -> NodeMap:
    """Returns the nodes of two traces that stand for one call, up to the first difference."""
    pairs: dict[fx.Node, fx.Node] = {}
    for mine, yours in zip(graph.nodes, other.nodes, strict=False):
        if mine.op != yours.op or (mine.target != yours.target and mine.op != "placeholder"):
            break
        pairs[mine] = yours
    return pairs


def _same_code(tracer: ValueTracer, other: ValueTracer, pairs: NodeMap) -> bool:
    """Whether two traces have the same calls, and the same tensors that were made without torch, by NumPy say."""
    mine, yours = tracer.constants, other.constants
    same_calls = len(pairs) == len(tracer.graph.nodes) == len(other.graph.nodes)
    return same_calls and mine.keys() == yours.keys() and all(equal_constants(mine[name], yours[name]) for name in mine)


def _differs(number_guard: fx.Node, convert: Callable[[Any], Any], pairs: NodeMap) -> bool:
    """Whether a number differs in another trace, or that trace did not reach it."""
    source: Any = number_guard.args[0]
    return source not in pairs or bool(convert(source.meta["val"]) != convert(pairs[source].meta["val"]))


def _sources_differ(number_guard: fx.Node, pairs: NodeMap) -> bool:
    """Whether a number that another trace has too is computed from numbers that differ there."""
    queue = [number_guard.args[0]]
    for node in queue:
        if isinstance(node, fx.Node) and type(node.meta["val"]) in (bool, int, float):
            if node not in pairs or node.meta["val"] != pairs[node].meta["val"]:
                return True
            queue += [source for source in node.all_input_nodes if source not in queue]
    return False


def _replacements(
    tracer: ValueTracer, traces: Sequence[NodeMap], numbers: Mapping[fx.Node, Callable[[Any], Any]]
) -> dict[tuple[fx.Node, Path], Formula] | None:
    """Returns a formula for each literal that differs, by node and path; None if the traces differ in anything else."""
    order = {node: i for i, node in enumerate(tracer.graph.nodes)}
    sources: dict[tuple[Any, ...], tuple[fx.Node, Callable[[Any], Any]]] = {}
    for number_guard, convert in numbers.items():
        node: Any = number_guard.args[0]
        values = (convert(node.meta["val"]), *(convert(pairs[node].meta["val"]) for pairs in traces))
        sources.setdefault(values, (node, convert))
    replacements: dict[tuple[fx.Node, Path], Formula] = {}
    for node in order:
        if node in numbers:
            continue
        for path, literals in _literals(node, traces):
            earlier = [(values, s) for values, s in sources.items() if literals and order[s[0]] < order[node]]
            fits = ((s[0], s[1], *line) for values, s in earlier if (line := _fit(values, literals)))
            if (number := next(fits, None)) is None:
                return None
            replacements[node, path] = number
    return replacements


def _literals(node: fx.Node, traces: Sequence[NodeMap]) -> Iterator[tuple[Path, tuple[Any, ...]]]:
    """Yields the literals of a node that differ between the traces, by path; () for any other difference."""
    mine, *theirs = (dict(argument_leaves(n)) for n in (node, *(pairs[node] for pairs in traces)))
    if any(yours.keys() != mine.keys() for yours in theirs):
        yield (), ()
        return
    for path, value in mine.items():
        values = [yours[path] for yours in theirs]
        if isinstance(value, fx.Node):
            if any(pairs.get(value) is not y for pairs, y in zip(traces, values, strict=True)):
                yield path, ()
        elif any(type(y) is not type(value) for y in values):
            yield path, ()
        elif any(y is not value and y != value for y in values):
            yield path, (value, *values) if type(value) in (int, float) else ()


def _fit(known: tuple[Any, ...], values: tuple[Any, ...]) -> tuple[tuple[Function, ...], float, float] | None:
    """Returns functions, factor and offset of a formula that is right in every trace."""
    if any(not isinstance(v, (int, float)) or not math.isfinite(v) for v in (*known, *values)) or known[0] == known[1]:
        return None
    line = _line([Fraction(v) for v in known], [Fraction(v) for v in values])
    # other fractions, such as a quarter of the batch, do not exist at every size
    if line and line[0].denominator == 1 and line[1].denominator == 1:
        return (), int(line[0]), int(line[1])
    if type(values[0]) is not float or min(known) <= 0:
        return None
    for functions in ((), *((f,) for f in FUNCTIONS)):
        x = [function(k, *rest) for k in known for function, rest in functions] or [float(k) for k in known]
        if line := _line(x, values, 1e-12):
            return functions, *line
    return None


def _line(x: Sequence[Any], y: Sequence[Any], error: float = 0) -> tuple[Any, Any] | None:
    """Returns factor and offset with `y = factor * x + offset`, up to a relative error."""
    factor = (y[1] - y[0]) / (x[1] - x[0])
    if error and abs(factor - round(factor)) <= 1e3 * error * abs(factor):
        factor = round(factor)
    offset, largest = y[0] - factor * x[0], max(map(abs, y))
    if abs(offset) <= error * largest:
        offset = type(offset)(0)
    fits = all(abs(b - (factor * a + offset)) <= error * largest for a, b in zip(x, y, strict=True))
    return (factor, offset) if fits else None


def _as_nodes(graph: fx.Graph, number: Formula) -> fx.Node:
    """Returns a node with the number, behind its source; existing ones are used again."""

    def apply(function: Callable[..., Any], node: fx.Node, *args: float) -> fx.Node:
        for user in node.users:
            if user.target is function and user.args == (node, *args) and not user.kwargs:
                return user
        with graph.inserting_after(node):
            new = graph.call_function(function, (node, *args))
        set_value(new, function(node.meta["val"], *args))
        return new

    out, convert, functions, factor, offset = number
    to_int = not isinstance(out.meta["val"], int) and convert is int
    scaled = (operator.mul, (factor,)), (operator.add, (offset,))
    for function, rest in (*(((int, ()),) if to_int else ()), *functions, *scaled):
        if (function, *rest) not in ((operator.mul, 1), (operator.add, 0)):
            out = apply(function, out, *rest)
    return out
