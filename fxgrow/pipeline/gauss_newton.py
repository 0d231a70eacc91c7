"""Outgoing weights on the loss's own curvature: conjugate gradients from zero, before the line search.

The refit takes E[V V^T] of one consumer for the curvature. Behind attention, or in early layers, that is far from it:
positions of a sequence move together, layers behind bend what passes them, and widths that grow at once ask for the
same. The refit then points where the slope is largest for its own model, and the line search has to stop early. Here
the curvature is J^T H J (generalised Gauss-Newton; Schraudolph 2002, Martens 2010), H that of the loss in the outputs,
over all new outgoing weights (and updates of old ones) of all widths together. Two forward passes and one backward give
its product with a direction: J d as a difference of outputs, so that no operator needs a second derivative.

requires: a plan with outgoing weights from a refit.
ensures:  the same plan with other outgoing weights and updates, of which gamma = 1 is the predicted best.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from fxgrow.analysis.analyse import analyse
from fxgrow.data.batches import Batch, Data
from fxgrow.data.loss import LossFn, loss_of
from fxgrow.graph.evaluate import eval_mode
from fxgrow.graph.graph import lookup
from fxgrow.graph.unrolled_rnn import unroll_recurrent_layers
from fxgrow.rewriting.axis_growth import places
from fxgrow.rewriting.plan import Plan
from fxgrow.rewriting.rewrite import Values, rewrite
from fxgrow.statistics.forward_backward import forward

#: conjugate-gradient steps; the fewer, the less of the noise of few batches is fitted
STEPS = 8
#: batches that the curvature is taken from
BATCHES = 6
#: added to the curvature, relative to that along the slope
DAMPING = 1e-2
#: length of the step over which outputs are compared, relative to the weights that exist
PROBE = 1e-2
#: one tensor for every parameter that moves
Direction = list[Tensor]


def newton(gm: fx.GraphModule, plan: Plan, data: Data, loss_fn: LossFn | None, share: float) -> Plan:
    """The plan with outgoing weights and updates found by conjugate gradients; incoming weights stay.

    Args:
        gm: the original.
        plan: from a refit.
        data: its fitting batches are read, a few of them several times.
        loss_fn: see `fxgrow.profile`.
        share: the part of gamma = 1 that the line search starts from.

    Returns:
        The plan as it was where the loss is no function of what the model puts out (a model with its own loss), or
        parameters are of less than single precision, where differences of outputs drown.
    """
    quadratic = Quadratic(gm, plan, data, loss_fn)
    if not quadratic.parameters or any(p.dtype not in (torch.float32, torch.float64) for p in quadratic.parameters):
        return plan
    with eval_mode(quadratic.graph), torch.enable_grad():
        found = conjugate_gradients(quadratic.slope(), quadratic.curvature)
    if found is None:
        return plan
    return replace(plan, values=quadratic.values(found), scale=share, slope=0.0, curvature=0.0)


class Quadratic:
    """The loss around gamma = 0, to second order in the new outgoing weights and the updates of a plan."""

    def __init__(self, gm: fx.GraphModule, plan: Plan, data: Data, loss_fn: LossFn | None) -> None:
        self.plan, self.data, self.loss_fn = plan, data, loss_fn
        self.few = list(itertools.islice(data.fitting(), BATCHES))
        wide, _ = rewrite(gm, plan.units, plan.at(0.0), torch.Generator().manual_seed(0))
        self.graph = unroll_recurrent_layers(wide)  # cuDNN's recurrent layers have no backward pass in eval mode
        self.where = places(analyse(gm), plan.units)
        self.names = list(dict.fromkeys([*(name for name, _, _ in plan.outgoing), *plan.values.delta]))
        self.parameters = [lookup(self.graph, name).requires_grad_() for name in self.names]
        self.base = [p.detach().clone() for p in self.parameters]
        self.masks = [self._mask(name) for name in self.names]
        self.size = sum(float(lookup(gm, name).detach().square().sum()) for name in self.names) ** 0.5

    def _mask(self, name: str) -> Tensor:
        """One where a parameter moves: new rows of a consumer belong to other widths."""
        mask = torch.zeros_like(lookup(self.graph, name))
        own = self.where.get(name, {})
        for (width, dim), positions in own.items():
            if (name, width, dim) in self.plan.outgoing:
                mask.index_fill_(dim, positions.to(mask.device), 1.0)
        for (width, dim), positions in own.items():
            if (name, width, dim) not in self.plan.outgoing:
                mask.index_fill_(dim, positions.to(mask.device), 0.0)
        if name in self.plan.values.delta:
            old = torch.ones_like(mask)
            for (_, dim), positions in own.items():
                old.index_fill_(dim, positions.to(mask.device), 0.0)
            mask += old
        return mask

    def slope(self) -> Direction:
        """Minus the gradient of the mean loss."""
        sums, count = [torch.zeros_like(b) for b in self.base], 0
        for batch in self.data.fitting():
            loss = loss_of(forward(self.graph, self.graph, batch), batch, self.loss_fn)
            self._pull(sums, [loss], [loss.new_full((), -float(batch.size))])
            count += batch.size
        self.data.world.sum_(sums)
        (total,) = self.data.world.total(count)
        return [s / total for s in sums]

    def curvature(self, direction: Direction) -> Direction:
        """J^T (dL/df at f + eps J d, less that at f) / eps, which is J^T H J d."""
        length = _dot(direction, direction) ** 0.5
        sums = [torch.zeros_like(b) for b in self.base]
        if not length > 0:
            return sums
        eps = PROBE * self.size / length
        for batch in self.few:
            self._put(direction, eps)
            with torch.no_grad():
                there = _asked(forward(self.graph, self.graph, batch), batch, self.loss_fn)
            self._put(direction, 0.0)
            output = forward(self.graph, self.graph, batch)
            here = _asked(output, batch, self.loss_fn)
            back = [(t - h) * (batch.size / eps) for t, h in zip(there, here, strict=True)]
            self._pull(sums, _outputs(output), back)
        self.data.world.sum_(sums)
        (total,) = self.data.world.total(sum(b.size for b in self.few))
        return [s / total for s in sums]

    def _put(self, direction: Direction, eps: float) -> None:
        with torch.no_grad():
            for p, b, d in zip(self.parameters, self.base, direction, strict=True):
                p.copy_(b + eps * d)

    def _pull(self, sums: Direction, outputs: Sequence[Tensor], back: Sequence[Tensor]) -> None:
        """Adds the gradients of what moves."""
        pairs = [(o, g) for o, g in zip(outputs, back, strict=True) if o.requires_grad]
        if not pairs:
            return
        found = torch.autograd.grad([o for o, _ in pairs], self.parameters, [g for _, g in pairs], allow_unused=True)
        for s, g, mask in zip(sums, found, self.masks, strict=True):
            if g is not None:
                s.add_(g * mask)

    def values(self, found: Direction) -> Values:
        """The plan's values with these outgoing weights and updates."""
        values = self.plan.values
        new, delta = {name: dict(slices) for name, slices in values.new.items()}, dict(values.delta)
        moved = dict(zip(self.names, found, strict=True))
        for name, width, dim in self.plan.outgoing:
            positions = self.where[name][width, dim].to(moved[name].device)
            new[name][width, dim] = self._old_entries(moved[name].index_select(dim, positions), name, but=dim)
        for name in delta:
            delta[name] = self._old_entries(moved[name], name)
        return replace(values, new=new, delta=delta)

    def _old_entries(self, t: Tensor, name: str, but: int | None = None) -> Tensor:
        """The entries along every dimension (except one) that were there before."""
        for dim in range(t.dim()):
            gone = [positions for (_, d), positions in self.where.get(name, {}).items() if d == dim]
            if dim != but and gone:
                keep = torch.ones(t.shape[dim], dtype=torch.bool)
                keep[torch.cat(gone)] = False
                t = t.index_select(dim, keep.nonzero().flatten().to(t.device))
        return t


