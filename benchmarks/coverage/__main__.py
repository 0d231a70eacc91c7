"""Over every network of torchvision, timm and Hugging Face: what fxgrow reads, what can grow, whether it stays exact.

    python -m benchmarks.coverage [--family torchvision timm hf] [--limit N] [--resume FILE] [--time-limit S]
                                  [--match TEXT] [--peer] [--onnx] [--memory GB]

One process per network, with a time limit; what each stage found is appended to a file of JSON lines at once, so that a
run can be stopped and resumed with the same file. `--tables` prints the tables of a file and runs nothing. Needs timm
and transformers; `--peer` needs torch-pruning.
"""

from __future__ import annotations

import multiprocessing
import os
import resource
import time
import traceback
from collections.abc import Mapping
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from benchmarks._command_line import FinishedRuns, command_line, parse
from benchmarks.coverage.subjects import FAMILIES, build, names
from benchmarks.coverage.tables import tables
from fxgrow.integrations._torchvision import import_torchvision

#: seconds for the peer, which on some networks never ends
PEER_LIMIT = 90.0


def work(pipe: Connection, family: str, name: str, options: Mapping[str, Any]) -> None:
    """In its own process: sends findings, then None."""
    torch.set_num_threads(1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # PyTorch logs every operator that fails on fake tensors
    bytes_ = int(options["memory"] * 2**30)
    resource.setrlimit(resource.RLIMIT_DATA, (bytes_, bytes_))
    try:
        from benchmarks.coverage.measure import measure

        pipe.send({"stage": "build"})
        for findings in measure(build(family, name), options):
            pipe.send(findings)
        if options["peer"] and family in ("torchvision", "timm"):
            from benchmarks.coverage.peer import prune

            pipe.send({"peer_builds": False, "peer_runs": False, "peer_narrower": 0.0, "peer_error": "no answer"})
            for findings in prune(build(family, name)):
                pipe.send({f"peer_{key}": value for key, value in findings.items()})
    except BaseException as error:  # a line in the table, whatever it is
        frame = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{Path(frame.filename).name}:{frame.lineno}"
        pipe.send({"crash": f"{type(error).__name__}: {error}"[:500] + f" ({where})"})
    pipe.send(None)


def run(family: str, name: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """One network's record."""
    record: dict[str, Any] = {"family": family, "name": name}
    context = multiprocessing.get_context("fork")  # the libraries are imported once
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=work, args=(theirs, family, name, options), daemon=True)
    start = time.monotonic()
    process.start()
    theirs.close()
    deadline = start + options["time_limit"]
    try:
        while True:
            if not ours.poll(max(0.0, deadline - time.monotonic())):
                if "peer_builds" not in record:
                    record["crash"] = f"no answer after {options['time_limit']:.0f} s"
                break
            findings = ours.recv()
            if findings is None:
                break
            if "peer_builds" in findings:
                deadline = min(deadline, time.monotonic() + PEER_LIMIT)
            record.update(findings)
    except EOFError:
        process.join()
        record["crash"] = f"the process ended with code {process.exitcode}"
    process.kill()
    process.join()
    record["wall"] = time.monotonic() - start
    return record


def main() -> None:
    parser = command_line(__doc__, threads=None, resume="coverage.jsonl")
    parser.add_argument("--family", nargs="+", choices=FAMILIES, default=list(FAMILIES))
    parser.add_argument("--match", default="", help="only networks with this in their name")
    parser.add_argument("--limit", type=int, help="at most so many networks of a family")
    parser.add_argument("--time-limit", type=float, default=300.0, help="seconds for one network (default: 300)")
    parser.add_argument("--memory", type=float, default=14.0, help="GB for one network (default: 14)")
    parser.add_argument("--peer", action="store_true", help="also prune torchvision and timm with Torch-Pruning")
    parser.add_argument("--onnx", action="store_true", help="also export the grown graph")
    parser.add_argument("--tables", action="store_true", help="only print the tables of the file")
    options = parse(parser)
    import_torchvision()
    runs = FinishedRuns(options.resume, "family", "name")
    for family in () if options.tables else options.family:
        for name in [n for n in names(family) if options.match in n][: options.limit]:
            if runs.find(family=family, name=name) is None:
                record = runs.add(**run(family, name, vars(options)))
                print(f"{family}/{name}: {summary(record)}", flush=True)
    print(tables(list(runs.records.values())))


def summary(record: Mapping[str, Any]) -> str:
    if "crash" in record:
        return record["crash"]
    if not record.get("captured"):
        return f"not captured: {record.get('capture_error', '')}"
    share = record["open"] / max(1, record["parameters"])
    state = "exact" if record.get("widened") else f"NOT EXACT {record.get('blame') or record.get('error', '')}"
    if not record["free"]:
        state = "nothing to grow"
    return (
        f"{record['nodes']} nodes, {record['seconds']:.1f} s, {record['free']} free, {share:.0%} of parameters, {state}"
    )


if __name__ == "__main__":
    main()
