"""Held-out batches: the loss on them in both modes, and whether two networks differ by more than its noise."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, fx

from fxgrow.data.batches import Batch, Data, take
from fxgrow.data.loss import LossFn, known_loss
from fxgrow.data.loss_parts import losses_of_parts
from fxgrow.distributed import SINGLE_PROCESS, ProcessGroup
from fxgrow.errors import FxgrowError, InfiniteLossError
from fxgrow.graph.evaluate import eval_mode, lent_buffers
from fxgrow.rewriting.batch_norm import Moments, RunningStatistics
from fxgrow.statistics.forward_backward import forward

#: batches of the search hold at most so many samples in all
SEARCH_SAMPLES = 1024
#: a loss with dropout is the mean over masks for so many samples, at least two masks and at most eight
MASKED_SAMPLES = 2048
#: differences that are less than this part of a loss are none
ROUNDING = 1e-6
#: losses of one batch on different hardware differ by less, relatively
SAME_LOSS = 1e-3


class Losses(NamedTuple):
    """Losses of parts of the held-out batches of this process, and their sizes; the same parts for every network."""

    values: Tensor
    sizes: Tensor

    def whole(self) -> Losses:
        """The mean loss as the only part."""
        size = self.sizes.sum()
        return Losses((self.values @ self.sizes / size).reshape(1), size.reshape(1))


def alike(losses: Losses, before: Losses) -> Losses:
    """All infinite where one is, then of the same parts as others."""
    if bool(losses.values.isfinite().all()):
        return losses
    return Losses(torch.full_like(before.values, math.inf), before.sizes)


class LossDifference(NamedTuple):
    """How much a mean loss is above another one, and the standard error of that, from the parts of the batches."""

    mean: float
    error: float


@dataclass
class HeldOut:
    """Held-out batches and the loss on them."""

    batches: Sequence[Batch]
    loss_fn: LossFn | None
    process_group: ProcessGroup = SINGLE_PROCESS
    #: whether a loss that is infinite, or not a number, is an error
    finite: bool = True
    #: masks of dropout to average over; 0: train mode has no such loss. None: not known yet
    _masks: int | None = field(default=None, repr=False)

    @classmethod
    def of(cls, data: Data, loss_fn: LossFn | None) -> HeldOut:
        """Held-out batches of some data, as many as hold `SEARCH_SAMPLES`."""
        batches = take(data.held_out(), math.ceil(SEARCH_SAMPLES / data.process_group.size))
        return cls(list(batches), known_loss(loss_fn), data.process_group)

    @torch.no_grad()
    def losses(self, graph: fx.GraphModule, masks: int = 1) -> Losses:
        """In the graph's mode, with so many masks, the same ones every time; buffers are as before."""
        values, sizes = [], []
        with torch.random.fork_rng(devices=[]):
            for seed in range(masks):
                torch.manual_seed(seed)
                for batch in self.batches:
                    with lent_buffers(graph):
                        output = forward(graph, graph, batch)
                    try:
                        parts = losses_of_parts(output, batch, self.loss_fn)
                    except InfiniteLossError:
                        if self.finite:
                            raise
                        parts = torch.tensor([math.inf], dtype=torch.float64)
                    values.append(parts.cpu())
                    sizes.append(torch.full_like(values[-1], batch.size / len(parts)))
        empty = torch.zeros(0, dtype=torch.float64)
        return Losses(torch.cat([empty, *values]), torch.cat([empty, *sizes]))

    def in_eval_mode(self, graph: fx.GraphModule) -> Losses:
        """With running statistics, without dropout."""
        with eval_mode(graph):
            return self.losses(graph)

    def in_train_mode(self, graph: fx.GraphModule, norms: RunningStatistics) -> tuple[Losses, dict[str, Moments]]:
        """With batch statistics and dropout, averaged over masks; returns the moments of what enters the norms too.

        Where train mode has no such loss (other outputs, say) only the norms are as in training.
        """
        masks = self._masks_of(graph)
        with norms.batch_statistics(training=masks > 0) as moments:
            losses = self.losses(graph, max(1, masks))
        return losses, moments

    def mean(self, losses: Losses) -> float:
        """Over the samples of all processes."""
        total, size = self.process_group.sum_numbers(float(losses.values @ losses.sizes), float(losses.sizes.sum()))
        return total / max(1.0, size)

    def difference(self, after: Losses, before: Losses) -> LossDifference:
        """Of the same parts, in all processes; of a single part the error is not known and taken to be 0."""
        if len(after.values) != len(before.values):  # a loss that takes single samples in one mode only
            before, after = before.whole(), after.whole()
        d, sizes = after.values - before.values, before.sizes
        total, size, count = self.process_group.sum_numbers(float(d @ sizes), float(sizes.sum()), float(len(d)))
        mean = total / max(1.0, size)
        (squares,) = self.process_group.sum_numbers(float((d - mean).square() @ sizes.square()))
        return LossDifference(
            mean, (squares * count / max(1.0, count - 1)) ** 0.5 / max(1.0, size) if count > 1 else 0.0
        )

    def _masks_of(self, graph: fx.GraphModule) -> int:
        if self._masks is None:
            first, group = HeldOut(self.batches[:1], self.loss_fn), self.process_group
            try:
                with RunningStatistics(graph, self.batches).batch_statistics(training=True):
                    one, other = first.losses(graph, 2).values.chunk(2)
                kinds = int(bool((one + other).isfinite().all())), not torch.equal(one, other)
            except Exception:
                kinds = 0, False
            trains, random = group.broadcast_from_rank0(lambda: kinds)
            (samples,) = group.sum_numbers(sum(b.size for b in self.batches))
            masks = min(8, max(2, math.ceil(MASKED_SAMPLES / max(1.0, samples))))
            self._masks = masks if trains and random else trains
        return self._masks


def check_same_loss(data: Data, graph: fx.GraphModule, loss_fn: LossFn | None) -> None:
    """Raises an `FxgrowError` in every process where they have other losses of the first batch of rank 0.

    Descriptions of settings leave out whole numbers, which may be those of a rank; this sees what they do.
    """
    if data.process_group.size == 1:
        return
    first = HeldOut([data.process_group.broadcast_from_rank0(data.first)], loss_fn, finite=False)
    own = first.mean(first.in_eval_mode(graph))
    losses = data.process_group.all_gather_rows(torch.tensor([[own]], dtype=torch.float64)).flatten()
    if bool(losses.isfinite().all()) and not torch.allclose(losses, losses[0], rtol=SAME_LOSS, atol=0.0):
        shown = ", ".join(f"{loss:.6g}" for loss in losses.tolist())
        raise FxgrowError(
            f"The processes have different losses of one batch: {shown}. "
            "Every process needs the same model and the same loss."
        )
