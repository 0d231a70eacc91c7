"""Top singular vectors of a whitened matrix, without forming a square root."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fxgrow.errors import ProfileError
from fxgrow.statistics.factorisation import Factor, WoodburyFactor, eigen
from fxgrow.statistics.gram import gram

#: with at most this many rows or columns, all singular values are computed
EXACT = {torch.float64: 320, torch.float32: 128}
#: singular values below this fraction of the largest are dropped: such units have no variance
DROP = 1e-6
#: applications of the operator to a larger matrix, to reach working precision
SWEEPS = {torch.float64: 12, torch.float32: 8}
#: with at most this many columns, N^T S^-1 N is formed once and not applied in every sweep
SMALL = 512
OVERSAMPLING = 8


class Units(NamedTuple):
    """New units, best first."""

    #: incoming weights ``[P, k]``
    alpha: Tensor
    #: per consumer, outgoing weights ``[k, taps, O]``
    omega: list[Tensor]
    #: singular values lambda ``[r]``, r >= k: all above `DROP` where all were computed, else the first k
    values: Tensor


def top_units(blocks: list[Tensor], s: Factor, g: list[Factor] | None, k: int, sweeps: int | None = None) -> Units:
    """The k best units: SVD of S^(-1/2) N G^(-1/2) = U diag(lambda) W^T over all blocks of columns.

    alpha_k = sqrt(lambda_k) S^(-1/2) u_k and omega_k = sqrt(lambda_k) G^(-1/2) w_k (Verbockhaven et al. 2024,
    TINY, where G is the identity). Any root gives the same units, so no S^(-1/2) is formed:
    alpha solves N G^-1 N^T alpha = lambda^2 S alpha. Signs make the largest entry of an alpha positive.

    Args:
        blocks: per consumer ``[P, taps, O]``, the matrix N = E[b V^T] less what dW* expresses.
        s: factor of S.
        g: per consumer the factor of its G ``[O, O]``, None for the identity.
        k: largest number of units; those with singular values up to 1e-6 of the largest are dropped.
        sweeps: applications of the operator; None for as many as working precision needs.
    """
    if not all(math.isfinite(block.sum()) for block in blocks):
        raise ProfileError("the moment of inputs and gradients holds NaN or infinity: look for a non-finite loss")
    matrix = _Columns(blocks, g)
    if not isinstance(s, WoodburyFactor) and min(matrix.shape) <= EXACT[matrix.dtype]:
        u, values, wt = torch.linalg.svd(s.whiten(matrix.dense()), full_matrices=False)
        values = values[values > DROP * values[:1]]
        kept = min(k, len(values))
        alpha, right = s.unwhiten(u[:, :kept]) * values[:kept].sqrt(), wt[:kept].mT
    else:
        alpha, right, values = _by_columns(matrix, s, k, sweeps or SWEEPS[matrix.dtype])
    largest = alpha.abs().argmax(0, keepdim=True) if alpha.numel() else alpha.new_zeros(1, 0).long()
    sign = alpha.gather(0, largest).sign()
    right = right * sign * values[: alpha.shape[1]].sqrt()
    return Units(alpha * sign, [part.mT.unflatten(1, b.shape[1:]) for b, part in matrix.parts(right)], values)


class _Columns:
    """The matrix N G^(-1/2) over all blocks, `[P, c]`, as an operator: forming it costs more than a few products."""

    def __init__(self, blocks: list[Tensor], g: list[Factor] | None) -> None:
        self.blocks: list[Tensor] = blocks
        self.g: Sequence[Factor | None] = g or [None] * len(blocks)
        pairs = zip(blocks, self.g, strict=True)
        #: columns of each block: its taps times the rank of G
        self.sizes = [b.shape[1] * (len(g.whiten(b[0].mT[:, :0])) if g else b.shape[2]) for b, g in pairs]
        self.shape = len(blocks[0]), sum(self.sizes)
        self.dtype, self.device = blocks[0].dtype, blocks[0].device

    def dense(self) -> Tensor:
        """The matrix itself."""
        return torch.cat(self._whitened([b.flatten(1).mT for b in self.blocks])).mT

    def parts(self, x: Tensor) -> list[tuple[Tensor, Tensor]]:
        """The blocks, and G^(-T/2) x for the rows of x that belong to each."""
        parts = zip(self.blocks, self.g, x.split(self.sizes), strict=True)
        return [(b, _on_outputs(g.unwhiten, part, b.shape[1]) if g else part) for b, g, part in parts]

    def times(self, x: Tensor) -> Tensor:
        """The matrix times `[c, w]`."""
        return sum((b.flatten(1) @ part for b, part in self.parts(x)), x.new_zeros(()))

    def transposed_times(self, y: Tensor) -> Tensor:
        """Its transpose times `[P, w]`."""
        return torch.cat(self._whitened([b.flatten(1).mT @ y for b in self.blocks]))

    def _whitened(self, parts: list[Tensor]) -> list[Tensor]:
        triples = zip(self.blocks, self.g, parts, strict=True)
        return [_on_outputs(g.whiten, part, b.shape[1]) if g else part for b, g, part in triples]


def _on_outputs(apply: Callable[[Tensor], Tensor], rows: Tensor, taps: int) -> Tensor:
    """Applies a map from O to r dimensions to rows `[taps * O, w]`: `[taps * r, w]`."""
    out = apply(rows.unflatten(0, (taps, -1)).transpose(0, 1).flatten(1))
    return out.reshape(len(out), taps, rows.shape[1]).transpose(0, 1).flatten(0, 1)


def _by_columns(columns: _Columns, s: Factor, k: int, sweeps: int) -> tuple[Tensor, Tensor, Tensor]:
    """Top singular triples from S^-1 alone, as eigenvectors of N^T S^-1 N ``[c, c]``.

    With many columns by a block Krylov space (Musco and Musco 2015, algorithm 2): a block subspace iteration that
    keeps all its blocks, which needs the same products per sweep and far fewer sweeps.
    """
    count, dtype = columns.shape[1], columns.dtype
    width = min(k + OVERSAMPLING, count)
    exact = count <= EXACT[dtype] or width * sweeps >= count
    white = product = None
    #: S^-1 N G^(-T/2) times the basis
    solved: list[Tensor] = []
    if exact or (sweeps >= SWEEPS[dtype] and count <= SMALL and not isinstance(s, WoodburyFactor)):
        matrix = columns.dense()
        white = None if isinstance(s, WoodburyFactor) or count > SMALL else s.whiten(matrix)
        if white is None:
            solved.append(s.solve(matrix))
        product = matrix.mT @ solved[0] if white is None else gram(white)

    def operate(x: Tensor) -> Tensor:
        """G^(-1/2) N^T S^-1 N G^(-T/2) x."""
        if product is not None:
            return product @ x
        solved.append(s.solve(columns.times(x)))
        return columns.transposed_times(solved[-1])

    if exact and product is not None:
        squares, inside = eigen((product + product.mT) / 2)
        basis = None
    else:
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(count, width, generator=generator, dtype=torch.float64).to(columns.device, dtype)
        x = torch.linalg.qr(x).Q
        basis, images = x, operate(x)
        for _ in range(sweeps - 1):
            x = images[:, -width:]
            for _ in range(2):  # once is not enough in floating point
                x = torch.linalg.qr(x - basis @ (basis.mT @ x)).Q
            basis, images = torch.cat([basis, x], 1), torch.cat([images, operate(x)], 1)
        small = basis.mT @ images
        squares, inside = eigen((small + small.mT) / 2)
        squares, inside = squares[-k:], inside[:, -k:]
    squares, inside = squares.flip(0), inside.flip(1)
    # squaring hides more of the tail in rounding than DROP does
    noise = max(DROP**2, count * torch.finfo(dtype).eps)
    values = squares[squares > noise * squares[:1].clamp_min(0)].sqrt()
    inside = inside[:, : min(k, len(values))]
    right = inside if basis is None else basis @ inside
    alpha = torch.cat(solved, 1) @ inside if white is None else s.unwhiten(white @ right)
    return alpha / values[: inside.shape[1]].sqrt(), right, values
