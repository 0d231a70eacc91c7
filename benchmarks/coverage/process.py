"""Networks one after the other, each in a process of its own with a limit of time and of memory."""

from __future__ import annotations

import argparse
import multiprocessing
import os
import resource
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from benchmarks._command_line import FinishedRuns, command_line

Findings = dict[str, Any]
Steps = Callable[[], Iterator[Findings]]
#: findings under this key are the seconds that the rest may take; when they are over this is no failure
SECONDS_LEFT = "seconds_left"


def options_of(text: str | None, resume: str, time_limit: float, memory: float) -> argparse.ArgumentParser:
    """The arguments of a benchmark over many networks, with its defaults."""
    parser = command_line(text, threads=None, resume=resume)
    parser.add_argument("--match", default="", help="only networks with this in their name")
    parser.add_argument("--time-limit", type=float, default=time_limit,
                        help=f"seconds for one network (default: {time_limit})")  # fmt: skip
    parser.add_argument("--memory", type=float, default=memory, help=f"GB for one network (default: {memory})")
    parser.add_argument("--onnx", action="store_true", help="also export the grown graph")
    parser.add_argument("--tables", action="store_true", help="only print the tables of the file")
    return parser


def records_of(
    todo: Iterable[tuple[str, str, Steps]], options: argparse.Namespace, summary: Callable[[Mapping[str, Any]], str]
) -> list[dict[str, Any]]:
    """The records in the file, and those of what is to do and not in it: family, name and steps."""
    runs = FinishedRuns(options.resume, "family", "name")
    for family, name, steps in () if options.tables else todo:
        if runs.find(family=family, name=name) is None:
            record = runs.add(**measured({"family": family, "name": name}, steps, vars(options)))
            print(f"{family}/{name}: {summary(record)}", flush=True)
    return list(runs.records.values())


def described(error: BaseException) -> str:
    """The error with the line that raised it."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {error}"[:500] + f" ({Path(frame.filename).name}:{frame.lineno})"


def measured(record: Mapping[str, Any], steps: Steps, options: Mapping[str, Any]) -> dict[str, Any]:
    """The record with all that the steps yield before they end, fail or run into a limit.

    Args:
        record: what is known before: names.
        steps: called in the process, which is a fork of this one.
        options: `time_limit` in seconds, `memory` in GB.
    """
    found = dict(record)
    context = multiprocessing.get_context("fork")  # what is imported here is imported once
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_work, args=(theirs, steps, options["memory"]), daemon=True)
    start = time.monotonic()
    process.start()
    theirs.close()
    deadline, optional = start + options["time_limit"], False
    try:
        while True:
            if not ours.poll(max(0.0, deadline - time.monotonic())):
                if not optional:
                    found["crash"] = f"no answer after {options['time_limit']:.0f} s"
                break
            findings = ours.recv()
            if findings is None:
                break
            if SECONDS_LEFT in findings:
                deadline, optional = min(deadline, time.monotonic() + findings.pop(SECONDS_LEFT)), True
            found.update(findings)
    except EOFError:
        process.join()
        found["crash"] = f"the process ended with code {process.exitcode}"
    process.kill()
    process.join()
    found["wall"] = time.monotonic() - start
    return found


def _work(pipe: Connection, steps: Steps, memory: float) -> None:
    """In its own process: sends findings, then None."""
    torch.set_num_threads(1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # PyTorch logs every operator that fails on fake tensors
    bytes_ = int(memory * 2**30)
    resource.setrlimit(resource.RLIMIT_DATA, (bytes_, bytes_))
    try:
        for findings in steps():
            pipe.send(findings)
    except BaseException as error:  # a line in the table, whatever it is
        pipe.send({"crash": described(error)})
    pipe.send(None)
