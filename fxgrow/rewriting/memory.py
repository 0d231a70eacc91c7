"""Memory that a growth takes at least, compared with what there is before anything large is allocated.

The rule: enlarged parameters and buffers stand once on their devices, and every entry of an enlarged dimension has an
index of 8 bytes on the CPU. A growth takes more than that, so what is refused would have failed.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Mapping
from pathlib import Path

import torch

from fxgrow.errors import PlanError

#: what fits anywhere is not looked into
ALWAYS_FITS = 64 << 20
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
