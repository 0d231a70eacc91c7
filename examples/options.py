"""Command line arguments of examples/loop_*.py."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import NamedTuple


class Options(NamedTuple):
    """Where a run starts and stops."""

    checkpoint: Path | None  # written when the run stops
    stop: int | None  # after so many epochs or steps; None: trains to the end
    resume: Path | None  # a checkpoint of an earlier run


def options(what: str) -> Options:
    """Parses `--checkpoint out/run --stop-after 5`, then `--resume out/run`: the same weights as without a stop."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--checkpoint", type=Path, help="write one when the run stops")
    parser.add_argument("--stop-after", type=int, metavar="N", help=f"stop after N {what}")
    parser.add_argument("--resume", type=Path, metavar="CHECKPOINT", help="go on from a checkpoint")
    given = parser.parse_args()
    if given.stop_after is not None and given.checkpoint is None:
        parser.error("--stop-after needs --checkpoint")
    return Options(given.checkpoint, given.stop_after, given.resume)
