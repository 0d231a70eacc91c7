"""Where old entries go and new ones appear when an axis grows."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fxgrow.analysis.analyse import AnalysedGraph
from fxgrow.axes.axes import Axis, UnitVar, resolve
from fxgrow.errors import PlanError

#: positions of new entries per parameter, by width and dimension, in the order of the units
Places = dict[str, dict[tuple[str, int], Tensor]]


@dataclass(frozen=True)
class Extended:
    """How one axis grows: where its old entries go, and where each width's new ones appear."""

    size: int
    old: Tensor
    new: dict[UnitVar, Tensor]


def units_of(analysed: AnalysedGraph, additions: Mapping[str, int]) -> dict[UnitVar, int]:
    """Steps that each variable grows by.

    Raises:
        PlanError: a width is unknown or pinned, or the units do not fit its step.
    """
    grow: dict[UnitVar, int] = {}
    for name, k in additions.items():
        h = analysed.free_width(name)
        if k < 0 or k % h.step:
            raise PlanError(
                f"{k} units for width {name!r}: it grows by positive multiples of its step {h.step}; "
                f"try {max(h.step, math.ceil(max(k, 1) / h.step) * h.step)}."
            )
        if k:
            grow[h.var] = k // h.step
    return grow


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


def places(analysed: AnalysedGraph, additions: Mapping[str, int]) -> Places:
    """Where each parameter of the graph, rewritten with `additions`, holds the new entries of each width."""
    names = {w.var: name for name, w in analysed.widths.items()}
    grow = units_of(analysed, additions)
    out: Places = {}
    for parameter, dims in analysed.structure.parameters.items():
        for dim, axis in enumerate(dims):
            for var, positions in extend(axis, grow).new.items():
                out.setdefault(parameter, {})[names[var], dim] = positions
    return out
