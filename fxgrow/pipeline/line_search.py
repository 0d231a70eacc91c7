"""The line search: the loss of the grown graph on held-out batches, as a function of gamma."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import fx, nn

from fxgrow.analysis.analyse import AnalysedGraph
from fxgrow.graph.graph import lookup
from fxgrow.pipeline.held_out import ROUNDING, HeldOut, LossDifference, Losses, alike
from fxgrow.rewriting.batch_norm import Moments, RunningStatistics
from fxgrow.rewriting.bounds import bounded
from fxgrow.rewriting.plan import Plan
from fxgrow.rewriting.size_change import SizeChange
from fxgrow.rewriting.widened_graph import WidenedGraph

#: gamma moves by this factor, at most so many times
STRIDE, STRIDES = 4.0, 12
#: and back by it, at most so many times, from where a mode has become worse
RETREATS = 4


@dataclass(frozen=True)
class Search:
    """Losses along gamma.

    Attributes:
        gammas: the values tried, 0 first.
        losses: mean held-out loss at each in train mode: norms on batch statistics, the same masks of dropout.
        eval_losses: the same in eval mode, with the running statistics that growth by this gamma leaves.
        best: the gamma with the smallest loss.
        applied: the gamma to apply, one of `gammas`; smaller than the best one where eval mode would be worse there.
        decrease: of `losses` at it.
        error: the standard error of the decrease, from the parts of the batches.
    """

    gammas: tuple[float, ...]
    losses: tuple[float, ...]
    eval_losses: tuple[float, ...]
    best: float
    applied: float
    decrease: float = 0.0
    error: float = 0.0

    @property
    def gain(self) -> float:
        """How much less the loss is at the best gamma, as a part of the loss without growth."""
        return (self.losses[0] - min(self.losses)) / max(abs(self.losses[0]), 1e-30)

    @property
    def predicted(self) -> dict[str, float]:
        """The loss in eval and in train mode at the gamma to apply."""
        at = self.gammas.index(self.applied)
        return {"eval": self.eval_losses[at], "train": self.losses[at]}


class GammaLine:
    """A grown graph that moves along gamma, within `bounds` where asked, and the batches it is measured on."""

    def __init__(
        self, analysed: AnalysedGraph, plan: Plan, held_out: HeldOut, follow: bool = True, bounds: bool = True
    ) -> None:
        self.analysed, self.plan, self.held_out, self.follow, self.bounds = analysed, plan, held_out, follow, bounds
        # random numbers are those of `apply`: only what depends on gamma differs
        change, generator = SizeChange(analysed, plan.units), torch.Generator().manual_seed(0)
        self.widened = WidenedGraph(change, plan.at(0.0), generator).check()
        self.graph, self.index = self.widened.gm, self.widened.index
        self.norms = RunningStatistics(self.graph, held_out.batches, held_out.process_group)
        #: by gamma, the losses in train and in eval mode
        self.seen: dict[float, tuple[Losses, Losses]] = {}
        self._start: dict[str, Moments] = {}

    def move(self, gamma: float) -> fx.GraphModule:
        """The graph with the parameters of this gamma, the same object every time."""
        plan = self._plan_at(gamma)
        with torch.no_grad():
            for name, value in self.widened.parameters(plan.at(gamma)).items():
                old = lookup(self.graph, name)
                if isinstance(old, nn.Parameter):  # running statistics follow what is seen
                    old.copy_(value)
        return self.graph

    def _plan_at(self, gamma: float) -> Plan:
        plan = self.plan.scaled(gamma)
        return bounded(plan, self.analysed.gm, self.analysed.structure) if self.bounds else plan

    def see(self, gamma: float) -> None:
        """Moves there and measures both modes; running statistics follow batch statistics."""
        graph, start = self.move(gamma), self.seen.get(0.0)
        # a step may be too long for a logarithm in the loss, say
        held_out = self.held_out if start is None else replace(self.held_out, finite=False)
        train, moments = held_out.in_train_mode(graph, self.norms)
        if not self._start:
            self._start = moments
        if self.follow:
            self.norms.follow(self._start, moments)
        # both modes are one where they were at gamma = 0
        same = start is not None and not self.norms.live and torch.equal(start[0].values, start[1].values)
        found = train, train if same else held_out.in_eval_mode(graph)
        if start is not None:
            found = alike(found[0], start[0]), alike(found[1], start[1])
        self.seen[gamma] = found

    def loss(self, gamma: float) -> float:
        """The mean loss in train mode."""
        if gamma not in self.seen:
            self.see(gamma)
        return self.held_out.mean(self.seen[gamma][0])

    def difference(self, gamma: float) -> tuple[LossDifference, LossDifference]:
        """Of the losses there from those at gamma = 0, in train and in eval mode."""
        if gamma not in self.seen:
            self.see(gamma)
        pairs = zip(self.seen[gamma], self.seen[0.0], strict=True)
        train, held = (self.held_out.difference(after, before) for after, before in pairs)
        return train, held

    def harms(self, gamma: float) -> bool:
        """Whether one of the modes is worse there than without growth."""
        before = [abs(self.held_out.mean(losses)) for losses in self.seen[0.0]]
        # a loss that is not a number is worse
        return not all(d.mean <= ROUNDING * b for d, b in zip(self.difference(gamma), before, strict=True))

    def plan_here(self, gamma: float) -> Plan:
        """The plan within bounds at this gamma, with the running statistics that the graph has now."""
        plan = self._plan_at(gamma)
        new, delta = {n: dict(s) for n, s in plan.values.new.items()}, dict(plan.values.delta)
        for name, (buffer, shift) in self.norms.shifts().items():
            for (width, dim), positions in self.widened.new_indices.get(name, {}).items():
                new.setdefault(name, {})[width, dim] = buffer[positions.to(buffer.device)].clone()
            (old,) = self.index.get(name, (None,))
            # a plan multiplies its deltas by gamma
            delta[name] = (shift if old is None else shift[old.to(shift.device)]) / gamma
        return replace(plan, values=replace(plan.values, new=new, delta=delta))


def search(line: GammaLine, share: float = 1.0) -> Search:
    """Starts at the plan's scale, moves by factors of `STRIDE` while the loss falls, then closes in on the best.

    With the running statistics of BatchNorm the loss would credit a step for what training normalises away at once: the
    search minimises the loss in train mode. From there it goes back to where neither mode is worse than before.

    The predicted scale rests on the gradients' second moment, which is the curvature of a likelihood only: for other
    losses it can be off by orders of magnitude, so the search goes as far as it must, in both directions.

    The graph is left at the gamma to apply, a `share` of the best one or less, with the running statistics there.
    """
    at, seen = line.loss, line.seen
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
        gamma = min(sorted(seen), key=at)
        if gamma:
            at(gamma / ratio)
            at(gamma * ratio)
    best = min(sorted(seen), key=at)
    tries = [best * share / STRIDE**i for i in range(RETREATS + 1)] if best else []
    applied = next((gamma for gamma in tries if not line.harms(gamma)), 0.0)
    line.see(applied)
    gammas = tuple(sorted(seen))
    train, held = zip(*([line.held_out.mean(losses) for losses in seen[g]] for g in gammas), strict=True)
    gain = line.difference(applied)[0]
    return Search(gammas, train, held, best, applied, -gain.mean, gain.error)
