"""Splitting steepest descent: units split along the most negative eigenvector of their splitting matrix.

Liu, Wu, Wang: "Splitting Steepest Descent for Growing Neural Architectures", NeurIPS 2019, arXiv 1910.02366, section
2. A unit sigma(theta^T b), with incoming weights theta `[D]`, becomes two, theta + delta and theta - delta, with half
its outgoing weights each. The loss changes by delta^T S delta / 2, S = E[(dl/d sigma) sigma''(theta^T b) b b^T]. With v
the eigenvector of the smallest eigenvalue lambda < 0, delta = eps v lowers it by eps^2 |lambda| / 2, for each unit of
the network; others stay as they are.

Here S is the second derivative in delta of the loss of the widened graph itself: the formula, but through whatever lies
between producer and consumer. S is only multiplied with, by double backward; lambda and v come from `STEPS` steps of
Lanczos (the paper takes all eigenvalues). eps is `EPS` times the mean length of the width's theta, then times the gamma
of the line search (the paper: a constant). Each unit is split at most once at a growth, the k best ones of a width.

A piecewise linear sigma has no second derivative. It gets that of its convolution with a box: [sigma'(a + r) -
sigma'(a - r)] / 2r, r half the root mean square of its inputs a in a batch (the paper smoothes too). So do ReLU, ReLU6,
LeakyReLU, PReLU, hardtanh, hardsigmoid and threshold; kinks of other functions, max-pools too, count as straight.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from fxgrow.errors import ProfileError
from fxgrow.initialisers.registry import InitialiserRequest, Splits, initialiser
from fxgrow.initialisers.splits import SplitGraph, SplitInitialiser, gradients, unit_vectors

#: length of delta at gamma = 1, relative to the incoming weights of its width
EPS = 0.1
#: products with S
STEPS = 12
#: half of the box that smoothes a kink, relative to the root mean square of what enters
BOX = 0.5
_KINKED = {
    F.relu, F.relu6, F.leaky_relu, F.hardtanh, F.hardsigmoid, F.threshold, torch.relu, torch.relu_, torch.prelu,
    torch.threshold, F.leaky_relu_, F.hardtanh_, Tensor.relu, Tensor.relu_, Tensor.prelu,
}  # fmt: skip
#: per width, one vector for every unit `[units, D]`
Vectors = dict[str, Tensor]


@initialiser("splitting", moments=False)
class Splitting(SplitInitialiser):
    """See the top of the file."""

    nothing = "no unit's splitting matrix has a negative eigenvalue: no split would lower the loss"

    def splits(self, request: InitialiserRequest) -> tuple[dict[str, Splits], float]:
        """A split of every unit."""
        matrix = SplittingMatrix(request)
        start = {
            name: torch.randn(t.shape, generator=request.generator, dtype=torch.float64).to(t)
            for name, t in matrix.theta.items()
        }
        values, vectors = smallest(matrix.product, start, STEPS)
        found = {}
        for name, theta in matrix.theta.items():
            eps = EPS * theta.norm(dim=1).mean()
            gains = (-0.5 * eps**2 * values[name]).double().cpu()
            found[name] = replace(split_every_unit(eps * vectors[name]), gains=gains)
        return found, matrix.loss


def split_every_unit(delta: Tensor) -> Splits:
    """Every unit of a width split along its row of `delta`."""
    return Splits(torch.arange(len(delta)), torch.zeros(len(delta), dtype=torch.bool), delta)


class SplittingMatrix:
    """S of every unit of the requested widths, all at once, on a copy of the graph with a copy of every unit."""

    def __init__(self, request: InitialiserRequest) -> None:
        #: incoming weights
        self.theta = {w.name: unit_vectors(request.analysed, w)[0] for w in request.widths}
        self.delta = {name: torch.zeros_like(t, requires_grad=True) for name, t in self.theta.items()}
        zero = {name: split_every_unit(delta) for name, delta in self.delta.items()}
        self.graph = SplitGraph(request, zero, SmoothKinks())
        self.parameters = self.graph.at(zero)
        #: mean loss, from the last product
        self.loss = 0.0

    @torch.enable_grad()
    def product(self, vectors: Vectors) -> Vectors:
        """S v for a vector of every unit."""
        delta, along = list(self.delta.values()), [vectors[name] for name in self.delta]

        def derive(loss: Tensor) -> Sequence[Tensor]:
            try:
                first = gradients(loss, delta, create_graph=True)
                slope = sum(((g * v).sum() for g, v in zip(first, along, strict=True)), loss.new_zeros(()))
                return gradients(slope, delta)
            except RuntimeError as error:
                raise ProfileError(
                    f"method='splitting' needs second derivatives, which this model does not have: {error}. "
                    "Choose another method."
                ) from error

        self.loss, second = self.graph.means(self.parameters, derive)
        return dict(zip(self.delta, second, strict=True))


def smallest(product: Callable[[Vectors], Vectors], start: Vectors, steps: int) -> tuple[Vectors, Vectors]:
    """The smallest eigenvalue `[units]` of each matrix and its vector: Lanczos with full orthogonalisation.

    Eigenvalues at zero or above may be reported as zero.
    """
    basis = {name: F.normalize(v, dim=1)[:, None] for name, v in start.items()}
    images = {name: v[:, :0] for name, v in basis.items()}
    for _ in range(steps):
        for name, image in product({name: known[:, -1] for name, known in basis.items()}).items():
            known, rest = basis[name], image[:, None]
            images[name] = torch.cat([images[name], rest], 1)
            rounding = 1e3 * torch.finfo(rest.dtype).eps * rest.norm(dim=2, keepdim=True)
            for _ in range(2):  # once more for what rounding left
                rest = rest - (rest @ known.mT) @ known
            rest = torch.where(rest.norm(dim=2, keepdim=True) > rounding, F.normalize(rest, dim=2), 0.0)
            basis[name] = torch.cat([known, rest], 1)
    values, vectors = {}, {}
    for name, v in start.items():
        known = basis[name][:, :-1].double()
        eigen = torch.linalg.eigh(known @ images[name].double().mT)
        values[name] = eigen.eigenvalues[:, 0].to(v)
        vectors[name] = torch.einsum("ukd,uk->ud", known, eigen.eigenvectors[:, :, 0]).to(v)
    return values, vectors


class SmoothKinks(TorchFunctionMode):
    """Piecewise linear functions that run in it have a second derivative; values and slopes stay."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func not in _KINKED:
            return func(*args, **kwargs or {})
        x, *rest = args

        def apply(t: Tensor) -> Tensor:
            # some work in place
            out: Tensor = func(t.clone(), *rest, **kwargs or {})
            return out

        slope = torch.func.grad(lambda t: apply(t).sum())
        at = x.detach()
        half = BOX * at.square().mean().sqrt().clamp_min(torch.finfo(at.dtype).tiny)
        curvature = (slope(at + half) - slope(at - half)).detach() / (2 * half)
        return apply(x) + curvature * (x - at).square() / 2
