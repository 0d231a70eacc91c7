"""New units that are like old ones in everything that carries a width: weights, biases, followers on the path."""

from __future__ import annotations

from fxgrow.analysis.analyse import AnalysedGraph
from fxgrow.analysis.widths import GrowableWidth
from fxgrow.axes.axes import multiplicity
from fxgrow.errors import PlanError
from fxgrow.initialisers.registry import Initialiser
from fxgrow.rewriting.parametrizations import spectral


def why_no_copies(analysed: AnalysedGraph, width: GrowableWidth) -> str | None:
    """What would become of the function if units of a width were copied; None where it stays."""
    if width.initial_state is not None:
        return "copies of a unit would change the norm over it, or the products of its units"
    for name, dims in analysed.structure.parameters.items():
        carriers = sum(width.var in multiplicity(axis) for axis in dims)
        if carriers > 1:
            return f"{name} both writes and reads it"
        if carriers and spectral(analysed.gm, name):
            return f"copies of its units would change the largest singular value of {name}"
    return None


class CopyInitialiser(Initialiser):
    """Base of the methods whose new units are like old ones."""

    def check_width(self, analysed: AnalysedGraph, width: GrowableWidth) -> None:
        """Refuses a width whose units cannot be copied."""
        why = why_no_copies(analysed, width)
        if why is not None:
            raise PlanError(
                f"method={self.name!r} is not defined for width {width.name!r}: {why}. Choose another method for it."
            )
