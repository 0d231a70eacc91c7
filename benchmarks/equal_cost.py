"""Does growing pay at equal cost? CPU time, one thread, growth included.

Per net and seed: a small net that is grown on the way (every width doubled, a few times) against the same small net
trained for the same time, a net of the final size trained from the start for the same time, and that one for as many
steps; `widened` doubles by `fxgrow.widen`, random units without data. All follow a cosine schedule over their own time
(or steps) and see the same batches in the same order. They take turns in slices, so that a slow phase of a
shared machine affects all of them. Evaluation is not counted. Accuracies are on test images (Fashion-MNIST, CIFAR-10)
or the next character (Shakespeare).

    FXGROW_DATA=... python -m benchmarks.equal_cost [--only mlp conv gpt] [--seeds 5] [--plot benchmarks/equal_cost.png]
"""

from __future__ import annotations

import json
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

import fxgrow
from benchmarks._command_line import FinishedRuns, command_line, difference, markdown, parse
from benchmarks._small_nets import CONTEXT, characters, convolutions, draw, loss_and_accuracy, loss_of, text
from examples.data import Split, cifar10, fashion_mnist
from models import GPT, MLP

#: how often a run is evaluated; also the number of slices in which the runs take turns
SLICES = 10
#: a point of a curve: CPU seconds, steps, test loss, test accuracy
Point = tuple[float, int, float, float]
#: per arm of one seed: its curve and what it is made of
Row = dict[str, dict[str, list[Point] | float]]


@dataclass
class Subject:
    """A net, its data, CPU seconds to train for, and the shares of them at which its widths double."""

    build: Callable[[], nn.Module]
    data: Callable[[], Split]
    seconds: float
    growths: tuple[float, ...]
    rate: float
    batch: int
    samples: int


def gpt() -> nn.Module:
    return GPT(characters(), CONTEXT, depth=2, heads=2, width=0.5)


SUBJECTS = {
    "mlp": Subject(
        lambda: MLP((784, 32, 32, 10)), lambda: fashion_mnist(60_000, 5000), 8.0, (0.15, 0.3, 0.45), 2e-3, 256, 1024
    ),
    "conv": Subject(lambda: convolutions((4, 8, 16)), lambda: cifar10(20_000, 2000), 15.0, (0.2, 0.4), 5e-3, 64, 512),
    "gpt": Subject(gpt, text, 20.0, (0.2, 0.4), 3e-3, 32, 512),
}


def fresh(net: nn.Module, seed: int) -> nn.Module:
    """The same sizes with first weights of PyTorch's own, embeddings as `models.GPT` has them."""
    torch.manual_seed(seed)
    for module in net.modules():
        if isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)
        elif callable(reset := getattr(module, "reset_parameters", None)):
            reset()
    return net


@dataclass
class Run:
    """One net in training; `advance` goes on to a share of its seconds, or of its steps where these are given."""

    subject: Subject
    split: Split
    net: nn.Module
    seed: int
    grow: Callable[[Run], nn.Module] | None = None
    steps: int | None = None
    spent: float = 0.0
    growing: float = 0.0
    done: int = 0
    curve: list[Point] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.optimizer = torch.optim.Adam(self.net.parameters(), self.subject.rate)
        self.due = list(self.subject.growths) if self.grow else []
        generator = torch.Generator().manual_seed(self.seed)
        self.batches = draw(self.split.x_train, self.split.y_train, 10**9, self.subject.batch, generator)
        self.net.train()
        self.see()

    @property
    def progress(self) -> float:
        return self.done / self.steps if self.steps else self.spent / self.subject.seconds

    def see(self) -> None:
        self.curve.append((self.spent, self.done, *loss_and_accuracy(self.net, self.split.x_test, self.split.y_test)))

    def advance(self, share: float) -> None:
        while self.progress < share:
            start = time.process_time()
            if self.due and self.progress >= self.due[0]:
                self.due.pop(0)
                self.net = self.grow(self) if self.grow else self.net
                self.net.train()
                self.growing += time.process_time() - start
            else:
                self.step()
            self.spent += time.process_time() - start
        self.see()

    def step(self) -> None:
        x, y = next(self.batches)
        for group in self.optimizer.param_groups:
            group["lr"] = self.subject.rate * (1 + math.cos(math.pi * min(1.0, self.progress))) / 2
        self.optimizer.zero_grad()
        loss_of(self.net(x), y).backward()
        self.optimizer.step()
        self.done += 1

    def record(self) -> dict[str, list[Point] | float]:
        parameters = sum(p.numel() for p in self.net.parameters())
        return {"curve": self.curve, "growing": self.growing, "parameters": parameters}


def doubled(names: list[str], net: nn.Module, example: Tensor) -> dict[str, int]:
    return {w.name: w.size for w in fxgrow.widths(fxgrow.capture(net, (example,))) if w.name in names}


def arms(subject: Subject, split: Split, seed: int) -> dict[str, Run]:
    """All runs of a seed but the one that needs to know how many steps the grown net took."""
    x = split.x_train[:2]
    torch.manual_seed(seed)
    small = fxgrow.capture(subject.build(), (x,))
    first = [(split.x_train[: subject.batch], split.y_train[: subject.batch])]
    names = list(fxgrow.profile(small, first, loss_of, method="random", progress=False))

    def by_data(run: Run) -> nn.Module:
        generator = torch.Generator().manual_seed(1000 + run.seed)
        count = subject.samples // subject.batch
        data = list(draw(split.x_train, split.y_train, count, subject.batch, generator))
        units = doubled(names, run.net, x)
        return fxgrow.grow(run.net, data, loss_fn=loss_of, neurons=units, optimizer=run.optimizer, progress=False)

    def blind(run: Run) -> nn.Module:
        return fxgrow.widen(run.net, (x,), doubled(names, run.net, x), optimizer=run.optimizer, seed=run.seed)

    again = lambda: fxgrow.apply(small, fxgrow.Plan({}))  # noqa: E731
    more = {name: size * (2 ** len(subject.growths) - 1) for name, size in doubled(names, small, x).items()}
    return {
        "grown": Run(subject, split, again(), seed, by_data),
        "widened": Run(subject, split, again(), seed, blind),
        "small": Run(subject, split, again(), seed),
        "final, equal time": Run(subject, split, fresh(fxgrow.widen(small, (x,), more), seed), seed),
    }


