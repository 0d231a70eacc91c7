"""How often a profile calls units significant where there is nothing to find.

*own labels*: the labels of the profile are drawn from the net's own softmax, so that no change of the function lowers
the expected loss. *shuffled*: net and profile have the same images with shuffled labels, so that nothing carries over
from one part of the data to another. *real*: the same nets with their real labels, which shows that the test can find
something. A run counts as false if any width has a significant unit.

    python -m benchmarks.false_positives [--runs 100] [--steps 150]
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

import fxgrow
from benchmarks._command_line import command_line, markdown, parse
from benchmarks._small_nets import draw, train
from examples.data import digits
from models import MLP, DigitsResNet

NETS: dict[str, Callable[[], nn.Module]] = {
    "mlp": lambda: MLP((64, 12, 12, 10)),
    "resnet": lambda: DigitsResNet(0.25),
}


def significant(make: Callable[[], nn.Module], kind: str, seed: int, steps: int) -> tuple[int, int]:
    """Widths with a significant unit, and all that were profiled."""
    split = digits()
    x, y = split.x_train, split.y_train
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    if kind == "shuffled":
        y = y[torch.randperm(len(y), generator=generator)]
    net = make()
    train(net, torch.optim.Adam(net.parameters(), 3e-3), list(draw(x, y, steps, 64, generator)))
    if kind == "own labels":
        with torch.no_grad():
            y = torch.multinomial(net.eval()(x).softmax(1), 1, generator=generator).flatten()
    order = torch.randperm(len(x), generator=generator).split(64)
    profile = fxgrow.profile(net.eval(), [(x[i], y[i]) for i in order], seed=seed, progress=False)
    return sum(b.significant > 0 for b in profile.values()), len(profile)


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("--runs", type=int, default=100, help="nets of each kind (default: 100)")
    parser.add_argument("--steps", type=int, default=150, help="of training before the profile (default: 150)")
    arguments = parse(parser)
    lines = []
    for name, make in NETS.items():
        for kind in ("own labels", "shuffled", "real"):
            found = [significant(make, kind, seed, arguments.steps) for seed in range(arguments.runs)]
            widths, every = sum(f for f, _ in found), sum(n for _, n in found)
            runs = sum(f > 0 for f, _ in found)
            lines.append([name, kind, f"{widths} of {every} ({widths / every:.1%})", f"{runs} of {len(found)}"])
            print(*lines[-1], sep="  ", flush=True)
    print("\n" + markdown(["net", "labels", "widths with a significant unit", "runs with any"], lines))


if __name__ == "__main__":
    main()
