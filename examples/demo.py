"""Handwritten digits: a narrow residual network, grown twice while it trains, against the same net never grown.

    make demo        (or: python -m examples.demo [seed])

HEADER
"""

from __future__ import annotations

import copy
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import fxgrow
from examples.data import Split, digits
from models import DigitsResNet

WIDTH = 0.25  # 4 and 8 channels: 1,382 parameters
BUDGET = "+50%"  # of the parameters, at each growth
STAGES, EPOCHS = 3, 6  # train, grow, train, grow, train
BATCH, RATE = 64, 0.01


@dataclass
class Outcome:
    """Test accuracy and loss of one network over its life, and what growing it took."""

    accuracy: list[float] = field(default_factory=list)  # after each stage of training, in percent
    loss: list[float] = field(default_factory=list)
    parameters: list[int] = field(default_factory=list)
    growths: list[fxgrow.Growth] = field(default_factory=list)
    seconds: float = 0.0  # spent growing
    net: nn.Module = field(default_factory=nn.Identity)


def run(seed: int, method: str | None = "default", show: bool = False) -> Outcome:
    """Train for `STAGES * EPOCHS` epochs, growing between the stages; `method=None` never grows.

    The first weights and the order of the batches depend on the seed alone.
    """
    data = digits()
    torch.manual_seed(seed)
    net: nn.Module = DigitsResNet(WIDTH)
    order = torch.Generator().manual_seed(seed)
    loader = DataLoader(TensorDataset(data.x_train, data.y_train), BATCH, shuffle=True, generator=order)
    optimizer = torch.optim.Adam(net.parameters(), RATE)
    steps = STAGES * EPOCHS * len(loader)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps, eta_min=RATE / 20)
    outcome = Outcome()
    for stage in range(STAGES):
        if stage > 0 and method is not None:
            if show and stage == 1:
                print(f"{fxgrow.profile(net, loader, progress=False)}\n")
            start = time.perf_counter()
            net = fxgrow.grow(net, loader, budget=BUDGET, method=method, optimizer=optimizer, progress=False)
            outcome.seconds += time.perf_counter() - start
            outcome.growths.append(net.meta["fxgrow"])
        train(net, loader, optimizer, schedule)
        accuracy, loss = evaluate(net, data)
        outcome.accuracy.append(accuracy)
        outcome.loss.append(loss)
        outcome.parameters.append(sum(p.numel() for p in net.parameters()))
    outcome.net = net
    return outcome


def train(net: nn.Module, loader: DataLoader[tuple[Tensor, ...]], optimizer: torch.optim.Optimizer, schedule) -> None:
    net.train()
    for _ in range(EPOCHS):
        for x, y in loader:
            optimizer.zero_grad()
            F.cross_entropy(net(x), y).backward()
            optimizer.step()
            schedule.step()


@torch.no_grad()
def evaluate(net: nn.Module, data: Split) -> tuple[float, float]:
    """Accuracy in percent and cross-entropy on the test images."""
    logits = copy.deepcopy(net).eval()(data.x_test)
    hits = (logits.argmax(1) == data.y_test).float().mean()
    return 100 * float(hits), float(F.cross_entropy(logits, data.y_test))


def main(seed: int, out: Path) -> None:
    out.mkdir(exist_ok=True)
    ungrown = run(seed, method=None)
    grown = run(seed, show=True)
    print(f"{grown.growths[0]}\n\nthe second growth: {grown.growths[1].plan}\n")
    grown.growths[0].plot(str(out / "growth.png"))
    fxgrow.export_onnx(grown.net, out / "grown.onnx", (digits().x_test[:4],))
    print(f"wrote {out / 'growth.png'} and {out / 'grown.onnx'} (the same outputs in onnxruntime)\n")
    print(
        f"test accuracy {grown.accuracy[0]:.1f} % before growth, {grown.accuracy[-1]:.1f} % after two growths "
        f"(never grown, as many epochs: {ungrown.accuracy[-1]:.1f} %); "
        f"{grown.parameters[0]:,} -> {grown.parameters[-1]:,} parameters; {grown.seconds:.1f} s spent growing"
    )


if __name__ == "__main__":
    torch.set_num_threads(1)  # images this small gain nothing from more
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 0, Path("out"))
