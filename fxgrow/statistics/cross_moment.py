"""Second moments N = E[b V^T] between a producer's input patches b and a consumer's output gradient V.

A producer and a consumer are sliding windows over nd spatial dimensions. With nd = 0 (linear layers) tensors are rows
``[n, T, F]``; with nd >= 1 they are maps ``[n, C, *spatial]``. Results are sums over samples and positions. Half
precision is accumulated in float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from itertools import product
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor

from fxgrow.errors import ProfileError
from fxgrow.statistics.conv_geometry import AxisGeometry, Strip, Window, axis_geometries, border_strips
from fxgrow.statistics.gram import accumulating, matrix_product


def patch_rows(
    x: Tensor, window: Window, chosen: Tensor | None = None, bias: bool = False, pool: tuple[int, ...] = ()
) -> Tensor:
    """Patches that a window reads, ``[m, C * prod(kernel) (+ 1)]`` in the feature order of ``weight.flatten(1)``.

    ``chosen`` (None: all) are flat indices into samples and positions of the window's output map; with ``pool``, window
    and stride of an average pool, of the pooled map, and a row is the mean patch. ``bias`` appends a feature that is 1.
    """
    if not window.kernel:
        rows = accumulating(x.flatten(0, 1) if chosen is None else x.flatten(0, 1).index_select(0, chosen))
        return F.pad(rows, (0, 1), value=1.0) if bias else rows
    nd = len(window.kernel)
    read = axis_geometries(tuple(x.shape[2:]), window, Window((1,) * nd), pool)
    x = _averaged(accumulating(x), window, read, pool)
    # channels last: one gathered cell is C consecutive numbers
    cells = x.movedim(1, -1).reshape(-1, x.shape[1])
    sizes = tuple(a.read for a in read)
    if chosen is None:
        chosen = torch.arange(len(x) * prod(sizes), device=x.device)
    index, *where = torch.unravel_index(chosen, (len(x), *sizes))
    offset = torch.zeros(1, dtype=torch.long, device=x.device)
    for size, axis, at in zip(x.shape[2:], read, where, strict=True):
        index = index * size + at * axis.hop
        entry = torch.arange(axis.kernel, device=x.device) * axis.dilation
        offset = (offset[:, None] * size + entry).flatten()
    rows = cells[index[:, None] + offset].transpose(1, 2).flatten(1)
    return F.pad(rows, (0, 1), value=1.0) if bias else rows


@torch.no_grad()
def cross_moment(
    x: Tensor, v: Tensor, producer: Window, consumer: Window, bias: bool = False, pool: tuple[int, ...] = ()
) -> Tensor:
    """Sum over samples and output positions p of b(p + tap) v(p)^T, ``[P, taps, O]``; zero where the tap is padding.

    This is the number of samples times E[b V^T] (the matrix N of TINY, arXiv 2405.19816, before the projection).
    Between convolutions it is computed as the weight gradient of one virtual convolution from the producer's input to
    the consumer's output, less the border terms, or tap by tap on small maps.

    Args:
        x: the producer's input, ``[n, C, *S]`` (linear: ``[n, T, F]``).
        v: V, minus the gradient at the consumer's output, ``[n, O, *R]`` (linear: ``[n, T, O]``).
        producer: the producer's geometry.
        consumer: the consumer's, over the output of the producer and an average pool with window and stride ``pool``.
        bias: the producer has a bias: one more feature that is 1.
        pool: see ``consumer``; empty for none.
    """
    x, v = accumulating(x), accumulating(v)
    if not producer.kernel:
        x, v = x.flatten(0, -2), v.flatten(0, -2)
        moment = x.new_empty(x.shape[1] + bias, v.shape[1])
        matrix_product(x.mT, v, out=moment[: x.shape[1]])
        if bias:
            torch.sum(v, 0, out=moment[-1])
        return moment.unsqueeze(1)
    geometry = axis_geometries(tuple(x.shape[2:]), producer, consumer, pool)
    if tuple(v.shape[2:]) != tuple(a.out for a in geometry):
        raise ProfileError(f"v has positions {tuple(v.shape[2:])}, the consumer {[a.out for a in geometry]}")
    placed = _averaged(x, producer, geometry, pool)
    if _tap_is_cheaper(geometry):
        moment = _by_tap(placed, v, geometry)
    else:
        borders = border_strips(tuple(x.shape[2:]), producer, geometry, pool)
        moment = _virtual(placed, v, geometry, borders, None if pool else (x, producer.padding))
    return torch.cat([moment, _tap_sums(v, geometry)[None]]) if bias else moment


@lru_cache(maxsize=256)
def coverage(read_shape: tuple[int, ...], consumer: Window) -> Tensor:
    """How many of the consumer's windows cover each position of the map that it reads, int64 ``[*read_shape]``.

    It is the weight of each position in S of TINY, where a patch counts once per window.
    """
    total = torch.ones((), dtype=torch.long)
    for axis in axis_geometries(read_shape, Window((1,) * len(read_shape)), consumer):
        at = axis.positions()
        total = total[..., None] * torch.bincount(at[(at >= 0) & (at < axis.read)], minlength=axis.read)
    return total


def _place(x: Tensor, lead: Sequence[int], length: Sequence[int]) -> Tensor:
    """Pads the map with ``lead`` zeros in front and to size ``length``, cropping what reaches further."""
    pads: list[int] = []
    for dim, (before, total) in enumerate(zip(lead, length, strict=True), start=2):
        x = x.narrow(dim, 0, max(0, min(x.shape[dim], total - before)))
        pads = [min(before, total), max(0, total - before - x.shape[dim]), *pads]
    return F.pad(x, pads) if any(pads) else x


def _averaged(x: Tensor, producer: Window, geometry: tuple[AxisGeometry, ...], pool: tuple[int, ...]) -> Tensor:
    """The producer's padded input, averaged so that the patch at a read position is the mean patch of its pool."""
    axes = list(zip(geometry, producer.stride, pool or (1,) * len(geometry), strict=True))
    x = _place(x, producer.padding, [a.extent + s * (r - 1) for a, s, r in axes])
    for dim, (axis, stride, r) in enumerate(axes, start=2):
        if r > 1:
            shifted = (x.narrow(dim, stride * t, axis.extent) for t in range(1, r))
            x = sum(shifted, x.narrow(dim, 0, axis.extent)) / r
    return x


