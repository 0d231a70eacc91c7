"""The line search: the loss of the grown graph on held-out batches, as a function of gamma."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, fx, nn

from fxgrow.analysis.analyse import AnalysedGraph
from fxgrow.data.batches import Batch, Data, take
from fxgrow.data.loss import LossFn, known_loss, loss_of
from fxgrow.distributed import SINGLE_PROCESS, ProcessGroup
from fxgrow.graph.evaluate import eval_mode, lent_buffers
from fxgrow.graph.graph import copy_graph, lookup
from fxgrow.rewriting.batch_norm import Moments, RunningStatistics
from fxgrow.rewriting.plan import Plan
from fxgrow.rewriting.size_change import SizeChange
from fxgrow.rewriting.widened_graph import WidenedGraph
from fxgrow.statistics.forward_backward import forward

#: gamma moves by this factor, at most so many times
STRIDE, STRIDES = 4.0, 12
#: batches of the search hold at most so many samples in all
SEARCH_SAMPLES = 1024


@dataclass(frozen=True)
class Search:
    """Losses along gamma.

    Attributes:
        gammas: the values tried, 0 first.
        losses: mean held-out loss at each, without dropout, norms on batch statistics as in training.
        eval_losses: the same in eval mode, with the running statistics that growth by this gamma leaves.
        best: the gamma with the smallest loss.
        applied: the gamma to apply, one of `gammas`.
    """

    gammas: tuple[float, ...]
    losses: tuple[float, ...]
    eval_losses: tuple[float, ...]
    best: float
    applied: float

    @property
    def gain(self) -> float:
        """How much less the loss is at the best gamma, as a part of the loss without growth."""
        return (self.losses[0] - min(self.losses)) / max(abs(self.losses[0]), 1e-30)

    @property
    def predicted(self) -> dict[str, float]:
        """The loss in eval and in train mode at the gamma to apply."""
        at = self.gammas.index(self.applied)
        return {"eval": self.eval_losses[at], "train": self.losses[at]}


@dataclass(frozen=True)
class HeldOut:
    """Held-out batches and the loss on them."""

    batches: Sequence[Batch]
    loss_fn: LossFn | None
    process_group: ProcessGroup = SINGLE_PROCESS

    @classmethod
    def of(cls, data: Data, loss_fn: LossFn | None) -> HeldOut:
        """Held-out batches of some data, as many as hold `SEARCH_SAMPLES`."""
        batches = take(data.held_out(), math.ceil(SEARCH_SAMPLES / data.process_group.size))
        return cls(list(batches), known_loss(loss_fn), data.process_group)

    @torch.no_grad()
    def mean_loss(self, graph: fx.GraphModule) -> float:
        """Mean loss over the samples of all processes, in the graph's mode; buffers are as before."""
        with lent_buffers(graph):
            loss = sum(float(loss_of(forward(graph, graph, b), b, self.loss_fn)) * b.size for b in self.batches)
        total, size = self.process_group.sum_numbers(loss, sum(b.size for b in self.batches))
        return total / max(1, size)

    def losses(self, gm: fx.GraphModule) -> dict[str, float]:
        """In eval and in train mode, of a copy (BatchNorm's statistics move)."""
        copy = copy_graph(gm)
        loss = self.mean_loss(copy.eval())
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return {"eval": loss, "train": self.mean_loss(copy.train())}


class GammaLine:
    """A grown graph that moves along gamma, and the held-out batches it is measured on."""

    def __init__(self, analysed: AnalysedGraph, plan: Plan, held_out: HeldOut) -> None:
        self.plan, self.held_out = plan, held_out
        # random numbers are those of `apply`: only what depends on gamma differs
        change, generator = SizeChange(analysed, plan.units), torch.Generator().manual_seed(0)
        self.widened = WidenedGraph(change, plan.at(0.0), generator).check()
        self.graph, self.index = self.widened.gm, self.widened.index
        self.norms = RunningStatistics(self.graph, held_out.batches, held_out.process_group)
        ends = self.widened.parameters(plan.at(1.0))
        # new entries and updates of old ones move at one rate, unless incoming weights share gamma
        units = self.widened.parameters(plan.at(1.0, update=False)) if plan.symmetric else ends
        self.steps: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
        for name, end in ends.items():
            p = lookup(self.graph, name)
            new, update = (units.get(name, p) - p).detach(), (end - units.get(name, p)).detach()
            if isinstance(p, nn.Parameter) and (bool(new.any()) or bool(update.any())):
                self.steps.append((p, p.detach().clone(), new, update))

    def move(self, gamma: float) -> fx.GraphModule:
        """The graph with the parameters of this gamma, the same object every time."""
        power = gamma**0.5 if self.plan.symmetric else gamma
        with torch.no_grad():
            for p, base, new, update in self.steps:
                p.copy_(base + power * new + gamma * update)
        return self.graph

    def plan_here(self, gamma: float) -> Plan:
        """The plan, with the running statistics that the graph has now, at this gamma."""
        values = self.plan.values
        new, delta = {n: dict(s) for n, s in values.new.items()}, dict(values.delta)
        for name, (buffer, shift) in self.norms.shifts().items():
            for (width, dim), positions in self.widened.new_indices.get(name, {}).items():
                new.setdefault(name, {})[width, dim] = buffer[positions.to(buffer.device)].clone()
            (old,) = self.index.get(name, (None,))
            # a plan multiplies its deltas by gamma
            delta[name] = (shift if old is None else shift[old.to(shift.device)]) / gamma
        return replace(self.plan, values=replace(values, new=new, delta=delta))


def search(line: GammaLine, share: float = 1.0, follow: bool = True) -> Search:
    """Starts at the plan's scale, moves by factors of `STRIDE` while the loss falls, then closes in on the best.

    With the running statistics of BatchNorm the loss would credit a step for what training normalises away at once: the
    search minimises the loss in train mode, and sees the one in eval mode beside it.

    The predicted scale rests on the gradients' second moment, which is the curvature of a likelihood only: for other
    losses it can be off by orders of magnitude, so the search goes as far as it must, in both directions.

    The graph is left at the gamma to apply, a `share` of the best one, with the running statistics there (which
    `follow` batch statistics).
    """
    norms, mean_loss = line.norms, line.held_out.mean_loss
    start: dict[str, Moments] = {}
    losses: dict[float, tuple[float, float]] = {}

    def see(gamma: float) -> None:
        graph = line.move(gamma)
        with norms.batch_statistics() as moments:
            train = mean_loss(graph)
        if gamma == 0.0:
            start.update(moments)
        if follow:
            norms.follow(start, moments)
        with eval_mode(graph):
            losses[gamma] = train, mean_loss(graph) if norms.live else train

    def at(gamma: float) -> float:
        if gamma not in losses:
            see(gamma)
        return losses[gamma][0]

    gamma = line.plan.scale if line.plan.scale > 0 else 1.0
    unchanged = at(0.0)
    if at(gamma) < unchanged:
        for _ in range(STRIDES):
            if not at(gamma * STRIDE) < at(gamma):
                break
            gamma *= STRIDE
    else:
        for _ in range(STRIDES):
            gamma /= STRIDE
            if at(gamma) < unchanged:
                break
    for ratio in (2.0, 2**0.5):
        gamma = min(losses, key=at)
        if gamma:
            at(gamma / ratio)
            at(gamma * ratio)
    best = min(losses, key=at)
    see(best * share)
    gammas = tuple(sorted(losses))
    train, held = zip(*(losses[g] for g in gammas), strict=True)
    return Search(gammas, train, held, best, best * share)
