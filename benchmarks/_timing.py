"""CPU time, arithmetic and peak memory of competing pieces of work."""

from __future__ import annotations

import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

#: CPU seconds above which a cell is run only once
SLOW = 10.0


def cpu_times(cells: Mapping[str, Callable[[], object]], repetitions: int) -> dict[str, float]:
    """Median CPU seconds of each cell, all threads of the process, after one round that is not counted.

    A cell that takes more than `SLOW` in that round is not run again. The others take turns within each repetition, so
    that a slow phase of the machine affects all of them.
    """

    def once(work: Callable[[], object]) -> float:
        start = time.process_time()
        work()
        return time.process_time() - start

    seconds = {name: [once(work)] for name, work in cells.items()}
    quick = {name: work for name, work in cells.items() if seconds[name][0] < SLOW}
    seconds |= {name: [] for name in quick}
    for _ in range(repetitions):
        for name, work in quick.items():
            seconds[name].append(once(work))
    return {name: statistics.median(values) for name, values in seconds.items()}


@contextmanager
def factors_counted() -> Iterator[list[float]]:
    """Multiply-adds of the Cholesky factors made inside, which PyTorch's counter does not know: P^3 / 6 each."""
    total = [0.0]
    original = torch.linalg.cholesky_ex

    def counted(matrix: Tensor, **options: object) -> object:
        total[0] += len(matrix) ** 3 / 6
        return original(matrix, **options)

    with mock.patch.object(torch.linalg, "cholesky_ex", counted):
        yield total


def multiply_adds(work: Callable[[], object]) -> float:
    """Of the matrix products, convolutions and Cholesky factors in it."""
    with FlopCounterMode(display=False) as counter, factors_counted() as factors:
        work()
    return counter.get_total_flops() / 2 + factors[0]


def peak_during(work: Callable[[], object]) -> float:
    """How far the resident size of this process rises above where it stands, in MB, while `work` runs.

    Linux lets a process reset its own high-water mark; elsewhere what the imports left behind may hide small rises.
    """
    reset = Path("/proc/self/clear_refs")
    if reset.exists():
        reset.write_text("5")
        before = _status("VmRSS")
        work()
        return (_status("VmHWM") - before) / 2**10
    start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    work()
    rise = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - start
    return rise / (2**20 if sys.platform == "darwin" else 2**10)


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(key)).split()[1])


def peak_of(module: str, arguments: Sequence[str]) -> float:
    """Runs `python -m module arguments` by itself; it prints its peak in MB as its last line."""
    done = subprocess.run([sys.executable, "-m", module, *arguments], capture_output=True, text=True, check=True)
    return float(done.stdout.split()[-1])
