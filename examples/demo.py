"""Handwritten digits: a narrow residual network, grown twice while it trains, against the same net never grown.

make demo        (or: python -m examples.demo [seed])

Profile by default: loss (cross-entropy) 0.2316 over 1,347 samples, 4 free widths, 1 pinned

                                                                         share of  predicted
width           size  step  producers → consumers            bottleneck      loss       gain  priority  accepted  add
─────────────────────────────────────────────────────────────────────────────────────────────────────────────────────
conv1              4     1  conv1 +1 → layer1.0.conv1 +2           3.96     12.4%     0.0214      0.13    4 of 4   +1
layer1.0.conv1     4     1  layer1.0.conv1 → layer1.0.conv2        1.15     13.5%     0.0204      0.06    4 of 4    ·
layer2.0.conv1     8     1  layer2.0.conv1 → layer2.0.conv2      0.0948      8.7%     0.0087     0.037    3 of 4    ·
layer2.0.conv2     8     1  layer2.0.conv2 +1 → linear            0.089     25.4%     0.0259     0.042    3 of 4   +1

add: with the default budget: 2 units, 1,382 → 1,638 parameters (+18.5%)

bottleneck: gradient energy that the consumers' existing weights cannot explain; accepted: by a held-out test.
predicted gain: decrease of the loss by the best unit; share of loss: by all accepted units, as a part of it.
priority: of a few more units here, against the other widths; budgets lean towards priority for the size.

pinned width  at node  because
────────────────────────────────────────────────────────
linear        output   a dimension of the model's output

Growth by default: 5 units, 1,382 → 2,051 parameters (+48.4%)
held-out loss (cross-entropy): eval 0.2457 → 0.1728 (-29.6%), train 0.2642 → 0.2088 (-21.0%)
decrease: 0.2084 predicted, 0.0728 realised
gamma: 6.21 applied, 6.21 best on held-out batches
loss along gamma: 0: 0.2642  2.2: 0.2297  3.11: 0.2207  4.39: 0.2125  6.21: 0.2088  8.79: 0.2170  17.6: 0.3635
seconds: 2.18 (capture 0.07, profile 1.02, plan 0.10, search 0.99)

                                                                         share of  predicted
width           size  step  producers → consumers            bottleneck      loss       gain  priority  accepted  added
───────────────────────────────────────────────────────────────────────────────────────────────────────────────────────
conv1              4     1  conv1 +1 → layer1.0.conv1 +2           3.96     12.4%     0.0214      0.13    4 of 4     +2
layer1.0.conv1     4     1  layer1.0.conv1 → layer1.0.conv2        1.15     13.5%     0.0204      0.06    4 of 4     +1
layer2.0.conv1     8     1  layer2.0.conv1 → layer2.0.conv2      0.0948      8.7%     0.0087     0.037    3 of 4     +1
layer2.0.conv2     8     1  layer2.0.conv2 +1 → linear            0.089     25.4%     0.0259     0.042    3 of 4     +1

bottleneck: gradient energy that the consumers' existing weights cannot explain; accepted: by a held-out test.
predicted gain: decrease of the loss by the best unit; share of loss: by all accepted units, as a part of it.
priority: of a few more units here, against the other widths; budgets lean towards priority for the size.

pinned width  at node  because
────────────────────────────────────────────────────────
linear        output   a dimension of the model's output

the second growth: layer1.0.conv1 +4;
2,051 -> 2,491 parameters, gamma 20.7

wrote out/growth.png and out/grown.onnx (the same outputs in onnxruntime)

test accuracy 92.7 % before growth, 96.9 % after two growths, 96.0 % ungrown; 1,382 -> 2,491 parameters; 4.5 s growing
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
SEED = 3  # of the run that is shown; ten seeds are in benchmarks/RESULTS.md


@dataclass
class Outcome:
    """Test accuracy and loss of one network after each stage, and the time spent growing."""

    accuracy: list[float] = field(default_factory=list)  # after each stage of training, in percent
    loss: list[float] = field(default_factory=list)
    parameters: list[int] = field(default_factory=list)
    growths: list[fxgrow.Growth] = field(default_factory=list)
    seconds: float = 0.0  # spent growing
    net: nn.Module = field(default_factory=nn.Identity)


def run(seed: int, method: str | None = "default", show: bool = False) -> Outcome:
    """Trains for `STAGES * EPOCHS` epochs and grows between the stages; `method=None` never grows.

    The first weights and the order of the batches depend only on the seed.
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
    """Returns accuracy in percent and cross-entropy on the test images."""
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
    torch.set_num_threads(1)  # more threads do not help with such small images
    main(int(sys.argv[1]) if len(sys.argv) > 1 else SEED, Path("out"))
