"""Second moments against plain loops over positions and taps, in float64."""

from __future__ import annotations

from itertools import product
from math import prod

import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from torch import Tensor

import fxgrow.statistics.cross_moment
from fxgrow.errors import ProfileError
from fxgrow.statistics.conv_geometry import Window, axis_geometries
from fxgrow.statistics.cross_moment import coverage, cross_moment, patch_rows

CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
POOL = {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d}


def read_map(x: Tensor, window: Window, bias: bool, pool: tuple[int, ...]) -> Tensor:
    """All features of a patch as channels, by a convolution with the identity and torch's own pooling."""
    nd, size = len(window.kernel), x.shape[1] * prod(window.kernel)
    eye = torch.eye(size, dtype=x.dtype).reshape(size, x.shape[1], *window.kernel)
    b = CONV[nd](x, eye, stride=window.stride, padding=window.padding, dilation=window.dilation)
    if bias:
        b = torch.cat([b, torch.ones_like(b[:, :1])], 1)
    return POOL[nd](b, pool) if pool else b


def patches(x: Tensor, window: Window, bias: bool = False) -> Tensor:
    return patch_rows(x, window, None, bias).unflatten(0, (len(x), -1))


def naive(x: Tensor, v: Tensor, producer: Window, consumer: Window, bias: bool, pool: tuple[int, ...]) -> Tensor:
    b = read_map(x, producer, bias, pool)
    nd = len(consumer.kernel)
    out = b.new_zeros(b.shape[1], prod(consumer.kernel), v.shape[1])
    for p in product(*(range(s) for s in v.shape[2:])):
        for tap, j in enumerate(product(*(range(k) for k in consumer.kernel))):
            m = [consumer.stride[d] * p[d] + consumer.dilation[d] * j[d] - consumer.padding[d] for d in range(nd)]
            if all(0 <= m[d] < b.shape[2 + d] for d in range(nd)):
                out[:, tap] += b[(slice(None), slice(None), *m)].T @ v[(slice(None), slice(None), *p)]
    return out


@st.composite
def cases(draw: st.DrawFn) -> tuple[tuple[int, ...], Window, Window, tuple[int, ...]]:
    """A shape, a producer, a consumer and a pool that leave at least one output position."""
    nd = draw(st.integers(1, 3))
    largest = (7, 4, 3)[nd - 1]

    def window() -> Window:
        ranges = ((1, largest), (1, 3), (1, 3), (0, 3))
        return Window(*(tuple(draw(st.integers(*r)) for _ in range(nd)) for r in ranges))

    producer, consumer = window(), window()
    pool = tuple(draw(st.integers(1, 3)) for _ in range(nd)) if draw(st.booleans()) else ()
    shape = []
    for d in range(nd):
        read = max(1, consumer.dilation[d] * (consumer.kernel[d] - 1) + 1 - 2 * consumer.padding[d])
        middle = read * (pool[d] if pool else 1)
        least = producer.stride[d] * (middle - 1) + producer.dilation[d] * (producer.kernel[d] - 1) + 1
        shape.append(max(1, least - 2 * producer.padding[d]) + draw(st.integers(0, (12, 6, 2)[nd - 1])))
    return tuple(shape), producer, consumer, pool


@pytest.mark.parametrize("path", ["virtual", "tap", "chosen"])
@settings(max_examples=60, deadline=None)
@given(case=cases(), bias=st.booleans())
def test_cross_moment_is_the_sum_over_positions_and_taps(path: str, case: tuple, bias: bool) -> None:  # type: ignore[type-arg]
    shape, producer, consumer, pool = case
    geometry = axis_geometries(shape, producer, consumer, pool)
    generator = torch.Generator().manual_seed(sum(shape))
    x = torch.randn(2, 2, *shape, dtype=torch.float64, generator=generator)
    v = torch.randn(2, 3, *(a.out for a in geometry), dtype=torch.float64, generator=generator)
    with pytest.MonkeyPatch.context() as patch:
        if path != "chosen":
            patch.setattr(fxgrow.statistics.cross_moment, "_tap_is_cheaper", lambda _: path == "tap")
        got = cross_moment(x, v, producer, consumer, bias, pool)
    want = naive(x, v, producer, consumer, bias, pool)
    assert got.shape == want.shape
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    ("shape", "producer", "consumer", "pool", "tap"),
    [
        ((32, 32), Window((3, 3), padding=(1, 1)), Window((3, 3), padding=(1, 1)), (), False),
        ((8, 8), Window((3, 3), padding=(1, 1)), Window((3, 3), padding=(1, 1)), (2, 2), False),
        ((1, 1), Window((3, 3), padding=(1, 1)), Window((3, 3), padding=(1, 1)), (), True),
        ((8, 8), Window((3, 3), padding=(1, 1)), Window((8, 8)), (), False),
        ((14, 14), Window((3, 3), (2, 2), padding=(1, 1)), Window((1, 1)), (), False),
    ],
)
def test_the_cheaper_way_is_chosen_and_right(
    shape: tuple[int, ...], producer: Window, consumer: Window, pool: tuple[int, ...], tap: bool
) -> None:
    geometry = axis_geometries(shape, producer, consumer, pool)
    assert fxgrow.statistics.cross_moment._tap_is_cheaper(geometry) == tap
    x, v = torch.randn(3, 4, *shape).double(), torch.randn(3, 5, *(a.out for a in geometry)).double()
    got = cross_moment(x, v, producer, consumer, True, pool)
    torch.testing.assert_close(got, naive(x, v, producer, consumer, True, pool), rtol=1e-10, atol=1e-10)


