"""A copy of a graph with more or fewer units in some widths: the one way to run a network with other units."""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property

import torch
from torch import Tensor

from fxgrow.axes.axes import Dims, length
from fxgrow.axes.structure import Projection
from fxgrow.graph.arguments import replaced_item, set_argument
from fxgrow.graph.graph import compile_graph, copy_graph, lookup, same_kind
from fxgrow.rewriting.entries import resized_parameters
from fxgrow.rewriting.initial_state import rows_that_must_be_zero, write_kept_numbers, write_norm_eps
from fxgrow.rewriting.size_change import SizeChange
from fxgrow.rewriting.values import Values
from fxgrow.rewriting.verify import check_shapes


class WidenedGraph:
    """A resized copy of an analysed graph, not checked yet: its nodes keep the old metadata until `check`.

    Args:
        change: of the widths; its graph is left as it is.
        values: new and old entries, where the defaults are not wanted.
        generator: draws the random rows.

    Attributes:
        gm: the copy.
        node_map: the copy's node for each node of the original.
    """

    def __init__(
        self, change: SizeChange, values: Values | None = None, generator: torch.Generator | None = None
    ) -> None:
        self.change, self.index, self.new_indices = change, change.index, change.new_indices
        self._random_state = (generator or torch.default_generator).get_state()
        resized = resized_parameters(change, values or Values(), generator)
        old = {name: lookup(change.gm, name) for name in resized}
        self.gm = copy_graph(change.gm, {id(t): same_kind(resized[name], t) for name, t in old.items()})
        self.node_map = dict(zip(change.gm.graph.nodes, self.gm.graph.nodes, strict=True))
        self._write_sizes()
        write_norm_eps(self.gm, change, self.node_map)
        write_kept_numbers(change, self.node_map)
        compile_graph(self.gm)
        self._zero_rows = rows_that_must_be_zero(self.gm, change, self.node_map)
        with torch.no_grad():
            for (name, dim), rows in self._zero_rows.items():
                lookup(self.gm, name).index_fill_(dim, rows, 0)

    def parameters(self, values: Values) -> dict[str, Tensor]:
        """The parameters and buffers that change with other values, to which gradients flow; random draws are alike."""
        generator = torch.Generator().set_state(self._random_state)
        resized = resized_parameters(self.change, values, generator)
        for (name, dim), rows in self._zero_rows.items():
            resized[name] = resized[name].index_fill(dim, rows, 0)
        return resized

    @cached_property
    def projections(self) -> list[Projection]:
        """Uses of weights in the copy."""
        uses, nodes = self.change.structure.projections, self.node_map
        return [replace(p, node=nodes[p.node], source=nodes[p.source]) for p in uses]

    def check(self) -> WidenedGraph:
        """Refreshes the metadata of the copy; raises `RewriteError` where a shape is not what the axes say."""
        shapes = {
            self.node_map[node]: tuple(map(self.change.length, dims))
            for node, dims in self.change.structure.outputs.items()
            if isinstance(dims, Dims)
        }
        check_shapes(self.gm, shapes)
        return self

    def _write_sizes(self) -> None:
        """Sizes in arguments and module attributes."""
        change = self.change
        for constant in change.structure.constants:
            size = change.length(constant.axis)
            target, path = constant.where
            if size == length(constant.axis):
                continue
            if isinstance(target, str):
                module, (name, *rest) = self.gm.get_submodule(target), path
                setattr(module, name, replaced_item(getattr(module, name), rest, size - constant.less))
            else:
                set_argument(self.node_map[target], path, size - constant.less)
        for node, path, axes, axis in change.structure.size_replacements:
            if any(change.length(a) != length(a) for a in axes):
                set_argument(self.node_map[node], path, -1 if axis is None else change.length(axis))
