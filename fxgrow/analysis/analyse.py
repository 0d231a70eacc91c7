"""A captured graph with the axes of its tensors and its widths: made once, passed on to all later stages."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import fx

from fxgrow.analysis.axis_propagation import propagate_axes
from fxgrow.analysis.widths import GrowableWidth, find_widths
from fxgrow.axes.records import Width
from fxgrow.axes.structure import Structure
from fxgrow.errors import PlanError
from fxgrow.graph.node_meta import check_captured


@dataclass(frozen=True, eq=False)
class AnalysedGraph:
    """What the later stages know about a graph."""

    gm: fx.GraphModule
    structure: Structure
    #: by name, in execution order of their first producers
    widths: Mapping[str, GrowableWidth]

    @property
    def free_widths(self) -> list[GrowableWidth]:
        """The widths that can change."""
        return [w for w in self.widths.values() if w.width.pinned is None]

    def free_width(self, name: str) -> GrowableWidth:
        """The width of that name; raises `PlanError` where there is none, or it is pinned."""
        if name not in self.widths:
            free = [w.name for w in self.free_widths]
            raise PlanError(
                f"There is no width named {name!r}. Widths are named after their first producer; free ones here: "
                f"{', '.join(free[:8]) or 'none'}{' ...' if len(free) > 8 else ''}."
            )
        pinned = self.widths[name].width.pinned
        if pinned is not None:
            raise PlanError(f"Width {name!r} cannot change: {pinned}.")
        return self.widths[name]


def analyse(gm: fx.GraphModule) -> AnalysedGraph:
    """Runs a captured graph on axes and lists its widths."""
    structure = propagate_axes(gm)
    return AnalysedGraph(gm, structure, find_widths(gm, structure))


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
    check_captured(gm)
    return [w.width for w in analyse(gm).widths.values()]
