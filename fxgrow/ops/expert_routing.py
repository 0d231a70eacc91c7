"""Mixtures of experts: weights `[experts, ...]` with one matrix per expert, and which tokens each expert gets.

Rows come stacked, `[experts, tokens, features]`, or as one list sorted by expert. For statistics both are laid out as
`[samples, experts * tokens, features]`, zero where a token does not go to an expert: zeros add nothing to a second
moment, and each expert then has samples and positions like any other layer.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from fxgrow.errors import ProfileError
from fxgrow.ops.elementwise import elementwise
from fxgrow.ops.registry import find_rule

STACKED = frozenset({torch.matmul, torch.bmm, operator.matmul, "matmul", "bmm", "__matmul__"})
SORTED = frozenset(f for f in (getattr(F, "grouped_mm", None), getattr(torch, "_grouped_mm", None)) if f is not None)
_CASTS = frozenset({"to", "float", "double", "half", "bfloat16", "type", "contiguous", "detach", "clone"})


@dataclass(frozen=True)
class Routes:
    """Which expert each row of a product belongs to; the nodes are those of a sorted list."""

    experts: int  # how many
    ends: fx.Node | None = None  # the index at which each expert's rows end
    tokens: fx.Node | None = None  # all tokens
    index: fx.Node | None = None  # the token index of each row

    def nodes(self) -> list[fx.Node]:
        """Nodes whose values `by_sample` needs."""
        return [n for n in (self.ends, self.tokens, self.index) if n is not None]

    def by_sample(self, rows: Tensor, known: Mapping[fx.Node, Tensor], samples: int) -> Tensor:
        """Rows as `[samples, experts * positions, features]`, padded where the tokens do not divide evenly.

        Raises:
            ProfileError: a token goes to the same expert twice.
        """
        if self.ends is not None and self.tokens is not None and self.index is not None:
            rows = self._stacked(rows, known[self.ends], len(known[self.tokens]), known[self.index])
        positions = -(-rows.shape[1] // samples)
        rows = F.pad(rows, (0, 0, 0, samples * positions - rows.shape[1]))
        by_sample: Tensor = rows.unflatten(1, (samples, positions)).transpose(0, 1).flatten(1, 2)
        return by_sample

    def _stacked(self, rows: Tensor, ends: Tensor, tokens: int, index: Tensor) -> Tensor:
        number = torch.arange(len(rows), device=rows.device, dtype=ends.dtype)
        expert = torch.searchsorted(ends, number, right=True)
        valid = expert < self.experts  # rows after the last end belong to no expert
        positions = (expert * tokens + index)[valid]
        if len(positions.unique()) < len(positions):
            raise ProfileError("A mixture sends a token to the same expert twice: its widths cannot be profiled.")
        out: Tensor = rows.new_zeros(self.experts * tokens, rows.shape[1])
        out.index_copy_(0, positions, rows[valid])
        return out.view(self.experts, tokens, -1)


def routes(node: fx.Node) -> Routes | None:
    """The routes of a product of experts, if the graph shows them; None for any other node."""
    x, weight = (*node.args[:2], None, None)[:2]
    if not isinstance(x, fx.Node) or not isinstance(weight, fx.Node) or not _is_product(node):
        return None
    shape = tuple(node.meta["val"].shape)
    # every reader gets the rows in the new layout
    if any(isinstance(u.meta.get("val"), Tensor) and not (_is_product(u) and u.args[0] is x) for u in x.users):
        return None
    if len(shape) == 3:
        return Routes(shape[0]) if x.meta["val"].shape[0] == shape[0] else None
    ends = _ends(node)
    gathered = None if ends is None else _gathered(x, ends, {})
    return gathered and Routes(weight.meta["val"].shape[0], ends, *gathered)


def all_routes(gm: fx.GraphModule) -> dict[fx.Node, Routes]:
    """The routes of every product of experts, and of its input."""
    by_node: dict[fx.Node, Routes] = {}
    for node in gm.graph.nodes:
        if (r := routes(node)) is not None:
            by_node[node] = by_node[node.args[0]] = r
    return by_node


def _is_product(node: fx.Node) -> bool:
    """Whether a node multiplies rows by three-dimensional weights."""
    weight = (*node.args, None, None)[1]
    value = weight.meta.get("val") if isinstance(weight, fx.Node) and weight.op == "get_attr" else None
    return node.target in SORTED or (node.target in STACKED and isinstance(value, Tensor) and value.dim() == 3)


def _ends(node: fx.Node) -> fx.Node | None:
    """The node with the index at which the rows of each expert end."""
    ends = node.kwargs.get("offs", (*node.args, None)[2])
    return ends if isinstance(ends, fx.Node) else None


def _gathered(node: fx.Node, ends: fx.Node, known: dict[fx.Node, Any]) -> Any:
    """The nodes of all tokens and of each row's token index, if everything since then works row by row."""
    if node in known:
        return known[node]
    known[node] = None
    if _picks_rows(node):
        known[node] = node.args[:2]
    elif node.target in SORTED or _row_by_row(node):
        inputs = [node.all_input_nodes[0]] if node.target in SORTED else _with_rows(node)
        same = node.target not in SORTED or _ends(node) is ends
        origins = {_gathered(n, ends, known) for n in inputs} if same else set()
        known[node] = origins.pop() if len(origins) == 1 else None
    return known[node]


def _picks_rows(node: fx.Node) -> bool:
    if node.target is not operator.getitem or not isinstance(index := node.args[1], fx.Node):
        return False
    rows, tokens = index.meta.get("val"), node.all_input_nodes[0].meta.get("val")
    integers = isinstance(rows, Tensor) and rows.dim() == 1 and rows.dtype in (torch.int64, torch.int32)
    return integers and isinstance(tokens, Tensor) and tokens.dim() == 2


def _row_by_row(node: fx.Node) -> bool:
    name = getattr(node.target, "__name__", node.target)
    if name in _CASTS:
        return True
    if name in ("chunk", "split"):
        return node.kwargs.get("dim", (*node.args, 0, 0)[2]) in (-1, 1)
    if node.target is operator.getitem:
        index = node.args[1]
        rows, columns = index if isinstance(index, tuple) and len(index) == 2 else (None, None)
        return isinstance(index, int) or (rows in (Ellipsis, slice(None)) and isinstance(columns, slice))
    gm = node.graph.owning_module
    module: nn.Module | None = gm.get_submodule(str(node.target)) if node.op == "call_module" and gm else None
    return find_rule(node, module) is elementwise


def _with_rows(node: fx.Node) -> list[fx.Node]:
    """Inputs with one row per token; those that are shared by all rows are left out."""
    values = {n: n.meta.get("val") for n in node.all_input_nodes}
    first = {n: v[0] if isinstance(v, (tuple, list)) and v else v for n, v in values.items()}
    return [n for n, v in first.items() if isinstance(v, Tensor) and v.dim() == 2 and len(v) > 1]
