"""The demo over many seeds: grown twice against never grown, paired by first weights and order of batches.

    python -m benchmarks.demo_seeds [--seeds 10] [--methods default random-refit random tiny]

Every network trains for the same number of epochs on the same batches with the same learning rates. A difference is
the mean over seeds of (grown - never grown) with its standard error; z is their ratio.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from benchmarks._command_line import command_line, difference, markdown, parse
from examples.demo import BUDGET, EPOCHS, STAGES, Outcome, run


def row(method: str, outcomes: Sequence[Outcome], ungrown: Sequence[Outcome]) -> list[str]:
    accuracy, loss = [o.accuracy[-1] for o in outcomes], [o.loss[-1] for o in outcomes]
    cells = [
        method,
        f"{statistics.mean(o.parameters[-1] for o in outcomes):,.0f}",
        f"{statistics.mean(accuracy):.2f} %",
        f"{statistics.mean(loss):.4f}",
    ]
    if outcomes is ungrown:
        cells += ["", "", ""]
    else:
        cells += [
            difference(accuracy, [o.accuracy[-1] for o in ungrown], 2),
            difference(loss, [o.loss[-1] for o in ungrown], 4),
            f"{statistics.mean(o.seconds for o in outcomes):.1f}",
        ]
    return cells


def main() -> None:
    parser = command_line(__doc__, seeds=10, threads=None)
    parser.add_argument("--methods", nargs="+", default=["default", "random-refit", "random", "tiny"])
    arguments = parse(parser)
    found: dict[str | None, list[Outcome]] = {m: [] for m in [None, *arguments.methods]}
    for seed in arguments.seeds:
        for method, outcomes in found.items():
            outcomes.append(run(seed, method))
        said = ", ".join(f"{m or 'never grown'} {o[-1].accuracy[-1]:.2f} %" for m, o in found.items())
        print(f"seed {seed}: {said}", flush=True)
    print(f"\n{len(arguments.seeds)} seeds, {STAGES * EPOCHS} epochs, two growths of {BUDGET}, 450 test images\n")
    differences = ["accuracy, difference", "loss, difference"]
    head = ["method", "parameters", "test accuracy", "test loss", *differences, "s growing"]
    print(markdown(head, [row(method or "never grown", outcomes, found[None]) for method, outcomes in found.items()]))
    first, *others = arguments.methods
    for other in others:
        accuracy = difference([o.accuracy[-1] for o in found[first]], [o.accuracy[-1] for o in found[other]], 2)
        loss = difference([o.loss[-1] for o in found[first]], [o.loss[-1] for o in found[other]], 4)
        print(f"\n{first} minus {other}: accuracy {accuracy}, loss {loss}")


if __name__ == "__main__":
    main()
