"""Sizes of the inputs that the model's code turned into plain numbers become nodes again.

requires: traces of one model on its example inputs and on inputs of other sizes.
ensures:  a number that `len(x)`, `int(x.shape[0])`, `math` or NumPy made of an input's size is a node of the graph
          where that can be shown, and the guard on it is gone; what is bound to a size keeps its guard.

A plain number does not say where it comes from. So the model is traced again with another batch size (and other
lengths): a literal that differs between the traces was computed from what differs between the inputs. It is replaced by
the number that the code asked for, where one has the same value in every trace.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from fxgrow.graph.arguments import Path, argument_leaves, set_argument
from fxgrow.graph.node_functions import guard
from fxgrow.graph.node_meta import set_value
from fxgrow.tracing.tracer import ValueTracer

#: what is added to a size for another trace: not all in step with a divisor
STEPS = (1, 3, 8)
Retrace = Callable[[dict[str, Any]], tuple[ValueTracer, bool]]
#: where a literal stands
Slot = tuple[fx.Node, Path]


@dataclass(frozen=True)
class SizeGroup:
    """Dimensions of the inputs that change together: the batch dimension, or all others of one size."""

    batch: bool
    size: int

    def changed(self, inputs: Mapping[str, Any], step: int) -> dict[str, Any]:
        """The inputs with `step` more entries in these dimensions."""
        return {name: pytree.tree_map_only(Tensor, lambda t: self._longer(t, step), value)
                for name, value in inputs.items()}  # fmt: skip

    def dims(self, x: Tensor) -> list[int]:
        """Those of one tensor."""
        return [d for d, n in enumerate(x.shape) if n == self.size and (d == 0) == self.batch]

    def _longer(self, x: Tensor, step: int) -> Tensor:
        dims = self.dims(x)
        if not dims or x.layout is not torch.strided:
            return x
        shape = [n + step if d in dims else n for d, n in enumerate(x.shape)]
        return torch.zeros((), dtype=x.dtype, device=x.device).expand(shape)


def keep_input_sizes(tracer: ValueTracer, retrace: Retrace) -> None:
    """Makes the graph of `tracer` independent of input sizes that its code only turned into numbers.

    Args:
        tracer: a finished trace; its graph is changed.
        retrace: traces the same model on other inputs; says whether the trace was completed.
    """
    there = set(tracer.graph.nodes)
    numbers = {node: convert for node, convert in tracer.numbers.items() if node in there}
    if not numbers:
        return
    bound: dict[fx.Node, list[SizeGroup]] = {node: [] for node in numbers}
    groups = _groups(tracer.inputs)
    for group in groups:
        _keep_group(tracer, retrace, group, numbers, bound)
    for question, these in bound.items():
        if any(group.batch for group in these):
            continue  # its guard says so
        for group in these:
            _bind(tracer.graph, group, question)
        tracer.graph.erase_node(question)


def _bind(graph: fx.Graph, group: SizeGroup, question: fx.Node) -> None:
    """Guards the dimensions of a group on the inputs themselves, in the place of a question about a number."""
    for node in graph.find_nodes(op="placeholder"):
        value = node.meta["val"]
        for d in group.dims(value) if isinstance(value, Tensor) else ():
            with graph.inserting_before(question):
                size = graph.call_method("size", (node, d))
                refusal = graph.call_function(guard, (size, group.size, f"the size from which {question.args[2]}"))
            set_value(size, group.size)
            set_value(refusal, None)


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
    bound: dict[fx.Node, list[SizeGroup]],
) -> None:
    """Replaces literals that change with one group of dimensions; else notes who is bound to it."""
    traces: list[dict[fx.Node, fx.Node]] = []
    complete = True
    for step in STEPS:
        other, complete = retrace(group.changed(tracer.inputs, step))
        pairs = _aligned(tracer.graph, other.graph)
        complete = complete and len(pairs) == len(tracer.graph.nodes) == len(other.graph.nodes)
        complete = complete and _same_constants(tracer, other)
        traces.append(pairs)
        if not complete or not any(_differs(n, convert, pairs) for n, convert in numbers.items()):
            break
    concerned = [n for n, convert in numbers.items() if any(_differs(n, convert, pairs) for pairs in traces)]
    if not concerned:
        return
    found = _explained(tracer, traces, numbers) if complete else None
    if found is None:
        for node in concerned:
            bound[node].append(group)
        return
    for (node, path), (source, convert, factor, offset) in found.items():
        set_argument(node, path, _expression(tracer.graph, source, convert, factor, offset))


def _aligned(graph: fx.Graph, other: fx.Graph) -> dict[fx.Node, fx.Node]:
    """Nodes of two traces that stand for one call, up to the first difference."""
    pairs: dict[fx.Node, fx.Node] = {}
    for mine, yours in zip(graph.nodes, other.nodes, strict=False):
        if mine.op != yours.op or (mine.target != yours.target and mine.op != "placeholder"):
            break
        pairs[mine] = yours
    return pairs


def _same_constants(tracer: ValueTracer, other: ValueTracer) -> bool:
    """Whether tensors that the code made without torch seeing it, of NumPy say, are the same at both sizes."""
    mine, yours = tracer.constants, other.constants
    return mine.keys() == yours.keys() and all(
        a is yours[name] or (a.shape == yours[name].shape and torch.equal(a, yours[name])) for name, a in mine.items()
    )


def _differs(question: fx.Node, convert: Callable[[Any], Any], pairs: Mapping[fx.Node, fx.Node]) -> bool:
    """Whether an asked number is another one in another trace; one that was not reached is taken to be."""
    asked = question.args[0]
    if asked not in pairs:
        return True
    return bool(convert(asked.meta["val"]) != convert(pairs[asked].meta["val"]))  # type: ignore[union-attr, index]


def _explained(
    tracer: ValueTracer, traces: list[dict[fx.Node, fx.Node]], numbers: Mapping[fx.Node, Callable[[Any], Any]]
) -> dict[Slot, tuple[fx.Node, Callable[[Any], Any], Fraction, Fraction]] | None:
    """For each literal that differs the asked number that gives it; None if the traces differ in anything else."""
    order = {node: i for i, node in enumerate(tracer.graph.nodes)}
    sources: dict[tuple[Any, ...], tuple[fx.Node, Callable[[Any], Any]]] = {}
    for question, convert in numbers.items():
        asked: Any = question.args[0]
        values = (convert(asked.meta["val"]), *(convert(pairs[asked].meta["val"]) for pairs in traces))
        sources.setdefault(values, (asked, convert))
    found: dict[Slot, tuple[fx.Node, Callable[[Any], Any], Fraction, Fraction]] = {}
    for node in tracer.graph.nodes:
        if node in numbers:
            continue
        for path, literals in _literals(node, [pairs[node] for pairs in traces], traces):
            if literals is None:
                return None
            for known, (source, convert) in sources.items():
                line = _line(known, literals)
                if line is not None and order[source] < order[node]:
                    found[node, path] = (source, convert, *line)
                    break
            else:
                return None
    return found


def _literals(
    node: fx.Node, others: list[fx.Node], traces: list[dict[fx.Node, fx.Node]]
) -> Iterator[tuple[Path, tuple[Any, ...] | None]]:
    """Literals of a node's arguments that differ between the traces, by path; None for any other difference."""
    mine, *theirs = (dict(argument_leaves(n)) for n in (node, *others))
    if any(yours.keys() != mine.keys() for yours in theirs):
        yield (), None
        return
    for path, value in mine.items():
        values = [yours[path] for yours in theirs]
        if isinstance(value, fx.Node):
            if any(pairs.get(value) is not y for pairs, y in zip(traces, values, strict=True)):
                yield path, None
        elif any(type(y) is not type(value) for y in values):
            yield path, None
        elif any(y is not value and y != value for y in values):
            yield path, (value, *values) if type(value) in (int, float) else None


