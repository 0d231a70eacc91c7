"""One graph for train and eval mode, where the model's Python code branches on ``self.training``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from fxgrow._fake import set_value
from fxgrow._runtime import guard_mode, in_mode
from fxgrow._trace import ValueTracer

_LITERALS = (bool, int, float, type(None), str, torch.dtype)


class _Different(Exception):
    pass


def merge_modes(tracer: ValueTracer, other: ValueTracer) -> bool:
    """Make ``tracer.graph`` right in both modes, if only constants differ between the two traces.

    A constant that differs becomes a node that picks the one of the mode the module is in:
    ``dropout(x, 0.1 if self.training else 0.0)`` is the usual case.

    Returns:
        False, with the graph unchanged, if the traces differ in more than constants.
    """
    ours, theirs = list(tracer.graph.nodes), list(other.graph.nodes)
    if len(ours) != len(theirs):
        return False
    pairs: dict[fx.Node, fx.Node] = {}
    changes: list[tuple[fx.Node, Any, Any]] = []
    for mine, yours in zip(ours, theirs, strict=True):
        if (mine.op, mine.target) != (yours.op, yours.target) or not _same_constant(tracer, other, mine):
            return False
        try:
            differs = [
                not _equal(mine.args, yours.args, pairs),
                not _equal(mine.kwargs, yours.kwargs, pairs),
            ]
        except _Different:
            return False
        if any(differs):
            changes.append((mine, yours.args, yours.kwargs))
        pairs[yours] = mine
    for node, args, kwargs in changes:
        choose = _chooser(tracer, node)
        node.args = _merged(node.args, args, choose)
        node.kwargs = _merged(node.kwargs, kwargs, choose)
    return True


def guard_modes(tracer: ValueTracer) -> None:
    """Make ``tracer.graph`` refuse to run in the mode it was not captured in."""
    for flag, (_, value, where) in tracer.branches.items():
        node = _flag_node(tracer, flag)
        with tracer.graph.inserting_after(node):
            guard_node = tracer.graph.call_function(guard_mode, (node, value, where))
        set_value(guard_node, None)


def _equal(mine: Any, yours: Any, pairs: dict[fx.Node, fx.Node]) -> bool:
    """Whether two arguments agree; raises if they differ in more than a literal."""
    if isinstance(mine, fx.Node) or isinstance(yours, fx.Node):
        if pairs.get(yours) is not mine:
            raise _Different
        return True
    if isinstance(mine, (tuple, list)) and type(mine) is type(yours) and len(mine) == len(yours):
        return all([_equal(a, b, pairs) for a, b in zip(mine, yours, strict=True)])
    if isinstance(mine, dict) and isinstance(yours, dict) and mine.keys() == yours.keys():
        return all([_equal(mine[name], yours[name], pairs) for name in mine])
    if isinstance(mine, slice) and isinstance(yours, slice):
        return _equal((mine.start, mine.stop, mine.step), (yours.start, yours.stop, yours.step), pairs)
    if isinstance(mine, _LITERALS) and isinstance(yours, _LITERALS):
        return type(mine) is type(yours) and mine == yours
    if type(mine) is type(yours) and mine == yours:
        return True
    raise _Different


def _merged(mine: Any, yours: Any, choose: Callable[[Any, Any], fx.Node]) -> Any:
    if isinstance(mine, (tuple, list)):
        return type(mine)(_merged(a, b, choose) for a, b in zip(mine, yours, strict=True))
    if isinstance(mine, dict):
        return {name: _merged(mine[name], yours[name], choose) for name in mine}
    if isinstance(mine, slice):
        ends = _merged((mine.start, mine.stop, mine.step), (yours.start, yours.stop, yours.step), choose)
        return slice(*ends)
    if isinstance(mine, _LITERALS) and not (type(mine) is type(yours) and mine == yours):
        return choose(mine, yours)
    return mine


def _chooser(tracer: ValueTracer, node: fx.Node) -> Callable[[Any, Any], fx.Node]:
    """A maker of ``in_mode`` nodes in front of ``node``, on the flag of the nearest module that branched."""
    stack = [path for path, _ in node.meta.get("nn_module_stack", {}).values()]
    names = [f"{path}.training" for path in reversed(stack)] + ["training"]
    flag = next((name for name in names if name in tracer.branches), next(iter(tracer.branches)))
    training = tracer.branches[flag][1]

    def choose(mine: Any, yours: Any) -> fx.Node:
        flag_node = _flag_node(tracer, flag)
        with tracer.graph.inserting_before(node):
            values = (mine, yours) if training else (yours, mine)
            chosen = tracer.graph.call_function(in_mode, (flag_node, *values))
        set_value(chosen, mine)
        for key in ("nn_module_stack", "stack_trace"):
            if key in node.meta:
                chosen.meta[key] = node.meta[key]
        return chosen

    return choose


def _flag_node(tracer: ValueTracer, flag: str) -> fx.Node:
    """The ``get_attr`` node of a flag, at the top of the graph, so that it is there for everybody."""
    found: list[fx.Node] = list(tracer.graph.find_nodes(op="get_attr", target=flag))
    if found:
        return found[0]
    last = [node for node in tracer.graph.nodes if node.op == "placeholder"][-1:]
    place = tracer.graph.inserting_after(last[0]) if last else tracer.graph.inserting_before()
    with place:
        # Not Graph.get_attr, which warns about attributes that are neither modules nor tensors.
        node = tracer.graph.create_node("get_attr", flag)
    set_value(node, tracer.branches[flag][1])
    return node


def _same_constant(tracer: ValueTracer, other: ValueTracer, node: fx.Node) -> bool:
    name = str(node.target)
    if node.op != "get_attr" or name not in tracer.constants:
        return True
    mine, yours = tracer.constants[name], other.constants.get(name)
    return mine is yours or (yours is not None and mine.dtype == yours.dtype and torch.equal(mine, yours))
