"""The line search: the loss of the grown graph on held-back batches, as a function of gamma."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from fxgrow._data import Batch, LossFn, loss_of
from fxgrow._pass import eval_mode, forward
from fxgrow._plan import Plan
from fxgrow._rewrite import rewrite

#: tried besides 0, as multiples of the plan's own scale
FACTORS = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0)
#: batches of the search hold at most so many samples in all
SEARCH_SAMPLES = 1024


@dataclass(frozen=True)
class Search:
    """Losses along gamma.

    Attributes:
        gammas: the values tried, 0 first.
        losses: mean held-back loss at each, in eval mode.
        best: the gamma with the smallest loss.
    """

    gammas: tuple[float, ...]
    losses: tuple[float, ...]

    @property
    def best(self) -> float:
        return self.gammas[min(range(len(self.losses)), key=self.losses.__getitem__)]


class Line:
    """A grown graph whose parameters move along gamma."""

    def __init__(self, gm: fx.GraphModule, plan: Plan) -> None:
        self.plan = plan
        self.graph, self.index = rewrite(gm, plan.units, plan.at(0.0))
        whole = dict(rewrite(gm, plan.units, plan.at(1.0))[0].named_parameters())
        # new entries and updates of old ones move at one rate, unless incoming weights share gamma
        units = dict(rewrite(gm, plan.units, plan.at(1.0, False))[0].named_parameters()) if plan.symmetric else whole
        self.steps: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
        for name, p in self.graph.named_parameters():
            new, update = (units[name] - p).detach(), (whole[name] - units[name]).detach()
            if bool(new.any()) or bool(update.any()):
                self.steps.append((p, p.detach().clone(), new, update))

    def move(self, gamma: float) -> fx.GraphModule:
        """The graph at this gamma, the same object every time."""
        power = gamma**0.5 if self.plan.symmetric else gamma
        with torch.no_grad():
            for p, base, new, update in self.steps:
                p.copy_(base + power * new + gamma * update)
        return self.graph


def mean_loss(graph: fx.GraphModule, batches: Sequence[Batch], loss_fn: LossFn | None) -> float:
    """Mean loss over samples, in the graph's mode."""
    total = 0.0
    with torch.no_grad():
        for b in batches:
            total += float(loss_of(forward(graph, graph, b), b, loss_fn)) * b.size
    return total / max(1, sum(b.size for b in batches))


def search(line: Line, batches: Sequence[Batch], loss_fn: LossFn | None) -> Search:
    """Evaluates gamma = 0 and multiples of the plan's scale until the loss rises, then both sides of the best."""
    centre = line.plan.scale if line.plan.scale > 0 else 1.0
    losses: dict[float, float] = {}
    with eval_mode(line.graph):

        def at(gamma: float) -> float:
            losses[gamma] = mean_loss(line.move(gamma), batches, loss_fn)
            return losses[gamma]

        start = last = at(0.0)
        for factor in FACTORS:
            now = at(centre * factor)
            if now > start and now > last:
                break
            last = now
        best = min(losses, key=losses.__getitem__)
        if best:
            at(best * 2**-0.5)
            at(best * 2**0.5)
    return Search(tuple(sorted(losses)), tuple(losses[g] for g in sorted(losses)))
