"""The rewrite: a deep copy of the graph in which some widths have more or fewer units.

ensures: entries that stay keep their values (shifted only by the index map), names stay, the graph lints and its
         shapes are what the axes say.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import fx

from fxgrow.analysis.analyse import analyse
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
    resized = WidenedGraph(SizeChange(analyse(plain), additions, removals), values, generator).check()
    return (resized.gm, resized.index) if plain is gm else restore_parametrizations(resized.gm, resized.index)
