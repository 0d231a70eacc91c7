"""What a reading adds up, and its sums over all processes.

requires: consumers and widths with sums over the samples of this process.
ensures:  with those of all samples, in every process the same bits; means are made of them afterwards.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch

from fxgrow.distributed import ProcessGroup
from fxgrow.statistics.consumer_moments import ConsumerMoments
from fxgrow.statistics.width_moments import WidthMoments


def sum_consumers(consumers: Mapping[str, ConsumerMoments], samples: float, process_group: ProcessGroup) -> float:
    """E[V h^T], E|V|^2, M, G and counts before `finish`; returns the samples of all processes."""
    if process_group.size == 1:
        return samples
    counts = torch.tensor(
        [[samples, float(c.vv), c.samples, c.given, c.rows] for c in consumers.values()], dtype=torch.float64
    ).view(-1, 5)
    process_group.sum_([counts, *(t for c in consumers.values() for t in (c.vh, c.m, c.g) if t is not None)])
    for c, (_, vv, seen, given, rows) in zip(consumers.values(), counts.tolist(), strict=True):
        c.vv, c.samples, c.given, c.rows = vv, int(seen), int(given), int(rows)
    return process_group.sum_numbers(samples)[0]


def sum_inputs(widths: Iterable[WidthMoments], samples: float, total: float, process_group: ProcessGroup) -> None:
    """S, or the few rows in its place, and counts; those rows make up a mean over this process's samples."""
    widths = list(widths)
    if process_group.size == 1 or not widths:
        return
    counts = torch.tensor([[w.rows, w.samples, w.reads] for w in widths], dtype=torch.float64)
    process_group.sum_([counts, *(w.s for w in widths if w.s is not None)])
    for w, (rows, seen, reads) in zip(widths, counts.tolist(), strict=True):
        w.rows, w.samples, w.reads = int(rows), int(seen), reads
        if w.few:
            w.few = [process_group.all_gather_rows(torch.cat(w.few) * (samples / total) ** 0.5)]


def sum_blocks(widths: Iterable[WidthMoments], process_group: ProcessGroup) -> None:
    """E[b V^T]: of this process's samples, over all samples; then of all."""
    process_group.sum_([block for w in widths for _, block in sorted(w.blocks.items())])
