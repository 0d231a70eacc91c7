"""Index maps of a change of size: which entries of every axis stay, where they go, and where new ones stand."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from fxgrow.analysis.analyse import AnalysedGraph
from fxgrow.analysis.axis_statistics import SPLIT
from fxgrow.analysis.initial_state import InitialState
from fxgrow.analysis.widths import GrowableWidth
from fxgrow.axes.axes import Axis, UnitVar, grown_length, resolve, variables
from fxgrow.data.argument_checks import PER_WIDTH, read_argument, shown
from fxgrow.errors import PlanError
from fxgrow.graph.graph import lookup
from fxgrow.rewriting.memory import check_memory
from fxgrow.rewriting.parametrizations import Index, spectral

#: positions of new entries per parameter, by width and dimension, in the order of the units
NewIndices = dict[str, dict[tuple[str, int], Tensor]]


@dataclass(frozen=True)
class AxisChange:
    """How one axis changes: its length before and after, and positions of entries."""

    old_size: int
    size: int
    #: old and new positions of the entries that stay
    kept: Tensor
    moved: Tensor
    #: per variable, the positions of its new entries, unit by unit
    new: dict[UnitVar, Tensor]

    @property
    def changed(self) -> bool:
        return bool(self.new) or len(self.kept) < self.old_size

    @property
    def index(self) -> Tensor:
        """The new position of every old entry, -1 for those that are left out."""
        return torch.full((self.old_size,), -1).index_copy_(0, self.kept, self.moved)

    def select(self, tensor: Tensor, dim: int) -> Tensor:
        """The entries of a tensor that stay, along the dimension of this axis."""
        if len(self.kept) == self.old_size:
            return tensor
        return tensor.index_select(dim, self.kept.to(tensor.device))


class SizeChange:
    """More or fewer units in some widths of a graph, and what follows for every axis.

    New units stand behind those that stay, in each segment of an axis that holds their width. Raises `PlanError` where
    a width is unknown or pinned, the units do not fit its step, or units cannot be left out.

    Args:
        analysed: the graph.
        additions: units to add per width, multiples of its step.
        removals: per width the numbers of the unit groups to leave out; a group is as many units as the step.
    """

    def __init__(
        self, analysed: AnalysedGraph, additions: Mapping[str, int], removals: Mapping[str, Sequence[int]] | None = None
    ) -> None:
        additions = read_argument("units", additions, PER_WIDTH)
        self.analysed, self.additions = analysed, additions
        self.gm, self.structure = analysed.gm, analysed.structure
        self.names = {w.var: name for name, w in analysed.widths.items()}
        #: new unit groups per variable, and the old ones that stay where not all do
        self.added: dict[UnitVar, int] = {}
        self.kept: dict[UnitVar, Tensor] = {}
        for name, k in additions.items():
            width = analysed.free_width(name)
            if k < 0 or k % width.step:
                raise PlanError(
                    f"{k} units for width {name!r}: it grows by positive multiples of its step {width.step}; "
                    f"try {max(width.step, math.ceil(max(k, 1) / width.step) * width.step)}."
                )
            if k:
                self.added[width.var] = k // width.step
        for name, groups in (removals or {}).items():
            width = analysed.free_width(name)
            if len(groups):
                self.kept[width.var] = self._kept(width, groups)
        #: net change of each variable's number of unit groups
        self.net = {var: self.units(var) - var.size for var in {**self.added, **self.kept}}
        states: dict[UnitVar, InitialState] = self.structure.initial_states
        #: of the variables that change
        self.initial_states = {var: state for var, state in states.items() if var in self.net}
        if self.added:
            check_memory(self._least_memory(), f"Adding {shown(additions)} units")

    def _least_memory(self) -> dict[torch.device, int]:
        """Bytes by device, as `memory.py` counts them."""
        cpu = torch.device("cpu")
        needed = {cpu: 0}
        for name, dims in self.structure.parameters.items():
            if self.changes(dims):
                tensor, sizes = lookup(self.gm, name), [self.length(a) for a in dims]
                device = tensor.device
                needed[device] = needed.get(device, 0) + math.prod(sizes) * tensor.element_size()
                needed[cpu] += 8 * sum(sizes)
        return needed

    def _kept(self, width: GrowableWidth, groups: Sequence[int]) -> Tensor:
        size = width.var.size
        if any(not 0 <= g < size for g in groups):
            raise PlanError(f"Width {width.name!r} has unit groups 0 to {size - 1}; given {list(groups)}.")
        kept = [g for g in range(size) if g not in set(groups)]
        why = None if kept else "at least one must stay"
        if kept and width.initial_state is not None and width.initial_state.kind == SPLIT:
            why = "activations are divided by their length over all of them"
        for name, dims in self.structure.parameters.items():
            if spectral(self.gm, name) and width.var in variables(*dims):
                why = f"the largest singular value of {name} would change"
        if why is not None:
            raise PlanError(f"Units of width {width.name!r} cannot be left out: {why}.")
        return torch.tensor(kept)

    def units(self, var: UnitVar) -> int:
        """The number of unit groups of a variable afterwards."""
        return (len(self.kept[var]) if var in self.kept else var.size) + self.added.get(var, 0)

    def changes(self, axes: Iterable[Axis]) -> bool:
        """Whether units of one of these axes are added or left out."""
        return any(s.var in self.net for a in axes for s in resolve(a))

    def length(self, axis: Axis) -> int:
        """Afterwards."""
        return grown_length(axis, self.net)

    def axis(self, axis: Axis) -> AxisChange:
        kept: list[Tensor] = []
        moved: list[Tensor] = []
        new: dict[UnitVar, list[Tensor]] = {}
        old_size = size = 0
        for s in resolve(axis):
            entries = torch.arange(old_size, old_size + s.length)
            old_size += s.length
            if s.var in self.kept:
                entries = entries.view(-1, s.inner)[self.kept[s.var]].flatten()
            kept.append(entries)
            moved.append(torch.arange(size, size + len(entries)))
            size += len(entries)
            if s.var in self.added:
                count = self.added[s.var] * s.inner
                new.setdefault(s.var, []).append(torch.arange(size, size + count).view(-1, s.inner))
                size += count
        none = torch.zeros(0, dtype=torch.long)
        positions = {var: torch.cat(parts, 1).flatten() for var, parts in new.items()}
        return AxisChange(old_size, size, torch.cat([none, *kept]), torch.cat([none, *moved]), positions)

    @cached_property
    def parameters(self) -> dict[str, tuple[AxisChange, ...]]:
        """The axes of every parameter and buffer that has units added or left out."""
        return {
            name: tuple(self.axis(a) for a in dims)
            for name, dims in self.structure.parameters.items()
            if self.changes(dims)
        }

    @cached_property
    def index(self) -> Index:
        """For each of these and each dimension that changes, the new positions of old entries (-1: left out)."""
        return {n: tuple(a.index if a.changed else None for a in axes) for n, axes in self.parameters.items()}

    @cached_property
    def new_indices(self) -> NewIndices:
        """Where the parameters have the new entries of each width."""
        out: NewIndices = {}
        for parameter, axes in self.parameters.items():
            for dim, axis in enumerate(axes):
                for var, positions in axis.new.items():
                    out.setdefault(parameter, {})[self.names[var], dim] = positions
        return out
