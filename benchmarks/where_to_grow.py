"""Where to grow: whether a profile ranks widths by what growing them brings, on real data.

*Planted cut*: one layer of an otherwise balanced net is cut to an eighth before training; its width should rank first.

*Rank correlation*: nets of random widths train briefly; each width in turn grows by 4 units with the default method,
and grown and ungrown nets train on with Adam on the same batches. The gain is the decrease of the held-out loss
relative to the ungrown net, at once and after 50 and 400 steps, averaged over two data orders. The figures are means
over nets of Spearman's rank correlation between a score and the gain of the net's widths, with standard errors;
chance is 0; a second table has gains per parameter added. *agreement* is the correlation between the two data orders,
an indication of how well a perfect score could do.

*Allocation*: a budget spent by the library's rule against one ratio for all widths at as many parameters, held-out loss
after 400 more steps, paired; on balanced nets and on those with a planted cut.

Nets: an MLP (Fashion-MNIST at 14x14), convolutions with BatchNorm (CIFAR-10 at 16x16), the perceptrons of a GPT
(Shakespeare); four widths each. Without $FXGROW_DATA the first two learn handwritten digits, and there is no GPT.

    FXGROW_DATA=... python -m benchmarks.where_to_grow [--only mlp conv gpt] [--parts cut rank allocation] [--seeds 10]
"""

from __future__ import annotations

import math
import os
import random
import statistics
from collections.abc import Callable, Sequence
from typing import Any

from scipy.stats import rankdata

import fxgrow
from benchmarks._command_line import FinishedRuns, command_line, markdown, mean_and_error, paired, parse
from benchmarks._small_nets import loss_of
from benchmarks._where_to_grow_nets import MARKS, SUBJECTS, Subject, Trained
from examples.data import VARIABLE, Split
from fxgrow.pipeline.cost import Parameters

#: units by which each width grows alone
UNITS = 4
#: a planted cut leaves this part of a layer
CUT = 8
UNGROWN, OWN, UNIFORM, ADDED = "ungrown", "own", "uniform", "most parameters added"
#: one line of the file of results: kind, net and seed say which, the rest is what was found
Row = dict[str, Any]


# -- runs


def random_sizes(name: str, subject: Subject, seed: int) -> list[int]:
    draw = random.Random(f"{name}{seed}")
    low, high = math.log(subject.between[0]), math.log(subject.between[1] + 0.5)
    return [round(math.exp(draw.uniform(low, high))) for _ in subject.widths]


def planted_sizes(subject: Subject, seed: int) -> list[int]:
    sizes = [subject.size] * len(subject.widths)
    sizes[seed % len(sizes)] //= CUT
    return sizes


def rank(name: str, subject: Subject, split: Split, seed: int) -> Row:
    """Scores of each width, and held-out losses of the ungrown net and of each width grown alone.

    Losses are lists per data order, at `MARKS`.
    """
    trained = Trained(subject, split, random_sizes(name, subject, seed), seed)
    found = scores(trained)
    orders = [trained.batches(MARKS[-1]) for _ in range(2)]
    losses = {UNGROWN: trained.losses(*trained.grown()[:2], orders)}
    for width in subject.widths:
        net, optimizer, _ = trained.grown(fxgrow.plan(trained.profile, neurons={width: UNITS}))
        losses[width] = trained.losses(net, optimizer, orders)
    tried = fxgrow.try_widths(trained.profile, trained.profiled, loss_of, units=UNITS)
    found["tried"] = {w: t.decrease for w, t in tried.items()}
    found["tried, per parameter"] = {w: t.per_parameter for w, t in tried.items()}
    return {"losses": losses, "scores": found}