def test_cross_moment_is_the_gradient_of_the_outgoing_times_incoming_weights() -> None:
    """With linear units, -dL/dalpha at omega is N contracted with omega: the definition, by autograd."""
    x = torch.randn(5, 3, 9, 7, dtype=torch.float64)
    producer, consumer = Window((3, 2), (2, 1), (1, 2), (1, 1)), Window((2, 3), (1, 2), (2, 1), (1, 1))
    alpha = torch.randn(1, 3, 3, 2, dtype=torch.float64, requires_grad=True)
    beta = torch.randn(1, dtype=torch.float64, requires_grad=True)
    omega = torch.randn(4, 1, 2, 3, dtype=torch.float64)
    z = F.conv2d(x, alpha, beta, producer.stride, producer.padding, producer.dilation)
    a = F.conv2d(z, omega, None, consumer.stride, consumer.padding, consumer.dilation)
    v = torch.randn_like(a)
    want = torch.cat([g.flatten() for g in torch.autograd.grad((a * v).sum(), (alpha, beta))])
    got = torch.einsum("pjo,oj->p", cross_moment(x, v, producer, consumer, bias=True), omega.flatten(1))
    torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-11)


def test_dense_cross_moment() -> None:
    x, v = torch.randn(4, 3, 5, dtype=torch.float64), torch.randn(4, 3, 2, dtype=torch.float64)
    want = torch.einsum("ntf,nto->fo", F.pad(x, (0, 1), value=1.0), v)[:, None]
    torch.testing.assert_close(cross_moment(x, v, Window(), Window(), bias=True), want)
    torch.testing.assert_close(cross_moment(x, v, Window(), Window()), want[:-1])


@settings(max_examples=60, deadline=None)
@given(case=cases(), bias=st.booleans())
def test_patches_and_gathered_rows(case: tuple, bias: bool) -> None:  # type: ignore[type-arg]
    shape, window, _, pool = case
    x = torch.randn(3, 2, *shape, dtype=torch.float64)
    torch.testing.assert_close(patches(x, window, bias), read_map(x, window, bias, ()).flatten(2).mT)
    want = read_map(x, window, bias, pool).flatten(2).mT
    chosen = torch.randint(3 * want.shape[1], (20,))
    torch.testing.assert_close(patch_rows(x, window, chosen, bias, pool), want.flatten(0, 1)[chosen])
    torch.testing.assert_close(patch_rows(x, window, None, bias, pool), want.flatten(0, 1))


def test_patches_multiply_with_the_flat_weight() -> None:
    conv = torch.nn.Conv2d(3, 4, (3, 2), stride=2, dilation=(1, 2), padding=(2, 1), bias=False).double()
    x = torch.randn(2, 3, 8, 9, dtype=torch.float64)
    window = Window((3, 2), (2, 2), (1, 2), (2, 1))
    torch.testing.assert_close(patches(x, window) @ conv.weight.flatten(1).T, conv(x).flatten(2).mT)


def test_dense_rows() -> None:
    x = torch.randn(3, 4, 5)
    chosen = torch.tensor([9, 3, 8])
    want = torch.cat([x[[2, 0, 2], [1, 3, 0]], torch.ones(3, 1)], 1)
    assert torch.equal(patch_rows(x, Window(), chosen, bias=True), want)
    assert torch.equal(patches(x, Window(), bias=True).flatten(0, 1)[chosen], want)


@settings(max_examples=40, deadline=None)
@given(case=cases())
def test_coverage_counts_windows(case: tuple) -> None:  # type: ignore[type-arg]
    shape, _, consumer, _ = case
    assume(min(consumer.output(shape)) > 0)
    ones = torch.ones(1, 1, *shape, dtype=torch.float64, requires_grad=True)
    y = CONV[len(shape)](
        ones,
        ones.new_ones(1, 1, *consumer.kernel),
        None,
        consumer.stride,
        consumer.padding,
        consumer.dilation,
    )
    (want,) = torch.autograd.grad(y.sum(), ones)
    assert torch.equal(coverage(shape, consumer).double(), want[0, 0])


def test_half_precision_is_accumulated_in_float32() -> None:
    x, v = torch.randn(4, 200, 3).bfloat16(), torch.randn(4, 200, 2).bfloat16()
    got = cross_moment(x, v, Window(), Window())
    assert got.dtype == torch.float32
    torch.testing.assert_close(
        got, cross_moment(x.double(), v.double(), Window(), Window()).float(), rtol=1e-4, atol=1e-4
    )


def test_errors_name_the_shapes() -> None:
    window = Window((3, 3), padding=(1, 1))
    with pytest.raises(ProfileError, match=r"kernel \(3, 3\) has stride \(2,\)"):
        Window((3, 3), stride=(2,))
    with pytest.raises(ProfileError, match=r"positions \(4, 4\).*\[8, 8\]"):
        cross_moment(torch.zeros(1, 1, 8, 8), torch.zeros(1, 1, 4, 4), window, window)
    with pytest.raises(ProfileError, match="empty map"):
        cross_moment(torch.zeros(1, 1, 8, 8), torch.zeros(1, 1, 4, 4), window, Window((9, 9)))
    with pytest.raises(ProfileError, match="same number of spatial dimensions"):
        cross_moment(torch.zeros(1, 1, 8, 8), torch.zeros(1, 1, 8, 8), window, Window((3,)))
