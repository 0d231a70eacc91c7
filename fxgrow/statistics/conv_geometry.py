"""The geometry of a producer, an average pool and a consumer in a row, as one virtual convolution.

Along each spatial dimension the composition of two convolutions reads the producer's input like one larger convolution.
It also reads patches where the consumer sees zero padding; the borders say which products must be subtracted again.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from math import gcd, prod
from operator import mul
from typing import NamedTuple

import torch
from torch import Tensor

from fxgrow.errors import ProfileError


@dataclass(frozen=True)
class Window:
    """A convolution's geometry, one entry per spatial dimension; ``Window()`` is a linear layer."""

    kernel: tuple[int, ...] = ()
    stride: tuple[int, ...] = ()
    dilation: tuple[int, ...] = ()
    padding: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for name, default in (("stride", 1), ("dilation", 1), ("padding", 0)):
            value = getattr(self, name) or (default,) * len(self.kernel)
            if len(value) != len(self.kernel):
                raise ProfileError(
                    f"a window with kernel {self.kernel} has {name} {value}: give one entry per spatial dimension"
                )
            object.__setattr__(self, name, value)

    @property
    def taps(self) -> int:
        """Number of kernel offsets (1 for a linear layer)."""
        return prod(self.kernel)

    def output(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The output's spatial shape for an input of spatial ``shape``."""
        sizes = zip(shape, self.kernel, self.stride, self.dilation, self.padding, strict=True)
        return tuple((size + 2 * p - d * (k - 1) - 1) // s + 1 for size, k, s, d, p in sizes)


class Strip(NamedTuple):
    """A part of the virtual convolution along one dimension."""

    #: output positions
    positions: slice
    #: taps
    start: int
    stop: int
    #: virtual kernel entries that read data, counted from that of the first tap
    low: int
    high: int


@dataclass(frozen=True)
class AxisGeometry:
    """One spatial dimension of a producer, an optional average pool and a consumer in a row.

    The consumer reads the *read map*. Entry i of the patch behind position m of this map is at ``hop * m + dilation *
    i`` of the producer's padded and averaged input. Output position p of the consumer reads m = ``stride * p + spread *
    j - padding`` at tap j.
    """

    #: of the producer; ``hop`` is its stride times the pool
    kernel: int
    dilation: int
    hop: int
    #: of the consumer: kernel size, stride, dilation and padding
    taps: int
    stride: int
    spread: int
    padding: int
    #: sizes of the read map and of the consumer's output
    read: int
    out: int

    @property
    def reach(self) -> int:
        """Length of one patch, less one."""
        return self.dilation * (self.kernel - 1)

    @property
    def extent(self) -> int:
        """Length of the input that the patches of the read map cover."""
        return self.hop * (self.read - 1) + self.reach + 1

    @property
    def gap(self) -> int:
        """Input distance between neighbouring taps."""
        return self.hop * self.spread

    @property
    def step(self) -> int:
        """Dilation of the virtual convolution: all offsets ``gap * j + dilation * i`` are multiples of it."""
        return gcd(self.gap if self.taps > 1 else 0, self.dilation if self.kernel > 1 else 0) or 1

    def size(self, taps: int) -> int:
        """Kernel size of the virtual convolution over ``taps`` neighbouring taps."""
        return (self.gap * (taps - 1) + self.reach) // self.step + 1

    def position(self, p: int, tap: int) -> int:
        """Read position of output position ``p`` at ``tap``; outside ``[0, read)`` it is padding."""
        return self.stride * p + self.spread * tap - self.padding

    def positions(self) -> Tensor:
        """The same of all output positions and taps, ``[out, taps]``."""
        return self.stride * torch.arange(self.out)[:, None] + self.spread * torch.arange(self.taps) - self.padding

    def inside(self, tap: int) -> range:
        """Output positions whose ``tap`` falls inside the read map."""
        first = self.spread * tap - self.padding
        low = max(0, -(first // self.stride))
        return range(low, max(low, min(self.out, (self.read - 1 - first) // self.stride + 1)))

    @property
    def jump(self) -> int:
        """Input distance between neighbouring output positions."""
        return self.hop * self.stride

    @property
    def lead(self) -> int:
        """Zeros in front of the input, for the consumer's padding."""
        return self.hop * self.padding

    def borders(self, data: range | None = None) -> list[Strip]:
        """One strip for every output position where the virtual patch of a padded tap reads data.

        The virtual convolution reads patches at padded positions too. They start outside of the map, but where patches
        overlap they end inside: these products have to be subtracted again. ``data`` are the positions of the input
        that are not the producer's padding; None for all.
        """
        overlap = self.reach // self.hop
        strips = []
        for p in range(self.out) if overlap and self.padding else ():
            for first, last in ((-overlap, 0), (self.read, self.read + overlap)):
                taps = [j for j in range(self.taps) if first <= self.position(p, j) < last]
                if not taps:
                    continue
                at = self.jump * p + self.gap * taps[0] - self.lead
                reads = ((u, at + self.step * u) for u in range(self.size(len(taps))))
                inside = [u for u, i in reads if 0 <= i < self.extent and (data is None or i in data)]
                if inside:
                    strips.append(Strip(slice(p, p + 1), taps[0], taps[-1] + 1, inside[0], inside[-1] + 1))
        return strips


def axis_geometries(
    shape: tuple[int, ...], producer: Window, consumer: Window, pool: tuple[int, ...] = ()
) -> tuple[AxisGeometry, ...]:
    """The geometry per spatial dimension of a producer on spatial ``shape``, a pool of ``pool`` and a consumer."""
    nd = len(producer.kernel)
    pool = pool or (1,) * nd
    if not len(shape) == len(consumer.kernel) == len(pool) == nd:
        raise ProfileError(
            f"input {shape}, producer {producer.kernel}, pool {pool} and consumer {consumer.kernel} "
            "do not have the same number of spatial dimensions"
        )
    read = tuple(q // r for q, r in zip(producer.output(shape), pool, strict=True))
    out = consumer.output(read)
    if min(read + out, default=1) < 1:
        raise ProfileError(f"an input of {shape} leaves an empty map: read {read}, output {out}")
    of_producer = producer.kernel, producer.dilation, map(mul, producer.stride, pool)
    of_consumer = consumer.kernel, consumer.stride, consumer.dilation, consumer.padding
    return tuple(map(AxisGeometry, *of_producer, *of_consumer, read, out))


@lru_cache(maxsize=256)
def border_strips(
    shape: tuple[int, ...], producer: Window, geometry: tuple[AxisGeometry, ...], pool: tuple[int, ...]
) -> tuple[tuple[Strip, ...], ...]:
    """The borders per spatial dimension, without entries that read only the producer's padding."""
    margin = [s * (r - 1) for s, r in zip(producer.stride, pool or (1,) * len(shape), strict=True)]
    parts = zip(geometry, shape, producer.padding, margin, strict=True)
    return tuple(tuple(axis.borders(range(p - m, p + size))) for axis, size, p, m in parts)
