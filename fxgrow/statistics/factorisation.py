"""From second moments to new units: factors, the whitened SVD and the best update.

Matrices are sums or means; nothing here depends on which, beyond the scale of what comes out. Every ridge
and every threshold is relative, so that scaling the loss scales the results and changes no decision.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from fxgrow.errors import ProfileError
from fxgrow.statistics.gram import accumulating, add_gram, gram, matmul

EXACT = {torch.float64: 320, torch.float32: 128}  # up to so many rows or columns, all singular values are computed
DROP = 1e-6  # singular values below this part of the largest are dropped: such units have no variance


class Factor(Protocol):
    """A factored symmetric positive semi-definite matrix A + eps I = L L^T of size P."""

    def solve(self, right: Tensor) -> Tensor:
        """(A + eps I)^-1 X for X of ``[P, c]``; the pseudo-inverse where it is singular."""

    def whiten(self, right: Tensor) -> Tensor:
        """L^-1 X: ``[r, c]``, r the rank."""

    def unwhiten(self, right: Tensor) -> Tensor:
        """L^-T X for X of ``[r, c]``: ``[P, c]``."""


@dataclass(frozen=True)
class Cholesky:
    """A positive definite matrix by its lower triangle ``[P, P]``."""

    lower: Tensor

    def solve(self, right: Tensor) -> Tensor:
        """See `Factor.solve`."""
        if right.shape[1] > 0.75 * len(self.lower):  # two triangular solves take up to twice as long
            return torch.cholesky_inverse(self.lower) @ right
        solution: Tensor = torch.cholesky_solve(right, self.lower)
        return solution

    def whiten(self, right: Tensor) -> Tensor:
        """See `Factor.whiten`."""
        solution: Tensor = torch.linalg.solve_triangular(self.lower, right, upper=False)
        return solution

    def unwhiten(self, right: Tensor) -> Tensor:
        """See `Factor.unwhiten`."""
        solution: Tensor = torch.linalg.solve_triangular(self.lower.mT, right, upper=True)
        return solution


@dataclass(frozen=True)
class Spectral:
    """A singular matrix by the eigenvectors ``[P, r]`` and roots ``[r]`` of its eigenvalues that count."""

    vectors: Tensor
    roots: Tensor

    def solve(self, right: Tensor) -> Tensor:
        """See `Factor.solve`."""
        return self.unwhiten(self.whiten(right))

    def whiten(self, right: Tensor) -> Tensor:
        """See `Factor.whiten`."""
        return (self.vectors.mT @ right) / self.roots[:, None]

    def unwhiten(self, right: Tensor) -> Tensor:
        """See `Factor.unwhiten`."""
        return self.vectors @ (right / self.roots[:, None])


@dataclass(frozen=True)
class Dual:
    """scale * rows^T rows + eps I with fewer rows than features, by the factored ``[m, m]`` Gram of the rows.

    (A + eps)^-1 = (1 - rows^T (rows rows^T + eps / scale)^-1 rows) / eps (Woodbury). It can only solve.
    """

    rows: Tensor
    inner: Factor
    eps: float

    def solve(self, right: Tensor) -> Tensor:
        """See `Factor.solve`."""
        return (right - matmul(self.rows.mT, self.inner.solve(matmul(self.rows, right)))) / self.eps

    def whiten(self, right: Tensor) -> Tensor:
        """Not available.

        Raises:
            NotImplementedError: always; a root would cost the P x P matrix that the dual avoids.
        """
        raise NotImplementedError("a dual factor has no root: use solve")

    unwhiten = whiten


def factor(A: Tensor | None = None, rows: Tensor | None = None, scale: float = 1.0, ridge: float = 0.0) -> Factor:
    """Factor A + eps I, eps = ridge * trace(A) / P.

    Cholesky where it is safe. A matrix that is singular to working precision (with ``ridge=0``: too few
    samples, a dead feature) gets the eigen-decomposition and acts as its pseudo-inverse.

    Args:
        A: symmetric positive semi-definite ``[P, P]``, of which the upper triangle is read.
        rows: instead of A: ``[m, P]``, A = scale * rows^T rows. With m < P and a ridge, the m x m dual is
            factored.
        scale: see ``rows``.
        ridge: relative ridge.

    Raises:
        ProfileError: neither A nor rows are given, or they hold NaN or infinity.
    """
    rows = None if rows is None else accumulating(rows)
    if rows is not None and ridge > 0 and rows.shape[0] < rows.shape[1]:
        eps = ridge * scale * torch.linalg.vector_norm(rows).item() ** 2 / rows.shape[1]
        if eps > 0:
            return Dual(rows, _factored(add_gram(None, rows.mT), eps / scale), eps)
    if rows is not None:
        A = gram(rows) * scale
    if A is None:
        raise ProfileError("a factor needs the matrix A, or the rows it is made of")
    A = accumulating(A)
    return _factored(A, ridge * A.diagonal().mean().item())


def _factored(A: Tensor, eps: float) -> Factor:
    if not math.isfinite(A.sum()):
        raise ProfileError(
            f"a second moment of size {A.shape[0]} holds NaN or infinity: look for non-finite activations or gradients"
        )
    noise = A.shape[0] * torch.finfo(A.dtype).eps
    # transposed, as LAPACK stores it: factored in place, in the one copy that is made
    lower = A.clone(memory_format=torch.contiguous_format).mT
    lower.diagonal().add_(eps)
    failed = torch.linalg.cholesky_ex(lower, out=(lower, A.new_empty(0, dtype=torch.int))).info
    # Without a ridge, a pivot at rounding level is noise that the inverse would blow up.
    safe = eps > 0 or bool((lower.diagonal().square() > noise * A.diagonal()).all())
    if not failed and safe:
        return Cholesky(lower)
    # in float64: LAPACK's float32 eigensolver does not always converge on a singular matrix
    shifted = A.double() + eps * torch.eye(len(A), dtype=torch.float64, device=A.device)
    values, vectors = (t.to(A.dtype) for t in torch.linalg.eigh(shifted, UPLO="U"))
    keep = values > noise * values[-1:].clamp_min(0)
    return Spectral(vectors[:, keep], values[keep].sqrt())


def best_update(M: Tensor, vh: Tensor, ridge: float = 0.0) -> Tensor:
    """The best move of the weights that exist, dW* = E[V h^T] (M + eps)^-1.

    TINY (Verbockhaven et al. 2024) has the pseudo-inverse, which is ``ridge=0``.

    Args:
        M: E[h h^T], ``[H, H]``.
        vh: E[V h^T], ``[O, H]``.
        ridge: relative ridge on M.

    Returns:
        ``[O, H]``.
    """
    return factor(M, ridge=ridge).solve(vh.mT).mT


def bottleneck(vv_trace: float, vh: Tensor, update: Tensor) -> float:
    """Expressivity bottleneck E|V - dW* h|^2 = E|V|^2 - tr(E[V h^T] dW*^T) (TINY, Verbockhaven et al. 2024).

    Args:
        vv_trace: E|V|^2.
        vh: E[V h^T], ``[O, H]``.
        update: dW*, see `best_update`, ``[O, H]``.

    Returns:
        What no move of the existing weights can express, not negative.
    """
    return max(0.0, float(vv_trace) - (vh * update).sum().item())


def decrease(s: float, q: float) -> tuple[float, float]:
    """Predicted decrease p = max(s, 0)^2 / (2 q) and the scale gamma = s / q that reaches it.

    Without curvature (q = 0) nothing can be predicted: (0, 0).
    """
    return (max(s, 0.0) ** 2 / (2 * q), s / q) if q > 0 else (0.0, 0.0)
