"""Every initialiser from the same trained checkpoint: what one growth brings at once, and after more training.

Small nets of five kinds on real data. Per seed (initialisation, data order) a net trains, then each method adds the
same number of units to the same widths (a quarter of each), with its own line search where it has one, and trains on,
with the optimiser's state, on the same batches, at a rate that falls to zero. Losses are held out: Fashion-MNIST and
CIFAR-10 test images, the last tenth of Shakespeare. Differences are paired over seeds; negative: `default` is better.

    FXGROW_DATA=... python -m benchmarks.one_step [--only mlp conv resnet20 vit gpt] [--seeds 10] [--methods ...]
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxgrow
from examples.data import Split, cifar10, fashion_mnist, shakespeare
from models import GPT, MLP, ViT, resnet20

METHODS = (
    "default", "tiny", "gradmax", "random-refit", "random", "net2wider", "variance-transfer", "north",
    "splitting", "firefly",
)  # fmt: skip
SHARE, CONTEXT = 0.25, 32
Batches = list[tuple[Tensor, Tensor]]
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


def conv() -> nn.Module:
    sizes = (3, 8, 12, 16)
    layers: list[nn.Module] = []
    for a, b in zip(sizes, sizes[1:], strict=False):
        layers += [nn.Conv2d(a, b, 3, padding=1, bias=False), nn.BatchNorm2d(b), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(sizes[-1], 10))


def text() -> Split:
    train, test, _ = shakespeare()
    cut = lambda t: t[: (len(t) - 1) // CONTEXT * CONTEXT + 1]  # noqa: E731
    pairs = [(t[:-1].view(-1, CONTEXT), t[1:].view(-1, CONTEXT)) for t in map(cut, (train, test[:20_000]))]
    return Split(*pairs[0], *pairs[1])


def characters() -> int:
    return len(shakespeare()[2])


SUBJECTS = {
    "mlp": Subject(lambda: MLP((784, 24, 24, 10)), lambda: fashion_mnist(12_000, 4000), 400, 400, 1e-3),
    "conv": Subject(conv, lambda: cifar10(8000, 2000), 250, 250, 3e-3),
    "resnet20": Subject(lambda: resnet20(0.5), lambda: cifar10(6000, 1000), 150, 100, 3e-3),
    "vit": Subject(lambda: ViT(patch_size=8, depth=2, heads=2, width=0.5), lambda: cifar10(8000, 2000), 400, 400, 1e-3),
    "gpt": Subject(lambda: GPT(characters(), CONTEXT, depth=2, heads=2, width=0.5), text, 400, 400, 3e-3, 32),
}


def loss_of(out: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(out.flatten(0, -2), y.flatten())


def draw(x: Tensor, y: Tensor, count: int, size: int, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
    for _ in range(count):
        i = torch.randint(len(x), (size,), generator=generator)
        yield x[i], y[i]


@torch.no_grad()
def evaluate(net: nn.Module, x: Tensor, y: Tensor) -> float:
    was = net.training
    net.eval()
    losses = [loss_of(net(a), b) * len(a) for a, b in zip(x.split(500), y.split(500), strict=True)]
    net.train(was)
    return float(sum(losses)) / len(x)


def train(net: nn.Module, optimizer: torch.optim.Optimizer, data: Batches, decay: bool = False) -> None:
    """One step a batch, at a constant rate or with one that falls to nothing: the noise of the last steps goes away."""
    net.train()
    rates = [group["lr"] for group in optimizer.param_groups]
    for i, (x, y) in enumerate(data):
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * (1 - i / len(data)) if decay else rate
        optimizer.zero_grad()
        loss_of(net(x), y).backward()
        optimizer.step()


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
    out: Row = {"ungrown": {"now": evaluate(net, *test)}}
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
        out[method] = {"now": evaluate(grown, *test), "held": before - after, "predicted": predicted}
        train(grown, optimizer, further, decay=True)
        out[method]["after"] = evaluate(grown, *test)
    twin = copy.deepcopy(net)
    optimizer = torch.optim.Adam(twin.parameters(), subject.rate)
    optimizer.load_state_dict(copy.deepcopy(state))
    train(twin, optimizer, further, decay=True)
    out["ungrown"]["after"] = evaluate(twin, *test)
    return out


def paired(rows: list[Row], method: str, key: str) -> str:
    """Default minus the other in thousandths of a nat, with its standard error."""
    d = [1e3 * (r["default"][key] - r[method][key]) for r in rows if method in r]
    if len(d) < 2:
        return "·"
    error = statistics.stdev(d) / math.sqrt(len(d))
    mark = "**" if abs(statistics.mean(d)) > 2 * error else ""
    return f"{mark}{statistics.mean(d):+.1f} ± {error:.1f}{mark}"


def predictions(rows: dict[str, list[Row]]) -> str:
    """What the profile predicts for the gamma that was applied, what held-back batches and the test data say of it."""
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
        f"{len(triples)} growths, predicted and held back: {against(predicted, held)}; "
        f"predicted and test: {against(predicted, test)}; held back and test: {against(held, test)}."
    )


def table(rows: dict[str, list[Row]], methods: list[str]) -> str:
    others = [m for m in methods if m != "default"]
    head = " | ".join(["net", "seeds", "ungrown: now, after", *(f"{m}: now, after" for m in others)])
    lines = [f"| {head} |", "|" + "---|" * (len(others) + 3)]
    for name, of in rows.items():
        means = [statistics.mean(r["ungrown"][key] for r in of) for key in ("now", "after")]
        cells = [f"{paired(of, m, 'now')}, {paired(of, m, 'after')}" for m in others]
        lines.append(f"| {name} | {len(of)} | {means[0]:.3f}, {means[1]:.3f} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(SUBJECTS), default=list(SUBJECTS))
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--resume", type=Path, default=Path("out/one_step.jsonl"), help="seeds in it are not run again")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    arguments.resume.parent.mkdir(parents=True, exist_ok=True)
    text_ = arguments.resume.read_text() if arguments.resume.exists() else ""
    done = {(r["net"], r["seed"]): r["row"] for r in map(json.loads, text_.splitlines())}
    rows: dict[str, list[Row]] = {}
    for name in arguments.only:
        split = SUBJECTS[name].data()
        for seed in range(arguments.seeds):
            if (name, seed) not in done:
                row = one_seed(SUBJECTS[name], split, seed, arguments.methods)
                done[name, seed] = row
                with arguments.resume.open("a") as file:
                    file.write(json.dumps({"net": name, "seed": seed, "row": row}) + "\n")
                print(name, seed, json.dumps(row), flush=True)
            rows.setdefault(name, []).append(done[name, seed])
    print("\nDefault minus the other, 10^-3 nats of held-out loss; bold: more than two standard errors\n")
    print(table(rows, arguments.methods))
    print(predictions(rows))


if __name__ == "__main__":
    main()
