"""Factored second moments against dense decompositions."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fxgrow.errors import ProfileError
from fxgrow.statistics.factorisation import CholeskyFactor, EigenFactor, WoodburyFactor, eigen, factor
from fxgrow.statistics.gram import gram


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


@pytest.mark.parametrize("ridge", [0.0, 0.1])
@pytest.mark.parametrize("rank", [12, 30], ids=["deficient", "full"])
def test_a_factor_solves_and_its_root_is_a_root(ridge: float, rank: int) -> None:
    rows = randn(rank, 20)
    A = rows.T @ rows / rank
    full = A + ridge * A.trace() / 20 * torch.eye(20, dtype=A.dtype)
    f, X = factor(A, ridge=ridge), randn(20, 3)
    assert isinstance(f, EigenFactor if rank == 12 and not ridge else CholeskyFactor)
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
    assert isinstance(f, EigenFactor)
    X = torch.randn(40, 5)
    want = torch.linalg.pinv(rows.double().T @ rows.double() / 64, hermitian=True, rtol=1e-8) @ X.double()
    torch.testing.assert_close(f.solve(X).double(), want, rtol=1e-3, atol=1e-3)
    assert factor(torch.zeros(4, 4)).solve(torch.ones(4, 1)).abs().max() == 0


@pytest.mark.parametrize("m", [15, 40])
def test_rows_solve_like_their_gram_matrix(m: int) -> None:
    rows, right = randn(m, 30), randn(30, 3)
    matrix, by_rows = factor(0.3 * rows.T @ rows, ridge=0.2), factor(rows=rows, scale=0.3, ridge=0.2)
    assert isinstance(by_rows, WoodburyFactor if m == 15 else CholeskyFactor)
    torch.testing.assert_close(by_rows.solve(right), matrix.solve(right), rtol=1e-10, atol=1e-10)


def test_scaling_the_loss_leaves_the_update_as_it_is() -> None:
    S, vh, scale = gram(randn(20, 6)), randn(4, 6), 1e-8
    update, scaled = factor(S, ridge=0.1).solve(vh.T), factor(scale * S, ridge=0.1).solve(scale * vh.T)
    torch.testing.assert_close(scaled, update, rtol=1e-9, atol=1e-12)


def test_non_finite_statistics_are_named() -> None:
    bad = torch.eye(3)
    bad[1, 2] = float("nan")
    with pytest.raises(ProfileError, match="second moment of size 3 holds NaN"):
        factor(bad)
    with pytest.raises(ProfileError, match="matrix A, or the rows"):
        factor()


@pytest.mark.parametrize("seed", range(3))
def test_eigenvectors_of_a_singular_matrix_in_float32(seed: int) -> None:
    # dead features, and eigenvalues over many orders of magnitude: LAPACK fails on some of these in float32
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(3, 128, generator=generator) * torch.logspace(0, -4, 3)[:, None]
    rows[:, torch.rand(128, generator=generator) < 0.5] = 0
    matrix = rows.mT @ rows
    values, vectors = eigen(matrix)
    torch.testing.assert_close(vectors * values @ vectors.mT, matrix)
