"""Ideas for new units at attention values, gated layers and the stream, by the loss at once and after more steps.

The setting of `benchmarks.widths`: a small decoder on Shakespeare, one kind of width grown by a quarter in both layers,
old weights stay, every method from the same checkpoint with the same line search on held-back batches. An idea that
ends in `newton` gets its outgoing weights from conjugate gradients on the loss's own curvature; `random-newton` shows
what that is worth alone. `best` is the loss at the best gamma, `now` at the part of it that is applied: a quarter, or
all of it (`whole`).

    FXGROW_DATA=... python -m benchmarks.ideas [--seeds 6] [--steps 300] [--further 200] [--only values gated stream]
"""

from __future__ import annotations

import argparse
import copy
import math
import statistics
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

import fxgrow
from benchmarks._ideas import Outcome, Ray, Trial, along, gate_features, per_block, together, value_features
from benchmarks._ideas_stream import exact_svd, isometric, stream_svd
from benchmarks.widths import CONTEXT, KINDS, RATE, SHARE, Batches, draw, evaluate, loss_of, train
from examples.data import shakespeare
from fxgrow.rewriting.rewrite import rewrite
from fxgrow.transfer.optimizer_state import repoint
from models import Decoder

Idea = Callable[[Trial, Batches], Outcome]
#: per method: losses `now`, `best` and `after`
Row = dict[str, dict[str, float]]


def library(method: str, trial: Trial, test: Batches, update: bool = False) -> Outcome:
    """What `fxgrow.grow` does."""
    options = {"neurons": trial.units, "method": method, "seed": trial.seed, "progress": False}
    grown = fxgrow.grow(trial.net, trial.data.loader, loss_fn=loss_of, update_existing=update, **options)
    growth = grown.meta["fxgrow"]
    best = growth.plan.scaled(growth.search.best) if growth.search is not None else growth.plan
    _, index = rewrite(trial.gm, trial.units)
    return grown, index, growth.plan.scale, evaluate(fxgrow.apply(trial.gm, best), test)


def refitted(alpha: Callable[[Trial], dict[str, dict[str, Tensor]]], trial: Trial, test: Batches) -> Outcome:
    """The library's refit for these incoming weights."""
    line, gamma = trial.refitted(alpha(trial))
    best = evaluate(line.move(4 * gamma), test)
    return line.move(gamma), line.index, gamma, best


def by_newton(
    alpha: Callable[[Trial], dict[str, dict[str, Tensor]]] | None, trial: Trial, test: Batches, share: float = 0.25
) -> Outcome:
    """These incoming weights (None: random), outgoing ones by `newton`."""
    ray = Ray(trial)
    for name, producers in (alpha(trial) if alpha else {}).items():
        for weight, rows in producers.items():
            ray.put((weight, name, 0), rows)
    return along(ray, trial, test, share)


def values(trial: Trial, jointly: bool) -> dict[str, dict[str, Tensor]]:
    """b(t) = sum_s A(t, s) x(s) per head; heads for themselves or together. Rows unit by unit, each over all heads."""
    out = {}
    for name, f in value_features(trial).items():
        k = trial.units[name] // len(f.n)
        rows = together(f, k)[0] if jointly else per_block(f, k)
        out[name] = {f"{name}.weight": rows.transpose(0, 1).flatten(0, 1)}
    return out


def gated(trial: Trial, old: bool) -> dict[str, dict[str, Tensor]]:
    """b = silu(g^T x) x; the best of twice as many gates, old or random ones, all together."""
    gates = {}
    for name, k in trial.units.items():
        weight = trial.net.get_parameter(f"{name}.weight").detach()
        drawn = torch.randn(2 * k, weight.shape[1], generator=trial.generator) * (2 / weight.shape[1]) ** 0.5
        gates[name] = weight[torch.randperm(len(weight), generator=trial.generator)[: 2 * k]] if old else drawn
    out = {}
    for name, f in gate_features(trial, gates).items():
        rows, kept = together(f, 1, keep=trial.units[name])
        out[name] = {f"{name}.weight": gates[name][kept], f"{name.removesuffix('gate')}up.weight": rows[:, 0]}
    return out


def silent_up(trial: Trial, test: Batches) -> Outcome:
    """Gates random, rows of the other factor zero, outgoing weights where the loss slopes most against them (GradMax).

    Each unit's outgoing weights are the first right singular vector of its N, of half the mean norm of the old ones
    (Evci et al. 2022): nothing changes at once, and the first step of training has a slope to follow.
    """
    ray = Ray(trial)
    gates = {name: ray.get((f"{name}.weight", name, 0)) for name in trial.units}
    for name, f in gate_features(trial, gates).items():
        layer = name.removesuffix("gate")
        down = trial.net.get_parameter(f"{layer}down.weight").detach()
        omega = torch.stack([torch.linalg.svd(n, full_matrices=False).Vh[0] for n in f.n], 1)
        ray.put((f"{layer}up.weight", name, 0), 0.0)
        ray.put((f"{layer}down.weight", name, 1), omega * down.norm(dim=0).mean() / 2)
    return ray.graph, ray.index, math.nan, evaluate(ray.graph, test)


