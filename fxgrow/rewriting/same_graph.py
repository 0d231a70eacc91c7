"""Compares two graphs node by node: whether the code of a module computes what a grown graph does."""

from __future__ import annotations

import itertools
import operator
import re
from collections.abc import Mapping
from typing import Any

from torch import fx
from torch.utils import _pytree as pytree


def first_difference(grown: fx.GraphModule, captured: fx.GraphModule) -> str | None:
    """Returns a text about the first node that differs; None where the graphs are the same."""
    node_map: dict[fx.Node, fx.Node] = {}
    unread: set[fx.Node] = set()  # shapes in the grown graph with a length that nothing reads any more
    for node, other in itertools.zip_longest(grown.graph.nodes, captured.graph.nodes):
        if node is None or other is None or not _same(node, other, node_map, unread):
            first = node or other
            ours, theirs = ("missing" if n is None else f"`{n.format_node()}`" for n in (node, other))
            return f"node {first.name!r}{location(first)} is {ours} in the grown graph and {theirs} in its code"
        node_map[other] = node
    return None


def _same(node: fx.Node, other: fx.Node, node_map: Mapping[fx.Node, fx.Node], unread: set[fx.Node]) -> bool:
    if node.op != other.op or _identity(node.target) != _identity(other.target):
        return False
    # both are mapped, so that both have the same immutable containers
    ours, spec = pytree.tree_flatten(fx.map_arg((node.args, node.kwargs), lambda n: n))
    theirs, other_spec = pytree.tree_flatten(fx.map_arg((other.args, other.kwargs), lambda n: node_map[n]))
    if spec != other_spec:
        return False
    # -1 follows from the other sizes; the code may compute a size that growth wrote as a number
    inferred = is_view(node) and ours.count(-1) == 1
    computed = [type(n) is fx.Node and n.meta.get("val") for n in argument_list(other)]
    equal = [
        _equal(x, y) or (inferred and x == -1) or (type(x) is int and type(n) is int and x == n)
        for x, y, n in zip(ours, theirs, computed, strict=True)
    ]
    if not unread.isdisjoint(node.all_input_nodes):
        if node.target is not operator.getitem or not all(equal):
            return False
        if node.meta["val"] != other.meta["val"]:
            unread.add(node)
        return True
    if not all(equal) and node.target is operator.add and isinstance(node.meta.get("val"), tuple):
        # `x.size()[:-1] + (n,)`, where growth has put -1 for n into the view that read it
        unread.add(node)
        return all(e or type(x) is type(y) is int for e, x, y in zip(equal, ours, theirs, strict=True))
    return all(equal)


def argument_list(node: fx.Node) -> list[Any]:
    """Returns the arguments of a node without the containers that they are in."""
    return pytree.tree_leaves(fx.map_arg((node.args, node.kwargs), lambda n: n))


def is_view(node: fx.Node) -> bool:
    return node.op == "call_method" and node.target in ("view", "reshape")


def location(node: fx.Node) -> str:
    """Returns where a node's code is, for messages; nothing where that is unknown."""
    match = re.match(r'File "(.*)", line (\d+), in .*\n\s*(.*)', node.stack_trace or "")
    return f" at {match[1]}:{match[2]}: `{match[3]}`" if match else ""


def _equal(x: Any, y: Any) -> bool:
    if isinstance(x, slice) and isinstance(y, slice):
        return (x.start, x.stop, x.step) == (y.start, y.stop, y.step)
    # NaN equals NaN
    return x is y or (type(x) is type(y) and (_identity(x) == _identity(y) or bool(x != x and y != y)))


def _identity(target: Any) -> Any:
    """Returns a function's name: one that each call of forward defines anew is a new object each time."""
    if callable(target) and hasattr(target, "__qualname__"):
        return getattr(target, "__module__", None), target.__qualname__
    return target
