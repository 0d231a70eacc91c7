"""Top singular vectors of a whitened matrix, without forming a square root."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fxgrow.errors import ProfileError
from fxgrow.statistics.factorisation import Factor, WoodburyFactor
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


@dataclass(frozen=True)
class Units:
    """New units, best first.

    Attributes:
        alpha: ``[P, k]`` incoming weights.
        omega: per consumer, ``[k, taps, O]`` outgoing weights.
        values: ``[r]`` singular values lambda, r >= k: all above `DROP` where all were computed, else the first k.
    """

    alpha: Tensor
    omega: list[Tensor]
    values: Tensor


def top_units(blocks: list[Tensor], s: Factor, g: list[Factor] | None, k: int, sweeps: int | None = None) -> Units:
    """The k best units: SVD of S^(-1/2) N G^(-1/2) = U diag(lambda) W^T over all blocks of columns.

    alpha_k = sqrt(lambda_k) S^(-1/2) u_k and omega_k = sqrt(lambda_k) G^(-1/2) w_k (Verbockhaven et al. 2024,
    TINY, where G is the identity). Any root gives the same units, so no S^(-1/2) is formed:
    alpha solves N G^-1 N^T alpha = lambda^2 S alpha.

    Args:
        blocks: per consumer ``[P, taps, O]``, the matrix N = E[b V^T] less what dW* expresses.
        s: factor of S.
        g: per consumer the factor of its G ``[O, O]``, None for the identity.
        k: largest number of units.
        sweeps: applications of the operator; None for as many as working precision needs.

    Returns:
        At most k units: singular values up to 1e-6 of the largest are dropped. The sign of a unit makes the
        entry of alpha with the largest magnitude positive; results are deterministic.

    Raises:
        ProfileError: N holds NaN or infinity.
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
        self.blocks, self.g = blocks, g
        #: per block, columns of each tap: the rank of G
        self.ranks = [len(g[i].whiten(b[0].mT[:, :0])) if g else b.shape[2] for i, b in enumerate(blocks)]
        self.sizes = [b.shape[1] * r for b, r in zip(blocks, self.ranks, strict=True)]
        self.shape = len(blocks[0]), sum(self.sizes)
        self.dtype, self.device = blocks[0].dtype, blocks[0].device

    def dense(self) -> Tensor:
        """The matrix itself."""
        columns = [(_on_columns(b, self.g[i].whiten) if self.g else b).flatten(1) for i, b in enumerate(self.blocks)]
        return torch.cat(columns, 1) if len(columns) > 1 else columns[0]

    def parts(self, x: Tensor) -> list[tuple[Tensor, Tensor]]:
        """The blocks, and G^(-T/2) x for the rows of x that belong to each."""
        out = []
        for i, (block, part) in enumerate(zip(self.blocks, x.split(self.sizes), strict=True)):
            if self.g:
                # [taps, O, w]: G acts on O
                taps = block.shape[1]
                part = self.g[i].unwhiten(part.unflatten(0, (taps, self.ranks[i])).transpose(0, 1).flatten(1))
                part = part.unflatten(1, (taps, x.shape[1])).transpose(0, 1).flatten(0, 1)
            out.append((block, part))
        return out

    def times(self, x: Tensor) -> Tensor:
        """The matrix times `[c, w]`."""
        return sum((b.flatten(1) @ part for b, part in self.parts(x)), x.new_zeros(()))

    def transposed_times(self, y: Tensor) -> Tensor:
        """Its transpose times `[P, w]`."""
        columns = []
        for i, block in enumerate(self.blocks):
            part = block.flatten(1).mT @ y
            if self.g:
                part = self.g[i].whiten(part.unflatten(0, block.shape[1:]).transpose(0, 1).flatten(1))
                part = part.unflatten(1, (block.shape[1], y.shape[1])).transpose(0, 1).flatten(0, 1)
            columns.append(part)
        return torch.cat(columns)


def _on_columns(block: Tensor, apply: Callable[[Tensor], Tensor]) -> Tensor:
    flat = block.flatten(0, 1).mT
    out = apply(flat).mT
    return out.reshape(*block.shape[:2], out.shape[-1])


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
        squares, inside = torch.linalg.eigh((product + product.mT) / 2)
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
        squares, inside = torch.linalg.eigh((small + small.mT) / 2)
        squares, inside = squares[-k:], inside[:, -k:]
    squares, inside = squares.flip(0), inside.flip(1)
    # squaring hides more of the tail in rounding than DROP does
    noise = max(DROP**2, count * torch.finfo(dtype).eps)
    values = squares[squares > noise * squares[:1].clamp_min(0)].sqrt()
    kept = min(k, len(values))
    inside = inside[:, :kept]
    right = inside if basis is None else basis @ inside
    alpha = torch.cat(solved, 1) @ inside if white is None else s.unwhiten(white @ right)
    return alpha / values[:kept].sqrt(), right, values