def scores(trained: Trained) -> dict[str, dict[str, float]]:
    """Per score, its value for each width."""
    profile, refit = trained.profile, trained.profile.refit
    assert refit is not None
    count = Parameters(trained.profile.analysed)
    added = {w: count.total({w: UNITS}) - count.total({}) for w in profile}
    marginal = {w: refit.marginal(w, UNITS) for w in profile}
    return {
        "worth": {w: b.worth for w, b in profile.items()},
        "worth for the size (tilt of plan)": {w: b.worth / b.width.size for w, b in profile.items()},
        "worth per parameter": {w: b.worth / added[w] for w, b in profile.items()},
        "units and dW predicted": {w: refit.joint(w, UNITS) for w in profile},
        "marginal": marginal,
        "marginal per parameter": {w: m / added[w] for w, m in marginal.items()},
        "Psi": {w: b.bottleneck for w, b in profile.items()},
        "smallest width": {w: -b.width.size for w, b in profile.items()},
        "gradient norm": trained.gradient_norms(),
        ADDED: added,
    }


def cut(name: str, subject: Subject, split: Split, seed: int) -> Row:
    """Which width was cut, and the scores."""
    sizes = planted_sizes(subject, seed)
    trained = Trained(subject, split, sizes, seed)
    return {"cut": subject.widths[sizes.index(min(sizes))], "scores": scores(trained)}


def allocation_cut(name: str, subject: Subject, split: Split, seed: int) -> Row:
    """What two allocations of one budget bring where one layer was cut."""
    return allocations(Trained(subject, split, planted_sizes(subject, seed), seed))


def allocation_balanced(name: str, subject: Subject, split: Split, seed: int) -> Row:
    """What two allocations of one budget bring to a net of equal sizes."""
    return allocations(Trained(subject, split, [subject.size] * len(subject.widths), seed))


def allocations(trained: Trained) -> Row:
    order = [trained.batches(MARKS[-1])]
    own = fxgrow.plan(trained.profile, trained.subject.budget)
    even = fxgrow.plan(trained.profile, neurons=uniform(trained, own.parameters[1]))
    out: Row = {}
    for kind, plan in ((OWN, own), (UNIFORM, even)):
        net, optimizer, _ = trained.grown(plan)
        out[kind] = {"losses": trained.losses(net, optimizer, order)[0], "units": plan.units}
        out[kind]["parameters"] = sum(p.numel() for p in net.parameters())
    return out


def uniform(trained: Trained, parameters: int) -> dict[str, int]:
    """One ratio for all widths, the one whose parameters come nearest."""
    count = Parameters(trained.profile.analysed)
    most = {w: (b.width.size, trained.profile.proposed[w]) for w, b in trained.profile.items()}

    def at(ratio: float) -> dict[str, int]:
        return {w: k for w, (size, have) in most.items() if (k := min(round(ratio * size), have))}

    return at(min((i / 500 for i in range(1, 251)), key=lambda r: abs(count.total(at(r)) - parameters)))


# -- tables


def spearman(a: Sequence[float], b: Sequence[float]) -> float:
    """Rank correlation, 0 where one of the two is the same everywhere."""
    x, y = (rankdata(v) - (len(v) + 1) / 2 for v in (a, b))
    scale = float((x @ x) * (y @ y)) ** 0.5
    return float(x @ y) / scale if scale else 0.0


def mean_text(values: Sequence[float]) -> str:
    mean, error = mean_and_error(values)
    return f"{mean:+.2f} ± {error:.2f}"


def correlations(row: Row, per_parameter: bool = False) -> dict[str, list[float]]:
    """Per score, and for the two data orders, the rank correlation with the gain at each of `MARKS` within one net."""
    losses = row["losses"]
    widths = [w for w in losses if w != UNGROWN]
    cost = row["scores"][ADDED] if per_parameter else dict.fromkeys(widths, 1)
    # [width][order][mark]
    gain = [
        [[(u - g) / cost[w] for u, g in zip(*of, strict=True)] for of in zip(losses[UNGROWN], losses[w], strict=True)]
        for w in widths
    ]
    out = {}
    for name, values in row["scores"].items():
        own = [values[w] for w in widths]
        out[name] = [spearman(own, [sum(o[m] for o in g) for g in gain]) for m in range(len(MARKS))]
    out["agreement"] = [spearman(*zip(*([o[m] for o in g] for g in gain), strict=True)) for m in range(len(MARKS))]
    return out


