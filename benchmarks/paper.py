"""The experiment of Growing Tiny Networks (arXiv 2405.19816) on CIFAR-10: a thin ResNet-18 grown to its full widths.

A ResNet-18 with the 3x3 stem for small images starts at a part of its widths and grows to all of them: width after
width from the input on (streams too), some training between two growths, more when the target is reached. Beside the
methods stands the target trained from the start for as many images. Costs are CPU seconds of one thread (wall time on a
GPU) and multiply-adds of everything, growth included.

`--config reduced` (the default) fits two CPU cores: an eighth of the widths, small images, little data. `--config full`
is the whole network on all images of the file and wants a GPU, which is used where there is one. A JSON file with the
fields of `benchmarks._paper_run.Protocol` is a config too.

    FXGROW_DATA=... python -m benchmarks.paper [--config full] [--seeds 4] [--only default tiny] [--plot paper.png]
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable
from dataclasses import asdict
from fractions import Fraction
from pathlib import Path

import torch
import torch.nn.functional as F

from benchmarks._command_line import FinishedRuns, command_line, markdown, mean_and_error, parse
from benchmarks._paper_run import Point, Protocol, from_the_start, grown
from examples.data import Split, cifar10

CONFIGS = {
    "reduced": Protocol(),
    "full": Protocol(
        width=1.0,
        images=None,
        test=None,
        side=32,
        batch=128,
        factor=2.0,
        between=0.25,
        after=100.0,
        samples=4096,
        augment=True,
    ),
}
#: the target without growth
SCRATCH = "target from the start"
#: (start, method) and its curves, one per seed
Found = dict[tuple[str, str], list[list[Point]]]


def protocol_of(config: str) -> Protocol:
    """A config by its name, or from a JSON file."""
    if config in CONFIGS:
        return CONFIGS[config]
    given = json.loads(Path(config).read_text())
    lists = {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}
    return Protocol(**lists)


def data(protocol: Protocol, device: torch.device) -> Split:
    split = cifar10(protocol.images, protocol.test)
    small = [F.avg_pool2d(x, 32 // protocol.side) for x in (split.x_train, split.x_test)]
    return Split(*(t.to(device) for t in (small[0], split.y_train, small[1], split.y_test)))


def mean(values: list[float], digits: int) -> str:
    """Returns the mean, with its standard error where there are several values."""
    value, error = mean_and_error(values)
    return f"{value:.{digits}f}" + (f" ± {error:.{digits}f}" if len(values) > 1 else "")


def table(found: Found) -> str:
    columns: dict[str, Callable[[list[Point]], str | float]] = {
        "parameters": lambda c: f"{c[0].parameters:,} → {c[-1].parameters:,}",
        "growths": lambda c: f"{c[-1].growths}",
        "accuracy when grown, %": lambda c: next(p for p in c if p.growths == c[-1].growths and p.seconds).accuracy,
        "accuracy at the end, %": lambda c: c[-1].accuracy,
        "seconds": lambda c: c[-1].seconds,
        "of these growing": lambda c: c[-1].growing,
        "multiply-adds, 10^12": lambda c: c[-1].multiply_adds / 1e12,
    }
    lines = []
    for (start, method), curves in found.items():
        cells = [start, method, str(len(curves))]
        for name, figure in columns.items():
            values = [figure(c) for c in curves]
            own = name.startswith("accuracy when") and method == SCRATCH
            numbers = [v for v in values if isinstance(v, float)]
            cells.append("" if own else mean(numbers, 2) if numbers else str(values[0]))
        lines.append(cells)
    return markdown(["start", "method", "seeds", *columns], lines)


def plot(found: Found, path: Path) -> None:
    """Accuracy against parameters, seconds and multiply-adds, a row for each start, means over the seeds."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    starts = list(dict.fromkeys(start for start, _ in found if start != "1"))
    figure, panels = plt.subplots(len(starts), 3, figsize=(11, 2.9 * len(starts)), squeeze=False, sharey=True)
    axes: dict[str, Callable[[Point], float]] = {
        "parameters": lambda p: p.parameters,
        "seconds": lambda p: p.seconds,
        "multiply-adds, 10^12": lambda p: p.multiply_adds / 1e12,
    }
    for row, start in zip(panels, starts, strict=True):
        for panel, (label, x) in zip(row, axes.items(), strict=True):
            for (of, method), curves in found.items():
                if of in (start, "1"):
                    together = zip(*curves, strict=True)
                    points = [(statistics.mean(map(x, at)), statistics.mean(p.accuracy for p in at)) for at in together]
                    style = "k--" if method == SCRATCH else "-"
                    panel.plot(*zip(*points, strict=True), style, marker="o", markersize=2.5, label=method)
            panel.set_xlabel(label)
        row[0].set(title=f"from {start} of the widths", ylabel="test accuracy, %", xscale="log")
    panels[0][1].legend(fontsize=7, frameon=False)
    figure.tight_layout()
    figure.savefig(path, dpi=80)


def main() -> None:
    parser = command_line(__doc__, seeds=4, threads=None, resume="paper.jsonl")
    parser.add_argument("--config", default="reduced", help="reduced, full, or a JSON file")
    parser.add_argument(
        "--only", nargs="+", help="methods (default: those of the config, and the target from the start)"
    )
    parser.add_argument("--plot", type=Path, help="where to write the curves (needs matplotlib)")
    arguments = parse(parser)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    protocol = protocol_of(arguments.config)
    runs = FinishedRuns(arguments.resume, "protocol", "start", "method", "seed")
    # everything that decides the outcome of a run
    settings = asdict(protocol) | {"starts": [], "methods": []}
    wanted = [(str(Fraction(start)), method) for start in protocol.starts for method in protocol.methods]
    wanted = [key for key in [*wanted, ("1", SCRATCH)] if not arguments.only or key[1] in arguments.only]
    split = None
    found: Found = {}
    for seed in arguments.seeds:
        for start, method in wanted:
            of = {"protocol": settings, "start": start, "method": method, "seed": seed}
            run = runs.find(**of)
            if run is None:
                split = data(protocol, device) if split is None else split
                if method == SCRATCH:
                    points = from_the_start(protocol, split, seed)
                else:
                    points = grown(protocol, split, float(Fraction(start)), method, seed)
                run = runs.add(**of, curve=[asdict(p) for p in points])
                print(start, method, seed, points[-1], flush=True)
            found.setdefault((start, method), []).append([Point(**p) for p in run["curve"]])
    print(f"\n{arguments.config}, on {device}: {protocol}\n")
    print(table(found))
    if arguments.plot:
        plot(found, arguments.plot)


if __name__ == "__main__":
    main()
