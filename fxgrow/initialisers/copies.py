"""New units that are like old ones in everything that carries a width: weights, biases, what follows on the way."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, fx

from fxgrow.analysis.analyse import AnalysedGraph
from fxgrow.analysis.widths import GrowableWidth
from fxgrow.axes.axes import multiplicity, unit_entries
from fxgrow.errors import PlanError
from fxgrow.graph.graph import lookup
from fxgrow.rewriting.parametrizations import spectral


def why_no_copies(analysed: AnalysedGraph, h: GrowableWidth) -> str | None:
    """What would become of the function if units of a width were copied; None where it stays."""
    if h.initial_state is not None:
        return "copies of a unit would change the norm over it, or the products of its units"
    for name, dims in analysed.structure.parameters.items():
        own = sum(h.var in multiplicity(axis) for axis in dims)
        if own > 1:
            return f"{name} both writes and reads it"
        if own and spectral(analysed.gm, name):
            return f"copies of its units would change the largest singular value of {name}"
    return None


def check_copies(analysed: AnalysedGraph, h: GrowableWidth, method: str) -> None:
    """Refuses a width whose units cannot be copied.

    Raises:
        PlanError: its units are under a norm, multiplied with each other, or in a weight that both writes and reads
            them; or one of its weights keeps its largest singular value.
    """
    why = why_no_copies(analysed, h)
    if why is not None:
        raise PlanError(f"method={method!r} is not defined for width {h.name!r}: {why}. Choose another method for it.")


def places(analysed: AnalysedGraph, h: GrowableWidth) -> Iterator[tuple[str, int, Tensor]]:
    """Every parameter and buffer that carries the width: its name, the dimension, the entries of each unit there."""
    for name, dims in analysed.structure.parameters.items():
        for d, axis in enumerate(dims):
            if h.var in multiplicity(axis):
                yield name, d, unit_entries(axis, h.var)


def rows_of(gm: fx.GraphModule, name: str, dim: int, entries: Tensor, units: Tensor) -> Tensor:
    """A parameter's slices of these units."""
    old = lookup(gm, name).detach()
    return old.index_select(dim, entries[units].flatten().to(old.device))
