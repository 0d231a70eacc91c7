"""One graph for train and eval mode, where the model's Python code branches on ``self.training``.

The model is traced once in each mode, and the two graphs are merged.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Sequence
from typing import Any

from torch import fx

from fxgrow.graph.arguments import get_argument, set_argument
from fxgrow.graph.conditional import run_only_if
from fxgrow.graph.node_functions import guard, guard_mode, in_mode
from fxgrow.graph.node_meta import CHECKPOINT, CONDITIONS, set_value
from fxgrow.tracing.alignment import Alignment, Different, merge_checkpoints
from fxgrow.tracing.mode_flags import branching, flag_node, flag_of
from fxgrow.tracing.random_branches import Alternative, RandomBranches
from fxgrow.tracing.tracer import ValueTracer


def merge_modes(tracer: ValueTracer, other: ValueTracer, alternatives: Sequence[Alternative] = ()) -> None:
    """Makes ``tracer.graph`` right in both modes.

    Nodes of one mode alone become conditional: the other mode does not run them, so that it draws no random number and
    changes no buffer there. A value that differs becomes a node that picks the value of the module's mode: of two
    constants, as in ``dropout(x, 0.1 if self.training else 0.0)``, or of two nodes. ``other`` is a trace with the flags
    flipped that the first one branched on; they have shared constants.

    Nodes of one outcome of a random decision become conditional likewise. In eval mode the outcome is the traced one.
    """
    ours, theirs = list(tracer.graph.nodes), list(other.graph.nodes)
    nodes = Alignment(ours, theirs, tracer.branches)
    merge_checkpoints(nodes.pairs, theirs)
    for flag in tracer.branches:
        flag_node(tracer, flag)
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
    except Different:  # a tensor in one mode, a tuple with more in the other
        nodes.changes.append((ours[-1], {(0,): theirs[-1].args[0]}))
    for node, values in nodes.changes:
        for path, value in values.items():
            value = fx.node.map_arg(value, lambda n: nodes.pairs.get(n, n))
            set_argument(node, path, _choose(tracer, node, get_argument(node, path), value))
    _guard_other_modes(tracer)
    if alternatives:
        RandomBranches(tracer, {n: n for n in ours} | nodes.pairs).merge(alternatives)


def _run_in_one_mode(tracer: ValueTracer, node: fx.Node, captured: bool) -> None:
    """Makes a node run in one mode alone: that of the capture, or the other one."""
    if node.op == "get_attr":
        return  # costs nothing
    flag = flag_of(tracer, node)
    run_only_if(node, flag_node(tracer, flag), tracer.branches[flag][1] is captured)


def guard_modes(tracer: ValueTracer) -> None:
    """Makes ``tracer.graph`` refuse to run in the mode in which it was not captured."""
    for flag, (_, value, where) in tracer.branches.items():
        node = flag_node(tracer, flag)
        with tracer.graph.inserting_after(node):
            guard_node = tracer.graph.call_function(guard_mode, (node, value, where))
        set_value(guard_node, None)


def _guard_other_modes(tracer: ValueTracer) -> None:
    """Refuses modes in which a node would read what only another module's mode computes."""
    flags = {n.name: n for n in map(functools.partial(flag_node, tracer), tracer.branches)}

    def flags_of(node: fx.Node) -> set[str]:
        found = {name for name, _ in node.meta.get(CONDITIONS, ()) if name in flags}
        return found | ({str(node.args[0])} if node.target is in_mode else set())

    alike: set[tuple[str, str]] = set()
    for node in tracer.graph.nodes:
        if used := flags_of(node):
            sources = set().union(*map(flags_of, node.all_input_nodes))
            first, *others = sorted(used | sources if sources or branching(tracer, node) else flags)
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
    flags = {flag_node(tracer, flag).name: flag for flag in tracer.branches}
    conditions = [c for value in (mine, yours) if isinstance(value, fx.Node) for c in value.meta.get(CONDITIONS, ())]
    flag = next((flags[name] for name, _ in conditions if name in flags), flag_of(tracer, node))
    condition = flag_node(tracer, flag)
    with tracer.graph.inserting_before(node):
        values = (mine, yours) if tracer.branches[flag][1] else (yours, mine)
        chosen = tracer.graph.call_function(in_mode, (condition, *values))
    set_value(chosen, fx.node.map_arg(mine, lambda n: n.meta["val"]))
    kept = "nn_module_stack", "stack_trace", CONDITIONS, CHECKPOINT
    chosen.meta |= {key: node.meta[key] for key in kept if key in node.meta}
    return chosen
