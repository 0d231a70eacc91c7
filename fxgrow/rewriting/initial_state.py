"""Writes what `fxgrow.analysis.initial_state` proved: the new entries, norms and numbers of a widened graph."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, fx
from torch.nn import functional as F

from fxgrow.analysis.initial_state import COPY, MEAN, SPLIT, ZERO, InitialState
from fxgrow.axes.axes import Dims, UnitVar, multiplicity, unit_entries
from fxgrow.axes.structure import Structure
from fxgrow.graph.evaluate import eval_mode
from fxgrow.graph.graph import lookup

#: position of eps among the arguments of a functional norm
_EPS = {F.layer_norm: 4, F.rms_norm: 3}


def growing(structure: Structure, grow: Mapping[UnitVar, int]) -> dict[UnitVar, InitialState]:
    """What is made up for when these variables grow."""
    return {var: c for var, c in structure.initial_states.items() if grow.get(var)}


def rescaled(old: Tensor, name: str, structure: Structure, grow: Mapping[UnitVar, int]) -> Tensor:
    """A norm's old weights times sqrt(d / (d + k)): new units count in the mean and add nothing to it.

    The mean of responses is one of lengths, not of squares. Where a norm has no weights, what reads it is scaled.
    """
    for var, c in growing(structure, grow).items():
        for d in c.norms:
            if d.weight == name:
                ratio = _ratio(var, grow)
                return (old + d.offset) * (ratio if d.kind == "response" else math.sqrt(ratio)) - d.offset
        if name in c.scaled:
            return old * math.sqrt(_ratio(var, grow))
    return old


def _ratio(var: UnitVar, grow: Mapping[UnitVar, int]) -> float:
    return var.size / (var.size + grow[var])


def apply_initial_entries(
    new: Tensor,
    name: str,
    entries: Sequence[Mapping[UnitVar, Tensor]],
    structure: Structure,
    grow: Mapping[UnitVar, int],
    scale_of: Mapping[str, Tensor],
) -> None:
    """New entries of a parameter that writes such a width: the mean of the old ones, zero, parts or copies.

    Args:
        new: the widened parameter, complete but for these entries.
        name: its name.
        entries: per dimension, the positions of each variable's new entries.
        structure: of the graph before.
        grow: units per variable.
        scale_of: old values of the parameters that scale a writer unit by unit.
    """
    for var, c in growing(structure, grow).items():
        for dim, found in enumerate(entries):
            if (name, dim) not in c.writers or var not in found:
                continue
            positions = found[var].to(new.device)
            if c.kind == MEAN:
                keep = torch.ones(new.shape[dim], dtype=torch.bool, device=new.device)
                keep[positions] = False
                old = new.movedim(dim, 0)[keep]
                if name in c.scales:
                    scale = scale_of[c.scales[name]].to(new).flatten()
                    old = old * scale.view(-1, *[1] * (old.dim() - 1))
                mean = old.mean(0, keepdim=True).expand(len(positions), *old.shape[1:])
                new.index_copy_(dim, positions, mean.movedim(0, dim).contiguous())
            elif c.kind == COPY:
                kept = torch.ones(new.shape[dim], dtype=torch.bool, device=new.device)
                kept[positions] = False
                old = new.movedim(dim, 0)[kept]
                copies = old.repeat(grow[var], *[1] * (old.dim() - 1)).movedim(0, dim)
                new.index_copy_(dim, positions, copies.contiguous())
            elif c.kind == SPLIT:
                _split(new.movedim(dim, 0), unit_entries(structure.parameters[name][dim], var, grow), grow[var])
            elif not c.products:
                new.index_fill_(dim, positions, 0)


def _split(rows: Tensor, units: Tensor, count: int) -> None:
    """Turns units into planes: (a u, b u) for u, with a^2 + b^2 = 1, keeps lengths and products."""
    old, new = units[:-count].to(rows.device), units[-count:].to(rows.device)
    for i in range(min(count, len(old))):
        parts = new[i :: len(old)]
        for part in parts:
            rows[part] = rows[old[i]] * (0.6 / math.sqrt(len(parts)))
        rows[old[i]] *= 0.8


def apply_initial_norms(
    gm: fx.GraphModule, structure: Structure, grow: Mapping[UnitVar, int], node_map: Mapping[fx.Node, fx.Node]
) -> None:
    """Epsilons for the new sizes: variances shrink by d / (d + k), and eps with them."""
    for var, c in growing(structure, grow).items():
        for d in c.norms:
            if d.kind == "length":
                continue
            node, eps = node_map[d.node], d.eps * _ratio(var, grow)
            if d.eps_at is not None:
                adds, at = node_map[d.eps_at[0]], d.eps_at[1]
                adds.args = tuple(eps if i == at else a for i, a in enumerate(adds.args))
            elif node.op == "call_module":
                setattr(gm.get_submodule(str(node.target)), d.eps_name, eps)
            elif len(node.args) > _EPS[node.target]:  # type: ignore[index]
                at = _EPS[node.target]  # type: ignore[index]
                node.args = (*node.args[:at], eps, *node.args[at + 1 :])
            else:
                node.kwargs = {**node.kwargs, "eps": eps}


def apply_initial_numbers(
    structure: Structure, grow: Mapping[UnitVar, int], node_map: Mapping[fx.Node, fx.Node]
) -> None:
    """Numbers that a growing size gave keep their old value."""
    for node, keyword, value, axes in structure.kept_numbers:
        if not any(grow.get(var) for axis in axes for var in multiplicity(axis)):
            continue
        twin = node_map[node]
        if keyword is not None:
            twin.kwargs = {**twin.kwargs, keyword: value}
            continue
        _replace(twin, value)


def _replace(node: fx.Node, value: float) -> None:
    """Writes a number where a node was used."""
    for user in list(node.users):
        user.args = fx.map_arg(user.args, lambda n: value if n is node else n)
        user.kwargs = fx.map_arg(user.kwargs, lambda n: value if n is node else n)
    node.graph.erase_node(node)


def apply_initial_products(
    gm: fx.GraphModule,
    structure: Structure,
    grow: Mapping[UnitVar, int],
    node_map: Mapping[fx.Node, fx.Node],
    inputs: Sequence[object],
    index: Mapping[str, tuple[Tensor | None, ...]],
) -> None:
    """Zero rows for what flows into the second operand of a product, found by running the graph.

    A weight may write both operands (a packed query, key and value); which of its new rows arrive where, the gradient
    of the operand's new entries says.
    """
    silent = {var: c for var, c in growing(structure, grow).items() if c.kind == ZERO}
    wanted = {node_map[d.source]: (var, d, c) for var, c in silent.items() for d in c.products}
    if not wanted:
        return
    writing = {
        d.source: sorted(w for w in c.writers if index.get(w[0], ()) and index[w[0]][w[1]] is not None)
        for _, d, c in wanted.values()
    }
    seen = _Values(gm, wanted)
    generator = torch.Generator().manual_seed(0)
    hits: dict[tuple[str, int], Tensor] = {}
    with eval_mode(gm), torch.enable_grad(), _trained([lookup(gm, w[0]) for ws in writing.values() for w in ws]):
        seen.run(*inputs, enable_io_processing=False)
        for source, (var, d, _) in wanted.items():
            total = _new_entries(seen.values[source], structure.outputs[d.source], var, grow, generator)
            parameters = [lookup(gm, name) for name, _ in writing[d.source]]
            gradients = torch.autograd.grad(total, parameters, allow_unused=True, retain_graph=True)
            for writer, g in zip(writing[d.source], gradients, strict=True):
                if g is not None:
                    hit = g.movedim(writer[1], 0).flatten(1).ne(0).any(1) if g.dim() > 1 else g.ne(0)
                    hits[writer] = hit | hits[writer] if writer in hits else hit
    with torch.no_grad():
        for (name, dim), hit in hits.items():
            old = index[name][dim]
            if old is not None:
                hit[old.to(hit.device)] = False
            lookup(gm, name).index_fill_(dim, hit.nonzero().flatten(), 0)


@contextlib.contextmanager
def _trained(tensors: Sequence[Tensor]) -> Iterator[None]:
    """With gradients for buffers too: a bias may be one."""
    frozen = {t for t in tensors if not t.requires_grad}
    for t in frozen:
        t.requires_grad_(True)
    try:
        yield
    finally:
        for t in frozen:
            t.requires_grad_(False)


def _new_entries(
    value: Tensor, dims: Dims, var: UnitVar, grow: Mapping[UnitVar, int], generator: torch.Generator
) -> Tensor:
    from fxgrow.rewriting.axis_growth import extend

    total = value.new_zeros(())
    for i, axis in enumerate(dims):
        positions = extend(axis, grow).new.get(var)
        if positions is not None:
            part = value.index_select(i, positions.to(value.device))
            weights = torch.rand(part.shape, generator=generator, dtype=torch.float64) + 0.5
            total = total + (part * weights.to(part)).sum()
    return total


class _Values(fx.Interpreter):
    """Runs a graph and keeps what some nodes put out."""

    def __init__(self, gm: fx.GraphModule, wanted: Mapping[fx.Node, object]) -> None:
        super().__init__(gm)
        self.wanted = wanted
        self.values: dict[fx.Node, Tensor] = {}

    def run_node(self, n: fx.Node) -> object:
        out = super().run_node(n)
        if n in self.wanted:
            self.values[n] = out
        return out
