"""From axes to widths: the hidden dimensions of a graph, with everything that must change with each."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from torch import fx

from fxgrow.analysis.analyse import analyse
from fxgrow.axes.axes import UnitVar, multiplicity, variables
from fxgrow.axes.records import Reason, Width
from fxgrow.axes.structure import Projection, Structure
from fxgrow.graph.node_meta import OWNER


@dataclass
class GrowableWidth:
    """A width together with what the later stages need of the graph's structure."""

    width: Width
    var: UnitVar
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


def hidden(structure: Structure) -> list[GrowableWidth]:
    """Every unbound variable that some weight writes, as a width."""
    found: dict[UnitVar, GrowableWidth] = {}
    readers: dict[UnitVar, list[Projection]] = {}
    for p in structure.projections:
        for var in variables(p.reads):
            readers.setdefault(var, []).append(p)
        for var in variables(p.writes):
            found.setdefault(var, GrowableWidth(Width("", 0, (), (), ()), var)).writes.append(p)
    carried = _carried(structure)
    names: Counter[str] = Counter(layer(h.writes[0]) for h in found.values())
    numbers: Counter[str] = Counter()
    for var, h in found.items():
        h.reads = readers.get(var, [])
        name = layer(h.writes[0])
        if names[name] > 1:
            # a producer whose output is split: its parts by number, a name that growth does not change
            numbers[name] += 1
            name = f"{name}[{numbers[name] - 1}]"
        step = multiplicity(h.writes[0].out)[var]
        pinned = var.pinned
        if pinned is None and not h.reads and var not in structure.compensations:
            pinned = Reason("output", h.writes[0].node.name, "no weight reads it")
        h.width = Width(
            name=name,
            size=var.size * step,
            producers=_unique(layer(p) for p in h.writes),
            followers=_followers(carried[var], h),
            consumers=_unique(layer(p) for p in h.reads),
            step=step,
            pinned=pinned,
        )
    return list(found.values())


def layer(p: Projection) -> str:
    """The module that uses the weight; a weight that the graph uses directly stands for itself or for its layer."""
    if p.node.op == "call_module":
        return str(p.node.target)
    if OWNER in p.node.meta:
        return str(p.node.meta[OWNER])
    module, _, leaf = p.weight.rpartition(".")
    return module if module and leaf == "weight" else p.weight


def _carried(structure: Structure) -> dict[UnitVar, list[str]]:
    """The parameters that each width appears in."""
    carried: dict[UnitVar, list[str]] = {}
    for name, dims in structure.parameters.items():
        for var in variables(*dims):
            carried.setdefault(var, []).append(name)
    return carried


def _followers(carried: list[str], h: GrowableWidth) -> tuple[str, ...]:
    weights = {p.weight for p in (*h.writes, *h.reads)} | {p.bias for p in (*h.writes, *h.reads)}
    return _unique(name.rpartition(".")[0] or name for name in carried if name not in weights)


def _unique(names: object) -> tuple[str, ...]:
    return tuple(dict.fromkeys(names))  # type: ignore[call-overload]
