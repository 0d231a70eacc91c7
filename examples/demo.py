"""Handwritten digits: a narrow residual network, grown twice while it trains, against the same net never grown.

make demo        (or: python -m examples.demo [seed])

Profile by default: loss 0.2366 over 1,347 samples, 4 free widths, 1 pinned

width           size  step  producers → consumers                 Ψ  share            best gains      ok  add
─────────────────────────────────────────────────────────────────────────────────────────────────────────────
conv1              4     1  conv1 +1 → layer1.0.conv1 +2       4.04  99.3%  0.0199 0.0041 0.0017  4 of 4    ·
layer1.0.conv1     4     1  layer1.0.conv1 → layer1.0.conv2    1.18  99.1%  0.0107 0.0057 0.0043  4 of 4   +1
layer2.0.conv1     8     1  layer2.0.conv1 → layer2.0.conv2  0.0975  96.1%       0.0150 0.0013 0  1 of 4   +1
layer2.0.conv2     8     1  layer2.0.conv2 +1 → linear       0.0915  95.0%  0.0185 0.0087 0.0078  1 of 4   +1

add: with the default budget: 3 units, 1,382 → 1,665 parameters (+20.5%)

Ψ: what the loss asks of the consumers and no change of their weights can express; share: of all it asks for.
best gains: predicted decrease of the loss per unit; ok: units that a test on held-back batches accepts.

pinned width  at node  because
────────────────────────────────────────────────────────
linear        output   a dimension of the model's output

Growth by default: 5 units, 1,382 → 2,051 parameters (+48.4%)
held-back loss: eval 0.2502 → 0.2214 (-11.5%), train 0.2655 → 0.2441 (-8.1%)
gamma: 1.49 applied, 5.96 best on held-back batches
loss along gamma: 0: 0.2655  1.05: 0.2497  2.11: 0.2369  4.21: 0.2202  5.96: 0.2136  8.42: 0.2157  11.9: 0.2404
                  16.8: 0.3325
seconds: 1.24 (capture 0.06, profile 0.82, plan 0.03, search 0.33)

width           size  step  producers → consumers                 Ψ  share            best gains      ok  added
───────────────────────────────────────────────────────────────────────────────────────────────────────────────
conv1              4     1  conv1 +1 → layer1.0.conv1 +2       4.04  99.3%  0.0199 0.0041 0.0017  4 of 4     +2
layer1.0.conv1     4     1  layer1.0.conv1 → layer1.0.conv2    1.18  99.1%  0.0107 0.0057 0.0043  4 of 4     +1
layer2.0.conv1     8     1  layer2.0.conv1 → layer2.0.conv2  0.0975  96.1%       0.0150 0.0013 0  1 of 4     +1
layer2.0.conv2     8     1  layer2.0.conv2 +1 → linear       0.0915  95.0%  0.0185 0.0087 0.0078  1 of 4     +1

Ψ: what the loss asks of the consumers and no change of their weights can express; share: of all it asks for.
best gains: predicted decrease of the loss per unit; ok: units that a test on held-back batches accepts.

pinned width  at node  because
────────────────────────────────────────────────────────
linear        output   a dimension of the model's output

the second growth: conv1 +1, layer1.0.conv1 +2, layer2.0.conv1 +2, layer2.0.conv2 +2;
2,051 -> 3,032 parameters, gamma 1.72

wrote out/growth.png and out/grown.onnx (the same outputs in onnxruntime)

test accuracy 92.2 % before growth, 96.9 % after two growths, 95.8 % ungrown; 1,382 -> 3,032 parameters; 2.3 s growing
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
SEED = 3  # of one run; all ten of the benchmark are in benchmarks/RESULTS.md


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
    print(f"{grown.growths[0]}\n")
    print("the second growth:", str(grown.growths[1].plan).replace("; ", ";\n"), end="\n\n")
    grown.growths[0].plot(str(out / "growth.png"))
    fxgrow.export_onnx(grown.net, out / "grown.onnx", (digits().x_test[:4],))
    print(f"wrote {out / 'growth.png'} and {out / 'grown.onnx'} (the same outputs in onnxruntime)\n")
    print(
        f"test accuracy {grown.accuracy[0]:.1f} % before growth, {grown.accuracy[-1]:.1f} % after two growths, "
        f"{ungrown.accuracy[-1]:.1f} % ungrown; {grown.parameters[0]:,} -> {grown.parameters[-1]:,} parameters; "
        f"{grown.seconds:.1f} s growing"
    )


if __name__ == "__main__":
    torch.set_num_threads(1)  # images this small gain nothing from more
    main(int(sys.argv[1]) if len(sys.argv) > 1 else SEED, Path("out"))