def _unfold(x: Tensor, geometry: tuple[AxisGeometry, ...]) -> Tensor:
    """All patches of the read map, ``[n, positions, C * prod(kernel)]``."""
    nd = len(geometry)
    for dim, axis in enumerate(geometry, start=2):
        x = x.unfold(dim, axis.reach + 1, axis.hop)[..., :: axis.dilation]
    order = (0, *range(2, 2 + nd), 1, *range(2 + nd, 2 + 2 * nd))
    return x.permute(order).flatten(1 + nd).flatten(1, nd)


@lru_cache(maxsize=256)
def _tap_is_cheaper(geometry: tuple[AxisGeometry, ...]) -> bool:
    """Whether the sum tap by tap is faster than the virtual convolution with its borders."""
    plain = prod(a.kernel * sum(len(a.inside(j)) for j in range(a.taps)) for a in geometry)
    full = prod(a.size(a.taps) * a.out for a in geometry)
    padded = prod(a.size(a.taps) * a.out + sum(s.high - s.low for s in a.borders()) for a in geometry)
    # multiply-adds per channel pair, weighted by their measured time on a CPU
    return 2 * plain < full + 2.5 * (padded - full)


def _by_tap(x: Tensor, v: Tensor, geometry: tuple[AxisGeometry, ...]) -> Tensor:
    """One product per tap, over the positions where the tap is not padding."""
    nd = len(geometry)
    b: Tensor = _unfold(x, geometry).unflatten(1, [a.read for a in geometry])
    v = v.movedim(1, -1)
    moment: Tensor = b.new_empty(b.shape[-1], prod(a.taps for a in geometry), v.shape[-1])
    for tap, entry in enumerate(product(*(range(a.taps) for a in geometry))):
        to = [a.inside(j) for a, j in zip(geometry, entry, strict=True)]
        if not all(to):
            moment[:, tap] = 0
            continue
        first = [a.position(r.start, j) for a, r, j in zip(geometry, to, entry, strict=True)]
        here = [slice(r.start, r.stop) for r in to]
        there = [slice(f, f + a.stride * len(r), a.stride) for a, r, f in zip(geometry, to, first, strict=True)]
        left: Tensor = b[(slice(None), *there)].flatten(0, nd)
        right: Tensor = v[(slice(None), *here)].flatten(0, nd)
        torch.mm(left.mT, right, out=moment[:, tap])
    return moment


