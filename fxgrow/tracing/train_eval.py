"""One graph for train and eval mode, where the model's Python code branches on ``self.training``.

The model is traced once in each mode, and the two graphs are merged.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Collection, Iterable, Mapping
from difflib import SequenceMatcher
from itertools import count
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from fxgrow.graph.arguments import Path, argument_leaves, get_argument, set_argument
from fxgrow.graph.conditional import ConditionalCodeGen, run_only_if
from fxgrow.graph.evaluate import equal_constants
from fxgrow.graph.node_functions import guard, guard_mode, in_mode
from fxgrow.graph.node_meta import CHECKPOINT, CONDITIONS, set_value
from fxgrow.tracing.tracer import ValueTracer

_LITERALS = (bool, int, float, type(None), str, torch.dtype)


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
    ours, theirs = list(tracer.graph.nodes), list(other.graph.nodes)
    nodes = _Alignment(ours, theirs, tracer.branches)
    _merge_checkpoints(nodes.pairs, theirs)
    for flag in tracer.branches:
        _flag_node(tracer, flag)
    for mine in nodes.mine_only:
        _run_in_one_mode(tracer, mine, captured=True)
    for yours, before in nodes.copies:
        with tracer.graph.inserting_before(before):
            copy = tracer.graph.node_copy(yours, lambda n: nodes.pairs.get(n, n))
        copy.meta = dict(yours.meta)
        _run_in_one_mode(tracer, copy, captured=False)
        nodes.pairs[yours] = copy
    try:
        nodes.changes.append((ours[-1], nodes.differences(ours[-1], theirs[-1])))
    except _Different:  # a tensor in one mode, a tuple with more in the other
        nodes.changes.append((ours[-1], {(0,): theirs[-1].args[0]}))
    for node, values in nodes.changes:
        for path, value in values.items():
            value = fx.node.map_arg(value, lambda n: nodes.pairs.get(n, n))
            set_argument(node, path, _choose(tracer, node, get_argument(node, path), value))
    _guard_other_modes(tracer)


class _Alignment:
    """Which nodes of two traces are the same call, and which are of one mode alone.

    Attributes:
        pairs: the node of our trace for one of theirs.
        changes: arguments in which a node of ours differs from its partner.
        mine_only: nodes of our trace alone.
        copies: nodes of their trace alone, each with the node of ours that it goes in front of.
    """

    def __init__(self, ours: list[fx.Node], theirs: list[fx.Node], flags: Collection[str]) -> None:
        inputs = {n.name: n for n in ours if n.op == "placeholder"}
        self.pairs = {n: inputs[n.name] for n in theirs if n.op == "placeholder"}
        self.changes: list[tuple[fx.Node, dict[Path, Any]]] = []
        self.mine_only: list[fx.Node] = []
        self.copies: list[tuple[fx.Node, fx.Node]] = []
        self._extra: set[fx.Node] = set()
        keys = [[(n.op, n.name if n.op == "placeholder" else n.target) for n in nodes] for nodes in (ours, theirs)]
        for kind, a, b, c, d in SequenceMatcher(None, keys[0], keys[1], autojunk=False).get_opcodes():
            if kind != "equal":
                mine_only = [n for n in ours[a:b] if not (n.op == "get_attr" and n.target in flags)]
                self._keep_apart(mine_only, theirs[c:d], ours[b])
                continue
            for mine, yours in zip(ours[a:b], theirs[c:d], strict=True):
                try:
                    changes = {} if mine.op == "output" else self.differences(mine, yours)
                except _Different:  # not the same call after all
                    self._keep_apart([mine], [yours], mine)
                    continue
                self.changes.append((mine, changes))
                self.pairs[yours] = mine

    def _keep_apart(self, ours: Iterable[fx.Node], theirs: Iterable[fx.Node], before: fx.Node) -> None:
        self.mine_only += [n for n in ours if n.op != "placeholder"]
        self.copies += [(n, before) for n in theirs if n.op != "placeholder"]
        self._extra.update(ours, theirs)

    def differences(self, mine: fx.Node, yours: fx.Node) -> dict[Path, Any]:
        """Returns the arguments of `yours`, by path, where `mine` has another literal or node of one mode."""
        structures = [pytree.tree_structure((n.args, n.kwargs)) for n in (mine, yours)]
        theirs = dict(argument_leaves(yours))
        if structures[0] != structures[1] or theirs.keys() != dict(argument_leaves(mine)).keys():
            raise _Different
        shapes = [value.shape for value in (mine.meta["val"], yours.meta["val"]) if isinstance(value, torch.Tensor)]
        if mine.op != "output" and len(set(shapes)) > 1:
            raise _Different
        return {path: theirs[path] for path, value in argument_leaves(mine) if not self._same(value, theirs[path])}

    def _same(self, mine: Any, yours: Any) -> bool:
        nodes = [value for value in (mine, yours) if isinstance(value, fx.Node)]
        literals = [value for value in (mine, yours) if isinstance(value, _LITERALS)]
        if len(nodes) == 2 and self.pairs.get(yours) is mine:
            return True
        if not nodes and type(mine) is type(yours) and mine == yours:
            return True
        if len(nodes) + len(literals) == 2 and (not nodes or not self._extra.isdisjoint(nodes)):
            return False
        raise _Different


def _merge_checkpoints(pairs: Mapping[fx.Node, fx.Node], theirs: Iterable[fx.Node]) -> None:
    """Gives a checkpointed part the same number in both graphs; one of one mode alone is one in both."""
    numbers = {yours.meta.get(CHECKPOINT): mine.meta.get(CHECKPOINT) for yours, mine in pairs.items()}
    for node in theirs:
        if number := node.meta.get(CHECKPOINT):
            node.meta[CHECKPOINT] = numbers.get(number) or number
            if node in pairs:
                pairs[node].meta.setdefault(CHECKPOINT, node.meta[CHECKPOINT])
                pairs[node].graph.set_codegen(ConditionalCodeGen())


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


def _guard_other_modes(tracer: ValueTracer) -> None:
    """Refuses modes in which a node would read what only another module's mode computes."""
    flags = {n.name: n for n in map(functools.partial(_flag_node, tracer), tracer.branches)}

    def flags_of(node: fx.Node) -> set[str]:
        found = {name for name, _ in node.meta.get(CONDITIONS, ()) if name in flags}
        return found | ({str(node.args[0])} if node.target is in_mode else set())

    alike: set[tuple[str, str]] = set()
    for node in tracer.graph.nodes:
        if used := flags_of(node):
            sources = set().union(*map(flags_of, node.all_input_nodes))
            first, *others = sorted(used | sources if sources or _branching(tracer, node) else flags)
            alike |= {(first, other) for other in others}
    for first, other in sorted(alike):
        with tracer.graph.inserting_after(flags[next(iter(flags))]):  # each is moved to the top, so the first is last
            same = tracer.graph.call_function(operator.eq, (flags[first], flags[other]))
            expected = flags[first].meta["val"] == flags[other].meta["val"]
        set_value(same, expected)
        message = f"`{flags[first].target} == {flags[other].target}`"
        with tracer.graph.inserting_after(same):
            set_value(tracer.graph.call_function(guard, (same, expected, message)), None)


