"""Writes what `fxgrow.analysis.initial_state` proved: the new entries, norms and numbers of a resized graph.

The same formulas serve units that are left out: a norm keeps its function where these were zero, or the mean.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn import functional as F
from torch.utils import _pytree as pytree

from fxgrow.analysis.axis_statistics import COPY, MEAN, SPLIT, ZERO
from fxgrow.axes.axes import UnitVar, unit_entries
from fxgrow.axes.structure import Factor, Invariant
from fxgrow.graph.arguments import argument_leaves, get_argument, set_argument
from fxgrow.graph.conditional import ConditionalInterpreter
from fxgrow.graph.evaluate import eval_mode
from fxgrow.graph.graph import lookup
from fxgrow.graph.node_meta import EXAMPLE_INPUTS
from fxgrow.rewriting.size_change import AxisChange, SizeChange

#: position of eps among the arguments of a functional norm
_EPS = {F.layer_norm: 4, F.rms_norm: 3}
NodeMap = Mapping[fx.Node, fx.Node]


def rescaled(old: Tensor, name: str, change: SizeChange) -> Tensor:
    """Old entries of what takes back the factor of a norm at its new size: its weights, or those that read it."""
    for var, state in change.initial_states.items():
        if name in state.rescaled:
            factor, offset = state.rescaled[name]
            return (old + offset) * _number(factor, var, change) - offset
    return old


def _number(factor: Factor, var: UnitVar, change: SizeChange) -> float:
    ratios = {c: (var.size - c) / (change.units(var) - c) for c in factor}
    return math.prod(math.pow(ratios[c], p) for c, p in factor.items())


def write_initial_entries(new: Tensor, name: str, change: SizeChange, axes: Sequence[AxisChange]) -> None:
    """New entries of a parameter that writes a width with an invariant: the mean of old ones, zero, parts or copies."""
    for var, state in change.initial_states.items():
        for dim, axis in enumerate(axes):
            if (name, dim) not in state.writers or var not in axis.new:
                continue
            positions = axis.new[var].to(new.device)
            if state.kind in (MEAN, COPY):
                old = new.movedim(dim, 0).index_select(0, axis.moved.to(new.device))
                ones = [1] * (old.dim() - 1)
                if name in state.scales:
                    old = old * lookup(change.gm, state.scales[name]).detach().to(new).view(-1, *ones)
                if state.kind == MEAN:
                    rows = old.mean(0, keepdim=True).expand(len(positions), *old.shape[1:])
                else:
                    rows = old.repeat(change.added[var], *ones)
                new.index_copy_(dim, positions, rows.movedim(0, dim).contiguous())
            elif state.kind == SPLIT:
                units = axis.moved[unit_entries(change.structure.parameters[name][dim], var)]
                _split(new.movedim(dim, 0), units.to(new.device), positions.view(-1, units.shape[1]))
            elif not state.products:
                new.index_fill_(dim, positions, 0)


def _split(rows: Tensor, old: Tensor, new: Tensor) -> None:
    """Turns units into planes: (a u, b u) for u, with a^2 + b^2 = 1, keeps lengths and products."""
    for i in range(min(len(new), len(old))):
        parts = new[i :: len(old)]
        for part in parts:
            rows[part] = rows[old[i]] * (0.6 / math.sqrt(len(parts)))
        rows[old[i]] *= 0.8


def write_norm_eps(gm: fx.GraphModule, change: SizeChange, node_map: NodeMap) -> None:
    """Epsilons for the new sizes: they change with what they are added to, variances by d / d'."""
    for var, state in change.initial_states.items():
        for node, path, factor in state.numbers:
            set_argument(node_map[node], path, get_argument(node, path) * _number(factor, var, change))
        for invariant in state.norms:
            if invariant.kind in ("length", "statistic"):
                continue
            node, eps = node_map[invariant.node], invariant.eps * var.size / change.units(var)
            if node.op == "call_module":
                module: Any = gm.get_submodule(str(node.target))
                module.eps = eps
            else:
                at = _EPS[node.target]  # type: ignore[index]
                set_argument(node, (at if len(node.args) > at else "eps",), eps)


def write_kept_numbers(change: SizeChange, node_map: NodeMap) -> None:
    """Numbers that were computed from a size that changes keep their old value."""
    for node, path, value, axes in change.structure.kept_numbers:
        copy = node_map[node]
        if not change.changes(axes):
            continue
        if path:
            set_argument(copy, path, value)
            continue
        for user in list(copy.users):
            for at in [at for at, leaf in argument_leaves(user) if leaf is copy]:
                set_argument(user, at, value)
        copy.graph.erase_node(copy)


def rows_that_must_be_zero(gm: fx.GraphModule, change: SizeChange, node_map: NodeMap) -> dict[tuple[str, int], Tensor]:
    """New rows that flow into the second operand of a product, per parameter and dimension, found by running the graph.

    A weight may write both operands (a packed query, key and value); which of its new rows arrive where, the gradient
    of the operand's new entries says.
    """
    written = change.parameters
    wanted = [
        (var, invariant, sorted((n, dim) for n, dim in state.writers if n in written and var in written[n][dim].new))
        for var, state in change.initial_states.items()
        for invariant in (state.products if state.kind == ZERO and var in change.added else ())
    ]
    if not wanted or any(p.is_meta for p in gm.parameters()):  # meta tensors have no rows to fill
        return {}
    run = ConditionalInterpreter(gm, garbage_collect_values=False)
    generator = torch.Generator().manual_seed(0)
    hits: dict[tuple[str, int], Tensor] = {}
    with contextlib.ExitStack() as stack, eval_mode(gm), torch.enable_grad():
        for t in [lookup(gm, name) for *_, writers in wanted for name, _ in writers]:
            if not t.requires_grad:  # a bias may be a buffer
                stack.callback(t.requires_grad_(True).requires_grad_, False)
        inputs = pytree.tree_map_only(Tensor, torch.clone, gm.meta[EXAMPLE_INPUTS])  # the model may write into them
        run.run(*inputs, enable_io_processing=False)
        for var, invariant, writers in wanted:
            total = _random_sum(run.env[node_map[invariant.source]], invariant, var, change, generator)
            tensors = [lookup(gm, name) for name, _ in writers]
            gradients = torch.autograd.grad(total, tensors, allow_unused=True, retain_graph=True)
            for writer, g in zip(writers, gradients, strict=True):
                if g is not None:
                    hit = g.movedim(writer[1], 0).flatten(1).ne(0).any(1) if g.dim() > 1 else g.ne(0)
                    hits[writer] = hit | hits[writer] if writer in hits else hit
    for (name, dim), hit in hits.items():
        hit[written[name][dim].moved.to(hit.device)] = False
    return {writer: hit.nonzero().flatten() for writer, hit in hits.items()}


def _random_sum(
    value: Tensor, invariant: Invariant, var: UnitVar, change: SizeChange, generator: torch.Generator
) -> Tensor:
    """A random linear function of the new entries of an operand."""
    total = value.real.new_zeros(())
    for i, axis in enumerate(change.structure.outputs[invariant.source]):
        positions = change.axis(axis).new.get(var)
        if positions is not None:
            part = value.index_select(i, positions.to(value.device))
            part = torch.view_as_real(part).sum(-1) if part.is_complex() else part
            weights = torch.rand(part.shape, generator=generator, dtype=torch.float64) + 0.5
            total = total + (part * weights.to(part)).sum()
    return total
