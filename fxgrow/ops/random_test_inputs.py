"""Made-up values to try an operator on, and choices of units, by which it shows whether it looks at all of them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

#: kinds of values; operators have domains, and code may decide by signs and sizes
KINDS = tuple(range(7))
#: those that say most, for large tensors
FEW_KINDS = (1, 5, 6)
#: at least so many units are made up: with two or three some coincidence would pass for a law
MIN_UNITS = 12
#: standard deviations of the kinds of values that may be negative
_SCALES = {1: 30.0, 3: 2.0, 4: 0.3, 5: 1.0, 6: 1.0}
#: of some kinds the units differ in size, from e^-s to e^s
SPREADS = {5: 13.0, 6: 6.0}


@dataclass(frozen=True)
class Layout:
    """How the units of an axis lie: `copies` times all units in order, each of `inner` neighbouring entries."""

    copies: int = 1
    inner: int = 1

    @property
    def entries(self) -> int:
        """Entries per unit."""
        return self.copies * self.inner

    def positions(self, chosen: Tensor, units: int) -> Tensor:
        """Where the entries of the chosen units lie in an axis of so many units."""
        block = (chosen[:, None] * self.inner + torch.arange(self.inner)).flatten()
        return torch.cat([block + copy * units * self.inner for copy in range(self.copies)])


def random_values(shape: tuple[int, ...], dtype: torch.dtype, kind: int, generator: torch.Generator) -> Tensor:
    """Values of one kind: probabilities, large, at least one, whole numbers, small, and for units of all sizes."""
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
    if kind == 3:
        return (x * _SCALES[3]).round()  # zeros and ties
    return x * _SCALES[kind]


def separate_units(x: Tensor, dim: int, layout: Layout, level: Tensor, kind: int) -> Tensor:
    """Units unlike each other in sign or, of the last kinds, in size: by their `level` between -1 and 1.

    No sum or maximum over some units is like that over others, so that a decision on it is seen.
    """
    if kind not in _SCALES or not x.is_floating_point():
        return x
    entries = level.repeat_interleave(layout.inner).repeat(layout.copies)
    along = entries.reshape(-1, *[1] * (x.dim() - dim - 1))
    return x * (SPREADS[kind] * along).exp() if kind in SPREADS else x + 4 * _SCALES[kind] * along


def levels(x: Tensor, dim: int, layout: Layout, units: int, sizes: bool) -> Tensor:
    """The mean (or the mean size) of every unit, by which the highest and the lowest are chosen."""
    values = x.real if x.is_complex() else x
    values = values.double().abs() if sizes else values.double()
    other = [d for d in range(x.dim()) if d != dim]
    means = values.mean(other) if other else values
    return means.reshape(layout.copies, units, layout.inner).mean((0, 2))


def index_selections(levels: Tensor, units: int, steps: int, generator: torch.Generator) -> list[Tensor]:
    """Units to choose.

    The first ones as if others had been added behind them, all in another order, one more than there were, the highest
    alone, and the lowest, more in each of so many steps: a decision on a sum or a maximum comes out differently.
    """
    order = levels.argsort()
    parts = sorted({max(1, len(order) * i // (steps + 1)) for i in range(1, steps + 1)})
    return [
        torch.arange(units),
        torch.randperm(len(order), generator=generator),
        torch.randint(len(order), (units + 1,), generator=generator),
        order[-parts[0] :].repeat_interleave(2),
        *(order[:n].repeat_interleave(2) for n in parts),
    ]
