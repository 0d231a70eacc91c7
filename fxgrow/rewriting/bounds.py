"""Bounds on what a growth writes: new entries and updates never dwarf the layer that they join.

A unit that is large beside its neighbours explodes in training, however well it fits one batch: its gradients are as
much larger, and so are those of what reads it. Everything that a method proposes goes through `bounded`, which compares
it with the old entries of the same layer, in root mean square and in magnitude, at the gamma at which it is written.
Random rows, and those that outgoing weights are fitted to, are made `within` the same bounds.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fxgrow.axes.structure import Structure
from fxgrow.graph.graph import lookup
from fxgrow.rewriting.plan import Plan

#: new entries and updates are at most so many times the old entries of their layer
LIMIT = 4.0


class EntrySize(NamedTuple):
    """How large the old entries of a parameter are."""

    rms: float
    largest: float

    @classmethod
    def of(cls, gm: nn.Module, name: str) -> EntrySize:
        """Of a parameter; biases and scales, which may all be zero, are as large as their layer's other parameters."""
        old = lookup(gm, name).detach()
        size, path = _size(old), name.rpartition(".")[0]
        if old.dim() <= 1:
            others = gm.get_submodule(path).named_parameters(recurse=False)
            sizes = [size, *(_size(p.detach()) for _, p in others if p.is_floating_point() or p.is_complex())]
            size = cls(max(s.rms for s in sizes), max(s.largest for s in sizes))
        if size.largest > 0:
            return size
        fresh = (old.numel() / max(1, len(old))) ** -0.5 if old.dim() > 1 and old.numel() else 1.0
        return cls(fresh, fresh)

    def factors(self, new: Tensor, dim: int) -> Tensor:
        """By what new slices along a dimension must be multiplied, each by itself; shaped to multiply them."""
        rows = new.detach().movedim(dim, 0).reshape(new.shape[dim], -1).abs().double()
        excess = rows.amax(1) / (LIMIT * self.largest)
        if new.dim() > 1:
            excess = torch.maximum(excess, rows.square().mean(1).sqrt() / (LIMIT * self.rms))
        return excess.clamp_min(1).reciprocal().view([-1 if d == dim else 1 for d in range(new.dim())])

    def within(self, new: Tensor, dim: int) -> Tensor:
        """New slices along a dimension, scaled down one by one as far as they must."""
        factors = self.factors(new, dim) if new.numel() else torch.ones(())
        return new if bool((factors == 1).all()) else new * factors.to(new.device, new.abs().dtype)

    def cut(self, drawn: Tensor) -> Tensor:
        """Random entries, scaled down as far as their mean square must, the largest ones cut off."""
        drawn = drawn / max(1.0, _size(drawn).rms / (LIMIT * self.rms))
        return drawn * (LIMIT * self.largest / drawn.abs().clamp_min(1e-30)).clamp_max(1)

    def factor(self, new: Tensor) -> float:
        """By what all of these entries must be multiplied."""
        size = _size(new.detach())
        return 1 / max(1.0, size.rms / (LIMIT * self.rms), size.largest / (LIMIT * self.largest))


def _size(t: Tensor) -> EntrySize:
    if not t.numel() or t.is_meta:
        return EntrySize(0.0, 0.0)
    # norms, which make no copy of a large weight
    norm, largest = (torch.linalg.vector_norm(t if t.dtype.itemsize > 2 else t.float(), ord=p) for p in (2, math.inf))
    return EntrySize(float(norm) / t.numel() ** 0.5, float(largest))


def bounded(plan: Plan, gm: nn.Module, structure: Structure) -> Plan:
    """The plan with entries that are within bounds at its scale; `.bounded` has what was scaled down, and by how much.

    New units are scaled one by one. Outgoing weights and the update of a layer are one step, which keeps its direction.
    """
    at, outgoing = plan.at(plan.scale), set(plan.outgoing)
    names = [n for n in {**plan.values.new, **plan.values.delta} if isinstance(lookup(gm, n), nn.Parameter)]
    sizes = {name: EntrySize.of(gm, name) for name in names}
    steps = {
        name: [*(t for key, t in at.new.get(name, {}).items() if (name, *key) in outgoing), *_only(at.delta, name)]
        for name in names
    }
    factors = {name: min(sizes[name].factor(t) for t in parts) for name, parts in steps.items() if parts}
    for use in structure.projections:
        if use.weight in factors and use.bias in factors:
            factors[use.weight] = factors[use.bias] = min(factors[use.weight], factors[use.bias])
    applied = {name: factor for name, factor in factors.items() if factor < 1}
    new = {name: dict(slices) for name, slices in plan.values.new.items()}
    for name in names:
        for (width, dim), t in new.get(name, {}).items():
            if (name, width, dim) in outgoing:
                new[name][width, dim] = t * factors[name] if factors[name] < 1 else t
            elif t.numel():
                by = sizes[name].factors(at.new[name][width, dim], dim)
                if bool((by < 1).any()):
                    new[name][width, dim] = t * by.to(t.device, t.abs().dtype)
                    applied[name] = min(applied.get(name, 1.0), float(by.min()))
    if not applied:
        return plan
    delta = {name: t * factors.get(name, 1.0) for name, t in plan.values.delta.items()}
    # the slope of what is left of the step, as if each part's were its square
    squares = {name: sum(float(t.abs().double().square().sum()) for t in parts) for name, parts in steps.items()}
    left = sum(square * factors.get(name, 1.0) for name, square in squares.items()) / max(1e-30, sum(squares.values()))
    plan = replace(plan, slope=plan.slope * left, curvature=plan.curvature * left**2)
    return replace(plan, values=replace(plan.values, new=new, delta=delta), bounded={**plan.bounded, **applied})


def _only(tensors: Mapping[str, Tensor], name: str) -> list[Tensor]:
    return [tensors[name]] if name in tensors else []
