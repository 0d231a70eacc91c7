"""torchvision's mobilenet_v3_small on three classes of CIFAR-10, two epochs before growth and two after."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.harmless.loop import Setting
from benchmarks.harmless.trials import Batch, Trial, classes
from examples.data import cifar10

#: aeroplanes, cats, ships
LABELS = (0, 3, 8)
EACH, HELD_OUT, BATCH, RATE = 500, 100, 32, 0.05


@cache
def _pictures() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    split = cifar10()
    rows = [(split.y_train == label).nonzero().flatten()[: EACH + HELD_OUT] for label in LABELS]
    train, held_out = (torch.cat([part[at] for part in rows]) for at in (slice(EACH), slice(EACH, None)))
    x, y = F.interpolate(split.x_train[torch.cat([train, held_out])], 64, mode="bicubic"), torch.arange(len(LABELS))
    return x[: len(train)], y.repeat_interleave(EACH), x[len(train) :], y.repeat_interleave(HELD_OUT)


@dataclass
class Augmented(Trial):
    """Images are shifted by up to four pixels and mirrored, another way each time."""

    def epoch(self, generator: torch.Generator) -> Iterable[Batch]:
        images, labels = self.train[0][0], self.train[1]
        for rows in torch.randperm(len(images), generator=generator).split(self.batch):
            yield (_shifted(images[rows], generator),), labels[rows]

    def loader(self) -> Iterable[Any]:
        return _Loader(self)


@dataclass
class _Loader:
    """Other batches at every pass, as a DataLoader with random transforms gives them."""

    trial: Augmented

    def __iter__(self) -> Iterator[Batch]:
        yield from self.trial.epoch(torch.Generator().manual_seed(int(torch.randint(2**31, ()))))


def _shifted(images: Tensor, generator: torch.Generator) -> Tensor:
    padded, side = F.pad(images, (4, 4, 4, 4)), images.shape[-1]
    moves = torch.randint(9, (len(images), 2), generator=generator).tolist()
    flips = torch.rand(len(images), generator=generator) < 0.5
    parts = [x[:, i : i + side, j : j + side] for x, (i, j) in zip(padded, moves, strict=True)]
    return torch.stack([part.flip(2) if flip else part for part, flip in zip(parts, flips, strict=True)])


def mobilenet(samples: int, seed: int) -> Trial:
    from torchvision.models import mobilenet_v3_small

    x, y, x_held_out, y_held_out = _pictures()
    model = mobilenet_v3_small(num_classes=len(LABELS))
    return Augmented(model, ((x,), y), ((x_held_out,), y_held_out), classes, rate=RATE, batch=BATCH)


def settings(seeds: Iterable[int]) -> Iterator[Setting]:
    """The learning rate falls to zero over four epochs; growth is after the second."""
    steps = 2 * -(-EACH * len(LABELS) // BATCH)
    for seed in seeds:
        yield Setting("sgd", "half", EACH * len(LABELS), steps, seed, cosine=True, tries=1)
