"""One graph for train and eval mode, where the model's Python code branches on ``self.training``.

The model is traced once in each mode, and the two graphs are merged.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import is_dataclass
from difflib import SequenceMatcher
from typing import Any

import torch
from torch import fx
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.dropout import _DropoutNd

from fxgrow.graph.node_functions import guard_mode, in_mode
from fxgrow.graph.node_meta import set_value
from fxgrow.graph.purity import is_pure
from fxgrow.tracing.tracer import ValueTracer

_LITERALS = (bool, int, float, type(None), str, torch.dtype)


class _Different(Exception):
    pass


def merge_modes(tracer: ValueTracer, other: ValueTracer) -> bool:
    """Make ``tracer.graph`` right in both modes, if that takes no more than choosing between values.

    A value that differs becomes a node that picks the one of the mode the module is in: of two constants, as in
    ``dropout(x, 0.1 if self.training else 0.0)``, or of two nodes, as for heads that only training reads. Both nodes
    are computed then, so what one mode alone computes must change nothing that lasts.

    Returns:
        False, with the graph unchanged, if the traces differ in more than that.
    """
    ours, theirs = list(tracer.graph.nodes), list(other.graph.nodes)
    keys = [[(n.op, n.name if n.op == "placeholder" else n.target) for n in nodes] for nodes in (ours, theirs)]
    kinds = {key: i for i, key in enumerate(dict.fromkeys(keys[0] + keys[1]))}
    mine_kinds, your_kinds = ([kinds[k] for k in own] for own in keys)
    steps = SequenceMatcher(None, mine_kinds, your_kinds, autojunk=False).get_opcodes()
    training, *others = {value for _, value, _ in tracer.branches.values()}
    mine_only = {n for kind, a, b, _, _ in steps if kind != "equal" for n in ours[a:b]}
    yours_only = {n for kind, _, _, a, b in steps if kind != "equal" for n in theirs[a:b]}
    if others and (mine_only or yours_only):
        return False  # captured with parts in train and parts in eval mode
    if not all(_leaves_no_trace(tracer, n, training, mine_only) for n in mine_only):
        return False
    if not all(_leaves_no_trace(other, n, not training, yours_only) for n in yours_only):
        return False
    pairs: dict[fx.Node, fx.Node] = {}
    extra = mine_only | yours_only
    changes: list[tuple[fx.Node, Any, Any]] = []
    copies: list[tuple[fx.Node, fx.Node]] = []
    results: tuple[Any, Any] = None, None
    try:
        for kind, a, b, c, d in steps:
            if kind != "equal":
                copies += [(yours, ours[b]) for yours in theirs[c:d]]
                # stands for its copy until it is known that there will be one
                pairs.update({yours: yours for yours in theirs[c:d]})
                continue
            for mine, yours in zip(ours[a:b], theirs[c:d], strict=True):
                if not _same_constant(tracer, other, mine):
                    return False
                if mine.op == "output":
                    results = mine.args[0], yours.args[0]
                    continue
                same = [_equal(x, y, pairs, extra) for x, y in ((mine.args, yours.args), (mine.kwargs, yours.kwargs))]
                if not all(same):
                    changes.append((mine, yours.args, yours.kwargs))
                pairs[yours] = mine
    except _Different:
        return False
    for yours, before in copies:
        with tracer.graph.inserting_before(before):
            copy = tracer.graph.node_copy(yours, pairs.__getitem__)
        copy.meta = dict(yours.meta)
        pairs[yours] = copy
    _merge_results(tracer, *results, pairs, extra)
    for node, args, kwargs in changes:
        choose = _chooser(tracer, node)
        args, kwargs = fx.node.map_arg((args, kwargs), pairs.__getitem__)
        node.args = _merged(node.args, args, choose)
        node.kwargs = _merged(node.kwargs, kwargs, choose)
    return True


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


def _leaves_no_trace(tracer: ValueTracer, node: fx.Node, training: bool, own: set[fx.Node]) -> bool:
    """Whether a node that one mode alone has may run in the other too.

    Norms that only training reaches use their own flag and keep their statistics in eval mode; those that only eval
    mode reaches would be fed in training.
    """
    if node.op in ("placeholder", "output") or (node.op == "get_attr" and str(node.target) in tracer.constants):
        return False  # constants are numbered by each trace on its own
    if node.op == "call_module":
        module = tracer.root.get_submodule(str(node.target))
        return training or not any(isinstance(m, (_NormBase, _DropoutNd)) for m in module.modules())
    inplace = node.kwargs.get("inplace")
    if inplace and node.args and node.args[0] in own:
        return True  # an activation in place of what this mode alone has made
    structure = isinstance(node.target, type) and (issubclass(node.target, (tuple, dict)) or is_dataclass(node.target))
    return structure or is_pure(node)


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
    if isinstance(mine, fx.Node):
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
    stack = [path for path, _ in node.meta.get("nn_module_stack", {}).values()]
    names = [f"{path}.training" for path in reversed(stack)] + ["training"]
    flag = next((name for name in names if name in tracer.branches), next(iter(tracer.branches)))
    training = tracer.branches[flag][1]

    def choose(mine: Any, yours: Any) -> fx.Node:
        flag_node = _flag_node(tracer, flag)
        with tracer.graph.inserting_before(node):
            values = (mine, yours) if training else (yours, mine)
            chosen = tracer.graph.call_function(in_mode, (flag_node, *values))
        set_value(chosen, mine.meta["val"] if isinstance(mine, fx.Node) else mine)
        for key in ("nn_module_stack", "stack_trace"):
            if key in node.meta:
                chosen.meta[key] = node.meta[key]
        return chosen

    return choose


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


def _same_constant(tracer: ValueTracer, other: ValueTracer, node: fx.Node) -> bool:
    name = str(node.target)
    if node.op != "get_attr" or name not in tracer.constants:
        return True
    mine, yours = tracer.constants[name], other.constants.get(name)
    return mine is yours or (yours is not None and mine.dtype == yours.dtype and torch.equal(mine, yours))
