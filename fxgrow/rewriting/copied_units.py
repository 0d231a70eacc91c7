"""The rewrite's part of new units that are like old ones: all that carries them, whatever else grows."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fxgrow.axes.axes import UnitVar, unit_entries
from fxgrow.axes.structure import Structure

if TYPE_CHECKING:
    from fxgrow.rewriting.axis_growth import Extended


@dataclass(frozen=True)
class CopiedUnits:
    """New units of a width that are like old ones.

    Attributes:
        origin: the old unit that each is like, `[k]`.
        shares: the part of an old unit's outgoing weights that each unit gets (an old one of its own, a new one of its
            origin's), old units first, `[size + k]`. A new unit with none is like its origin only in what follows on
            the way (norms, depthwise kernels): its incoming and outgoing weights are its own.
    """

    origin: Tensor
    shares: Tensor


def apply_copies(
    new: Tensor,
    name: str,
    structure: Structure,
    plan: Sequence[Extended],
    copies: Mapping[UnitVar, CopiedUnits],
    given: Collection[tuple[UnitVar, int]],
    delta: Tensor | None,
) -> None:
    """Entries of units that are like old ones, in a parameter that is complete but for them.

    Where a delta moves an old unit's incoming weights, its copy's move the other way: a split. Readers come last, so
    that rows which are copies themselves share columns too.

    Args:
        new: the widened parameter, changed in place; gradients flow through.
        name: its name.
        structure: of the graph before.
        plan: how each dimension grows.
        copies: per variable.
        given: where new entries stand already: a follower's, or own incoming or outgoing weights.
        delta: what was added to the old entries, in the new shape.
    """
    writes = {(p.weight, p.out_dim) for p in structure.projections} | {(p.bias, 0) for p in structure.projections}
    reads = {(p.weight, p.in_dim) for p in structure.projections}
    for reading in (False, True):
        for dim, g in enumerate(plan):
            for var, c in copies.items():
                if var not in g.new or ((name, dim) in reads) is not reading:
                    continue
                own = (var, dim) in given
                if own and not reading and (name, dim) not in writes:
                    continue
                old = g.old[unit_entries(structure.parameters[name][dim], var)].to(new.device)
                entries = g.new[var].to(new.device)
                origin = old[c.origin.to(new.device)].flatten()
                along = [-1 if d == dim else 1 for d in range(new.dim())]
                copied = new.index_select(dim, origin)
                if reading:
                    parts = c.shares.to(new).repeat_interleave(old.shape[1])
                    copied = copied * parts[old.numel() :].view(along)
                    kept = new.index_select(dim, old.flatten()) * parts[: old.numel()].view(along)
                    new.index_copy_(dim, old.flatten(), kept)
                else:
                    if delta is not None:
                        copied = copied - 2 * delta.index_select(dim, origin)
                    if (name, dim) in writes:
                        like = (c.shares[len(old) :] != 0).to(new).repeat_interleave(old.shape[1])
                        copied = torch.where(like.view(along) != 0, copied, 0.0)
                if own:
                    copied = copied + new.index_select(dim, entries)
                new.index_copy_(dim, entries, copied)