def _virtual(
    x: Tensor, v: Tensor, geometry: tuple[AxisGeometry, ...], borders: tuple[tuple[Strip, ...], ...],
    raw: tuple[Tensor, tuple[int, ...]] | None = None,
) -> Tensor:  # fmt: skip
    """Weight gradient of the virtual convolution, less its borders by inclusion-exclusion over dimensions.

    x is the producer's input, padded and averaged; without a pool, `raw` is it before padding, and its padding.
    """
    nd, channels = len(geometry), x.shape[1]
    padding = _implicit_padding(*raw, geometry) if raw else None
    every = [Strip(slice(0, a.out), 0, a.taps, 0, a.size(a.taps)) for a in geometry]
    choices = [[full, *strips] for full, strips in zip(every, borders, strict=True)]
    # O is the innermost dimension throughout, so that every sum runs along it
    moment = x.new_zeros(channels, *(a.kernel for a in geometry), *(a.taps for a in geometry), v.shape[1])
    # per dimension: all positions, or one border position with the taps that are padding there
    for choice in product(*choices):
        cut = sum(strip is not full for strip, full in zip(choice, every, strict=True))
        vs, xs, target = v, x, moment
        lead = [a.lead for a in geometry]
        length = [a.jump * (a.out - 1) + a.step * (a.size(a.taps) - 1) + 1 for a in geometry]
        for d, (axis, strip) in enumerate(zip(geometry, choice, strict=True)):
            target = target.narrow(1 + nd + d, strip.start, strip.stop - strip.start)
            if strip is not every[d]:
                vs = vs[(slice(None),) * (2 + d) + (strip.positions,)]
                first = axis.jump * strip.positions.start + axis.gap * strip.start + axis.step * strip.low
                lead[d], length[d] = 0, axis.step * (strip.high - strip.low - 1) + 1
                xs = xs.narrow(2 + d, first - axis.lead, length[d])
        kernel = [strip.high - strip.low for strip in choice]
        if raw and padding and not cut:
            weight = _virtual_weight_gradient(raw[0], vs, kernel, geometry, padding)
        else:
            weight = _virtual_weight_gradient(_place(xs, lead, length), vs, kernel, geometry)
        target.add_(_offsets(weight, choice, geometry), alpha=(-1) ** cut)
    return moment.reshape(-1, prod(a.taps for a in geometry), v.shape[1])


