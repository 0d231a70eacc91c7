"""Where there is nothing to find, nothing should be significant.

*own labels*: the labels of the profile are drawn from the net's own softmax, so that no change of the function lowers
the expected loss. *shuffled*: net and profile have the same images with shuffled labels, so that nothing carries over
from one part of the data to another. *real*: the same nets with their real labels, which shows that the test can find
something. A run counts as false if any width has a significant unit.

    python -m benchmarks.nulls [--runs 100] [--steps 150]
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxgrow
from examples.data import digits
from models import MLP, DigitsResNet

NETS: dict[str, Callable[[], nn.Module]] = {
    "mlp": lambda: MLP((64, 12, 12, 10)),
    "resnet": lambda: DigitsResNet(0.25),
}


def train(net: nn.Module, x: Tensor, y: Tensor, steps: int, generator: torch.Generator) -> None:
    optimizer = torch.optim.Adam(net.parameters(), 3e-3)
    for _ in range(steps):
        i = torch.randint(len(x), (64,), generator=generator)
        optimizer.zero_grad()
        F.cross_entropy(net(x[i]), y[i]).backward()
        optimizer.step()


def significant(make: Callable[[], nn.Module], kind: str, seed: int, steps: int) -> tuple[int, int]:
    """Widths with a significant unit, and all that were profiled."""
    split = digits()
    x, y = split.x_train, split.y_train
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    if kind == "shuffled":
        y = y[torch.randperm(len(y), generator=generator)]
    net = make()
    train(net, x, y, steps, generator)
    if kind == "own labels":
        with torch.no_grad():
            y = torch.multinomial(net.eval()(x).softmax(1), 1, generator=generator).flatten()
    order = torch.randperm(len(x), generator=generator).split(64)
    profile = fxgrow.profile(net.eval(), [(x[i], y[i]) for i in order], seed=seed, progress=False)
    return sum(b.significant > 0 for b in profile.values()), len(profile)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=100)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    print("| net | labels | widths with a significant unit | runs with any |")
    print("|---|---|---|---|")
    for name, make in NETS.items():
        for kind in ("own labels", "shuffled", "real"):
            found = [significant(make, kind, seed, arguments.steps) for seed in range(arguments.runs)]
            widths, every = sum(f for f, _ in found), sum(n for _, n in found)
            runs = sum(f > 0 for f, _ in found)
            print(
                f"| {name} | {kind} | {widths} of {every} ({widths / every:.1%}) | {runs} of {len(found)} |", flush=True
            )


if __name__ == "__main__":
    main()
