"""Memory that a growth takes at least, compared with what there is before anything large is allocated.

The rule: enlarged parameters and buffers stand once on their devices, and every entry of an enlarged dimension has an
index of 8 bytes on the CPU. A growth takes more than that, so what is refused would have failed.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch

from fxgrow.analysis.analyse import AnalysedGraph
from fxgrow.errors import PlanError, first_lines
from fxgrow.graph.graph import accumulation_dtype, lookup

#: what fits anywhere is not looked into
ALWAYS_FITS = 64 << 20
#: what the allocator of the CPU says, on Linux and on Windows
_CPU_IS_FULL = ("can't allocate memory", "not enough memory")
#: memory that a container may use at most
_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


def check_memory(needed: Mapping[torch.device, int], what: str) -> None:
    """Raises a `PlanError` where a device has less memory than these bytes."""
    for device, size in needed.items():
        if size > ALWAYS_FITS and size > (available := available_memory(device)):
            raise PlanError(
                f"{what} needs at least {size / 1e9:,.1f} GB of memory on {device}, where {available / 1e9:,.1f} GB "
                "are available: ask for fewer units."
            )


def check_fit_memory(analysed: AnalysedGraph, additions: Mapping[str, int]) -> None:
    """Raises a `PlanError` where the fit of outgoing weights, a number for each pair of new units, does not fit."""
    name = max(additions, key=additions.__getitem__, default=None)
    if name is not None:
        weight, k = lookup(analysed.gm, analysed.widths[name].producers[0].weight), additions[name]
        needed = {weight.device: k**2 * accumulation_dtype(weight).itemsize}
        check_memory(needed, f"Fitting {k:,} units of width {name!r}")


@contextlib.contextmanager
def memory_errors() -> Iterator[None]:
    """Raises a `PlanError` where memory runs out inside the block: activations and temporary copies are not counted."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        full = isinstance(error, (MemoryError, torch.OutOfMemoryError))
        if not full and not any(text in str(error) for text in _CPU_IS_FULL):
            raise
        raise PlanError(
            f"Memory ran out: {first_lines(error, 1)}. Nothing was changed. Ask for fewer units, give smaller "
            "batches, or set memory_limit=."
        ) from error


def available_memory(device: torch.device) -> float:
    """Returns the bytes that can still be allocated on a device, as far as that is known."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return min(_main_memory(), *map(_limit, _LIMITS)) if device.type == "cpu" else math.inf


def _main_memory() -> float:
    """What is free or in caches; all there is where the system does not say, since free pages alone are too few."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        return int(Path("/proc/meminfo").read_text().split("MemAvailable:")[1].split()[0]) * 1024
    with contextlib.suppress(OSError, ValueError, AttributeError):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return math.inf


def _limit(path: str) -> float:
    with contextlib.suppress(OSError, ValueError):  # ValueError: "max"
        return int(Path(path).read_text())
    return math.inf
