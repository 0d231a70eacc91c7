"""What a Grower costs while it does not grow, and how fast a grown net runs, eager and compiled.

python -m benchmarks.overhead

Steps of the loops alternate within each repetition, so that a slow phase of the machine affects all of them. CPU time
of the process, one thread, medians over repetitions. `--no-inductor` leaves the compiled nets out (they need a C++
compiler).
"""

from __future__ import annotations

import datetime
import math
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fxgrow
from benchmarks._command_line import command_line, markdown, parse
from models.gpt import GPT
from models.mlp import MLP
from models.resnet import DigitsResNet

Data = tuple[Tensor, Tensor]


def main() -> None:
    parser = command_line(__doc__, threads=None)
    parser.add_argument("--repetitions", type=int, default=30, help="figures are medians over them (default: 30)")
    parser.add_argument("--steps", type=int, default=40, help="of each loop in a repetition (default: 40)")
    parser.add_argument("--no-inductor", action="store_true", help="leave the compiled nets out")
    arguments = parse(parser)
    print(f"{datetime.date.today()}, torch {torch.__version__}, one thread\n")
    print("A Grower that does not grow, over a plain step; a grown net, over one built at its sizes\n")
    head = ["net", "plain step, µs", "with step()", "with step(loss)", "step() alone, µs", "grown, eager", "compiled"]
    print(markdown(head, []), flush=True)
    for name, (net, data) in nets().items():
        plain, quiet, losses = loops(net, data)
        turns = arguments.repetitions, arguments.steps
        times = interleaved({"plain": plain, "quiet": quiet, "losses": losses}, *turns)
        cells = [f"{1e6 * statistics.median(times['plain']):.0f}"]
        cells += [percent(*ratio(times[key], times["plain"])) for key in ("quiet", "losses")]
        cells.append(f"{1e6 * alone_seconds(net, data):.2f}")
        cells.append(percent(*speed(net, data, False, *turns)))
        cells.append("·" if arguments.no_inductor else percent(*speed(net, data, True, *turns)))
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


def nets() -> dict[str, tuple[Callable[[float], nn.Module], Data]]:
    """Makers of nets by width factor, and a batch; at 1 a net is twice as wide as at 1/2 in every width that grows."""
    generator = torch.Generator().manual_seed(0)
    images, classes = torch.randn(64, 1, 8, 8, generator=generator), torch.randint(10, (64,), generator=generator)
    tokens = torch.randint(65, (16, 65), generator=generator)
    return {
        "MLP 64-64-64-10": (lambda w: MLP((64, 64, 64, 10), width=w), (images, classes)),
        "DigitsResNet": (lambda w: DigitsResNet(w), (images, classes)),
        "GPT, 2 blocks": (lambda w: GPT(depth=2, width=w), (tokens[:, :-1], tokens[:, 1:])),
    }


def loss_of(net: nn.Module, data: Data) -> Tensor:
    out = net(data[0])
    return F.cross_entropy(out.flatten(0, -2), data[1].flatten())


def stepper(net: nn.Module, data: Data, after: Callable[[Tensor], object] = lambda loss: None) -> Callable[[], None]:
    optimizer = torch.optim.Adam(net.parameters())

    def step() -> None:
        optimizer.zero_grad()
        loss = loss_of(net, data)
        loss.backward()
        optimizer.step()
        after(loss)

    return step


def loops(make: Callable[[float], nn.Module], data: Data) -> tuple[Callable[[], None], ...]:
    """The same loop without a Grower, with `step()`, and with `step(loss)` on a plateau schedule."""
    torch.manual_seed(0)
    net = make(1.0)
    growers = [quiet_grower(net, data, schedule) for schedule in (fxgrow.Every(steps=10**9), fxgrow.OnPlateau(10**9))]
    return (
        stepper(net, data),
        stepper(net, data, lambda loss: growers[0].step()),
        stepper(net, data, lambda loss: growers[1].step(loss)),
    )


def quiet_grower(net: nn.Module, data: Data, schedule: fxgrow.Schedule) -> fxgrow.Grower:
    return fxgrow.Grower(net, torch.optim.SGD(net.parameters(), 0.1), schedule, dataloader=[data])


def alone_seconds(make: Callable[[float], nn.Module], data: Data, calls: int = 100_000) -> float:
    grower = quiet_grower(make(1.0), data, fxgrow.Every(steps=10**9))
    start = time.process_time()
    for _ in range(calls):
        grower.step()
    return (time.process_time() - start) / calls


def speed(
    make: Callable[[float], nn.Module], data: Data, compiled: bool, repetitions: int, steps: int
) -> tuple[float, float]:
    """A net that reached its sizes in two growths, over one that was built with them."""
    torch.manual_seed(0)
    small, target = make(0.5), make(1.0)
    sizes = {w.name: w.size for w in fxgrow.widths(fxgrow.capture(target, (data[0],)))}
    grown: nn.Module = small
    for part in (0.5, 1.0):
        units = {}
        for w in fxgrow.widths(fxgrow.capture(grown, (data[0],))):
            k = math.ceil((sizes[w.name] - w.size) * part / w.step) * w.step
            if w.pinned is None and k > 0:
                units[w.name] = k
        grown = fxgrow.widen(grown, (data[0],), units)
    shapes = [[p.shape for p in net.parameters()] for net in (grown, target)]
    if shapes[0] != shapes[1]:
        raise SystemExit(f"the grown net has other sizes than the one from scratch: {shapes}")
    if compiled:
        torch._dynamo.reset()
        grown, target = torch.compile(grown), torch.compile(target)
    times = interleaved({"grown": stepper(grown, data), "built": stepper(target, data)}, repetitions, steps)
    return ratio(times["grown"], times["built"])


def interleaved(loops: dict[str, Callable[[], None]], repetitions: int, steps: int) -> dict[str, list[float]]:
    """CPU seconds of a step in each repetition; the loops take turns, each going first equally often."""
    names = list(loops)
    for name in names:
        for _ in range(steps):
            loops[name]()
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for repetition in range(repetitions):
        first = repetition % len(names)
        total = dict.fromkeys(names, 0.0)
        for _ in range(steps):
            for name in names[first:] + names[:first]:
                start = time.process_time()
                loops[name]()
                total[name] += time.process_time() - start
        for name in names:
            seconds[name].append(total[name] / steps)
    return seconds


def ratio(ours: list[float], theirs: list[float]) -> tuple[float, float]:
    """Median of the ratios over repetitions, less one, and its standard error (1.2533 times that of a mean)."""
    ratios = [a / b - 1 for a, b in zip(ours, theirs, strict=True)]
    return statistics.median(ratios), 1.2533 * statistics.stdev(ratios) / math.sqrt(len(ratios))


def percent(value: float, error: float) -> str:
    return f"{100 * value:+.2f} ± {100 * error:.2f} %"


if __name__ == "__main__":
    main()
