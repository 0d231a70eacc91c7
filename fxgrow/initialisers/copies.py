"""New units that are like old ones in everything that carries a width: weights, biases, what follows on the way."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, fx

from fxgrow._axes import multiplicity, unit_entries
from fxgrow._errors import PlanError
from fxgrow._graph import lookup
from fxgrow._widths import Hidden
from fxgrow.ops.registry import Structure


def places(structure: Structure, h: Hidden, method: str) -> Iterator[tuple[str, int, Tensor]]:
    """Every parameter and buffer that carries the width: its name, the dimension, the entries of each unit there.

    Raises:
        PlanError: units of this width cannot be copied.
    """
    if h.var in structure.compensations:
        raise PlanError(
            f"method={method!r} is not defined for width {h.width.name!r}: copies of a unit would change the norm over "
            "it, or the products of its units. Choose another method for it."
        )
    for name, dims in structure.parameters.items():
        own = [d for d, axis in enumerate(dims) if h.var in multiplicity(axis)]
        if len(own) > 1:
            raise PlanError(
                f"method={method!r} is not defined for width {h.width.name!r}: {name} both writes and reads it."
            )
        for d in own:
            yield name, d, unit_entries(dims[d], h.var)


def rows_of(gm: fx.GraphModule, name: str, dim: int, entries: Tensor, units: Tensor) -> Tensor:
    """A parameter's slices of these units."""
    old = lookup(gm, name).detach()
    return old.index_select(dim, entries[units].flatten().to(old.device))
