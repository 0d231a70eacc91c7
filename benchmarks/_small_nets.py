"""Small nets on real data: the parts that several benchmarks train, feed and evaluate them with."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from examples.data import Split, shakespeare

Batches = list[tuple[Tensor, Tensor]]
#: characters in a sequence of text
CONTEXT = 32


def convolutions(channels: Sequence[int]) -> nn.Module:
    """3x3 convolutions with BatchNorm and pooling, from 3 input channels to 10 classes."""
    layers: list[nn.Module] = []
    for a, b in zip((3, *channels), channels, strict=False):
        layers += [nn.Conv2d(a, b, 3, padding=1, bias=False), nn.BatchNorm2d(b), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels[-1], 10))


def text() -> Split:
    """Shakespeare in sequences of `CONTEXT` characters, with the next characters as targets."""
    train_text, test_text, _ = shakespeare()
    cut = lambda t: t[: (len(t) - 1) // CONTEXT * CONTEXT + 1]  # noqa: E731
    pairs = [(t[:-1].view(-1, CONTEXT), t[1:].view(-1, CONTEXT)) for t in map(cut, (train_text, test_text[:20_000]))]
    return Split(*pairs[0], *pairs[1])


def characters() -> int:
    return len(shakespeare()[2])


def loss_of(out: Tensor, y: Tensor) -> Tensor:
    """Cross-entropy of classes or of next characters."""
    return F.cross_entropy(out.flatten(0, -2), y.flatten())


def draw(x: Tensor, y: Tensor, count: int, size: int, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields batches of random samples."""
    for _ in range(count):
        i = torch.randint(len(x), (size,), generator=generator)
        yield x[i], y[i]


def train(net: nn.Module, optimizer: torch.optim.Optimizer, data: Batches, decay: bool = False) -> None:
    """Takes one step per batch, at a constant rate or at one that falls linearly to zero."""
    net.train()
    rates = [group["lr"] for group in optimizer.param_groups]
    for i, (x, y) in enumerate(data):
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * (1 - i / len(data)) if decay else rate
        optimizer.zero_grad()
        loss_of(net(x), y).backward()
        optimizer.step()


@torch.no_grad()
def held_out_loss(net: nn.Module, x: Tensor, y: Tensor) -> float:
    """Returns the mean loss in eval mode."""
    was = net.training
    net.eval()
    losses = [loss_of(net(a), b) * len(a) for a, b in zip(x.split(500), y.split(500), strict=True)]
    net.train(was)
    return float(sum(losses)) / len(x)


@torch.no_grad()
def loss_and_accuracy(net: nn.Module, x: Tensor, y: Tensor) -> tuple[float, float]:
    """Returns cross-entropy and accuracy in per cent, in eval mode."""
    was = net.training
    net.eval()
    out = torch.cat([net(part).flatten(0, -2) for part in x.split(500)])
    net.train(was)
    return float(loss_of(out, y)), 100 * float((out.argmax(-1) == y.flatten()).float().mean())