def _offsets(weight: Tensor, strips: tuple[Strip, ...], geometry: tuple[AxisGeometry, ...]) -> Tensor:
    """The virtual kernel ``[*kernel, C, O]`` at each tap and entry, as a view ``[C, *entry, *tap, O]``."""
    taps = [s.stop - s.start for s in strips]
    pads = [n for s, a, t in zip(strips, geometry, taps, strict=True) for n in (a.size(t) - s.high, s.low)]
    weight = F.pad(weight, [0, 0, 0, 0, *reversed(pads)]) if any(pads) else weight
    shape = [weight.shape[-2], *(a.kernel for a in geometry), *taps, weight.shape[-1]]
    along_entries = [axis.dilation // axis.step * weight.stride(d) for d, axis in enumerate(geometry)]
    along_taps = [axis.gap // axis.step * weight.stride(d) for d, axis in enumerate(geometry)]
    return weight.as_strided(shape, [weight.stride(-2), *along_entries, *along_taps, weight.stride(-1)])


def _implicit_padding(x: Tensor, padding: tuple[int, ...], geometry: tuple[AxisGeometry, ...]) -> list[int] | None:
    """Symmetric padding with which the virtual convolution can read x itself, None where there is none.

    Convolution kernels skip such padding; with explicit zeros they take up to twice the time.
    """
    total = [p + axis.lead for p, axis in zip(padding, geometry, strict=True)]
    for size, before, pad, axis in zip(x.shape[2:], padding, total, geometry, strict=True):
        positions = (size + 2 * pad - axis.step * (axis.size(axis.taps) - 1) - 1) // axis.jump + 1
        if size + before > axis.extent or positions != axis.out or axis.out == 1:
            return None
    return total


def _virtual_weight_gradient(
    x: Tensor, v: Tensor, kernel: list[int], geometry: tuple[AxisGeometry, ...], padding: list[int] | None = None
) -> Tensor:
    """Sum over samples and positions of x(jump * p + step * u) v(p)^T: contiguous ``[*kernel, C, O]``."""
    nd = len(kernel)
    long = [d for d in range(nd) if v.shape[2 + d] > 1]
    if len(long) > 1 or nd == len(long):
        # a dimension with one position needs no convolution: its offsets become channels
        flat = [d for d in range(nd) if d not in long]
        cut = tuple(slice(None, None, geometry[d].step if d in flat else 1) for d in range(nd))
        x = x[(slice(None), slice(None), *cut)].permute(0, *(2 + d for d in flat), 1, *(2 + d for d in long))
        x = x.flatten(1, 1 + len(flat))
        v = v.squeeze([2 + d for d in flat])
        strides, steps = [geometry[d].jump for d in long], [geometry[d].step for d in long]
        weight: Tensor = weight_gradient(x, v, [kernel[d] for d in long], strides, padding or [0] * len(long), steps)
        weight = weight.unflatten(1, (*(kernel[d] for d in flat), -1))
        order = [1 + flat.index(d) if d in flat else 2 + len(flat) + long.index(d) for d in range(nd)]
        return weight.permute(*order, 1 + len(flat), 0).contiguous()
    # a strip has so few positions that unfolding and one product are faster; channels last, to copy runs of C
    x = x.movedim(1, -1).contiguous()
    for d, axis in enumerate(geometry):
        x = x.unfold(1 + d, axis.step * (kernel[d] - 1) + 1, axis.jump)[..., :: axis.step]
    x = x.movedim(1 + nd, -1).flatten(1 + nd).flatten(0, nd)
    return (x.mT @ v.movedim(1, -1).flatten(0, nd)).view(*kernel, -1, v.shape[1])


def _tap_sums(v: Tensor, geometry: tuple[AxisGeometry, ...]) -> Tensor:
    """The row of the feature that is 1, ``[taps, O]``: per tap, the sum of v where the tap is not padding."""
    total = v.sum(0)
    for axis in geometry:
        at = axis.positions().to(total.device)
        total = torch.tensordot(total, ((at >= 0) & (at < axis.read)).to(total), dims=([1], [0]))
    return total.flatten(1).mT


def weight_gradient(
    x: Tensor, v: Tensor, kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]
) -> Tensor:
    """The weight gradient ``[O, C, *kernel]`` of a convolution on x with the output gradient v."""
    like = v.new_empty(1).expand(v.shape[1], x.shape[1], *kernel)
    no = [0] * len(kernel)
    gradient: Tensor = torch.ops.aten.convolution_backward(
        v, x, like, None, stride, padding, dilation, False, no, 1, (False, True, False)
    )[1]
    return gradient
