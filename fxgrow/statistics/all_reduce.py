"""Sums of moments over all processes, with the same bits in each."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch

from fxgrow.distributed import ProcessGroup
from fxgrow.statistics.consumer_moments import ConsumerMoments
from fxgrow.statistics.width_moments import WidthMoments


def sum_consumers(consumers: Mapping[str, ConsumerMoments], samples: float, process_group: ProcessGroup) -> float:
    """Sums E[V h^T], E|V|^2, M, G and counts, before `finish`; returns the number of samples of all processes."""
    if process_group.size == 1:
        return samples
    numbers = [[float(c.vv), c.samples, c.position_count, c.rows] for c in consumers.values()]
    counts = torch.tensor(numbers, dtype=torch.float64)
    process_group.sum_([counts, *(t for c in consumers.values() for t in (c.vh, c.m, c.g) if t is not None)])
    for c, (vv, seen, positions, rows) in zip(consumers.values(), counts.tolist(), strict=True):
        c.vv, c.samples, c.position_count, c.rows = vv, seen, int(positions), int(rows)
    return process_group.sum_numbers(samples)[0]


def sum_inputs(widths: Iterable[WidthMoments], samples: float, total: float, process_group: ProcessGroup) -> None:
    """Sums S and counts; sampled rows that replace S are gathered and weighted by this process's share of samples."""
    widths = list(widths)
    if process_group.size == 1 or not widths:
        return
    counts = torch.tensor([[w.rows, w.samples, w.position_count] for w in widths], dtype=torch.float64)
    process_group.sum_([counts, *(w.s for w in widths if w.s is not None)])
    for w, (rows, seen, positions) in zip(widths, counts.tolist(), strict=True):
        w.rows, w.samples, w.position_count = int(rows), seen, positions
        if w.sampled:
            w.sampled = [process_group.all_gather_rows(torch.cat(w.sampled) * (samples / total) ** 0.5)]
