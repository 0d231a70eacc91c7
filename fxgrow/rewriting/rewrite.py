"""The rewrite: a deep copy of the graph in which some widths have more units.

requires: a captured graph and, per width, a number of units that is a multiple of its step.
ensures:  old entries keep their values (shifted only by the index map), names stay, the graph lints and its shapes
          are what the axes say.

Every parameter is rewritten alike: its axes say where old entries go and where new ones appear. Left alone, new rows
of a producer are random, new columns of a consumer are zero and followers are the identity, so the function stays.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from fxgrow.analysis.analyse import AnalysedGraph, analyse
from fxgrow.axes.axes import Dims, UnitVar, grown_length, length
from fxgrow.axes.structure import Projection, Structure
from fxgrow.graph.graph import compile_graph, copy_graph, lookup, put, same_kind
from fxgrow.rewriting.axis_growth import Extended, extend, units_of
from fxgrow.rewriting.copied_units import CopiedUnits, apply_copies
from fxgrow.rewriting.initial_state import (
    apply_initial_entries,
    apply_initial_norms,
    apply_initial_numbers,
    apply_initial_products,
    rescaled,
)
from fxgrow.rewriting.parametrizations import orthogonalise_new_rows, remove_parametrizations, restore_parametrizations
from fxgrow.rewriting.verify import check_shapes


@dataclass
class Values:
    """What new and old entries become, where the defaults are not wanted.

    Attributes:
        new: per parameter, by width and dimension, the new slices along that dimension in the order of their
            positions; the other dimensions have their old sizes.
        delta: per parameter, what is added to its old entries.
        new_units_see_each_other: whether new rows of a producer read the new units of other widths (random), or not
            (zero).
        copies: per width, the old units that its new ones are like; `new` is what they have of their own.
    """

    new: dict[str, dict[tuple[str, int], Tensor]] = field(default_factory=dict)
    delta: dict[str, Tensor] = field(default_factory=dict)
    new_units_see_each_other: bool = True
    copies: dict[str, CopiedUnits] = field(default_factory=dict)


def rewrite(
    gm: fx.GraphModule,
    additions: Mapping[str, int],
    values: Values | None = None,
    generator: torch.Generator | None = None,
) -> tuple[fx.GraphModule, dict[str, tuple[Tensor | None, ...]]]:
    """Returns the wider copy, and for each parameter that grew the new positions of its old entries.

    Args:
        gm: a captured graph; it is left as it is.
        additions: units per width, multiples of its step.
        values: new and old entries, where the defaults are not wanted.
        generator: draws the random rows.

    Raises:
        PlanError: a width is unknown or pinned, or the units do not fit its step.
        RewriteError: the result does not run, or has other shapes than its axes.
    """
    plain = remove_parametrizations(gm)
    wide = widened(analyse(plain), additions, values, generator)
    check_shapes(wide.graph, wide.lengths)
    return (wide.graph, wide.index) if plain is gm else restore_parametrizations(wide.graph, wide.index)


@dataclass(frozen=True)
class Wide:
    """A widened copy that nobody has checked yet.

    Attributes:
        graph: the copy.
        index: for each parameter that grew, the new positions of its old entries.
        node_map: the copy's node for each node of the original.
        lengths: the shape that each node of the copy must have.
    """

    graph: fx.GraphModule
    index: dict[str, tuple[Tensor | None, ...]]
    node_map: dict[fx.Node, fx.Node]
    lengths: dict[fx.Node, tuple[int, ...]]


def widened(
    analysed: AnalysedGraph,
    additions: Mapping[str, int],
    values: Values | None = None,
    generator: torch.Generator | None = None,
) -> Wide:
    """`rewrite` without its check, for who runs the copy on data at once; its nodes keep the old shapes' metadata."""
    gm, structure = analysed.gm, analysed.structure
    grow = units_of(analysed, additions)
    filled, index = entries(analysed, additions, values or Values(), generator)
    replaced: dict[int, Tensor] = {}
    for name, new in filled.items():
        old = lookup(gm, name)
        replaced[id(old)] = same_kind(new, old)
    grown = copy_graph(gm, replaced)
    node_map = dict(zip(gm.graph.nodes, grown.graph.nodes, strict=True))
    _write_constants(grown, structure, grow, node_map)
    apply_initial_norms(grown, structure, grow, node_map)
    apply_initial_numbers(structure, grow, node_map)
    compile_graph(grown)
    apply_initial_products(grown, structure, grow, node_map, gm.meta["example_inputs"], index)
    return Wide(grown, index, node_map, _lengths(structure, grow, node_map))


def entries(
    analysed: AnalysedGraph,
    additions: Mapping[str, int],
    values: Values,
    generator: torch.Generator | None = None,
) -> tuple[dict[str, Tensor], dict[str, tuple[Tensor | None, ...]]]:
    """Every parameter that changes, as `widened` has it, and the new positions of old entries in those that grow.

    Gradients flow back to what `values` gives.
    """
    gm, structure = analysed.gm, analysed.structure
    grow = units_of(analysed, additions)
    names = {w.var: name for name, w in analysed.widths.items()}
    out: dict[str, Tensor] = {}
    index: dict[str, tuple[Tensor | None, ...]] = {}
    scales = {n: lookup(gm, n).detach() for c in structure.initial_states.values() for n in c.scales.values()}
    for name, dims in structure.parameters.items():
        old = lookup(gm, name)
        plan = [extend(axis, grow) for axis in dims]
        changed = any(g.new for g in plan)
        if not changed and name not in values.delta:
            continue
        new = out[name] = _fill(name, old.detach(), dims, plan, structure, values, names, generator, grow)
        apply_initial_entries(new, name, [g.new for g in plan], structure, grow, scales)
        orthogonalise_new_rows(gm, name, new, [g.old for g in plan])
        if changed:
            index[name] = tuple(g.old if g.new else None for g in plan)
    return out, index