def conjugate_gradients(slope: Direction, curvature: Callable[[Direction], Direction]) -> Direction | None:
    """X with (curvature + damping) x = slope after `STEPS` steps from zero; None where there is no curvature."""
    x: Direction | None = None
    residual, direction, damping = slope, slope, 0.0
    for step in range(STEPS):
        bent = curvature(direction)
        before, along = _dot(residual, residual), _dot(direction, bent)
        if step == 0 and along > 0:
            damping = DAMPING * along / _dot(direction, direction)
        along += damping * _dot(direction, direction)
        if not along > 0 or not before > 0:
            break
        bent = [b + damping * d for b, d in zip(bent, direction, strict=True)]
        steps = [before / along * d for d in direction]
        x = steps if x is None else [a + s for a, s in zip(x, steps, strict=True)]
        residual = [r - before / along * b for r, b in zip(residual, bent, strict=True)]
        turn = _dot(residual, residual) / before
        direction = [r + turn * d for r, d in zip(residual, direction, strict=True)]
    return x


def _asked(output: Any, batch: Batch, loss_fn: LossFn | None) -> list[Tensor]:
    """The gradient of the loss in each floating tensor of the output."""
    leaves, spec = pytree.tree_flatten(output)
    at = [t.detach().requires_grad_() if _floating(t) else t for t in leaves]
    own = [t for t in at if _floating(t)]
    if not own:
        return []
    with torch.enable_grad():
        loss = loss_of(pytree.tree_unflatten(at, spec), batch, loss_fn)
    found = torch.autograd.grad(loss, own, allow_unused=True)
    return [torch.zeros_like(t) if g is None else g for g, t in zip(found, own, strict=True)]


def _outputs(output: Any) -> list[Tensor]:
    return [t for t in pytree.tree_leaves(output) if _floating(t)]


def _floating(t: Any) -> bool:
    return isinstance(t, Tensor) and t.is_floating_point()


def _dot(a: Sequence[Tensor], b: Sequence[Tensor]) -> float:
    return float(sum((x * y).sum() for x, y in zip(a, b, strict=True)))
