"""New units against dense decompositions and definitions, on random problems."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fxgrow.errors import ProfileError
from fxgrow.statistics import top_singular
from fxgrow.statistics.conv_geometry import Window
from fxgrow.statistics.cross_moment import cross_moment
from fxgrow.statistics.factorisation import bottleneck, factor
from fxgrow.statistics.gram import gram
from fxgrow.statistics.top_singular import Units, top_units


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def inverse_root(A: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(A)
    keep = values > 1e-12 * values[-1]
    return vectors[:, keep] / values[keep].sqrt() @ vectors[:, keep].T


def product(units: Units) -> Tensor:
    """The rank-k map from a patch to every consumer: free of signs and of rotations among equal values."""
    return units.alpha @ torch.cat([o.flatten(1) for o in units.omega], 1)


@pytest.mark.parametrize("rank", [50, 8], ids=["full", "deficient"])
@pytest.mark.parametrize("fisher", [False, True])
def test_units_are_the_dense_whitened_svd(rank: int, fisher: bool) -> None:
    b, k = randn(rank, 12), 4
    S, Gs = b.T @ b / rank, [gram(randn(9, 3)), gram(randn(9, 5))]
    N = [(b.T @ randn(rank, t * o)).view(12, t, o) for t, o in ((2, 3), (1, 5))]
    roots = [torch.kron(torch.eye(n.shape[1]), inverse_root(G)) for n, G in zip(N, Gs, strict=True)]
    right = torch.block_diag(*roots) if fisher else torch.eye(11, dtype=S.dtype)
    left = inverse_root(S)
    u, values, wt = torch.linalg.svd(left @ torch.cat([n.flatten(1) for n in N], 1) @ right)
    units = top_units(N, factor(S), [factor(G) for G in Gs] if fisher else None, k)
    assert units.alpha.shape == (12, k) and [o.shape for o in units.omega] == [(k, 2, 3), (k, 1, 5)]
    assert len(units.values) == min(rank, 11)
    torch.testing.assert_close(units.values, values[: len(units.values)])
    torch.testing.assert_close(product(units), left @ u[:, :k] * values[:k] @ wt[:k] @ right)
    incoming = values[:k].sqrt() * (left @ u[:, :k])
    torch.testing.assert_close(units.alpha.abs(), incoming.abs(), rtol=1e-6, atol=1e-8)
    assert (units.alpha.gather(0, units.alpha.abs().argmax(0)[None]) > 0).all()


@pytest.mark.parametrize("m", [15, 40])
def test_units_from_rows_are_those_from_their_gram_matrix(m: int) -> None:
    rows, N = randn(m, 30), [randn(30, 4, 3)]
    G = [factor(gram(randn(20, 3)))]
    matrix, by_rows = factor(0.3 * rows.T @ rows, ridge=0.2), factor(rows=rows, scale=0.3, ridge=0.2)
    a, b = top_units(N, matrix, G, 5), top_units(N, by_rows, G, 5)
    torch.testing.assert_close(a.values, b.values, rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(product(a), product(b), rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(a.alpha, b.alpha, rtol=1e-7, atol=1e-8)


def test_each_unit_lowers_the_bottleneck_by_its_squared_value() -> None:
    """Linear units: the drop of the exact least squares residual is the sum of lambda^2."""
    n = 300
    h, V = randn(n, 5), randn(n, 7)
    b = torch.cat([h @ randn(5, 6) + randn(n, 6), torch.ones(n, 1)], 1)
    M, vh = h.T @ h / n, V.T @ h / n
    update = torch.linalg.solve(M, vh.T).T
    psi = bottleneck(V.square().sum() / n, vh, update)
    rest = V - h @ update.T
    torch.testing.assert_close(psi, (rest.square().sum() / n).item(), rtol=1e-12, atol=0)
    N = cross_moment(b[:, None], rest[:, None], Window(), Window()) / n
    for k in range(1, 8):
        units = top_units([N], factor(b.T @ b / n), None, k)
        left = rest - b @ product(units)
        drop = psi - (left.square().sum() / n).item()
        assert drop == pytest.approx(units.values[:k].square().sum().item(), rel=1e-10)


@pytest.mark.parametrize("small", [0, 1000])
@pytest.mark.parametrize("by_rows", [False, True])
def test_the_krylov_iteration_finds_what_eigh_finds(by_rows: bool, small: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = randn(150 if by_rows else 500, 200)
    N = [(rows.T @ randn(len(rows), 320) / len(rows)).view(200, 4, 80)]  # noise: no gap
    s, k = factor(rows=rows, ridge=0.1), 6
    want = top_units(N, s, None, k)
    monkeypatch.setattr(top_singular, "EXACT", dict.fromkeys(top_singular.EXACT, 10))
    monkeypatch.setattr(top_singular, "SMALL", small)
    got = top_units(N, s, None, k)
    assert len(got.values) == k < len(want.values)
    torch.testing.assert_close(got.values, want.values[:k], rtol=1e-6, atol=0)
    error = (product(got) - product(want)).norm() / product(want).norm()
    assert error < 1e-4
    assert torch.equal(got.alpha, top_units(N, s, None, k).alpha)


def test_units_without_signal_are_dropped() -> None:
    b = randn(100, 6)
    N = [(b.T @ (b[:, :2] @ randn(2, 5))).view(6, 1, 5)]
    for s in (factor(gram(b)), factor(rows=randn(4, 6), ridge=0.1)):
        units = top_units(N, s, None, 5)
        assert units.alpha.shape == (6, 2) and units.omega[0].shape == (2, 1, 5)
    units = top_units([torch.zeros(6, 1, 5)], factor(gram(b)), None, 3)
    assert units.alpha.shape == (6, 0) and len(units.values) == 0


SCALE = 1e-4  # a gradient at the end of training


@pytest.mark.parametrize(
    "values",
    [
        lambda c, N, S, G: top_units([c * N], factor(S), None, 3).values / c,
        lambda c, N, S, G: top_units([c * N], factor(S, ridge=0.1), [factor(c * c * G, ridge=0.01)], 3).values,
        lambda c, N, S, G: top_units([c * N], factor(rows=S, ridge=0.1), None, 3).values / c,
    ],
    ids=["tiny", "both-sided", "rows"],
)
def test_scaling_the_loss_scales_the_results(values: Callable[..., Tensor]) -> None:
    N, S, G = randn(6, 1, 4), gram(randn(20, 6)), gram(randn(20, 4))
    torch.testing.assert_close(values(SCALE, N, S, G), values(1.0, N, S, G), rtol=1e-9, atol=1e-12)


def test_non_finite_moments_are_named() -> None:
    with pytest.raises(ProfileError, match="non-finite loss"):
        top_units([torch.full((3, 1, 2), float("inf"))], factor(torch.eye(3)), None, 1)
