"""What an arm trains: a network, its batches and its loss, each made anew from a name and a seed."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.coverage.measure import call
from examples.data import Split

#: inputs as the network takes them, and targets (None: the network returns its loss)
Batch = tuple[Any, Any]
Loss = Callable[[Any, Any], Tensor]


@dataclass
class Trial:
    """A network and its data.

    Attributes:
        model: with its first weights.
        train: inputs and targets, all samples at once.
        held_out: the same, of samples that are not trained on.
        loss_fn: of outputs and targets; None for a network that returns its own.
        other: a network that is trained against this one, with every step of it.
        rate: learning rate of SGD; AdamW takes a tenth of it.
        batch: samples in a batch.
        pace: which part of the steps it trains for.
    """

    model: nn.Module
    train: Batch
    held_out: Batch
    loss_fn: Loss | None = None
    other: Critic | None = None
    rate: float = 0.02
    batch: int = 16
    pace: float = 1.0

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        out = call(model, batch[0])
        return out["loss"] if self.loss_fn is None else self.loss_fn(out, batch[1])

    def epoch(self, generator: torch.Generator) -> Iterable[Batch]:
        """The batches of an epoch, in random order."""
        return batches(self.train, self.batch, torch.randperm(size_of(self.train), generator=generator))

    def loader(self) -> Iterable[Any]:
        """The batches to grow on, as `fxgrow.grow` takes them."""
        given = batches(self.train, self.batch)
        return [inputs for inputs, _ in given] if self.loss_fn is None else given


@dataclass
class Critic:
    """The discriminator of a GAN, and the loss of the generator that it gives."""

    net: nn.Module
    optimizer: torch.optim.Optimizer = field(init=False)

    def __post_init__(self) -> None:
        self.optimizer = torch.optim.Adam(self.net.parameters(), 1e-3, betas=(0.5, 0.99))

    def loss(self, made: Tensor, _: Tensor) -> Tensor:
        return F.softplus(-self.net(made)).mean()

    def step(self, generator: nn.Module, batch: Batch) -> None:
        with torch.no_grad():
            made = call(generator, batch[0])
        self.optimizer.zero_grad()
        (F.softplus(-self.net(batch[1])).mean() + F.softplus(self.net(made)).mean()).backward()
        self.optimizer.step()


def batches(data: Batch, size: int, order: Tensor | None = None) -> list[Batch]:
    """The samples in batches of one size, without a smaller last one where there are several."""
    count = size_of(data)
    order = torch.arange(count) if order is None else order
    parts = [part for part in order.split(size) if len(part) == size or count < size]
    return [(_taken(data[0], part), _taken(data[1], part)) for part in parts]


def size_of(data: Batch) -> int:
    inputs = data[0]
    return len(next(iter(inputs.values())) if isinstance(inputs, dict) else inputs[0])


def _taken(given: Any, rows: Tensor) -> Any:
    if isinstance(given, dict):
        return {key: value[rows] for key, value in given.items()}
    if isinstance(given, tuple):
        return tuple(value[rows] for value in given)
    return None if given is None else given[rows]


def labelled(split: Split) -> tuple[Batch, Batch]:
    """Training and held-out samples of a data set."""
    return ((split.x_train,), split.y_train), ((split.x_test,), split.y_test)


def classes(out: Any, labels: Tensor) -> Tensor:
    """Cross-entropy; the losses of auxiliary heads in train mode count .3, as those networks are trained."""
    logits, *others = out if isinstance(out, tuple) else (out,)
    aux = [F.cross_entropy(other, labels) for other in others if other is not None]
    return F.cross_entropy(logits, labels) + 0.3 * sum(aux, start=logits.new_zeros(()))
