"""One net of the paper's experiment: grown to its target width by width, trained between, all costs counted."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import fxgrow
from benchmarks._small_nets import draw
from examples.data import Split
from models import ResNet

#: channels of the stages of ResNet-18
RESNET18 = (64, 128, 256, 512)
#: of the test images, so many give the points of a curve; all give the last one
GLIMPSE = 1000


@dataclass(frozen=True)
class Protocol:
    """How large, on how much, for how long.

    Attributes:
        width: of the target, as a part of ResNet-18's widths.
        starts: parts of the target's widths that nets start with (at least one channel).
        methods: initialisers of `fxgrow.grow`.
        images, test: how many there are to train on and to test on; None for all in the file.
        side: of the images in pixels, 32 or a part of it (averages).
        factor: a growth makes a width at most so many times as large; all widths take as many rounds as the thinnest.
        between: epochs between two growths, each of one width.
        after: epochs once the target is reached, with a cosine schedule.
        samples: read by each growth.
        rate: of SGD with momentum 0.9 and weight decay 5e-4.
        augment: whether images are mirrored and shifted by up to four pixels.
    """

    width: float = 1 / 8
    starts: tuple[float, ...] = (1 / 4, 1 / 64)
    methods: tuple[str, ...] = ("default", "tiny", "gradmax", "random")
    images: int | None = 4000
    test: int | None = 4000
    side: int = 16
    batch: int = 64
    factor: float = 8.0
    between: float = 1 / 16
    after: float = 4.0
    samples: int = 256
    rate: float = 0.05
    augment: bool = False

    def sizes(self, start: float) -> tuple[int, ...]:
        """Channels of the stages at a part of the target's widths."""
        return tuple(max(1, round(size * self.width * start)) for size in RESNET18)


@dataclass(frozen=True)
class Point:
    """Where a net stands: what it has cost, how large it is, how well it does."""

    seconds: float
    multiply_adds: float
    parameters: int
    accuracy: float
    growing: float
    growths: int


