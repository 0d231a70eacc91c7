"""One graph for train and eval mode, where the model's Python code branches on ``self.training``.

The model is traced once in each mode, and the two graphs are merged.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from difflib import SequenceMatcher
from itertools import count
from typing import Any

import torch
from torch import fx

from fxgrow.graph.conditional import run_only_if
from fxgrow.graph.node_functions import guard_mode, in_mode
from fxgrow.graph.node_meta import CONDITIONS, set_value
from fxgrow.tracing.tracer import ValueTracer

_LITERALS = (bool, int, float, type(None), str, torch.dtype)


#: kind, and the runs of nodes in either graph
Step = tuple[str, int, int, int, int]


class _Different(Exception):
    pass


def merge_modes(tracer: ValueTracer, other: ValueTracer) -> None:
    """Makes ``tracer.graph`` right in both modes.

    What one mode alone computes becomes conditional nodes, which the other mode leaves out: no random number is drawn
    and no buffer is moved there. A value that differs becomes a node that picks the one of the mode the module is
    in: of two constants, as in ``dropout(x, 0.1 if self.training else 0.0)``, or of two nodes.

    Args:
        tracer: a trace in the mode that the model is in; its graph is changed.
        other: a trace with every flag flipped that the first one branched on.
    """
    _share_constants(tracer, other)
    try:
        _merge(tracer, other, _matching_calls(tracer, other))
    except _Different:
        if len(tracer.branches) > 1:
            guard_modes(tracer)  # there are more than two ways
            return
        # nothing in common that could be found: two graphs, one of which runs
        _merge(tracer, other, [("replace", 0, len(tracer.graph.nodes) - 1, 0, len(other.graph.nodes) - 1)])


def _matching_calls(tracer: ValueTracer, other: ValueTracer) -> Sequence[Step]:
    """Runs of nodes that both graphs have, and runs that one has, in the form of `SequenceMatcher.get_opcodes`."""
    ours, theirs = list(tracer.graph.nodes), list(other.graph.nodes)
    keys = [[(n.op, n.name if n.op == "placeholder" else n.target) for n in nodes] for nodes in (ours, theirs)]
    kinds = {key: i for i, key in enumerate(dict.fromkeys(keys[0] + keys[1]))}
    my_kinds, their_kinds = ([kinds[k] for k in own] for own in keys)
    return SequenceMatcher(None, my_kinds, their_kinds, autojunk=False).get_opcodes()


def _in_both_modes(tracer: ValueTracer, node: fx.Node) -> bool:
    return node.op == "placeholder" or (node.op == "get_attr" and str(node.target) in tracer.branches)


def _merge(tracer: ValueTracer, other: ValueTracer, steps: Sequence[Step]) -> None:
    """Merges the graphs along the matching nodes.

    Raises:
        _Different: matching nodes differ in more than a literal or a node of one mode alone; nothing has changed then.
    """
    ours, theirs = list(tracer.graph.nodes), list(other.graph.nodes)
    my_own = {n for kind, a, b, _, _ in steps if kind != "equal" for n in ours[a:b] if not _in_both_modes(tracer, n)}
    their_own = {n for kind, _, _, a, b in steps if kind != "equal" for n in theirs[a:b]}
    inputs = {n.name: n for n in ours if n.op == "placeholder"}
    pairs = {n: inputs[n.name] for n in theirs if n.op == "placeholder"}
    extra = my_own | their_own
    changes: list[tuple[fx.Node, Any, Any]] = []
    copies: list[tuple[fx.Node, fx.Node]] = []
    results: tuple[Any, Any] = None, None
    for kind, a, b, c, d in steps:
        if kind != "equal":
            new = [yours for yours in theirs[c:d] if yours.op != "placeholder"]
            copies += [(yours, ours[b]) for yours in new]
            # stands for its copy until it is known that there will be one
            pairs.update({yours: yours for yours in new})
            continue
        for mine, yours in zip(ours[a:b], theirs[c:d], strict=True):
            if mine.op == "output":
                results = mine.args[0], yours.args[0]
                continue
            same = [_equal(x, y, pairs, extra) for x, y in ((mine.args, yours.args), (mine.kwargs, yours.kwargs))]
            if not all(same):
                changes.append((mine, yours.args, yours.kwargs))
            pairs[yours] = mine
    if results == (None, None):
        results = ours[-1].args[0], theirs[-1].args[0]
    for flag in tracer.branches:
        _flag_node(tracer, flag)
    for mine in my_own:
        _run_in_one_mode(tracer, mine, captured=True)
    for yours, before in copies:
        with tracer.graph.inserting_before(before):
            copy = tracer.graph.node_copy(yours, pairs.__getitem__)
        copy.meta = dict(yours.meta)
        _run_in_one_mode(tracer, copy, captured=False)
        pairs[yours] = copy
    _merge_results(tracer, *results, pairs, extra)
    for node, args, kwargs in changes:
        choose = _chooser(tracer, node)
        args, kwargs = fx.node.map_arg((args, kwargs), pairs.__getitem__)
        node.args = _merged(node.args, args, choose)
        node.kwargs = _merged(node.kwargs, kwargs, choose)


def _run_in_one_mode(tracer: ValueTracer, node: fx.Node, captured: bool) -> None:
    """Lets a node run in the mode that was captured alone, or in the other one."""
    if node.op == "get_attr":
        return  # costs nothing
    flag = _flag_of(tracer, node)
    run_only_if(node, _flag_node(tracer, flag), tracer.branches[flag][1] is captured)


def _share_constants(tracer: ValueTracer, other: ValueTracer) -> None:
    """Gives equal constants of both traces one name, and those that the other has alone new ones."""
    names = {}
    for name, value in other.constants.items():
        same = [mine for mine, t in tracer.constants.items() if t is value or _equal_tensors(t, value)]
        names[name] = (
            same[0]
            if same
            else next(
                new
                for i in count()
                if (new := f"_constant{i}") not in tracer.constants and not hasattr(tracer.root, new)
            )
        )
        tracer.constants[names[name]] = value
    for node in other.graph.find_nodes(op="get_attr"):
        node.target = names.get(str(node.target), node.target)


def _equal_tensors(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and a.device == b.device and torch.equal(a, b)


def _merge_results(
    tracer: ValueTracer, mine: Any, yours: Any, pairs: dict[fx.Node, fx.Node], extra: set[fx.Node]
) -> None:
    """Each mode returns its own, whatever it is made of: a tensor in one, a tuple with more in the other."""
    output = next(iter(tracer.graph.find_nodes(op="output")))
    choose = _chooser(tracer, output)
    yours = fx.node.map_arg(yours, pairs.__getitem__)
    try:
        _equal(mine, yours, {n: n for n in tracer.graph.nodes}, extra)
        output.args = (_merged(mine, yours, choose),)
    except _Different:
        output.args = (choose(mine, yours),)


def guard_modes(tracer: ValueTracer) -> None:
    """Make ``tracer.graph`` refuse to run in the mode it was not captured in."""
    for flag, (_, value, where) in tracer.branches.items():
        node = _flag_node(tracer, flag)
        with tracer.graph.inserting_after(node):
            guard_node = tracer.graph.call_function(guard_mode, (node, value, where))
        set_value(guard_node, None)


def _equal(mine: Any, yours: Any, pairs: dict[fx.Node, fx.Node], extra: set[fx.Node]) -> bool:
    """Whether two arguments agree; raises if they differ in more than a literal or a node of one mode alone."""
    if isinstance(mine, fx.Node) and isinstance(yours, fx.Node):
        if pairs.get(yours) is mine:
            return True
        if mine in extra or yours in extra:
            return False
        raise _Different
    if isinstance(mine, fx.Node) or isinstance(yours, fx.Node):
        node, value = (mine, yours) if isinstance(mine, fx.Node) else (yours, mine)
        if node in extra and isinstance(value, _LITERALS):
            return False
        raise _Different
    if isinstance(mine, (tuple, list)) and type(mine) is type(yours) and len(mine) == len(yours):
        return all([_equal(a, b, pairs, extra) for a, b in zip(mine, yours, strict=True)])
    if isinstance(mine, dict) and isinstance(yours, dict) and mine.keys() == yours.keys():
        return all([_equal(mine[name], yours[name], pairs, extra) for name in mine])
    if isinstance(mine, slice) and isinstance(yours, slice):
        ends = (mine.start, mine.stop, mine.step), (yours.start, yours.stop, yours.step)
        return _equal(*ends, pairs, extra)
    if isinstance(mine, _LITERALS) and isinstance(yours, _LITERALS):
        return type(mine) is type(yours) and mine == yours
    if type(mine) is type(yours) and mine == yours:
        return True
    raise _Different


def _merged(mine: Any, yours: Any, choose: Callable[[Any, Any], fx.Node]) -> Any:
    if isinstance(mine, fx.Node) or isinstance(yours, fx.Node):
        return mine if mine is yours else choose(mine, yours)
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
    flag = _flag_of(tracer, node)
    training = tracer.branches[flag][1]

    def choose(mine: Any, yours: Any) -> fx.Node:
        flag_node = _flag_node(tracer, flag)
        with tracer.graph.inserting_before(node):
            values = (mine, yours) if training else (yours, mine)
            chosen = tracer.graph.call_function(in_mode, (flag_node, *values))
        set_value(chosen, mine.meta["val"] if isinstance(mine, fx.Node) else mine)
        for key in ("nn_module_stack", "stack_trace", CONDITIONS):
            if key in node.meta:
                chosen.meta[key] = node.meta[key]
        return chosen

    return choose


def _flag_of(tracer: ValueTracer, node: fx.Node) -> str:
    """The flag of the nearest module around a node that branched on its own."""
    stack = [path for path, _ in node.meta.get("nn_module_stack", {}).values()]
    names = [f"{path}.training" for path in reversed(stack)] + ["training"]
    return next((name for name in names if name in tracer.branches), next(iter(tracer.branches)))


def _flag_node(tracer: ValueTracer, flag: str) -> fx.Node:
    """The ``get_attr`` node of a flag, at the top of the graph, so that it is there for everybody."""
    last = [node for node in tracer.graph.nodes if node.op == "placeholder"][-1:]
    found: list[fx.Node] = list(tracer.graph.find_nodes(op="get_attr", target=flag))
    if found:
        first = next(iter(tracer.graph.nodes))
        (last[0].append if last else first.prepend)(found[0])
        return found[0]
    place = tracer.graph.inserting_after(last[0]) if last else tracer.graph.inserting_before()
    with place:
        # Not Graph.get_attr, which warns about attributes that are neither modules nor tensors.
        node = tracer.graph.create_node("get_attr", flag)
    set_value(node, tracer.branches[flag][1])
    return node
