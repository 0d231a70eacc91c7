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
from torch import Tensor, fx, nn

from fxgrow._analyse import analyse
from fxgrow._axes import Axis, Dims, Var, length, resolve
from fxgrow._check import check_shapes
from fxgrow._copies import Copies, settle_copies
from fxgrow._errors import PlanError
from fxgrow._fold import folded, quiet_rows, unfolded
from fxgrow._graph import compile_graph, copy_graph, lookup
from fxgrow._settle import settle_entries, settle_norms, settle_numbers, settle_products, shrunk
from fxgrow._widths import Hidden, hidden
from fxgrow.ops.registry import Projection, Structure


@dataclass
class Values:
    """What new and old entries become, where the defaults are not wanted.

    Attributes:
        new: per parameter, by width and dimension, the new slices along that dimension in the order of their
            positions; the other dimensions have their old sizes.
        delta: per parameter, what is added to its old entries.
        corner: whether new rows of a producer read the new units of other widths (random) or not (zero).
        copies: per width, the old units that its new ones are like; `new` is what they have of their own.
    """

    new: dict[str, dict[tuple[str, int], Tensor]] = field(default_factory=dict)
    delta: dict[str, Tensor] = field(default_factory=dict)
    corner: bool = True
    copies: dict[str, Copies] = field(default_factory=dict)


@dataclass(frozen=True)
class Extended:
    """How one axis grows: where its old entries go, and where each width's new ones appear."""

    size: int
    old: Tensor
    new: dict[Var, Tensor]


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
    plain = folded(gm)
    wide = widened(plain, analyse(plain), additions, values, generator)
    check_shapes(wide.graph, wide.lengths)
    return (wide.graph, wide.index) if plain is gm else unfolded(wide.graph, wide.index)


@dataclass(frozen=True)
class Wide:
    """A widened copy that nobody has checked yet.

    Attributes:
        graph: the copy.
        index: for each parameter that grew, the new positions of its old entries.
        twins: the copy's node for each node of the original.
        lengths: the shape that each node of the copy must have.
    """

    graph: fx.GraphModule
    index: dict[str, tuple[Tensor | None, ...]]
    twins: dict[fx.Node, fx.Node]
    lengths: dict[fx.Node, tuple[int, ...]]


def widened(
    gm: fx.GraphModule,
    structure: Structure,
    additions: Mapping[str, int],
    values: Values | None = None,
    generator: torch.Generator | None = None,
) -> Wide:
    """`rewrite` without its check, for who runs the copy on data at once; its nodes keep the old shapes' metadata."""
    grow = units_of({h.width.name: h for h in hidden(structure)}, additions)
    filled, index = entries(gm, structure, additions, values or Values(), generator)
    replaced: dict[int, Tensor] = {}
    for name, new in filled.items():
        old = lookup(gm, name)
        replaced[id(old)] = nn.Parameter(new, old.requires_grad) if isinstance(old, nn.Parameter) else new
    grown = copy_graph(gm, replaced)
    twins = dict(zip(gm.graph.nodes, grown.graph.nodes, strict=True))
    _write_constants(grown, structure, grow, twins)
    settle_norms(grown, structure, grow, twins)
    settle_numbers(structure, grow, twins)
    compile_graph(grown)
    settle_products(grown, structure, grow, twins, gm.meta["example_inputs"], index)
    return Wide(grown, index, twins, _lengths(structure, grow, twins))


def entries(
    gm: fx.GraphModule,
    structure: Structure,
    additions: Mapping[str, int],
    values: Values,
    generator: torch.Generator | None = None,
) -> tuple[dict[str, Tensor], dict[str, tuple[Tensor | None, ...]]]:
    """Every parameter that changes, as `widened` has it, and the new positions of old entries in those that grow.

    Gradients flow back to what `values` gives.
    """
    found = {h.width.name: h for h in hidden(structure)}
    grow = units_of(found, additions)
    names = {h.var: name for name, h in found.items()}
    out: dict[str, Tensor] = {}
    index: dict[str, tuple[Tensor | None, ...]] = {}
    scales = {n: lookup(gm, n).detach() for c in structure.compensations.values() for n in c.scales.values()}
    for name, dims in structure.parameters.items():
        old = lookup(gm, name)
        plan = [extend(axis, grow) for axis in dims]
        changed = any(g.new for g in plan)
        if not changed and name not in values.delta:
            continue
        new = out[name] = _fill(name, old.detach(), dims, plan, structure, values, names, generator, grow)
        settle_entries(new, name, [g.new for g in plan], structure, grow, scales)
        quiet_rows(gm, name, new, [g.old for g in plan])
        if changed:
            index[name] = tuple(g.old if g.new else None for g in plan)
    return out, index


def units_of(found: Mapping[str, Hidden], additions: Mapping[str, int]) -> dict[Var, int]:
    grow: dict[Var, int] = {}
    for name, k in additions.items():
        h = require_free(found, name)
        if k < 0 or k % h.width.step:
            raise PlanError(
                f"{k} units for width {name!r}: it grows by positive multiples of its step {h.width.step}; "
                f"try {max(h.width.step, math.ceil(max(k, 1) / h.width.step) * h.width.step)}."
            )
        if k:
            grow[h.var] = k // h.width.step
    return grow