@dataclass
class Trial:
    """A net in training; `seconds` are CPU seconds of this process, on a GPU wall time."""

    protocol: Protocol
    split: Split
    net: nn.Module
    seed: int
    seconds: float = 0.0
    growing: float = 0.0
    multiply_adds: float = 0.0
    growths: int = 0
    curve: list[Point] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.optimizer = torch.optim.SGD(self.net.parameters(), self.protocol.rate, momentum=0.9, weight_decay=5e-4)
        self.generator = torch.Generator().manual_seed(self.seed)
        self.per_step = self.count()
        self.see()

    def count(self) -> float:
        """Multiply-adds of a step of training."""
        net = copy.deepcopy(self.net)
        x, y = self.split.x_train[: self.protocol.batch], self.split.y_train[: self.protocol.batch]
        with FlopCounterMode(display=False) as counter:
            F.cross_entropy(net(x), y).backward()
        return counter.get_total_flops() / 2

    def see(self, whole: bool = False) -> None:
        count = len(self.split.x_test) if whole else GLIMPSE
        found = accuracy(self.net, self.split.x_test[:count], self.split.y_test[:count])
        parameters = sum(p.numel() for p in self.net.parameters())
        self.curve.append(Point(self.seconds, self.multiply_adds, parameters, found, self.growing, self.growths))

    def train(self, epochs: float, rate: Callable[[float], float] = lambda share: 1.0) -> None:
        """So many epochs, `rate` times the protocol's rate at each share of them."""
        steps = max(1, round(epochs * len(self.split.x_train) / self.protocol.batch))
        self.net.train()
        start = now(self.split.x_train.device)
        for step in range(steps):
            for group in self.optimizer.param_groups:
                group["lr"] = self.protocol.rate * rate(step / steps)
            self.step()
            self.multiply_adds += self.per_step
        self.seconds += now(self.split.x_train.device) - start

    def batches(self, count: int, generator: torch.Generator) -> list[tuple[Tensor, Tensor]]:
        drawn = draw(self.split.x_train, self.split.y_train, count, self.protocol.batch, generator)
        return [(shifted(x, generator) if self.protocol.augment else x, y) for x, y in drawn]

    def step(self) -> None:
        ((x, y),) = self.batches(1, self.generator)
        self.optimizer.zero_grad()
        F.cross_entropy(self.net(x), y).backward()
        self.optimizer.step()

    def grow(self, width: str, units: int, method: str) -> None:
        """One width. Seconds are of everything; multiply-adds are those of the passes over the data (a counter beside
        them would cost more than they do): forward and backward over what is fitted, forward in both modes at each
        gamma over held-out batches.
        """
        generator = torch.Generator().manual_seed(1000 * self.seed + self.growths)
        data = self.batches(max(2, self.protocol.samples // self.protocol.batch), generator)
        start = now(self.split.x_train.device)
        self.net = fxgrow.grow(
            self.net, data, neurons={width: units}, method=method, optimizer=self.optimizer, progress=False,
            seed=self.seed,
        )  # fmt: skip
        took = now(self.split.x_train.device) - start
        record = self.net.meta["fxgrow"]
        held = max(1, len(data) // 4)
        passes = 2 if record.profile.refit is not None else 1
        # where nothing moves with gamma it is not searched
        looks = 4 if record.search is None else 4 + 2 * (1 + len(record.search.gammas))
        self.per_step = self.count()
        # a forward pass is a third of a step
        self.multiply_adds += self.per_step * (passes * (len(data) - held) + looks * held / 3)
        self.seconds += took
        self.growing += took
        self.growths += 1


def build(protocol: Protocol, start: float, seed: int, device: torch.device) -> ResNet:
    torch.manual_seed(seed)
    return ResNet((2, 2, 2, 2), protocol.sizes(start), shortcut="conv").to(device)


def events(protocol: Protocol, start: float, net: nn.Module, example: Tensor) -> list[tuple[str, int]]:
    """The growths in order: in each round every width, from the input on, with the units it is to get."""
    small, large = protocol.sizes(start), protocol.sizes(1.0)
    # the stage of a width: the stem and layer1 are the first
    stages = {
        w.name: int(w.name[5]) - 1 if w.name.startswith("layer") else 0
        for w in fxgrow.widths(fxgrow.capture(net, (example,)))
        if w.pinned is None
    }
    sizes = {name: small[stage] for name, stage in stages.items()}
    target = {name: large[stage] for name, stage in stages.items()}
    out = []
    for name, wanted in fxgrow.LayerByLayer(target, steps=1, factor=protocol.factor).turns(sizes):
        out.append((name, wanted - sizes[name]))
        sizes[name] = wanted
    return out


def grown(protocol: Protocol, split: Split, start: float, method: str, seed: int) -> list[Point]:
    """Growth to the target, then training."""
    trial = Trial(protocol, split, build(protocol, start, seed, split.x_train.device), seed)
    plan = events(protocol, start, trial.net, split.x_train[:2])
    trial.net = fxgrow.capture(trial.net, (split.x_train[:2],))
    trial.train(protocol.between)
    for index, (width, units) in enumerate(plan, start=1):
        trial.grow(width, units, method)
        trial.train(protocol.between)
        if index % 4 == 0 or index == len(plan):
            trial.see()
    return finished(trial)


def from_the_start(protocol: Protocol, split: Split, seed: int) -> list[Point]:
    """The target, trained on as many images as a net that grows from the smallest start."""
    trial = Trial(protocol, split, build(protocol, 1.0, seed, split.x_train.device), seed)
    smallest = build(protocol, min(protocol.starts), seed, split.x_train.device)
    count = 1 + len(events(protocol, min(protocol.starts), smallest, split.x_train[:2]))
    trial.net = fxgrow.capture(trial.net, (split.x_train[:2],))
    for _ in range(count // 4):
        trial.train(4 * protocol.between)
        trial.see()
    if count % 4:
        trial.train(count % 4 * protocol.between)
    return finished(trial)


def finished(trial: Trial) -> list[Point]:
    parts = max(1, round(trial.protocol.after))
    for part in range(parts):
        cosine = lambda share, part=part: (1 + math.cos(math.pi * (part + share) / parts)) / 2  # noqa: E731
        trial.train(trial.protocol.after / parts, cosine)
        trial.see(whole=part == parts - 1)
    return trial.curve


def shifted(x: Tensor, generator: torch.Generator) -> Tensor:
    """Each image mirrored with probability one half and moved by up to four pixels, zeros beyond the edge."""
    n, _, h, w = x.shape
    mirror = torch.rand(n, generator=generator).to(x.device) < 0.5
    x = torch.where(mirror[:, None, None, None], x.flip(3), x)
    down, right = torch.randint(9, (2, n), generator=generator).to(x.device)
    rows = (down[:, None] + torch.arange(h, device=x.device))[:, :, None]
    columns = (right[:, None] + torch.arange(w, device=x.device))[:, None, :]
    images = torch.arange(n, device=x.device)[:, None, None]
    return F.pad(x, (4, 4, 4, 4))[images, :, rows, columns].permute(0, 3, 1, 2).contiguous()


@torch.no_grad()
def accuracy(net: nn.Module, x: Tensor, y: Tensor) -> float:
    """Per cent, in eval mode."""
    net.eval()
    right = sum(float((net(a).argmax(1) == b).sum()) for a, b in zip(x.split(500), y.split(500), strict=True))
    net.train()
    return 100 * right / len(x)


def now(device: torch.device) -> float:
    if device.type == "cpu":
        return time.process_time()
    torch.cuda.synchronize(device)
    return time.perf_counter()