def rank_table(nets: dict[str, list[dict[str, list[float]]]]) -> str:
    """Mean rank correlations per kind of net and over all of them."""
    kinds = [*nets, "all"]
    nets = nets | {"all": [c for of in nets.values() for c in of]}
    head = [f"{k} ({len(nets[k])} nets): {', '.join(map(str, MARKS))}" for k in kinds]
    lines = []
    for name in nets["all"][0]:
        cells = [", ".join(mean_text([c[name][m] for c in nets[k]]) for m in range(len(MARKS))) for k in kinds]
        lines.append([name, *cells])
    return markdown(["score", *head], lines)


def cut_table(nets: dict[str, list[Row]]) -> str:
    """How often the width that was cut ranks first."""
    lines = []
    for name in next(iter(nets.values()))[0]["scores"]:
        cells = []
        for rows in nets.values():
            first = [max(r["scores"][name], key=r["scores"][name].__getitem__) == r["cut"] for r in rows]
            cells.append(f"{sum(first)} of {len(first)}")
        lines.append([name, *cells])
    return markdown(["score", *nets], lines)


def allocation_table(nets: dict[str, list[Row]]) -> str:
    """The rule's allocation minus one ratio for all, in thousandths of a nat."""
    marks = ", ".join(map(str, MARKS))
    lines = []
    for name, rows in nets.items():
        size = ", ".join(f"{statistics.mean(r[k]['parameters'] for r in rows):,.0f}" for k in (OWN, UNIFORM))
        cells = []
        for m in range(len(MARKS)):
            mean, error = paired(*([1e3 * r[kind]["losses"][m] for r in rows] for kind in (OWN, UNIFORM)))
            cells.append(f"{mean:+.1f} ± {error:.1f}")
        after = statistics.mean(r[UNIFORM]["losses"][-1] for r in rows)
        lines.append([f"{name} ({len(rows)})", size, f"{after:.3f}", ", ".join(cells)])
    return markdown(["net", "parameters: own, uniform", "loss after, uniform", f"own minus uniform: {marks}"], lines)


# -- all of it

RUNS: dict[str, Callable[[str, Subject, Split, int], Row]] = {
    "cut": cut,
    "rank": rank,
    "balanced": allocation_balanced,
    "unbalanced": allocation_cut,
}
PARTS = {"cut": ("cut",), "rank": ("rank",), "allocation": ("balanced", "unbalanced")}


def main() -> None:
    known = [name for name in SUBJECTS if name != "gpt" or os.environ.get(VARIABLE)]
    parser = command_line(__doc__, seeds=10, only=SUBJECTS, default=known, resume="where_to_grow.jsonl")
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    arguments = parse(parser)
    runs = FinishedRuns(arguments.resume, "kind", "net", "seed")
    kinds = [kind for part in arguments.parts for kind in PARTS[part]]
    every: dict[str, dict[str, list[Row]]] = {kind: {} for kind in kinds}
    for name in arguments.only:
        split = SUBJECTS[name].data()
        for kind in kinds:
            for seed in arguments.seeds:
                run = runs.find(kind=kind, net=name, seed=seed)
                if run is None:
                    run = runs.add(kind=kind, net=name, seed=seed, row=RUNS[kind](name, SUBJECTS[name], split, seed))
                every[kind].setdefault(name, []).append(run["row"])
    if "cut" in arguments.parts:
        print("\nThe width that was cut to an eighth ranks first\n")
        print(cut_table(every["cut"]))
    if "rank" in arguments.parts:
        for per in (False, True):
            what = f"gain{' per parameter' * per} of growing one width by {UNITS} units"
            print(f"\nRank correlation within a net with the {what}\n")
            print(rank_table({name: [correlations(r, per) for r in rows] for name, rows in every["rank"].items()}))
    if "allocation" in arguments.parts:
        print("\nHeld-out loss, 10^-3 nats, negative: the library's allocation is better than one ratio for all\n")
        titles = {"balanced": "balanced", "unbalanced": "one layer cut"}
        print(allocation_table({f"{n}, {t}": rows for k, t in titles.items() for n, rows in every[k].items()}))


if __name__ == "__main__":
    main()
