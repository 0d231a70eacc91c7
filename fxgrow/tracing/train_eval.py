"""One graph for train and eval mode, where the model's Python code branches on ``self.training``.

The model is traced once in each mode, and the two graphs are merged.
"""

from __future__ import annotations

import contextlib
import functools
import operator
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from difflib import SequenceMatcher
from itertools import count
from typing import Any, NamedTuple

import torch
from torch import fx
from torch.utils import _pytree as pytree

from fxgrow.errors import CaptureError
from fxgrow.graph.arguments import Path, argument_leaves, get_argument, set_argument
from fxgrow.graph.conditional import ConditionalCodeGen, run_only_if
from fxgrow.graph.evaluate import equal_constants
from fxgrow.graph.node_functions import guard, guard_mode, holds, in_mode
from fxgrow.graph.node_meta import CHECKPOINT, CONDITIONS, set_value
from fxgrow.tracing.outcomes import Outcomes
from fxgrow.tracing.tracer import ValueTracer

_LITERALS = (bool, int, float, type(None), str, torch.dtype)


class _Different(Exception):
    """Matching nodes differ in more than a literal or a node of one mode alone."""


class Alternative(NamedTuple):
    """What the code does for the other outcome of one decision on random numbers."""

    asked: fx.Node  # the question, in the trace that this is an alternative to, and the outcome there
    outcome: bool
    nodes: _Alignment


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
        nodes = _Alignment(ours, theirs, constants.branches)
        try:
            nodes.changes.append((ours[-1], nodes.differences(ours[-1], theirs[-1])))
        except _Different:
            raise CaptureError("A random number decides what the model returns.") from None
        if any(yours.target is holds for yours, _ in nodes.copies):
            raise CaptureError("One outcome of a random decision leads to another one.")
        _merge_checkpoints(nodes.pairs, theirs)
        if nodes.mine_only or nodes.copies or any(values for _, values in nodes.changes):
            found.append(Alternative(asked, bool(asked.meta["val"]), nodes))
    return found


def merge_modes(tracer: ValueTracer, other: ValueTracer, alternatives: Sequence[Alternative] = ()) -> None:
    """Makes ``tracer.graph`` right in both modes.

    Nodes of one mode alone become conditional: the other mode does not run them, so that it draws no random number and
    changes no buffer there. A value that differs becomes a node that picks the value of the module's mode: of two
    constants, as in ``dropout(x, 0.1 if self.training else 0.0)``, or of two nodes. ``other`` is a trace with the flags
    flipped that the first one branched on; they have shared constants.

    Nodes of one outcome of a random decision become conditional likewise. In eval mode the outcome is the traced one.
    """
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
    if alternatives:
        _RandomBranches(tracer, {n: n for n in ours} | nodes.pairs).merge(alternatives)


class _RandomBranches:
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
        flags = {_flag_node(tracer, flag).name: flag for flag in tracer.branches}
        modes = [name for name, runs in asked.meta.get(CONDITIONS, ()) if name in flags and runs]
        flag = _flag_node(tracer, flags[modes[0]] if modes else _flag_of(tracer, asked))
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


def share_constants(tracer: ValueTracer, other: ValueTracer) -> None:
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