def _line(known: tuple[Any, ...], values: tuple[Any, ...]) -> tuple[Fraction, Fraction] | None:
    """`values = factor * known + offset` in every trace, of a known number that differs."""
    if any(not isinstance(v, (int, float)) or v != v or abs(v) == float("inf") for v in (*known, *values)):
        return None
    if known[0] == known[1]:
        return None
    exact, wanted = [Fraction(v) for v in known], [Fraction(v) for v in values]
    factor = (wanted[1] - wanted[0]) / (exact[1] - exact[0])
    offset = wanted[0] - factor * exact[0]
    if any(w != factor * k + offset for k, w in zip(exact, wanted, strict=True)):
        return None
    # a part of a number, such as a quarter of the batch, must come out even, whatever the size
    return (factor, offset) if factor.denominator == 1 and offset.denominator == 1 else None


def _expression(
    graph: fx.Graph, source: fx.Node, convert: Callable[[Any], Any], factor: Fraction, offset: Fraction
) -> fx.Node:
    """`factor * source + offset` as nodes behind `source`; an existing one where there is one."""

    def step(target: Callable[..., Any], number: fx.Node, *args: int) -> fx.Node:
        for user in number.users:
            if user.target is target and user.args == (number, *args) and not user.kwargs:
                return user
        with graph.inserting_after(number):
            node = graph.call_function(target, (number, *args))
        set_value(node, target(number.meta["val"], *args))
        return node

    out = source
    if not isinstance(source.meta["val"], int) and convert is int:
        out = step(int, out)
    if factor != 1:
        out = step(operator.mul, out, int(factor))
    if offset:
        out = step(operator.add, out, int(offset))
    return out
