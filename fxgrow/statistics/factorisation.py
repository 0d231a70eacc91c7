"""Factored second moments: Cholesky, eigen-decomposition or Woodbury identity, with a relative ridge.

Every ridge and threshold is relative, so that scaling the loss scales the results and changes no decision.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from fxgrow.errors import ProfileError
from fxgrow.statistics.gram import accumulating, add_gram, gram, matrix_product


class Factor(ABC):
    """A factored symmetric positive semi-definite matrix A + eps I = L L^T of size P."""

    def solve(self, right: Tensor) -> Tensor:
        """(A + eps I)^-1 X for X of ``[P, c]``; the pseudo-inverse where it is singular."""
        return self.unwhiten(self.whiten(right))

    @abstractmethod
    def whiten(self, right: Tensor) -> Tensor:
        """L^-1 X: ``[r, c]``, r the rank."""

    @abstractmethod
    def unwhiten(self, right: Tensor) -> Tensor:
        """L^-T X for X of ``[r, c]``: ``[P, c]``."""


@dataclass(frozen=True)
class CholeskyFactor(Factor):
    """A positive definite matrix by its lower triangle ``[P, P]``."""

    lower: Tensor

    def solve(self, right: Tensor) -> Tensor:
        if right.shape[1] > 0.75 * len(self.lower):  # two triangular solves take up to twice as long
            return torch.cholesky_inverse(self.lower) @ right
        return torch.cholesky_solve(right, self.lower)

    def whiten(self, right: Tensor) -> Tensor:
        return torch.linalg.solve_triangular(self.lower, right, upper=False)  # type: ignore[no-any-return]

    def unwhiten(self, right: Tensor) -> Tensor:
        return torch.linalg.solve_triangular(self.lower.mT, right, upper=True)  # type: ignore[no-any-return]


@dataclass(frozen=True)
class EigenFactor(Factor):
    """A singular matrix by its eigenvectors ``[P, r]`` and the roots ``[r]`` of its non-zero eigenvalues."""

    vectors: Tensor
    roots: Tensor

    def whiten(self, right: Tensor) -> Tensor:
        return (self.vectors.mT @ right) / self.roots[:, None]

    def unwhiten(self, right: Tensor) -> Tensor:
        return self.vectors @ (right / self.roots[:, None])


@dataclass(frozen=True)
class WoodburyFactor(Factor):
    """scale * rows^T rows + eps I with fewer rows than features, by the factored ``[m, m]`` Gram of the rows.

    (A + eps)^-1 = (1 - rows^T (rows rows^T + eps / scale)^-1 rows) / eps (Woodbury identity). It can only solve: a root
    needs the P x P matrix that is avoided here.
    """

    rows: Tensor
    inner: Factor
    eps: float

    def solve(self, right: Tensor) -> Tensor:
        return (right - matrix_product(self.rows.mT, self.inner.solve(matrix_product(self.rows, right)))) / self.eps

    def whiten(self, right: Tensor) -> Tensor:
        raise NotImplementedError("a Woodbury factor has no root: use solve")

    unwhiten = whiten


def factor(A: Tensor | None = None, rows: Tensor | None = None, scale: float = 1.0, ridge: float = 0.0) -> Factor:
    """Factors A + eps I, eps = ridge * trace(A) / P, of A ``[P, P]`` (in its upper triangle) or scale * rows^T rows.

    The result is a Cholesky factor where that is safe. A matrix that is singular to working precision (too few samples
    or a dead feature, with ``ridge=0``) gets an eigen-decomposition, which solves with the pseudo-inverse. With fewer
    rows than features and a ridge, the Gram matrix ``[m, m]`` of the rows is factored.
    """
    rows = None if rows is None else accumulating(rows)
    if rows is not None and ridge > 0 and rows.shape[0] < rows.shape[1]:
        eps = ridge * scale * torch.linalg.vector_norm(rows).item() ** 2 / rows.shape[1]
        if eps > 0:
            return WoodburyFactor(rows, _factored(add_gram(None, rows.mT), eps / scale), eps)
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
    # without a ridge, a pivot at rounding level is noise that the inverse would amplify
    safe = eps > 0 or bool((lower.diagonal().square() > noise * A.diagonal()).all())
    if not failed and safe:
        return CholeskyFactor(lower)
    values, vectors = eigen(A, eps)
    keep = values > noise * values[-1:].clamp_min(0)
    return EigenFactor(vectors[:, keep], values[keep].sqrt())


def eigen(A: Tensor, shift: float = 0.0) -> tuple[Tensor, Tensor]:
    """Eigenvalues, ascending, and eigenvectors of A + shift I, of A in its upper triangle.

    In float64: LAPACK's float32 eigensolver does not always converge on a singular matrix, and returns NaN.
    """
    shifted = A.double() + shift * torch.eye(len(A), dtype=torch.float64, device=A.device)
    values, vectors = torch.linalg.eigh(shifted, UPLO="U")
    return values.to(A.dtype), vectors.to(A.dtype)


def bottleneck(vv: float, vh: Tensor, update: Tensor) -> float:
    """The expressivity bottleneck Psi = E|V - dW* h|^2 = E|V|^2 - tr(E[V h^T] dW*^T) of TINY (arXiv 2405.19816)."""
    return max(0.0, float(vv) - (vh * update).sum().item())
