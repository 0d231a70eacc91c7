"""The borders of a virtual convolution: where it reads patches that the consumer sees as padding."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache

from fxgrow._window import Axis, Strip, Window


@lru_cache(maxsize=256)
def strips(
    shape: tuple[int, ...], producer: Window, geometry: tuple[Axis, ...], pool: tuple[int, ...]
) -> tuple[tuple[Strip, ...], ...]:
    """The borders of every axis, without the virtual kernel entries that meet only the producer's padding."""
    found = []
    for d, axis in enumerate(geometry):
        first = producer.padding[d] - producer.stride[d] * (pool[d] - 1 if pool else 0)
        data = range(first, producer.padding[d] + shape[d])
        own = []
        for strip in axis.borders():
            at = axis.jump * strip.positions.start + axis.gap * strip.start - axis.lead
            met = [u for u in range(strip.low, strip.high) if at + axis.step * u in data]
            if met:
                own.append(replace(strip, low=met[0], high=met[-1] + 1))
        found.append(tuple(own))
    return tuple(found)