def _fill(
    name: str,
    old: Tensor,
    dims: Dims,
    plan: list[Extended],
    structure: Structure,
    values: Values,
    names: Mapping[UnitVar, str],
    generator: torch.Generator | None,
    grow: Mapping[UnitVar, int],
) -> Tensor:
    uses = [p for p in structure.projections if p.weight == name]
    biases = any(p.bias == name for p in structure.projections)
    fill = 0.0 if uses or biases else structure.fills.get(name, "mean")
    new = old.new_empty([g.size for g in plan])
    for dim, g in enumerate(plan):
        for positions in g.new.values():
            new.index_fill_(dim, positions.to(new.device), _constant_fill(fill, old))
    if uses or fill == "random":
        out_dim = uses[0].out_dim if uses else 0
        _random(new, out_dim, list(plan[out_dim].new.values()), _fan_in(new, uses[0] if uses else None), generator)
    for p in uses:
        # whoever read the width before must not see the new units
        free = {var for var, c in structure.initial_states.items() if (p.weight, p.in_dim) in c.free}
        _random(new, p.in_dim, [i for v, i in plan[p.in_dim].new.items() if v in free], _fan_in(new, p), generator)
        _zero(new, plan, p.in_dim, p.out_dim, new_units_see_each_other=not values.new_units_see_each_other, free=free)
    for (width, dim), given in values.new.get(name, {}).items():
        for var, positions in plan[dim].new.items():
            if names[var] == width:
                where = [positions if d == dim else other.old for d, other in enumerate(plan)]
                put(new, where, given.to(old))
    delta = values.delta.get(name)
    old = rescaled(old, name, structure, grow)
    kept = [g.old for g in plan]
    put(new, kept, old if delta is None else old + delta.to(old))
    if values.copies:
        moved = None
        if delta is not None:
            moved = torch.zeros_like(new)
            put(moved, kept, delta.to(old))
        copies = {var: values.copies[width] for var, width in names.items() if width in values.copies}
        own = {(var, dim) for width, dim in values.new.get(name, {}) for var in copies if names[var] == width}
        apply_copies(new, name, structure, plan, copies, own, moved)
    return new


def _constant_fill(fill: float | str, old: Tensor) -> float:
    if not isinstance(fill, str):
        return fill
    return float(old.double().mean()) if old.is_floating_point() and old.numel() else 0.0


def _fan_in(new: Tensor, use: Projection | None) -> int:
    """How many inputs a row has; each of several experts has its own."""
    rows = new.shape[use.out_dim if use is not None else 0]
    return new.numel() // max(1, rows * (len(new) if use is not None and use.experts else 1))


def _random(new: Tensor, dim: int, places: list[Tensor], fan: int, generator: torch.Generator | None) -> None:
    """Kaiming-normal entries at places of a dimension, for so many inputs (He et al. 2015, eq. 10)."""
    std = math.sqrt(2 / max(1, fan))
    for positions in places:
        shape = [len(positions) if d == dim else n for d, n in enumerate(new.shape)]
        drawn = torch.randn(shape, generator=generator, dtype=torch.promote_types(new.dtype, torch.float32))
        new.index_copy_(dim, positions.to(new.device), (drawn * std).to(new))


def _zero(
    new: Tensor, plan: list[Extended], in_dim: int, out_dim: int, new_units_see_each_other: bool, free: set[UnitVar]
) -> None:
    for var, positions in plan[in_dim].new.items():
        if var in free:
            continue
        positions = positions.to(new.device)
        columns = new.index_select(in_dim, positions)
        rows = torch.arange(plan[out_dim].size) if new_units_see_each_other else plan[out_dim].old
        if in_dim == out_dim:
            columns.zero_()
        else:
            columns.index_fill_(out_dim, rows.to(new.device), 0)
        new.index_copy_(in_dim, positions, columns)


def _lengths(
    structure: Structure, grow: Mapping[UnitVar, int], node_map: Mapping[fx.Node, fx.Node]
) -> dict[fx.Node, tuple[int, ...]]:
    return {
        node_map[node]: tuple(grown_length(a, grow) for a in dims)
        for node, dims in structure.outputs.items()
        if isinstance(dims, Dims)
    }


def _write_constants(
    gm: fx.GraphModule, structure: Structure, grow: Mapping[UnitVar, int], node_map: Mapping[fx.Node, fx.Node]
) -> None:
    for c in structure.constants:
        n = grown_length(c.axis, grow)
        target, path = c.where
        if n == length(c.axis):
            continue
        if isinstance(target, str):
            module, (name, *rest) = gm.get_submodule(target), path
            setattr(module, name, _with(getattr(module, name), rest, n - c.less))
        else:
            _set_argument(node_map[target], path, n - c.less)
    for node, path, axes, axis in structure.size_replacements:
        if any(grown_length(a, grow) != length(a) for a in axes):
            _set_argument(node_map[node], path, -1 if axis is None else grown_length(axis, grow))


def _set_argument(node: fx.Node, path: tuple[Any, ...], value: int) -> None:
    first, *rest = path
    if isinstance(first, str):
        node.kwargs = {**node.kwargs, first: _with(node.kwargs[first], rest, value)}
    else:
        node.args = tuple(_with(a, rest, value) if i == first else a for i, a in enumerate(node.args))


def _with(argument: Any, path: list[Any], value: int) -> Any:
    if not path:
        return value
    items = list(argument)
    items[path[0]] = _with(items[path[0]], path[1:], value)
    return type(argument)(items) if type(argument) in (list, tuple) else tuple(items)
