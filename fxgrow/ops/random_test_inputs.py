"""Random inputs for `fxgrow.ops.equivariance_test`, and selections of units that show where units interact."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

#: with more elements than this only the most informative kinds of values are tried
MANY = 1 << 18
#: smallest number of units in a test: with two or three, an operator may look equivariant by coincidence
MIN_UNITS = 12
#: standard deviations of the kinds of values that may be negative
_SCALES = {1: 30.0, 3: 2.0, 4: 0.3, 5: 1.0, 6: 1.0}
#: kinds whose units differ in magnitude, from e^-s to e^s
_SPREADS = {5: 13.0, 6: 6.0}


def kinds(elements: int) -> tuple[int, ...]:
    """The kinds to try: operators have domains, and code may branch on signs and magnitudes."""
    return (1, 5, 6) if elements > MANY else tuple(range(7))


@dataclass(frozen=True)
class Layout:
    """How the units of an axis are laid out: `copies` times all units in order, each as `inner` consecutive entries."""

    copies: int = 1
    inner: int = 1

    @property
    def entries(self) -> int:
        """Entries per unit."""
        return self.copies * self.inner

    def positions(self, chosen: Tensor, units: int) -> Tensor:
        """Positions of the entries of the chosen units, in an axis of `units` units."""
        block = (chosen[:, None] * self.inner + torch.arange(self.inner)).flatten()
        return torch.cat([block + copy * units * self.inner for copy in range(self.copies)])


def random_values(shape: tuple[int, ...], dtype: torch.dtype, kind: int, generator: torch.Generator) -> Tensor:
    """Values of one kind: probabilities, large, at least one, integers, small, and two for units of all magnitudes."""
    if dtype == torch.bool:
        return torch.rand(shape, generator=generator) < 0.5
    if not (dtype.is_floating_point or dtype.is_complex):
        return torch.randint(0, 2, shape, generator=generator).to(dtype)
    if dtype.is_complex:
        return torch.randn(shape, generator=generator, dtype=torch.complex128)
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    if kind == 0:
        return x.sigmoid() * 0.9 + 0.05
    if kind == 2:
        return 1 + x.abs()
    x = x * _SCALES[kind]
    return x.round() if kind == 3 else x  # zeros and ties


def separate_units(x: Tensor, dim: int, layout: Layout, level: Tensor, kind: int) -> Tensor:
    """Shifts each unit, or scales it (kinds in `_SPREADS`), by its `level` between -1 and 1.

    Sums and maxima over different selections of units then differ clearly, so that a branch on them shows.
    """
    if kind not in _SCALES or not x.is_floating_point():
        return x
    entries = level.repeat_interleave(layout.inner).repeat(layout.copies)
    along = entries.reshape(-1, *[1] * (x.dim() - dim - 1))
    return x * (_SPREADS[kind] * along).exp() if kind in _SPREADS else x + 4 * _SCALES[kind] * along


def index_selections(
    x: Tensor, dim: int, layout: Layout, units: int, kind: int, generator: torch.Generator
) -> list[Tensor]:
    """Indices of units of `x` to select.

    The first `units` ones; all in random order; `units + 1` random ones; the highest by their mean (mean magnitude for
    kinds in `_SPREADS`); and the lowest, more of them in each step, so that a branch on a sum or a maximum takes both
    sides.
    """
    values = (x.real if x.is_complex() else x).double()
    values = values.abs() if kind in _SPREADS else values
    other = [d for d in range(x.dim()) if d != dim]
    means = values.mean(other) if other else values
    order = means.reshape(layout.copies, -1, layout.inner).mean((0, 2)).argsort()
    steps = 12 if kind in _SPREADS else 2
    parts = sorted({max(1, len(order) * i // (steps + 1)) for i in range(1, steps + 1)})
    return [
        torch.arange(units),
        torch.randperm(len(order), generator=generator),
        torch.randint(len(order), (units + 1,), generator=generator),
        order[-parts[0] :].repeat_interleave(2),
        *(order[:n].repeat_interleave(2) for n in parts),
    ]
