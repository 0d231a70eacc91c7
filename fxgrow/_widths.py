"""From axes to widths: the hidden dimensions of a graph, with everything that must change with each."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field

from torch import fx

from fxgrow._analyse import analyse
from fxgrow._axes import Axis, Var, length, multiplicity, resolve, variables
from fxgrow._records import Reason, Width
from fxgrow.ops.registry import Projection, Structure


@dataclass
class Hidden:
    """A width together with what the later stages need of the graph's structure."""

    width: Width
    var: Var
    writes: list[Projection] = field(default_factory=list)
    reads: list[Projection] = field(default_factory=list)


def widths(gm: fx.GraphModule) -> list[Width]:
    """The hidden dimensions of a captured graph, in execution order of their first producers.

    Args:
        gm: a graph from `fxgrow.capture`.

    Returns:
        One `Width` per hidden dimension; those that cannot change carry a `Reason` in `pinned`.

    Example:
        >>> import torch, fxgrow
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> [(w.name, w.size, w.pinned is None) for w in fxgrow.widths(fxgrow.capture(net, (torch.zeros(1, 4),)))]
        [('0', 8, True), ('2', 2, False)]
    """
    return [h.width for h in hidden(analyse(gm))]


def hidden(structure: Structure) -> list[Hidden]:
    """Every unbound variable that some weight writes, as a width."""
    found: dict[Var, Hidden] = {}
    readers: dict[Var, list[Projection]] = {}
    for p in structure.projections:
        for var in variables(p.reads):
            readers.setdefault(var, []).append(p)
        for var in variables(p.writes):
            found.setdefault(var, Hidden(Width("", 0, (), (), ()), var)).writes.append(p)
    units = _units(structure)
    names: Counter[str] = Counter(owner(h.writes[0].weight) for h in found.values())
    for var, h in found.items():
        h.reads = readers.get(var, [])
        name = owner(h.writes[0].weight)
        if names[name] > 1:
            start, stop = _span(h.writes[0].writes, var)
            name = f"{name}[{start}:{stop}]"
        pinned = var.pinned
        if pinned is None and not h.reads:
            pinned = Reason("output", h.writes[0].node.name, "no weight reads it")
        h.width = Width(
            name=name,
            size=var.size * units[var],
            producers=_unique(owner(p.weight) for p in h.writes),
            followers=_followers(structure, h),
            consumers=_unique(owner(p.weight) for p in h.reads),
            step=units[var],
            pinned=pinned,
        )
    return list(found.values())


def owner(parameter: str) -> str:
    """The module that holds a weight; a parameter of another name stands for itself."""
    module, _, leaf = parameter.rpartition(".")
    return module if module and leaf == "weight" else parameter


def _units(structure: Structure) -> dict[Var, int]:
    """How many units the smallest growth adds: what divides the width's every appearance in a parameter."""
    units: dict[Var, int] = {}
    for dims in structure.parameters.values():
        for axis in dims:
            for var, m in multiplicity(axis).items():
                units[var] = math.gcd(units.get(var, 0), m)
    return units


def _span(axis: Axis, var: Var) -> tuple[int, int]:
    position = 0
    for s in resolve(axis):
        if s.var is var:
            return position, position + s.length
        position += s.length
    return 0, length(axis)


def _followers(structure: Structure, h: Hidden) -> tuple[str, ...]:
    weights = {p.weight for p in (*h.writes, *h.reads)} | {p.bias for p in (*h.writes, *h.reads)}
    carry = [
        name
        for name, dims in structure.parameters.items()
        if name not in weights and any(h.var in multiplicity(axis) for axis in dims)
    ]
    return _unique(name.rpartition(".")[0] or name for name in carry)


def _unique(names: object) -> tuple[str, ...]:
    return tuple(dict.fromkeys(names))  # type: ignore[call-overload]
