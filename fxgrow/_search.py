"""The line search: the loss of the grown graph on held-back batches, as a function of gamma."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fxgrow._data import Batch, LossFn, loss_of
from fxgrow._pass import eval_mode, forward
from fxgrow._plan import Plan
from fxgrow._rewrite import rewrite

#: gamma moves by this factor, at most so many times
STRIDE, STRIDES = 4.0, 12
#: batches of the search hold at most so many samples in all
SEARCH_SAMPLES = 1024


@dataclass(frozen=True)
class Search:
    """Losses along gamma.

    Attributes:
        gammas: the values tried, 0 first.
        losses: mean held-back loss at each, without dropout, norms on batch statistics as in training.
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
        self.original, self.plan = gm, plan
        self.graph, self.index = self._rewritten(0.0)
        whole = dict(self._rewritten(1.0)[0].named_parameters())
        # new entries and updates of old ones move at one rate, unless incoming weights share gamma
        units = dict(self._rewritten(1.0, update=False)[0].named_parameters()) if plan.symmetric else whole
        self.steps: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
        for name, p in self.graph.named_parameters():
            new, update = (units[name] - p).detach(), (whole[name] - units[name]).detach()
            if bool(new.any()) or bool(update.any()):
                self.steps.append((p, p.detach().clone(), new, update))

    def _rewritten(
        self, gamma: float, update: bool = True
    ) -> tuple[fx.GraphModule, dict[str, tuple[Tensor | None, ...]]]:
        # what is drawn at random is drawn alike, as in `apply`: only what depends on gamma differs
        return rewrite(self.original, self.plan.units, self.plan.at(gamma, update), torch.Generator().manual_seed(0))

    def move(self, gamma: float) -> fx.GraphModule:
        """The graph at this gamma, the same object every time."""
        power = gamma**0.5 if self.plan.symmetric else gamma
        with torch.no_grad():
            for p, base, new, update in self.steps:
                p.copy_(base + power * new + gamma * update)
        return self.graph


def norms_of(gm: nn.Module) -> dict[str, _BatchNorm]:
    """Norms that training would feed with batch statistics; a frozen one keeps its own."""
    return {
        name: m
        for name, m in gm.named_modules()
        if isinstance(m, _BatchNorm)
        and m.running_mean is not None
        and m.track_running_stats
        and (m.weight is None or m.weight.requires_grad)
    }


@contextlib.contextmanager
def batch_statistics(gm: nn.Module, batches: Sequence[Batch]) -> Iterator[None]:
    """Eval mode, but norms use the statistics of each batch and leave their running ones alone.

    A batch of one sample has no statistics: where there is one, norms stay in eval mode.
    """
    with eval_mode(gm):
        norms = list(norms_of(gm).values()) if all(b.size > 1 for b in batches) else []
        try:
            for m in norms:
                m.training, m.track_running_stats = True, False
            yield
        finally:
            for m in norms:
                m.track_running_stats = True


def mean_loss(graph: fx.GraphModule, batches: Sequence[Batch], loss_fn: LossFn | None) -> float:
    """Mean loss over samples, in the graph's mode."""
    total = 0.0
    with torch.no_grad():
        for b in batches:
            total += float(loss_of(forward(graph, graph, b), b, loss_fn)) * b.size
    return total / max(1, sum(b.size for b in batches))


def search(line: Line, batches: Sequence[Batch], loss_fn: LossFn | None) -> Search:
    """Starts at the plan's scale, moves by factors of `STRIDE` while the loss falls, then closes in on the best.

    With the running statistics of BatchNorm the loss would credit a step for what training normalises away at once.

    The predicted scale rests on the gradients' second moment, which is the curvature of a likelihood only: for other
    losses it can be off by orders of magnitude, so the search goes as far as it must, in both directions.
    """
    losses: dict[float, float] = {}
    with batch_statistics(line.graph, batches):

        def at(gamma: float) -> float:
            if gamma not in losses:
                losses[gamma] = mean_loss(line.move(gamma), batches, loss_fn)
            return losses[gamma]

        gamma = line.plan.scale if line.plan.scale > 0 else 1.0
        start = at(0.0)
        if at(gamma) < start:
            for _ in range(STRIDES):
                if not at(gamma * STRIDE) < at(gamma):
                    break
                gamma *= STRIDE
        else:
            for _ in range(STRIDES):
                gamma /= STRIDE
                if at(gamma) < start:
                    break
        for ratio in (2.0, 2**0.5):
            gamma = min(losses, key=at)
            if gamma:
                at(gamma / ratio)
                at(gamma * ratio)
    return Search(tuple(sorted(losses)), tuple(losses[g] for g in sorted(losses)))
