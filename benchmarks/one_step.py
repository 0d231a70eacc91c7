"""Every initialiser from the same trained checkpoint: what one growth brings at once, and after more training.

Small nets of five kinds on real data. Per seed (initialisation, data order) a net trains, then each method adds the
same number of units to the same widths (a quarter of each), with its own line search where it has one, and trains on,
with the optimiser's state, on the same batches, at a rate that falls to zero. Losses are held out: Fashion-MNIST and
CIFAR-10 test images, the last tenth of Shakespeare. Differences are paired over seeds; negative: `default` is better.

    FXGROW_DATA=... python -m benchmarks.one_step [--only mlp conv resnet20 vit gpt] [--seeds 10] [--methods ...]
"""

from __future__ import annotations

import copy
import json
import statistics
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

import fxgrow
from benchmarks._command_line import FinishedRuns, command_line, markdown, paired, parse
from benchmarks._small_nets import CONTEXT, characters, convolutions, draw, held_out_loss, loss_of, text, train
from examples.data import Split, cifar10, fashion_mnist
from models import GPT, MLP, ViT, resnet20

METHODS = (
    "default", "tiny", "gradmax", "random-refit", "random", "net2wider", "variance-transfer", "north",
    "splitting", "firefly",
)  # fmt: skip
SHARE = 0.25
#: per method the held-out loss at once and after more training
Row = dict[str, dict[str, float]]


@dataclass
class Subject:
    """A net and how it trains: `steps` before growth, `further` after it, batches of `batch`."""

    build: Callable[[], nn.Module]
    data: Callable[[], Split]
    steps: int
    further: int
    rate: float
    batch: int = 64


SUBJECTS = {
    "mlp": Subject(lambda: MLP((784, 24, 24, 10)), lambda: fashion_mnist(12_000, 4000), 400, 400, 1e-3),
    "conv": Subject(lambda: convolutions((8, 12, 16)), lambda: cifar10(8000, 2000), 250, 250, 3e-3),
    "resnet20": Subject(lambda: resnet20(0.5), lambda: cifar10(6000, 1000), 150, 100, 3e-3),
    "vit": Subject(lambda: ViT(patch_size=8, depth=2, heads=2, width=0.5), lambda: cifar10(8000, 2000), 400, 400, 1e-3),
    "gpt": Subject(lambda: GPT(characters(), CONTEXT, depth=2, heads=2, width=0.5), text, 400, 400, 3e-3, 32),
}


def one_seed(subject: Subject, split: Split, seed: int, methods: list[str]) -> Row:
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    net = subject.build()
    optimizer = torch.optim.Adam(net.parameters(), subject.rate)
    own = (split.x_train, split.y_train)
    train(net, optimizer, list(draw(*own, subject.steps, subject.batch, generator)))
    state = copy.deepcopy(optimizer.state_dict())
    profiled = list(draw(*own, 32, subject.batch, generator))
    further = list(draw(*own, subject.further, subject.batch, generator))
    test = (split.x_test, split.y_test)
    free = [w for w in fxgrow.widths(fxgrow.capture(net, (profiled[0][0],))) if w.pinned is None]
    known = fxgrow.profile(net, profiled, loss_of, method="random", progress=False)
    # an even number of steps, for the method that adds pairs
    units = {w.name: max(2, round(SHARE * w.size / w.step / 2) * 2) * w.step for w in free if w.name in known}
    out: Row = {"ungrown": {"now": held_out_loss(net, *test)}}
    for method in methods:
        twin = copy.deepcopy(net)
        optimizer = torch.optim.Adam(twin.parameters(), subject.rate)
        optimizer.load_state_dict(copy.deepcopy(state))
        options = {"neurons": units, "method": method, "seed": seed, "progress": False, "optimizer": optimizer}
        try:
            grown = fxgrow.grow(twin, profiled, loss_fn=loss_of, **options)
        except fxgrow.PlanError:  # not defined for one of the widths
            continue
        record = grown.meta["fxgrow"]
        before, after = record.losses["eval"]
        predicted = record.plan.decrease(record.plan.scale)
        out[method] = {"now": held_out_loss(grown, *test), "held": before - after, "predicted": predicted}
        train(grown, optimizer, further, decay=True)
        out[method]["after"] = held_out_loss(grown, *test)
    twin = copy.deepcopy(net)
    optimizer = torch.optim.Adam(twin.parameters(), subject.rate)
    optimizer.load_state_dict(copy.deepcopy(state))
    train(twin, optimizer, further, decay=True)
    out["ungrown"]["after"] = held_out_loss(twin, *test)
    return out


def difference(rows: list[Row], method: str, key: str) -> str:
    """Default minus the other in thousandths of a nat, with its standard error."""
    both = [r for r in rows if method in r]
    if len(both) < 2:
        return "·"
    mean, error = paired([1e3 * r["default"][key] for r in both], [1e3 * r[method][key] for r in both])
    mark = "**" if abs(mean) > 2 * error else ""
    return f"{mark}{mean:+.1f} ± {error:.1f}{mark}"


def predictions(rows: dict[str, list[Row]]) -> str:
    """Predicted decreases at the applied gamma, against those on held-out batches and on test data."""
    triples = [
        (r[m]["predicted"], r[m]["held"], r["ungrown"]["now"] - r[m]["now"])
        for of in rows.values()
        for r in of
        for m in r
        if r[m].get("predicted")
    ]
    if len(triples) < 2:
        return ""
    predicted, held, test = zip(*triples, strict=True)

    def against(mine: tuple[float, ...], theirs: tuple[float, ...]) -> str:
        apart = statistics.median(abs(p - d) / max(abs(d), 1e-12) for p, d in zip(mine, theirs, strict=True))
        return f"{apart:.0%} apart in the median, correlation {statistics.correlation(mine, theirs):.2f}"

    return (
        f"{len(triples)} growths, predicted and held out: {against(predicted, held)}; "
        f"predicted and test: {against(predicted, test)}; held out and test: {against(held, test)}."
    )


def table(rows: dict[str, list[Row]], methods: list[str]) -> str:
    others = [m for m in methods if m != "default"]
    lines = []
    for name, of in rows.items():
        means = [statistics.mean(r["ungrown"][key] for r in of) for key in ("now", "after")]
        cells = [f"{difference(of, m, 'now')}, {difference(of, m, 'after')}" for m in others]
        lines.append([name, str(len(of)), f"{means[0]:.3f}, {means[1]:.3f}", *cells])
    return markdown(["net", "seeds", "ungrown: now, after", *(f"{m}: now, after" for m in others)], lines)


def main() -> None:
    parser = command_line(__doc__, seeds=10, only=SUBJECTS, resume="one_step.jsonl")
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    arguments = parse(parser)
    runs = FinishedRuns(arguments.resume, "net", "seed")
    rows: dict[str, list[Row]] = {}
    for name in arguments.only:
        split = SUBJECTS[name].data()
        for seed in arguments.seeds:
            run = runs.find(net=name, seed=seed)
            if run is None:
                run = runs.add(net=name, seed=seed, row=one_seed(SUBJECTS[name], split, seed, arguments.methods))
                print(name, seed, json.dumps(run["row"]), flush=True)
            rows.setdefault(name, []).append(run["row"])
    print("\nDefault minus the other, 10^-3 nats of held-out loss; bold: more than two standard errors\n")
    print(table(rows, arguments.methods))
    print(predictions(rows))


if __name__ == "__main__":
    main()
