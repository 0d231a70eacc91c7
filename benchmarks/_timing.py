"""CPU time and peak memory of competing pieces of work."""

from __future__ import annotations

import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence


def cpu_times(cells: Mapping[str, Callable[[], object]], repetitions: int) -> dict[str, float]:
    """Median CPU seconds of each cell, all threads of the process, after one round that is not counted.

    The cells take turns within each repetition, so that a slow spell of the machine meets all of them.
    """
    for work in cells.values():
        work()
    seconds: dict[str, list[float]] = {name: [] for name in cells}
    for _ in range(repetitions):
        for name, work in cells.items():
            start = time.process_time()
            work()
            seconds[name].append(time.process_time() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def own_peak() -> float:
    """Largest resident size of this process so far, in MB."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


def peak_of(module: str, arguments: Sequence[str]) -> float:
    """Runs `python -m module arguments` by itself; it prints its peak in MB as its last line."""
    done = subprocess.run([sys.executable, "-m", module, *arguments], capture_output=True, text=True, check=True)
    return float(done.stdout.split()[-1])
