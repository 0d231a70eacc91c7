"""Running statistics of BatchNorm follow a growth.

What growth adds to the input of an old norm shifts its mean and variance. Training normalises that away at once; in
eval mode the running statistics would lag behind until training has moved them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, fx

from fxgrow._analyse import analyse
from fxgrow._candidates import places
from fxgrow._data import Batch
from fxgrow._pass import forward
from fxgrow._plan import Plan
from fxgrow._rewrite import Values, lookup
from fxgrow._search import Line, batch_statistics, norms_of


def follow(line: Line, gamma: float, batches: Sequence[Batch]) -> Plan:
    """The line's plan with running statistics moved as the batch statistics move from 0 to gamma.

    The graph of the line is left at gamma, its running statistics moved too.
    """
    before = _measure(line.move(0.0), batches)
    graph = line.move(gamma)
    after = _measure(graph, batches)
    plan = line.plan
    structure = analyse(line.original)
    where = places(structure, plan.units)
    new, delta = {n: dict(s) for n, s in plan.values.new.items()}, dict(plan.values.delta)
    for name, (mean, var) in after.items():
        old_mean, old_var = before[name]
        growth = torch.where(old_var > 0, var / old_var, 1.0) - 1
        for key in ("running_mean", "running_var"):
            full = f"{name}.{key}"
            buffer = lookup(graph, full)
            shift = (mean - old_mean if key == "running_mean" else buffer * growth).to(buffer)
            if not bool(shift.any()):
                continue
            buffer += shift
            for (width, dim), positions in where.get(full, {}).items():
                new.setdefault(full, {})[width, dim] = buffer[positions.to(buffer.device)].clone()
            (old,) = line.index.get(full, (None,))
            # a plan multiplies its deltas by gamma
            delta[full] = (shift if old is None else shift[old.to(shift.device)]) / gamma
    return replace(plan, values=Values(new, delta, plan.values.corner))


def _measure(gm: fx.GraphModule, batches: Sequence[Batch]) -> dict[str, tuple[Tensor, Tensor]]:
    """Mean and variance of what enters each norm, per channel, averaged over batches."""
    sums: dict[str, tuple[Tensor, Tensor]] = {}
    count: dict[str, int] = {}

    def see(name: str, x: Tensor) -> None:
        rows = x.transpose(0, 1).flatten(1)
        rows = rows if rows.dtype == torch.float64 else rows.float()
        mean, var = rows.mean(1), rows.var(1)
        old = sums.get(name)
        sums[name] = (mean, var) if old is None else (old[0] + mean, old[1] + var)
        count[name] = count.get(name, 0) + 1

    if any(b.size < 2 for b in batches):
        return {}
    hooks = [
        m.register_forward_pre_hook(lambda _, args, name=name: see(name, args[0])) for name, m in norms_of(gm).items()
    ]
    try:
        with torch.no_grad(), batch_statistics(gm, batches):
            for batch in batches:
                forward(gm, gm, batch)
    finally:
        for hook in hooks:
            hook.remove()
    return {name: (m / count[name], v / count[name]) for name, (m, v) in sums.items()}