def _choose(tracer: ValueTracer, node: fx.Node, mine: Any, yours: Any) -> fx.Node:
    """Makes an ``in_mode`` node in front of `node`, on the flag of a value, or of the nearest module that branched."""
    flags = {_flag_node(tracer, flag).name: flag for flag in tracer.branches}
    conditions = [c for value in (mine, yours) if isinstance(value, fx.Node) for c in value.meta.get(CONDITIONS, ())]
    flag = next((flags[name] for name, _ in conditions if name in flags), _flag_of(tracer, node))
    flag_node = _flag_node(tracer, flag)
    with tracer.graph.inserting_before(node):
        values = (mine, yours) if tracer.branches[flag][1] else (yours, mine)
        chosen = tracer.graph.call_function(in_mode, (flag_node, *values))
    set_value(chosen, fx.node.map_arg(mine, lambda n: n.meta["val"]))
    kept = "nn_module_stack", "stack_trace", CONDITIONS, CHECKPOINT
    chosen.meta |= {key: node.meta[key] for key in kept if key in node.meta}
    return chosen


def _flag_of(tracer: ValueTracer, node: fx.Node) -> str:
    """Returns the flag of the nearest module around a node that branched."""
    return next(iter([*_branching(tracer, node), *tracer.branches]))


def _branching(tracer: ValueTracer, node: fx.Node) -> list[str]:
    """Returns the flags of the modules around a node that branched, innermost first."""
    names = [f"{path}.training" for path, _ in reversed(node.meta.get("nn_module_stack", {}).values())]
    return [name for name in [*names, "training"] if name in tracer.branches]


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
