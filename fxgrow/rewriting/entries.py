"""Every entry of the parameters that a change of size touches: axes say where old entries go and new ones appear.

By default new rows of a producer are random, new columns of a consumer zero and followers the identity.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from fxgrow.axes.axes import UnitVar, unit_entries
from fxgrow.axes.structure import Projection
from fxgrow.errors import PlanError
from fxgrow.graph.graph import lookup, put
from fxgrow.rewriting.bounds import EntrySize
from fxgrow.rewriting.initial_state import rescaled, write_initial_entries
from fxgrow.rewriting.parametrizations import keep_norm, orthogonalise_new_rows
from fxgrow.rewriting.size_change import SizeChange
from fxgrow.rewriting.values import Values


def resized_parameters(
    change: SizeChange, values: Values, generator: torch.Generator | None = None
) -> dict[str, Tensor]:
    """Every parameter and buffer that changes, new and old entries in their places; gradients flow to `values`."""
    if change.kept and values.copies:
        raise PlanError("Units cannot be copied and left out at once: leave them out first.")
    rescaled = {name for state in change.initial_states.values() for name in state.rescaled}
    names = [n for n in change.structure.parameters if n in change.parameters or n in values.delta or n in rescaled]
    return {name: _ResizedParameter(change, name, values, generator).filled() for name in names}


class _ResizedParameter:
    """One parameter on its way to its new size."""

    def __init__(self, change: SizeChange, name: str, values: Values, generator: torch.Generator | None) -> None:
        self.change, self.name, self.values, self.generator = change, name, values, generator
        self.old = lookup(change.gm, name).detach()
        self.dims = change.structure.parameters[name]
        self.axes = change.parameters.get(name) or tuple(change.axis(a) for a in self.dims)
        self.moved = [axis.moved for axis in self.axes]
        self.uses = [p for p in change.structure.projections if p.weight == name]
        self.new = _empty_like([axis.size for axis in self.axes], self.old)
        delta = values.delta.get(name)
        self.delta = None if delta is None else keep_norm(change.gm, name, delta.to(self.old))

    def filled(self) -> Tensor:
        if any(axis.new for axis in self.axes):
            self._fill_new()
        self._put_given()
        old = rescaled(self.old, self.name, self.change)
        self._put_kept(self.new, old if self.delta is None else old + self.delta)
        if self.change.structure.fills.get(self.name) == "copy":
            self._repeat_units()
        if self.values.copies:
            self._copy_units()
        write_initial_entries(self.new, self.name, self.change, self.axes)
        orthogonalise_new_rows(self.change.gm, self.name, self.new, self.moved)
        return self.new

    def _fill_new(self) -> None:
        """Random rows of producers, zero columns of consumers, constants elsewhere."""
        structure = self.change.structure
        is_bias = any(p.bias == self.name for p in structure.projections)
        fill = 0.0 if self.uses or is_bias else structure.fills.get(self.name, "mean")
        is_mean = isinstance(fill, str) and self.old.is_floating_point() and self.old.numel() and not self.old.is_meta
        constant = float(self.old.double().mean()) if is_mean else 0.0 if isinstance(fill, str) else fill
        for dim, axis in enumerate(self.axes):
            for positions in axis.new.values():
                self.new.index_fill_(dim, positions.to(self.new.device), constant)
        for out_dim, use in {use.out_dim: use for use in reversed(self.uses)}.items():
            self._draw(out_dim, self.axes[out_dim].new.values(), use)
        if not self.uses and fill == "random":
            self._draw(0, self.axes[0].new.values(), None)
        for use in self.uses:
            # whoever read the width before must not see the new units, except where they are zero
            states = self.change.initial_states.items()
            free = {var for var, state in states if (self.name, use.in_dim) in state.free}
            new = self.axes[use.in_dim].new
            self._draw(use.in_dim, [positions for var, positions in new.items() if var in free], use)
            for var, positions in new.items():
                if var not in free:
                    self._zero_columns(use, positions.to(self.new.device))

    def _draw(self, dim: int, places: Iterable[Tensor], use: Projection | None) -> None:
        """Kaiming-normal entries (He et al. 2015, eq. 10) at places of a dimension; each expert has its own inputs."""
        rows = self.new.shape[use.out_dim if use is not None else 0]
        fan_in = self.new.numel() // max(1, rows * (len(self.new) if use is not None and use.experts else 1))
        std = math.sqrt(2 / max(1, fan_in))
        if use is not None and use.computed and self.old.numel() > 1:
            std = float(self.old.std())  # what the graph makes of them is scaled for entries like these
        size = EntrySize.of(self.change.gm, self.name) if self.old.numel() and not self.old.is_meta else None
        for positions in places:
            shape = [len(positions) if d == dim else n for d, n in enumerate(self.new.shape)]
            dtype = torch.promote_types(self.new.dtype, torch.float32)
            drawn = torch.randn(shape, generator=self.generator, dtype=dtype)
            drawn = drawn * std if size is None else size.cut(drawn * std)
            self.new.index_copy_(dim, positions.to(self.new.device), drawn.to(self.new))

    def _zero_columns(self, use: Projection, positions: Tensor) -> None:
        if use.in_dim == use.out_dim:
            self.new.index_fill_(use.in_dim, positions, 0)
            return
        rows = self.axes[use.out_dim]
        zero = rows.moved if self.values.new_units_see_each_other else torch.arange(rows.size)
        columns = self.new.index_select(use.in_dim, positions)
        columns.index_fill_(use.out_dim, zero.to(self.new.device), 0)
        self.new.index_copy_(use.in_dim, positions, columns)

    def _put_given(self) -> None:
        for (width, dim), given in self.values.new.get(self.name, {}).items():
            for d, axis in enumerate(self.axes):
                given = given if d == dim else axis.select(given, d)
            for var, positions in self.axes[dim].new.items():
                if self.change.names[var] == width:
                    put(self.new, [positions if d == dim else m for d, m in enumerate(self.moved)], given.to(self.old))

    def _put_kept(self, new: Tensor, old: Tensor) -> None:
        for dim, axis in enumerate(self.axes):
            old = axis.select(old, dim)
        put(new, self.moved, old)

    def _repeat_units(self) -> None:
        """Entries of new units are those of the old ones, in turn, along every axis of the width."""
        for dim, axis in enumerate(self.axes):
            for var, positions in axis.new.items():
                units = axis.index[unit_entries(self.dims[dim], var)]
                units = units[(units >= 0).all(1)]
                turn = torch.arange(len(positions) // units.shape[1]) % len(units)
                old = self.new.index_select(dim, units[turn].flatten().to(self.new.device))
                self.new.index_copy_(dim, positions.to(self.new.device), old)

    def _copy_units(self) -> None:
        """Entries of units that are like old ones; where a delta moves incoming weights, the copy's move back: a split.

        Consumers come last, so that rows which are copies themselves share columns too.
        """
        delta = None
        if self.delta is not None:
            delta = torch.zeros_like(self.new)
            self._put_kept(delta, self.delta)
        reads = {use.in_dim for use in self.uses}
        for reading in (False, True):
            for dim, axis in enumerate(self.axes):
                for var in axis.new:
                    if self.change.names[var] in self.values.copies and (dim in reads) is reading:
                        self._copy_along(dim, var, delta, reading)

    def _copy_along(self, dim: int, var: UnitVar, delta: Tensor | None, reading: bool) -> None:
        new, axis, name = self.new, self.axes[dim], self.change.names[var]
        copies, structure = self.values.copies[name], self.change.structure
        writes = any((self.name, dim) in ((p.weight, p.out_dim), (p.bias, 0)) for p in structure.projections)
        # a follower's given entries stand already; those of a producer or consumer are added
        given = (name, dim) in self.values.new.get(self.name, {})
        if given and not reading and not writes:
            return
        old = axis.moved[unit_entries(self.dims[dim], var)].to(new.device)
        entries = axis.new[var].to(new.device)
        origin = old[copies.origin.to(new.device)].flatten()
        along = [-1 if d == dim else 1 for d in range(new.dim())]
        copied = new.index_select(dim, origin)
        if reading:
            parts = copies.shares.to(new).repeat_interleave(old.shape[1])
            copied = copied * parts[old.numel() :].view(along)
            kept = new.index_select(dim, old.flatten()) * parts[: old.numel()].view(along)
            new.index_copy_(dim, old.flatten(), kept)
        else:
            if delta is not None:
                copied = copied - 2 * delta.index_select(dim, origin)
            if writes:
                like = (copies.shares[len(old) :] != 0).to(new).repeat_interleave(old.shape[1])
                copied = torch.where(like.view(along) != 0, copied, 0.0)
        if given:
            copied = copied + new.index_select(dim, entries)
        new.index_copy_(dim, entries, copied)


def _empty_like(sizes: list[int], old: Tensor) -> Tensor:
    """A tensor of these sizes in the memory format of another one (channels last, say)."""
    # strides of single entries say nothing, except in channels-last kernels of one channel
    strides, shape = old.stride(), old.shape
    layout = sorted(range(old.dim()), key=lambda d: (-strides[d], shape[d] == 1))
    return torch.empty_permuted(sizes, layout, dtype=old.dtype, device=old.device)
