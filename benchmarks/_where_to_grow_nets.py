"""Nets of `benchmarks.where_to_grow`: how they are built and trained, and what growth brings them."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

import fxgrow
from benchmarks._small_nets import CONTEXT, Batches, characters, draw, held_out_loss, loss_of, text, train
from examples.data import VARIABLE, Split, cifar10, digits, fashion_mnist
from fxgrow.data.batches import Data
from fxgrow.pipeline.grow import apply_best
from fxgrow.pipeline.held_out import HeldOut
from fxgrow.transfer.optimizer_state import repoint
from models import GPT, MLP

#: batches that a profile reads
PROFILED = 48
#: further steps of Adam after which growth is measured
MARKS = (0, 50, 400)
#: learning rates of the first and of the further steps: at the first one, losses vary by more than growth brings
RATE, FURTHER = 3e-3, 1e-3


@dataclass(frozen=True)
class Subject:
    """A family of nets with the same widths at any size, and how they train.

    Attributes:
        build: the net of these hidden sizes.
        data: what it learns.
        widths: names of the hidden sizes.
        size: of each in a balanced net.
        between: least and largest of random sizes.
        steps: of Adam before anything is measured, in batches of `batch`.
        budget: of the allocations.
    """

    build: Callable[[Sequence[int]], nn.Module]
    data: Callable[[], Split]
    widths: tuple[str, ...]
    size: int
    between: tuple[int, int]
    steps: int
    batch: int
    budget: str = "+25%"


def images(load: Callable[[int, int], Split], train_: int, test: int) -> Split:
    """Images of half the size (handwritten digits as they are, where there is no folder with data)."""
    if not os.environ.get(VARIABLE):
        return digits()
    s = load(train_, test)
    return Split(F.avg_pool2d(s.x_train, 2), s.y_train, F.avg_pool2d(s.x_test, 2), s.y_test)


def mlp(sizes: Sequence[int]) -> nn.Module:
    return MLP((196 if os.environ.get(VARIABLE) else 64, *sizes, 10))


def conv(sizes: Sequence[int]) -> nn.Module:
    layers: list[nn.Module] = []
    channels = (3 if os.environ.get(VARIABLE) else 1, *sizes)
    for i, (a, b) in enumerate(zip(channels, sizes, strict=False)):
        layers += [nn.Conv2d(a, b, 3, padding=1, bias=False), nn.BatchNorm2d(b), nn.ReLU()]
        if i % 2 == 0:
            layers.append(nn.MaxPool2d(2))
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(sizes[-1], 10))


def gpt(sizes: Sequence[int]) -> nn.Module:
    net = GPT(characters(), CONTEXT, depth=len(sizes), heads=2, width=0.5)
    for block, hidden in zip(net.blocks, sizes, strict=True):
        stream = block.mlp[0].in_features
        block.mlp = nn.Sequential(nn.Linear(stream, hidden), nn.GELU(), nn.Linear(hidden, stream))
    return net


SUBJECTS = {
    "mlp": Subject(
        mlp,
        lambda: images(fashion_mnist, 12_000, 4000),
        tuple(f"layers.{i}" for i in range(4)),
        32,
        (4, 32),
        300,
        64,
    ),
    "conv": Subject(conv, lambda: images(cifar10, 12_000, 3000), ("0", "4", "7", "11"), 16, (3, 24), 200, 32),
    "gpt": Subject(gpt, text, tuple(f"blocks.{i}.mlp.0" for i in range(4)), 64, (4, 64), 300, 16, "+10%"),
}


class Trained:
    """A net after its first steps, with its optimiser and the data that it goes on with."""

    def __init__(self, subject: Subject, split: Split, sizes: Sequence[int], seed: int) -> None:
        torch.manual_seed(seed)
        self.subject, self.split, self.seed = subject, split, seed
        self.generator = torch.Generator().manual_seed(seed)
        self.net = subject.build(sizes)
        self.optimizer = torch.optim.Adam(self.net.parameters(), RATE, fused=True)
        train(self.net, self.optimizer, self.batches(subject.steps))
        self.profiled = self.batches(PROFILED)
        self.gm = fxgrow.capture(self.net, (self.profiled[0][0],))
        self.profile = fxgrow.profile(self.gm, self.profiled, loss_of, widths=subject.widths, seed=seed, progress=False)
        self.held_out = HeldOut.of(Data(self.profiled), loss_of)

    def batches(self, count: int) -> Batches:
        """So many more, never seen in this order."""
        return list(draw(self.split.x_train, self.split.y_train, count, self.subject.batch, self.generator))

    def grown(self, plan: fxgrow.Plan | None = None) -> tuple[nn.Module, torch.optim.Adam, fxgrow.Growth | None]:
        """A copy that has grown by the plan as `fxgrow.grow` does it, or has not, with its optimiser."""
        old = self.net if plan is not None else copy.deepcopy(self.net)
        optimizer = torch.optim.Adam(old.parameters())
        optimizer.load_state_dict(copy.deepcopy(self.optimizer.state_dict()))
        optimizer.param_groups[0]["lr"] = FURTHER
        if plan is None:
            return old, optimizer, None
        grown = apply_best(plan, self.profile, self.held_out, forced=True, follow=True)
        repoint(optimizer, old, grown.model, grown.index)
        return grown.model, optimizer, grown.record

    def gradient_norms(self) -> dict[str, float]:
        """Of the weights that write each width."""
        net = copy.deepcopy(self.net).train()
        net.zero_grad()
        for x, y in self.profiled[:16]:
            loss_of(net(x), y).backward()
        gradients = {name: p.grad for name, p in net.named_parameters() if p.grad is not None}
        return {w: float(gradients[f"{w}.weight"].norm()) for w in self.subject.widths}

    def losses(self, net: nn.Module, optimizer: torch.optim.Adam, orders: Sequence[Batches]) -> list[list[float]]:
        """Held-out losses at each of `MARKS`, per data order."""
        start = copy.deepcopy((net.state_dict(), optimizer.state_dict()))
        now = self._evaluate(net)
        out = []
        for data in orders:
            net.load_state_dict(start[0])
            optimizer.load_state_dict(copy.deepcopy(start[1]))
            found = [now]
            for last, mark in zip(MARKS, MARKS[1:], strict=False):
                train(net, optimizer, data[last:mark])
                found.append(self._evaluate(net))
            out.append(found)
        return out

    def _evaluate(self, net: nn.Module) -> float:
        return held_out_loss(net, self.split.x_test, self.split.y_test)