LIBRARY: dict[str, Idea] = {m: partial(library, m) for m in ("random", "random-refit", "default")}
IDEAS: dict[str, dict[str, Idea]] = {
    "values": LIBRARY
    | {
        "each head, refit": partial(refitted, partial(values, jointly=False)),
        "heads together, refit": partial(refitted, partial(values, jointly=True)),
        "random, newton": partial(by_newton, None),
        "heads together, newton": partial(by_newton, partial(values, jointly=True)),
        "heads together, newton, whole": partial(by_newton, partial(values, jointly=True), share=1.0),
    },
    "gated": LIBRARY
    | {m: partial(library, m) for m in ("random-newton", "newton")}
    | {
        "silent up (GradMax)": silent_up,
        "old gates together, refit": partial(refitted, partial(gated, old=True)),
        "random gates together, newton": partial(by_newton, partial(gated, old=False)),
    },
    # the library's three methods all leave a stream's writers at zero and its readers random: one row for them
    "stream": {
        "random": LIBRARY["random"],
        "writers zero, readers by SVD": exact_svd,
        "old directions split": isometric,
        "random writers, newton": partial(stream_svd, directions=False),
        "writers by SVD, newton": partial(stream_svd, directions=True),
    },
}
#: the library's methods where the weights that exist move too (`--update`)
UPDATING: dict[str, Idea] = {
    m: partial(library, m, update=True) for m in ("random", "random-refit", "default", "random-newton", "newton")
}
#: random units with zero outgoing weights, and random ones with fitted ones
REFERENCES = {
    "values": ("random", "random-refit"),
    "gated": ("random", "random-refit"),
    "stream": ("random", "random writers, newton"),
}


def one_seed(kind: str, seed: int, arguments: argparse.Namespace) -> Row:
    train_text, test_text, characters = shakespeare()
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    net = Decoder(len(characters), CONTEXT, fixed_heads=kind == "values")
    optimizer = torch.optim.Adam(net.parameters(), RATE)
    train(net, optimizer, draw(train_text, arguments.steps, generator))
    profiled, continued = draw(train_text, 32, generator), draw(train_text, arguments.further, generator)
    test = draw(test_text, 32, torch.Generator().manual_seed(99))
    free = [w for w in fxgrow.widths(fxgrow.capture(net, (test[0][0],))) if w.name.endswith(KINDS[kind])]
    units = {w.name: max(1, round(SHARE * w.size / w.step)) * w.step for w in free}
    out: Row = {"ungrown": {"now": evaluate(net, test)}}
    for name, idea in (UPDATING if arguments.update else IDEAS[kind]).items():
        if arguments.ideas and name not in arguments.ideas:
            continue
        torch.manual_seed(seed)
        trial = Trial(copy.deepcopy(net), profiled, units, seed)
        own = torch.optim.Adam(trial.net.parameters())
        own.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        for group in own.param_groups:
            group["lr"] = arguments.rate
        grown, index, gamma, best = idea(trial, test)
        repoint(own, trial.net, grown, index)
        out[name] = {"now": evaluate(grown, test), "best": best, "gamma": gamma}
        train(grown, own, continued)
        out[name]["after"] = evaluate(grown, test)
    return out


def paired(rows: list[Row], name: str, other: str, key: str) -> str:
    """Mean difference of an idea to another in thousandths of a nat, and its standard error."""
    d = [1e3 * (r[name][key] - r[other][key]) for r in rows]
    error = statistics.stdev(d) / math.sqrt(len(d)) if len(d) > 1 else math.nan
    return f"{statistics.mean(d):+.2f} ± {error:.2f}"


def table(rows: list[Row], zero: str, fitted: str) -> str:
    """Every idea against both kinds of random units."""
    pairs = [("best", fitted), *((key, other) for key in ("now", "after") for other in (zero, fitted))]
    lines = ["| idea | " + " | ".join(f"{key}, {other}" for key, other in pairs) + " |", "|" + "---|" * 6]
    for name in list(rows[0])[1:]:
        cells = ["" if name == other else paired(rows, name, other, key) for key, other in pairs]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=6)
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--further", type=int, default=200)
    parser.add_argument("--rate", type=float, default=RATE, help="learning rate of the further steps")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--update", action="store_true", help="the library's methods, which move old weights as well")
    parser.add_argument("--only", nargs="+", choices=list(IDEAS), default=list(IDEAS))
    parser.add_argument("--ideas", nargs="+", help="only these ideas (random and random-refit among them)")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    for kind in arguments.only:
        rows = []
        for seed in range(arguments.first, arguments.first + arguments.seeds):
            row = one_seed(kind, seed, arguments)
            rows.append(row)
            parts = [f"{m}: " + " ".join(f"{k} {v:.4f}" for k, v in r.items()) for m, r in row.items()]
            print(f"{kind}, seed {seed}\n  " + "\n  ".join(parts), flush=True)
        print(f"\n{kind}: idea minus the other, 10^-3 nats, {len(rows)} paired seeds (negative: the idea is better)\n")
        print(table(rows, *REFERENCES["values" if arguments.update else kind]), flush=True)


if __name__ == "__main__":
    main()
