"""Where old entries go and new ones appear when an axis grows."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fxgrow.analysis.widths import GrowableWidth, hidden
from fxgrow.axes.axes import Axis, UnitVar, resolve
from fxgrow.axes.structure import Structure
from fxgrow.errors import PlanError

#: positions of new entries per parameter, by width and dimension, in the order of the units
Places = dict[str, dict[tuple[str, int], Tensor]]


@dataclass(frozen=True)
class Extended:
    """How one axis grows: where its old entries go, and where each width's new ones appear."""

    size: int
    old: Tensor
    new: dict[UnitVar, Tensor]


def units_of(found: Mapping[str, GrowableWidth], additions: Mapping[str, int]) -> dict[UnitVar, int]:
    grow: dict[UnitVar, int] = {}
    for name, k in additions.items():
        h = require_free(found, name)
        if k < 0 or k % h.width.step:
            raise PlanError(
                f"{k} units for width {name!r}: it grows by positive multiples of its step {h.width.step}; "
                f"try {max(h.width.step, math.ceil(max(k, 1) / h.width.step) * h.width.step)}."
            )
        if k:
            grow[h.var] = k // h.width.step
    return grow


def require_free(found: Mapping[str, GrowableWidth], name: str) -> GrowableWidth:
    """The width of that name, or an error that says what there is, or why it is pinned."""
    if name not in found:
        free = [n for n, h in found.items() if h.width.pinned is None]
        raise PlanError(
            f"There is no width named {name!r}. Widths are named after their first producer; free ones here: "
            f"{', '.join(free[:8]) or 'none'}{' ...' if len(free) > 8 else ''}."
        )
    h = found[name]
    if h.width.pinned is not None:
        raise PlanError(f"Width {name!r} cannot change: {h.width.pinned}.")
    return h


def extend(axis: Axis, grow: Mapping[UnitVar, int]) -> Extended:
    """New entries stand at the end of each of their width's segments; they are listed unit by unit."""
    old: list[int] = []
    new: dict[UnitVar, list[list[int]]] = {}
    at = 0
    for s in resolve(axis):
        old.extend(range(at, at + s.length))
        at += s.length
        if s.var is not None and grow.get(s.var):
            units = new.setdefault(s.var, [[] for _ in range(grow[s.var])])
            for unit in units:
                unit.extend(range(at, at + s.inner))
                at += s.inner
    positions = {v: torch.tensor([i for unit in units for i in unit]) for v, units in new.items()}
    return Extended(at, torch.tensor(old, dtype=torch.long), positions)


def places(structure: Structure, additions: Mapping[str, int]) -> Places:
    """Where each parameter of the graph, rewritten with `additions`, holds the new entries of each width."""
    found = {h.width.name: h for h in hidden(structure)}
    names = {h.var: name for name, h in found.items()}
    grow = units_of(found, additions)
    out: Places = {}
    for parameter, dims in structure.parameters.items():
        for dim, axis in enumerate(dims):
            for var, positions in extend(axis, grow).new.items():
                out.setdefault(parameter, {})[names[var], dim] = positions
    return out