def require_free(found: Mapping[str, Hidden], name: str) -> Hidden:
    """The width of that name, or an error that says what there is, or why it is pinned."""
    if name not in found:
        free = [n for n, h in found.items() if h.width.pinned is None]
        raise PlanError(
            f"There is no width named {name!r}. Widths are named after their first producer; free ones here: "
            f"{', '.join(free[:8]) or 'none'}{' ...' if len(free) > 8 else ''}."
        )
    h = found[name]
    if h.width.pinned is not None:
        raise PlanError(f"Width {name!r} cannot change: {h.width.pinned}.")
    return h


def extend(axis: Axis, grow: Mapping[Var, int]) -> Extended:
    """New entries stand at the end of each of their width's segments; they are listed unit by unit."""
    old: list[int] = []
    new: dict[Var, list[list[int]]] = {}
    at = 0
    for s in resolve(axis):
        old.extend(range(at, at + s.length))
        at += s.length
        if s.var is not None and grow.get(s.var):
            units = new.setdefault(s.var, [[] for _ in range(grow[s.var])])
            for unit in units:
                unit.extend(range(at, at + s.inner))
                at += s.inner
    positions = {v: torch.tensor([i for unit in units for i in unit]) for v, units in new.items()}
    return Extended(at, torch.tensor(old, dtype=torch.long), positions)


def _fill(
    name: str,
    old: Tensor,
    dims: Dims,
    plan: list[Extended],
    structure: Structure,
    values: Values,
    names: Mapping[Var, str],
    generator: torch.Generator | None,
    grow: Mapping[Var, int],
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
        free = {var for var, c in structure.compensations.items() if (p.weight, p.in_dim) in c.free}
        _random(new, p.in_dim, [i for v, i in plan[p.in_dim].new.items() if v in free], _fan_in(new, p), generator)
        _zero(new, plan, p.in_dim, p.out_dim, corner=not values.corner, free=free)
    for (width, dim), given in values.new.get(name, {}).items():
        for var, positions in plan[dim].new.items():
            if names[var] == width:
                where = [positions if d == dim else other.old for d, other in enumerate(plan)]
                put(new, where, given.to(old))
    delta = values.delta.get(name)
    old = shrunk(old, name, structure, grow)
    kept = [g.old for g in plan]
    put(new, kept, old if delta is None else old + delta.to(old))
    if values.copies:
        moved = None
        if delta is not None:
            moved = torch.zeros_like(new)
            put(moved, kept, delta.to(old))
        copies = {var: values.copies[width] for var, width in names.items() if width in values.copies}
        own = {(var, dim) for width, dim in values.new.get(name, {}) for var in copies if names[var] == width}
        settle_copies(new, name, structure, plan, copies, own, moved)
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


def _zero(new: Tensor, plan: list[Extended], in_dim: int, out_dim: int, corner: bool, free: set[Var]) -> None:
    for var, positions in plan[in_dim].new.items():
        if var in free:
            continue
        positions = positions.to(new.device)
        columns = new.index_select(in_dim, positions)
        rows = torch.arange(plan[out_dim].size) if corner else plan[out_dim].old
        if in_dim == out_dim:
            columns.zero_()
        else:
            columns.index_fill_(out_dim, rows.to(new.device), 0)
        new.index_copy_(in_dim, positions, columns)


def put(new: Tensor, where: list[Tensor], value: Tensor, dim: int = 0) -> None:
    """`new[ix_(*where)] = value`, dimension by dimension, skipping those that are taken whole."""
    while dim < new.dim() and len(where[dim]) == new.shape[dim]:
        dim += 1
    if dim == new.dim():
        new.copy_(value.reshape(new.shape))
        return
    runs = _runs(where[dim])
    if len(runs) <= 8:
        for start, at, n in runs:
            put(new.narrow(dim, start, n), where, value.narrow(dim, at, n), dim + 1)
        return
    index = where[dim].to(new.device)
    part = new.index_select(dim, index)
    put(part, where, value, dim + 1)
    new.index_copy_(dim, index, part)


def _runs(positions: Tensor) -> list[tuple[int, int, int]]:
    """Neighbouring positions as (first position, index of it, how many): most axes are one run, copied in place."""
    breaks = (positions.diff() != 1).nonzero().flatten() + 1
    edges = [0, *breaks.tolist(), len(positions)]
    return [(int(positions[a]), a, b - a) for a, b in zip(edges, edges[1:], strict=False) if b > a]


def _new_length(axis: Axis, grow: Mapping[Var, int]) -> int:
    return length(axis) + sum(grow.get(s.var, 0) * s.inner for s in resolve(axis) if s.var is not None)


def _lengths(
    structure: Structure, grow: Mapping[Var, int], twins: Mapping[fx.Node, fx.Node]
) -> dict[fx.Node, tuple[int, ...]]:
    return {
        twins[node]: tuple(_new_length(a, grow) for a in dims)
        for node, dims in structure.outputs.items()
        if isinstance(dims, Dims)
    }


def _write_constants(
    gm: fx.GraphModule, structure: Structure, grow: Mapping[Var, int], twins: Mapping[fx.Node, fx.Node]
) -> None:
    for c in structure.constants:
        n = _new_length(c.axis, grow)
        target, path = c.where
        if n == length(c.axis):
            continue
        if isinstance(target, str):
            module, (name, *rest) = gm.get_submodule(target), path
            setattr(module, name, _with(getattr(module, name), rest, n - c.less))
        else:
            _set_argument(twins[target], path, n - c.less)
    for node, path, axes, axis in structure.replaced:
        if any(_new_length(a, grow) != length(a) for a in axes):
            _set_argument(twins[node], path, -1 if axis is None else _new_length(axis, grow))


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
