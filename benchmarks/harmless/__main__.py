"""Does growth ever harm a run? Networks of every kind are trained, grown by the default and trained on.

    python -m benchmarks.harmless [--only small gan vae hf torchvision timm mobilenet] [--limit N] [--match TEXT]
                                  [--resume FILE] [--time-limit S] [--memory GB] [--tables]

Two arms per setting: both train on with the same batches, one of them grown, its optimiser passed to `fxgrow.grow`. An
arm is harmed where its worst batch after growth is above twice the other's (or 0.2, if that is more), where a layer's
largest parameter is above ten times what it was before (or is without growth; or 0.01, if that is more), or where
anything is not finite.

Networks of torchvision and timm, one of every family, meet two settings each, so that every value of optimiser (SGD
with momentum, AdamW), stage (cold: 3 steps; warm: 24) and number of samples (32 to 512) is met about equally often;
small ones all of them, up to 2,000 samples. Learning rates are lowered until the arm that does not grow is stable.
`mobilenet`: mobilenet_v3_small with SGD .05, over five seeds, two epochs before growth and two after.

Images are handwritten digits in colours; `mobilenet` has three classes of CIFAR-10 ($FXGROW_DATA; without it, none).
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from functools import partial
from typing import Any

from benchmarks._command_line import command_line, parse
from benchmarks.coverage.process import Steps, records_of
from benchmarks.harmless.loop import Setting, compare
from benchmarks.harmless.tables import summary, tables
from examples.data import VARIABLE
from fxgrow.integrations._torchvision import import_torchvision

PARTS = ("small", "gan", "vae", "hf", "torchvision", "timm", "mobilenet")
#: for networks that meet two settings each
SAMPLES = ((64, 256), (256, 32), (32, 512), (256, 64))


def settings(family: str, place: int) -> Iterator[Setting]:
    """Of the network at a place in the list of its family."""
    if family in ("torchvision", "timm"):
        stages = ("warm", "cold") if place % 2 else ("cold", "warm")
        for optimizer, stage, samples in zip(("sgd", "adamw"), stages, SAMPLES[place // 2 % len(SAMPLES)], strict=True):
            yield Setting(optimizer, stage, samples)
    else:
        for optimizer, stage, samples in itertools.product(("sgd", "adamw"), ("cold", "warm"), (32, 256, 2000)):
            yield Setting(optimizer, stage, samples, after=32)


def arms(family: str) -> Iterator[tuple[str, Steps]]:
    """Names and what runs them."""
    if family == "mobilenet":
        from benchmarks.harmless import mobilenet

        for setting in mobilenet.settings(range(5)):
            yield f"mobilenet_v3_small {setting}", partial(compare, mobilenet.mobilenet, setting)
        return
    from benchmarks.harmless.nets import NETS, pictures

    pictures()  # once, before processes are forked
    for place, (name, make) in enumerate(NETS[family].items()):
        for setting in settings(family, place):
            yield f"{name} {setting}", partial(compare, make, setting)


def main() -> None:
    parser = command_line(__doc__, threads=None, only=PARTS, resume="harmless.jsonl")
    parser.add_argument("--limit", type=int, help="at most so many arms of a part")
    parser.add_argument("--match", default="", help="only arms with this in their name")
    parser.add_argument("--time-limit", type=float, default=180, help="seconds for one arm (default: 180)")
    parser.add_argument("--memory", type=float, default=8, help="GB for one arm (default: 8)")
    parser.add_argument("--tables", action="store_true", help="only print the tables of the file")
    options = parse(parser)
    if "mobilenet" in options.only and not os.environ.get(VARIABLE):
        print(f"mobilenet is left out: {VARIABLE} is not set")
        options.only = [part for part in options.only if part != "mobilenet"]
    import_torchvision()
    print(tables(records_of(_todo(options), options, summary)))


def _todo(options: Any) -> Iterator[tuple[str, str, Steps]]:
    for family in options.only:
        chosen = ((name, steps) for name, steps in arms(family) if options.match in name)
        for name, steps in itertools.islice(chosen, options.limit):
            yield family, name, steps


if __name__ == "__main__":
    main()
