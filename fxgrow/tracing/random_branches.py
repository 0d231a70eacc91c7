"""Branches on random numbers in training: the traces of their other outcomes, merged into one graph."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from torch import fx

from fxgrow.errors import CaptureError
from fxgrow.graph.arguments import Path, argument_leaves, get_argument, set_argument
from fxgrow.graph.conditional import run_only_if
from fxgrow.graph.node_functions import holds, in_mode
from fxgrow.graph.node_meta import CONDITIONS, set_value
from fxgrow.tracing.alignment import Alignment, Different, merge_checkpoints, share_constants
from fxgrow.tracing.mode_flags import flag_node, flag_of
from fxgrow.tracing.outcomes import Outcomes
from fxgrow.tracing.tracer import ValueTracer


class Alternative(NamedTuple):
    """What the code does for the other outcome of one decision on random numbers."""

    asked: fx.Node  # the question, in the trace that this is an alternative to, and the outcome there
    outcome: bool
    nodes: Alignment


def nearest_outcomes(tracer: ValueTracer, like: ValueTracer, retrace: Callable[[Outcomes], ValueTracer]) -> ValueTracer:
    """Returns a trace whose decisions on random numbers do what the code does in the other mode, and more."""
    keys = Counter((n.op, n.target) for n in like.graph.nodes)

    def distance(trace: ValueTracer) -> tuple[int, int, int]:
        found = Counter((n.op, n.target) for n in trace.graph.nodes)
        return sum((keys - found).values()), -len(trace.outcomes.asked), -len(trace.graph.nodes)

    for place in dict.fromkeys(tracer.outcomes.places):
        with contextlib.suppress(CaptureError):
            tracer = min(tracer, retrace(tracer.outcomes.again(frozenset((place,)))), key=distance)
    return tracer


def alternatives_of(
    tracer: ValueTracer, constants: ValueTracer, retrace: Callable[[Outcomes], ValueTracer]
) -> list[Alternative]:
    """Returns the alternatives that make a difference, one for each decision on random numbers."""
    found = []
    for i, asked in enumerate(tracer.outcomes.asked):
        other = retrace(tracer.outcomes.again(other=i))
        if other.branches.keys() - constants.branches.keys():
            raise CaptureError("A mode is asked for after one outcome of a random decision alone.")
        share_constants(constants, other)
        ours, theirs = list(tracer.graph.nodes), list(other.graph.nodes)
        nodes = Alignment(ours, theirs, constants.branches)
        try:
            nodes.changes.append((ours[-1], nodes.differences(ours[-1], theirs[-1])))
        except Different:
            raise CaptureError("A random number decides what the model returns.") from None
        if any(yours.target is holds for yours, _ in nodes.copies):
            raise CaptureError("One outcome of a random decision leads to another one.")
        merge_checkpoints(nodes.pairs, theirs)
        if nodes.mine_only or nodes.copies or any(values for _, values in nodes.changes):
            found.append(Alternative(asked, bool(asked.meta["val"]), nodes))
    return found


class RandomBranches:
    """Nodes that run for one outcome of a random decision, each decision independent of the others."""

    def __init__(self, tracer: ValueTracer, merged: Mapping[fx.Node, fx.Node]) -> None:
        self._tracer, self._merged = tracer, merged
        self._conditions: dict[str, fx.Node] = {}
        self._chosen: dict[tuple[str, Any], fx.Node] = {}
        self._read: list[tuple[fx.Node, fx.Node]] = []  # by what is of one outcome alone, with the condition

    def merge(self, alternatives: Sequence[Alternative]) -> None:
        conditions = [self._condition(a) for a in alternatives]
        for condition, a in zip(conditions, alternatives, strict=True):
            merged = [self._merged[mine] for mine in a.nodes.mine_only if mine.op != "get_attr"]
            of_modes = [n for node in merged for n in node.all_input_nodes if n.target is in_mode]
            for node in merged + of_modes:
                run_only_if(node, condition, a.outcome)
        for condition, a in reversed(list(zip(conditions, alternatives, strict=True))):
            self._add(condition, a)
        for condition, source in self._read:
            before = {condition.name, *(name for name, _ in source.meta.get(CONDITIONS, ()))}
            if any((name, source) in self._chosen for name in self._conditions.keys() - before):
                raise CaptureError("Random decisions depend on each other.")  # which of both does the code read?
        for node in self._tracer.graph.nodes:
            self._read_chosen(node)
        try:
            self._tracer.graph.lint()
        except RuntimeError as error:
            raise CaptureError("Random decisions depend on each other.") from error

    def _condition(self, a: Alternative) -> fx.Node:
        """Makes the outcome of a decision: a random one in train mode, the traced one in eval mode."""
        tracer, asked = self._tracer, self._merged[a.asked]
        flags = {flag_node(tracer, flag).name: flag for flag in tracer.branches}
        modes = [name for name, runs in asked.meta.get(CONDITIONS, ()) if name in flags and runs]
        flag = flag_node(tracer, flags[modes[0]] if modes else flag_of(tracer, asked))
        if not modes:
            run_only_if(asked, flag, True)
        with tracer.graph.inserting_after(asked):
            condition = tracer.graph.call_function(in_mode, (flag, asked, a.outcome))
        set_value(condition, a.outcome)
        self._conditions[condition.name] = condition
        return condition

    def _add(self, condition: fx.Node, a: Alternative) -> None:
        graph, asked = self._tracer.graph, self._merged[a.asked]
        around = asked.meta[CONDITIONS]
        theirs = {yours: self._merged[mine] for yours, mine in a.nodes.pairs.items()}
        for yours, before in a.nodes.copies:
            with graph.inserting_before(self._merged[before]):
                theirs[yours] = copy = graph.node_copy(yours, theirs.__getitem__)
            copy.meta = dict(yours.meta)
            self._read += [(condition, source) for source in copy.all_input_nodes]
            if copy.op != "get_attr":
                copy.meta[CONDITIONS] = (*around, (condition.name, not a.outcome))
        outer = tuple(c for c in around if c[0] in self._conditions)
        for mine, values in a.nodes.changes:
            for path, value in values.items():
                node, value = self._merged[mine], fx.node.map_arg(value, theirs.__getitem__)
                self._read += [(condition, value)] if isinstance(value, fx.Node) else []
                both = get_argument(node, path)
                modes = isinstance(both, fx.Node) and both.target is in_mode
                if modes and both.args[0] not in self._conditions.values():
                    node, path = both, (1,)  # of train mode
                set_argument(node, path, self._choose(condition, a.outcome, outer, (node, path, value)))

    def _choose(
        self, condition: fx.Node, outcome: bool, outer: tuple[Any, ...], change: tuple[fx.Node, Path, Any]
    ) -> fx.Node:
        """Returns what has the value of the outcome: an argument of a node as it is, or another one."""
        graph, (node, path, value) = self._tracer.graph, change
        mine = get_argument(node, path)
        order = {n: i for i, n in enumerate(graph.nodes)}
        last = max((n for n in (condition, mine, value) if isinstance(n, fx.Node)), key=order.__getitem__)
        with graph.inserting_after(last):
            values = (mine, value) if outcome else (value, mine)
            chosen = graph.call_function(in_mode, (condition, *values))
        set_value(chosen, fx.node.map_arg(mine, lambda n: n.meta["val"]))
        chosen.meta |= {key: node.meta[key] for key in ("nn_module_stack", "stack_trace") if key in node.meta}
        chosen.meta[CONDITIONS] = outer
        self._chosen.setdefault((condition.name, mine), chosen)
        return chosen

    def _read_chosen(self, node: fx.Node) -> None:
        """Lets a node read what another decision has chosen, where it runs for both of its outcomes."""
        runs = {*node.meta.get(CONDITIONS, ())}
        for path, source in argument_leaves(node):
            known = runs | ({(str(node.args[0]), path[-1] == 1)} if node.target is in_mode else set())
            while isinstance(source, fx.Node):
                of = source.meta.get(CONDITIONS, ())
                missing = next((c for c in of if c[0] in self._conditions and c not in known), None)
                if missing is None:
                    break
                if (missing[0], source) not in self._chosen:
                    raise CaptureError("Random decisions depend on each other.")
                source = self._chosen[missing[0], source]
                set_argument(node, path, source)