def one_seed(subject: Subject, split: Split, seed: int) -> Row:
    runs = arms(subject, split, seed)
    for slice_ in range(1, SLICES + 1):
        for run in runs.values():
            run.advance(slice_ / SLICES)
    again = fresh(fxgrow.apply(runs["final, equal time"].net, fxgrow.Plan({})), seed)
    longer = Run(subject, split, again, seed, steps=runs["grown"].done)
    for slice_ in range(1, SLICES + 1):
        longer.advance(slice_ / SLICES)
    return {name: run.record() for name, run in {**runs, "final, equal steps": longer}.items()}


def over_time(curve: list[Point]) -> float:
    """Mean accuracy over the time of a run, by trapezoids."""
    area = sum((b[0] - a[0]) * (a[3] + b[3]) / 2 for a, b in zip(curve, curve[1:], strict=False))
    return area / (curve[-1][0] - curve[0][0])


def table(rows: list[Row]) -> str:
    def of(arm: str, figure: Callable[[list[Point]], float]) -> list[float]:
        return [figure(r[arm]["curve"]) for r in rows]  # type: ignore[arg-type]

    figures: dict[str, tuple[Callable[[list[Point]], float], int]] = {
        "mean accuracy over the time": (over_time, 2),
        "final accuracy": (lambda c: c[-1][3], 2),
        "final loss": (lambda c: c[-1][2], 4),
    }
    head = ["net", "parameters", "steps", "CPU s", "of these growing", *figures]
    head += [f"grown minus it: {f}" for f in figures]
    lines = []
    for arm in rows[0]:
        cells = [arm, f"{rows[0][arm]['parameters']:,}", f"{statistics.mean(of(arm, lambda c: c[-1][1])):,.0f}"]
        cells.append(f"{statistics.mean(of(arm, lambda c: c[-1][0])):.1f}")
        cells.append(f"{statistics.mean(float(r[arm]['growing']) for r in rows):.1f}")  # type: ignore[arg-type]
        cells += [f"{statistics.mean(of(arm, f)):.{digits}f}" for f, digits in figures.values()]
        for f, digits in figures.values():
            # over its own, longer time means another thing
            other = f is over_time and arm.endswith("steps")
            same = len(rows) < 2 or arm == "grown"
            cells.append("" if same or other else difference(of("grown", f), of(arm, f), digits))
        lines.append(cells)
    return markdown(head, lines)


def plot(found: dict[str, list[Row]], path: Path) -> None:
    """Test accuracy against CPU seconds, means over the seeds."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, len(found), figsize=(4.2 * len(found), 3.2), squeeze=False)
    for panel, (name, rows) in zip(panels[0], found.items(), strict=True):
        for arm in rows[0]:
            together = zip(*(r[arm]["curve"] for r in rows), strict=True)  # type: ignore[arg-type]
            points = [[statistics.mean(p) for p in zip(*at, strict=True)] for at in together]
            style = "--" if arm.endswith("steps") else "-"
            panel.plot([p[0] for p in points], [p[3] for p in points], style, marker="o", markersize=3, label=arm)
        for share in SUBJECTS[name].growths:
            panel.axvline(share * SUBJECTS[name].seconds, color="0.8", linewidth=1, zorder=0)
        best = max(p[3] for r in rows for arm in r.values() for p in arm["curve"])  # type: ignore[union-attr]
        first = min(arm["curve"][1][3] for r in rows for arm in r.values())  # type: ignore[index]
        panel.set(title=name, xlabel="CPU seconds", ylim=(first - 1, best + 1))
    panels[0][0].set_ylabel("test accuracy, %")
    panels[0][0].legend(fontsize=7, frameon=False)
    figure.tight_layout()
    figure.savefig(path, dpi=90)


def main() -> None:
    parser = command_line(__doc__, seeds=5, threads=None, only=SUBJECTS, resume="equal_cost.jsonl")
    parser.add_argument("--plot", type=Path, help="where to write the curves (needs matplotlib)")
    arguments = parse(parser)
    runs = FinishedRuns(arguments.resume, "net", "seed")
    found: dict[str, list[Row]] = {}
    for name in arguments.only:
        if any(runs.find(net=name, seed=seed) is None for seed in arguments.seeds):
            split = SUBJECTS[name].data()
            warm = arms(SUBJECTS[name], split, 0)["grown"]
            if warm.grow:
                warm.grow(warm)  # what a process pays once is not counted
        for seed in arguments.seeds:
            run = runs.find(net=name, seed=seed)
            if run is None:
                run = runs.add(net=name, seed=seed, row=one_seed(SUBJECTS[name], split, seed))
                final = {arm: r["curve"][-1][3] for arm, r in run["row"].items()}
                print(name, seed, json.dumps(final), flush=True)
            found.setdefault(name, []).append(run["row"])
    for name, rows in found.items():
        print(f"\n{name}, {len(rows)} seeds, {SUBJECTS[name].seconds:g} CPU seconds\n")
        print(table(rows))
    if arguments.plot:
        plot(found, arguments.plot)


if __name__ == "__main__":
    main()
