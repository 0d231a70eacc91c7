"""Over networks of packages outside torchvision, timm and transformers: what fxgrow reads, widens, grows and saves.

    python -m benchmarks.wild --install .wild        a venv with the packages (Python 3.11 or newer; some GB)
    .wild/bin/python -m benchmarks.wild [--package vit-pytorch monai] [--match TEXT] [--limit N] [--onnx]
                                        [--resume FILE] [--time-limit S] [--memory GB] [--tables] [--list]

The checks are those of `benchmarks.coverage`; after them each network grows on batches of which the last is smaller,
and what has grown is saved and loaded into a fresh one. One process per network; a package that is not installed is
left out.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import os
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks._command_line import parse
from benchmarks.coverage.process import options_of, records_of
from benchmarks.coverage.tables import COLUMNS, Record, share, tables
from benchmarks.wild.entries import Entry, entries
from benchmarks.wild.install import install
from benchmarks.wild.measure import steps
from fxgrow.integrations._torchvision import import_torchvision

#: checks that a network passes; the user's own class may be in the way of `into="module"`, which says why
MUST = ("faithful", "widened", "other_size", "train_step", "grown", "saved", "onnx")


def failure(record: Record) -> str | None:
    """The first thing that is wrong with a network, or None."""
    if record.get("captured") is False:
        return f"capture: {record['capture_error']}"
    for key in MUST:
        if record.get(key) is False:
            shown = record.get("error" if key == "widened" else f"{key}_error") or record.get("differences", "")
            return f"{key}: {shown}"
    return f"crash: {record['crash']}" if "crash" in record else None


def summary(record: Record) -> str:
    wrong = failure(record)
    if wrong is not None:
        return " ".join(wrong.split())[:200]
    opened = record["open"] / max(1, record["parameters"])
    return f"{record['nodes']} nodes, {record['free']} free, {opened:.0%} of parameters, {record['wall']:.0f} s"


def passing(of: list[Record]) -> str:
    return f"{sum(failure(r) is None for r in of)}/{len(of)}"


def wild_columns() -> dict[str, Any]:
    last = {
        "grown": share("grown", missing=True),
        "saved and loaded": share("saved", missing=True),
        "ONNX": share("onnx"),
    }
    return {"all checks but into module": passing, **COLUMNS, **last}


def chosen_entries(options: argparse.Namespace) -> list[Entry]:
    packages: dict[str, list[Entry]] = {}
    for entry in entries():
        if options.match in entry.name and (options.package is None or entry.package in options.package):
            packages.setdefault(entry.package, []).append(entry)
    return [entry for members in packages.values() for entry in members[: options.limit]]


def main() -> None:
    parser = options_of(__doc__, "wild.jsonl", time_limit=300, memory=8)
    parser.add_argument("--package", nargs="+", help="only these")
    parser.add_argument("--limit", type=int, help="at most so many networks of a package")
    parser.add_argument("--install", type=Path, metavar="FOLDER", help="make a venv there and run nothing")
    parser.add_argument("--list", action="store_true", help="only print the names of the networks")
    options = parse(parser)
    if options.install is not None:
        install(options.install)
        return
    os.environ |= {"HF_HUB_OFFLINE": "1", "DDE_BACKEND": "pytorch", "OMP_NUM_THREADS": "1", "MPLBACKEND": "Agg"}
    if importlib.util.find_spec("torchvision") is not None:
        with contextlib.suppress(Exception):
            import_torchvision()
    chosen = chosen_entries(options)
    if options.list:
        print("\n".join(f"{e.package}/{e.name}{'' if e.installed else ' (not installed)'}" for e in chosen))
        return
    if missing := sorted({e.package for e in chosen if not e.installed}):
        print(f"not installed: {', '.join(missing)}")
    todo = ((e.package, e.name, partial(steps, e, vars(options))) for e in chosen if e.installed)
    print(tables(records_of(todo, options, summary), wild_columns()))


if __name__ == "__main__":
    main()
