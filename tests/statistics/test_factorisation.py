"""The algebra of the method on random problems, against dense decompositions and definitions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fxgrow.candidates.outgoing_weights import RIDGE, OutgoingWeightFit
from fxgrow.errors import ProfileError
from fxgrow.statistics import top_singular
from fxgrow.statistics.cross_moment import Window, cross_moment
from fxgrow.statistics.factorisation import Cholesky, Dual, Spectral, best_update, bottleneck, decrease, factor
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


@pytest.mark.parametrize("ridge", [0.0, 0.1])
@pytest.mark.parametrize("rank", [12, 30], ids=["deficient", "full"])
def test_a_factor_solves_and_its_root_is_a_root(ridge: float, rank: int) -> None:
    rows = randn(rank, 20)
    A = rows.T @ rows / rank
    full = A + ridge * A.trace() / 20 * torch.eye(20, dtype=A.dtype)
    f, X = factor(A, ridge=ridge), randn(20, 3)
    assert isinstance(f, Spectral if rank == 12 and not ridge else Cholesky)
    torch.testing.assert_close(f.solve(X), torch.linalg.pinv(full, hermitian=True, rtol=1e-12) @ X)
    torch.testing.assert_close(f.unwhiten(f.whiten(X)), f.solve(X))
    root = f.whiten(torch.eye(20, dtype=A.dtype))
    eye = torch.eye(len(root), dtype=A.dtype)
    torch.testing.assert_close(root @ full @ root.T, eye, rtol=1e-9, atol=1e-9)


def test_a_singular_float32_matrix_gives_no_nan_and_no_noise() -> None:
    rows = torch.randn(64, 40)
    rows[:, 20:] = rows[:, :20]  # every feature twice: Cholesky's pivots are rounding noise
    rows[:, 3] = rows[:, 23] = 0  # and a dead one
    f = factor(gram(rows) / 64)
    assert isinstance(f, Spectral)
    X = torch.randn(40, 5)
    want = torch.linalg.pinv(rows.double().T @ rows.double() / 64, hermitian=True, rtol=1e-8) @ X.double()
    torch.testing.assert_close(f.solve(X).double(), want, rtol=1e-3, atol=1e-3)
    assert factor(torch.zeros(4, 4)).solve(torch.ones(4, 1)).abs().max() == 0


@pytest.mark.parametrize("m", [15, 40])
def test_rows_in_the_dual_equal_the_matrix_in_the_primal(m: int) -> None:
    rows, N = randn(m, 30), [randn(30, 4, 3)]
    G = [factor(gram(randn(20, 3)))]
    primal, dual = factor(0.3 * rows.T @ rows, ridge=0.2), factor(rows=rows, scale=0.3, ridge=0.2)
    assert isinstance(dual, Dual if m == 15 else Cholesky)
    torch.testing.assert_close(dual.solve(N[0][:, 0]), primal.solve(N[0][:, 0]), rtol=1e-10, atol=1e-10)
    a, b = top_units(N, primal, G, 5), top_units(N, dual, G, 5)
    torch.testing.assert_close(a.values, b.values, rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(product(a), product(b), rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(a.alpha, b.alpha, rtol=1e-7, atol=1e-8)


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


def test_each_unit_lowers_the_bottleneck_by_its_squared_value() -> None:
    """Linear units: the drop of the exact least squares residual is the sum of lambda^2."""
    n = 300
    h, V = randn(n, 5), randn(n, 7)
    b = torch.cat([h @ randn(5, 6) + randn(n, 6), torch.ones(n, 1)], 1)
    M, vh = h.T @ h / n, V.T @ h / n
    psi = bottleneck(V.square().sum() / n, vh, best_update(M, vh))
    rest = V - h @ best_update(M, vh).T
    torch.testing.assert_close(psi, (rest.square().sum() / n).item(), rtol=1e-12, atol=0)
    N = cross_moment(b[:, None], rest[:, None], Window(), Window()) / n
    for k in range(1, 8):
        units = top_units([N], factor(b.T @ b / n), None, k)
        left = rest - b @ product(units)
        drop = psi - (left.square().sum() / n).item()
        assert drop == pytest.approx(units.values[:k].square().sum().item(), rel=1e-10)


@pytest.mark.parametrize("small", [0, 1000])
@pytest.mark.parametrize("dual", [False, True])
def test_the_krylov_iteration_finds_what_eigh_finds(dual: bool, small: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = randn(150 if dual else 500, 200)
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
        lambda c, N, S, G: fitted(S, c * N[:, 0].T, c * c * G)[0] / c,
        lambda c, N, S, G: best_update(c * c * S, c * c * N[:, 0].T, 0.1),
    ],
    ids=["tiny", "both-sided", "dual", "refit", "update"],
)
def test_scaling_the_loss_scales_the_results(values: Callable[..., Tensor]) -> None:
    N, S, G = randn(6, 1, 4), gram(randn(20, 6)), gram(randn(20, 4))
    torch.testing.assert_close(values(SCALE, N, S, G), values(1.0, N, S, G), rtol=1e-9, atol=1e-12)


def fitted(M: Tensor, vz: Tensor, G: Tensor, old: int = 2, update: bool = True) -> tuple[Tensor, float]:
    """W and its curvature, the first columns being those of existing weights."""
    columns = torch.arange(len(M))
    h, z = columns[:old], columns[old:]
    use: Any = None
    parts = M[h][:, h], M[h][:, z], M[z][:, z]
    new = {"w": torch.arange(len(z))[:, None]}
    fit = vz[:, h], vz[:, z]
    r = OutgoingWeightFit("", None, use, torch.arange(len(vz)), new, *parts, G, fit, fit)
    every = {"w": torch.arange(len(z))}
    moved, weights = r.solve(every, update)
    found = torch.cat([moved, weights], 1) if update else weights
    slope, curvature = r.predict(every, update)
    assert slope == pytest.approx((found * (vz if update else fit[1])).sum().item())
    return found, curvature


def ridges(M: Tensor, old: int = 2) -> Tensor:
    d = M.diagonal()
    return RIDGE * torch.cat([d[:old].mean().expand(old), d[old:].mean().expand(len(d) - old)])


@pytest.mark.parametrize("update", [True, False])
def test_refit_is_ridge_least_squares_behind_the_output_side(update: bool) -> None:
    z, V = randn(200, 6), randn(200, 3)
    M, vz = z.T @ z / 200, V.T @ z / 200
    eps = ridges(M)
    flat, _ = fitted(M, vz, torch.eye(3, dtype=M.dtype) * 7, update=update)
    own = slice(0 if update else 2, None)
    flat = flat * 1.1
    gradient = flat @ M[own, own] - vz[:, own] + flat * eps[own]  # of |V - W z|^2 / 2 + |W|^2 eps / 2
    assert gradient.abs().max() < 1e-12
    G = gram(V) / 200
    values, vectors = torch.linalg.eigh(G)
    half = vectors / (values / values.mean() + 0.1) @ vectors.T
    torch.testing.assert_close(fitted(M, vz, G, update=update)[0], half @ flat)
    assert fitted(M, 0 * vz, 0 * G)[0].abs().max() == 0


def test_the_quadratic_model_is_the_sum_over_samples() -> None:
    z, V = randn(50, 6), randn(50, 3)
    G = V.T @ V / 50
    W, q = fitted(z.T @ z / 50, V.T @ z / 50, G)
    d = z @ W.T
    assert q == pytest.approx(torch.einsum("no,op,np->", d, G, d).item() / 50)
    s = (V * d).sum().item() / 50
    p, scale = decrease(s, q)
    steps = torch.linspace(-3, 3, 6001, dtype=torch.float64) * abs(scale)
    best = (steps * s - steps**2 * q / 2).max().item()
    assert p == pytest.approx(best if s > 0 else 0.0)
    assert decrease(-1.0, 2.0) == (0.0, -0.5) and decrease(1.0, 0.0) == (0.0, 0.0)


def test_non_finite_statistics_are_named() -> None:
    bad = torch.eye(3)
    bad[1, 2] = float("nan")
    with pytest.raises(ProfileError, match="second moment of size 3 holds NaN"):
        factor(bad)
    with pytest.raises(ProfileError, match="non-finite loss"):
        top_units([torch.full((3, 1, 2), float("inf"))], factor(torch.eye(3)), None, 1)
    with pytest.raises(ProfileError, match="matrix A, or the rows"):
        factor()
