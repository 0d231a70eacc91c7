"""The rewrite: a deep copy of the graph in which some widths have more or fewer units.

ensures: entries that stay keep their values (shifted only by the index map), names stay, the graph lints and its
         shapes are what the axes say.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import fx

from fxgrow.analysis.analyse import analyse
from fxgrow.errors import PlanError
from fxgrow.graph.graph import lookup
from fxgrow.rewriting.parametrizations import Index, remove_parametrizations, restore_parametrizations
from fxgrow.rewriting.size_change import SizeChange
from fxgrow.rewriting.values import Values
from fxgrow.rewriting.widened_graph import WidenedGraph


def rewrite(
    gm: fx.GraphModule,
    additions: Mapping[str, int],
    values: Values | None = None,
    generator: torch.Generator | None = None,
    removals: Mapping[str, Sequence[int]] | None = None,
) -> tuple[fx.GraphModule, Index]:
    """Resizes a copy of a graph, as `SizeChange` and `WidenedGraph` describe, and checks it.

    Returns the copy, and for each parameter that changes the new positions of its old entries (-1: left out).
    """
    plain = remove_parametrizations(gm)
    change = SizeChange(analyse(plain), additions, removals)
    _check_values(change, values or Values())
    resized = WidenedGraph(change, values, generator).check()
    return (resized.gm, resized.index) if plain is gm else restore_parametrizations(resized.gm, resized.index)


def _check_values(change: SizeChange, values: Values) -> None:
    """Refuses values of other sizes than the change has, as an edited plan may hold."""
    variables = {name: var for var, name in change.names.items()}
    for name in (*values.new, *values.delta):
        if name not in change.structure.parameters:
            raise PlanError(f"The plan has weights for {name!r}, which is no parameter of this model.")
        old = lookup(change.gm, name).shape
        given = [(old, values.delta[name])] if name in values.delta else []
        for (width, dim), t in values.new.get(name, {}).items():
            axes = change.parameters.get(name, ())
            new = axes[dim].new.get(variables.get(width)) if dim < len(axes) else None  # type: ignore[arg-type]
            if new is None:
                raise PlanError(f"The plan has new weights of width {width!r} in {name!r}, which gets none there.")
            given.append((torch.Size([new.numel() if d == dim else n for d, n in enumerate(old)]), t))
        for shape, t in given:
            if t.shape != shape:
                raise PlanError(f"The plan has weights of shape {list(t.shape)} for {name!r}, not {list(shape)}.")
    for width, copies in values.copies.items():
        var = variables.get(width)
        size, added = (var.size, change.added.get(var, 0)) if var is not None else (0, 0)
        origin, shares = copies.origin, copies.shares
        good = (
            origin.shape == (added,)
            and shares.shape == (size + added,)
            and bool(((0 <= origin) & (origin < size)).all())
        )
        if not good:
            raise PlanError(f"The plan copies units of width {width!r} that are not there.")
