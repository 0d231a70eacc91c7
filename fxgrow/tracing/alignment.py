"""Which nodes of two traces of one model are the same call."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from difflib import SequenceMatcher
from itertools import count
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from fxgrow.graph.arguments import Path, argument_leaves
from fxgrow.graph.conditional import ConditionalCodeGen
from fxgrow.graph.evaluate import equal_constants
from fxgrow.graph.node_meta import CHECKPOINT
from fxgrow.tracing.tracer import ValueTracer

_LITERALS = (bool, int, float, type(None), str, torch.dtype)


class Different(Exception):
    """Matching nodes differ in more than a literal or a node of one mode alone."""


class Alignment:
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
                except Different:  # not the same call after all
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
            raise Different
        shapes = [value.shape for value in (mine.meta["val"], yours.meta["val"]) if isinstance(value, torch.Tensor)]
        if mine.op != "output" and len(set(shapes)) > 1:
            raise Different
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
        raise Different


def merge_checkpoints(pairs: Mapping[fx.Node, fx.Node], theirs: Iterable[fx.Node]) -> None:
    """Gives a checkpointed part the same number in both graphs; one of one mode alone is one in both."""
    numbers = {yours.meta.get(CHECKPOINT): mine.meta.get(CHECKPOINT) for yours, mine in pairs.items()}
    for node in theirs:
        if number := node.meta.get(CHECKPOINT):
            node.meta[CHECKPOINT] = numbers.get(number) or number
            if node in pairs:
                pairs[node].meta.setdefault(CHECKPOINT, node.meta[CHECKPOINT])
                pairs[node].graph.set_codegen(ConditionalCodeGen())


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
