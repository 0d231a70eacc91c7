"""What the benchmarks share: their arguments, the file of finished runs, tables and paired differences."""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch


def command_line(
    text: str | None,
    *,
    seeds: int | None = None,
    threads: int | None = 1,
    only: Iterable[str] = (),
    default: Sequence[str] | None = None,
    resume: str | None = None,
) -> argparse.ArgumentParser:
    """Returns a parser with the arguments that benchmarks have in common.

    Args:
        text: the module's docstring, printed by `--help`.
        seeds: default of `--seeds` (with it `--first`); None for a benchmark without seeds.
        threads: default of `--threads`; None leaves the argument out, and the benchmark runs on one thread.
        only: choices of `--only`; left out if there are none.
        default: choices that run without `--only`; all of them if None.
        resume: name of the file in out/ that holds finished runs.
    """
    parser = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    if seeds is not None:
        parser.add_argument("--seeds", type=int, default=seeds, help=f"how many seeds (default: {seeds})")
        parser.add_argument("--first", type=int, default=0, help="the first seed (default: 0)")
    if threads is not None:
        parser.add_argument("--threads", type=int, default=threads, help=f"of PyTorch (default: {threads})")
    if choices := list(only):
        parts = list(default or choices)
        parser.add_argument("--only", nargs="+", choices=choices, default=parts, help="run a part of the benchmark")
    if resume is not None:
        file = Path("out") / resume
        parser.add_argument("--resume", type=Path, default=file, help=f"file of finished runs (default: {file})")
    return parser


def parse(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """Reads the arguments and sets PyTorch's number of threads."""
    arguments = parser.parse_args()
    threads = getattr(arguments, "threads", 1)
    torch.set_num_threads(threads if isinstance(threads, int) else 1)
    if hasattr(arguments, "seeds"):
        arguments.seeds = range(arguments.first, arguments.first + arguments.seeds)
    return arguments


class FinishedRuns:
    """Runs of a benchmark in a file of JSON lines, so that it can be stopped and continued.

    Args:
        file: made with its folder when the first run is added.
        fields: of a record that say which run it is.
    """

    def __init__(self, file: Path, *fields: str) -> None:
        self.file, self.fields = file, fields
        lines = file.read_text().splitlines() if file.exists() else []
        self.records = {self._key(record): record for record in map(json.loads, lines)}

    def find(self, **fields: Any) -> dict[str, Any] | None:
        """Returns the record of a run, or None if it has not finished."""
        return self.records.get(self._key(fields))

    def add(self, **record: Any) -> dict[str, Any]:
        """Appends a record to the file and returns it as the file has it."""
        line = json.dumps(record)
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with self.file.open("a") as file:
            file.write(line + "\n")
        self.records[self._key(record)] = json.loads(line)
        return self.records[self._key(record)]

    def _key(self, record: dict[str, Any]) -> tuple[str, ...]:
        return tuple(json.dumps(record[field], sort_keys=True) for field in self.fields)


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Returns a table for RESULTS.md."""
    lines = [f"| {' | '.join(cells)} |" for cells in (head, *rows)]
    return "\n".join([lines[0], "|" + "---|" * len(head), *lines[1:]])


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Returns the mean and its standard error, which is not a number for a single value."""
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return statistics.mean(values), error


def paired(values: Sequence[float], others: Sequence[float]) -> tuple[float, float]:
    """Returns the mean of the differences `values - others`, seed by seed, and its standard error."""
    return mean_and_error([a - b for a, b in zip(values, others, strict=True)])


def difference(values: Sequence[float], others: Sequence[float], digits: int) -> str:
    """Returns the mean of `values - others`, its standard error, and their ratio z."""
    mean, error = paired(values, others)
    return f"{mean:+.{digits}f} ± {error:.{digits}f} (z {mean / error:+.1f})"
