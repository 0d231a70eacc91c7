"""One graph for train and eval mode, where the model's Python code branches on ``self.training``.

The model is traced once in each mode, and the two graphs are merged.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from difflib import SequenceMatcher
from itertools import count
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from fxgrow.graph.arguments import Path, argument_leaves, get_argument, set_argument
from fxgrow.graph.conditional import run_only_if
from fxgrow.graph.node_functions import guard_mode, in_mode
from fxgrow.graph.node_meta import CONDITIONS, set_value
from fxgrow.tracing.tracer import ValueTracer, equal_constants

_LITERALS = (bool, int, float, type(None), str, torch.dtype)

#: kind, and the ranges of nodes in both graphs, as in `SequenceMatcher.get_opcodes`
Step = tuple[str, int, int, int, int]


class _Different(Exception):
    """Matching nodes differ in more than a literal or a node of one mode alone."""


def merge_modes(tracer: ValueTracer, other: ValueTracer) -> None:
    """Makes ``tracer.graph`` right in both modes.

    Nodes of one mode alone become conditional: the other mode does not run them, so that it draws no random number and
    changes no buffer there. A value that differs becomes a node that picks the value of the module's mode: of two
    constants, as in ``dropout(x, 0.1 if self.training else 0.0)``, or of two nodes. ``other`` is a trace with the flags
    flipped that the first one branched on.
    """
    _share_constants(tracer, other)
    keys = [[(n.op, n.name if n.op == "placeholder" else n.target) for n in t.graph.nodes] for t in (tracer, other)]
    try:
        _merge(tracer, other, SequenceMatcher(None, keys[0], keys[1], autojunk=False).get_opcodes())
    except _Different:
        if len(tracer.branches) > 1:
            guard_modes(tracer)  # there are more than two modes
            return
        # no common part was found: two graphs, one of which runs
        _merge(tracer, other, [("replace", 0, len(tracer.graph.nodes) - 1, 0, len(other.graph.nodes) - 1)])


def _merge(tracer: ValueTracer, other: ValueTracer, steps: Sequence[Step]) -> None:
    """Merges the graphs along the matching nodes, or raises _Different before anything has changed."""
    ours, theirs = list(tracer.graph.nodes), list(other.graph.nodes)
    flags = {n for n in ours if n.op == "get_attr" and str(n.target) in tracer.branches}
    mine_only = {n for kind, a, b, _, _ in steps if kind != "equal" for n in ours[a:b] if n.op != "placeholder"} - flags
    theirs_only = {n for kind, _, _, a, b in steps if kind != "equal" for n in theirs[a:b]}
    inputs = {n.name: n for n in ours if n.op == "placeholder"}
    pairs = {n: inputs[n.name] for n in theirs if n.op == "placeholder"}
    extra = mine_only | theirs_only
    changes: list[tuple[fx.Node, dict[Path, Any]]] = []
    copies: list[tuple[fx.Node, fx.Node]] = []
    for kind, a, b, c, d in steps:
        if kind != "equal":
            new = [yours for yours in theirs[c:d] if yours.op != "placeholder"]
            copies += [(yours, ours[b]) for yours in new]
            # stands for its copy until it is known that there will be one
            pairs.update({yours: yours for yours in new})
            continue
        for mine, yours in zip(ours[a:b], theirs[c:d], strict=True):
            if mine.op != "output":
                changes.append((mine, _differences(mine, yours, pairs, extra)))
                pairs[yours] = mine
    for flag in tracer.branches:
        _flag_node(tracer, flag)
    for mine in mine_only:
        _run_in_one_mode(tracer, mine, captured=True)
    for yours, before in copies:
        with tracer.graph.inserting_before(before):
            copy = tracer.graph.node_copy(yours, pairs.__getitem__)
        copy.meta = dict(yours.meta)
        _run_in_one_mode(tracer, copy, captured=False)
        pairs[yours] = copy
    try:
        changes.append((ours[-1], _differences(ours[-1], theirs[-1], pairs, extra)))
    except _Different:  # a tensor in one mode, a tuple with more in the other
        changes.append((ours[-1], {(0,): theirs[-1].args[0]}))
    for node, values in changes:
        for path, value in values.items():
            value = fx.node.map_arg(value, pairs.__getitem__)
            set_argument(node, path, _choose(tracer, node, get_argument(node, path), value))


def _run_in_one_mode(tracer: ValueTracer, node: fx.Node, captured: bool) -> None:
    """Makes a node run in one mode alone: that of the capture, or the other one."""
    if node.op == "get_attr":
        return  # costs nothing
    flag = _flag_of(tracer, node)
    run_only_if(node, _flag_node(tracer, flag), tracer.branches[flag][1] is captured)


def _share_constants(tracer: ValueTracer, other: ValueTracer) -> None:
    """Gives equal constants of both traces one name, and constants of the other trace alone new names."""
    free = (f"_constant{i}" for i in count() if not hasattr(tracer.root, f"_constant{i}"))
    names = {}
    for name, value in other.constants.items():
        same = (mine for mine, t in tracer.constants.items() if equal_constants(t, value))
        names[name] = next(same, None) or next(new for new in free if new not in tracer.constants)
        tracer.constants[names[name]] = value
    for node in other.graph.find_nodes(op="get_attr"):
        node.target = names.get(str(node.target), node.target)


def guard_modes(tracer: ValueTracer) -> None:
    """Makes ``tracer.graph`` refuse to run in the mode in which it was not captured."""
    for flag, (_, value, where) in tracer.branches.items():
        node = _flag_node(tracer, flag)
        with tracer.graph.inserting_after(node):
            guard_node = tracer.graph.call_function(guard_mode, (node, value, where))
        set_value(guard_node, None)


def _differences(
    mine: fx.Node, yours: fx.Node, pairs: Mapping[fx.Node, fx.Node], extra: set[fx.Node]
) -> dict[Path, Any]:
    """Returns the arguments of `yours`, by path, where `mine` has another literal or node of one mode, or raises."""
    structures = [pytree.tree_structure((n.args, n.kwargs)) for n in (mine, yours)]
    theirs = dict(argument_leaves(yours))
    if structures[0] != structures[1] or theirs.keys() != dict(argument_leaves(mine)).keys():
        raise _Different
    return {path: theirs[path] for path, value in argument_leaves(mine) if not _same(value, theirs[path], pairs, extra)}


def _same(mine: Any, yours: Any, pairs: Mapping[fx.Node, fx.Node], extra: set[fx.Node]) -> bool:
    nodes = [value for value in (mine, yours) if isinstance(value, fx.Node)]
    literals = [value for value in (mine, yours) if isinstance(value, _LITERALS)]
    if len(nodes) == 2 and pairs.get(yours) is mine:
        return True
    if not nodes and type(mine) is type(yours) and mine == yours:
        return True
    if len(nodes) + len(literals) == 2 and (not nodes or not extra.isdisjoint(nodes)):
        return False
    raise _Different


def _choose(tracer: ValueTracer, node: fx.Node, mine: Any, yours: Any) -> fx.Node:
    """Makes an ``in_mode`` node in front of `node`, on the flag of the nearest module that branched."""
    flag = _flag_of(tracer, node)
    flag_node = _flag_node(tracer, flag)
    with tracer.graph.inserting_before(node):
        values = (mine, yours) if tracer.branches[flag][1] else (yours, mine)
        chosen = tracer.graph.call_function(in_mode, (flag_node, *values))
    set_value(chosen, fx.node.map_arg(mine, lambda n: n.meta["val"]))
    chosen.meta |= {key: node.meta[key] for key in ("nn_module_stack", "stack_trace", CONDITIONS) if key in node.meta}
    return chosen


def _flag_of(tracer: ValueTracer, node: fx.Node) -> str:
    """Returns the flag of the nearest module around a node that branched."""
    names = [f"{path}.training" for path, _ in reversed(node.meta.get("nn_module_stack", {}).values())]
    return next((name for name in [*names, "training"] if name in tracer.branches), next(iter(tracer.branches)))


def _flag_node(tracer: ValueTracer, flag: str) -> fx.Node:
    """Returns the ``get_attr`` node of a flag, moved to the top of the graph, before all its users."""
    nodes: list[fx.Node] = list(tracer.graph.find_nodes(op="get_attr", target=flag))
    if not nodes:
        # not Graph.get_attr, which warns about attributes that are neither modules nor tensors
        nodes.append(tracer.graph.create_node("get_attr", flag))
        set_value(nodes[0], tracer.branches[flag][1])
    inputs = list(tracer.graph.find_nodes(op="placeholder"))
    (inputs[-1].append if inputs else next(iter(tracer.graph.nodes)).prepend)(nodes[0])
    return nodes[0]
