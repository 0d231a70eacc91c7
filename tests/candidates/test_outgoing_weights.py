"""Fits of outgoing weights against their definition, on random problems."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fxgrow.candidates.outgoing_weights import RIDGE, OutgoingWeightFit
from fxgrow.candidates.refit import decrease
from fxgrow.statistics.gram import gram


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def fitted(M: Tensor, vz: Tensor, G: Tensor, old: int = 2, update: bool = True) -> tuple[Tensor, float]:
    """W and its curvature, the first columns being those of existing weights."""
    columns = torch.arange(len(M))
    h, z = columns[:old], columns[old:]
    use: Any = None
    parts = M[h][:, h], M[h][:, z], M[z][:, z]
    new = {"w": torch.arange(len(z))[:, None]}
    fit = vz[:, h], vz[:, z]
    r = OutgoingWeightFit("", None, use, torch.arange(len(vz)), new, *parts, G, fit)
    r.held_out = fit
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
    p, scale = decrease([(s, q)]), s / q
    steps = torch.linspace(-3, 3, 6001, dtype=torch.float64) * abs(scale)
    best = (steps * s - steps**2 * q / 2).max().item()
    assert p == pytest.approx(best if s > 0 else 0.0)
    assert decrease([(-1.0, 2.0)]) == decrease([(1.0, 0.0)]) == 0.0


def test_scaling_the_loss_scales_the_weights() -> None:
    M, vz, G, c = gram(randn(20, 6)), randn(4, 6), gram(randn(20, 4)), 1e-4
    torch.testing.assert_close(fitted(M, c * vz, c * c * G)[0] / c, fitted(M, vz, G)[0], rtol=1e-9, atol=1e-12)
