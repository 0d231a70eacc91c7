"""Which parameter of a grown model replaces which old one, and where the old entries are in it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TypeAlias

import torch
from torch import Tensor, nn

from fxgrow.errors import FxgrowError
from fxgrow.graph.graph import put

#: per dimension of a parameter, the positions of its old entries in the new one; None: the dimension did not change
Positions: TypeAlias = tuple[Tensor | None, ...]
#: makes a prepared change; it cannot fail
Assign: TypeAlias = Callable[[], None]


@dataclass(frozen=True)
class ParameterMove:
    """An old parameter, the new one that replaces it, and the positions of the old entries in that."""

    name: str
    old: nn.Parameter
    new: nn.Parameter
    positions: Positions

    @property
    def unchanged(self) -> bool:
        return all(where is None for where in self.positions)


@dataclass(frozen=True)
class ParameterChange:
    """A growth: the models before and after, without wrappers."""

    old: nn.Module
    new: nn.Module
    #: of each parameter and buffer that grew; of tied parameters any one name is enough
    index: Mapping[str, Positions]

    @cached_property
    def names(self) -> dict[int, list[str]]:
        """All names of each old parameter, by its id."""
        names: dict[int, list[str]] = {}
        for name, parameter in self.old.named_parameters(remove_duplicate=False):
            names.setdefault(id(parameter), []).append(name)
        return names

    @cached_property
    def moves(self) -> list[ParameterMove]:
        """The moves of all old parameters."""
        return [self.move(parameter) for parameter in self.old.parameters()]

    @cached_property
    def _new_parameters(self) -> dict[str, nn.Parameter]:
        return dict(self.new.named_parameters(remove_duplicate=False))

    def move(self, parameter: nn.Parameter) -> ParameterMove:
        """Returns what becomes of a parameter of the old model, if the names, ties and shapes of the new one fit."""
        names = self.names[id(parameter)]
        kept = [name for name in names if name in self._new_parameters]
        if not kept:
            raise FxgrowError(f"the grown model has no parameter {names[0]!r}; it must keep the old names")
        new = self._new_parameters[kept[0]]
        untied = [name for name in kept if self._new_parameters[name] is not new]
        if untied:
            raise FxgrowError(
                f"{kept[0]!r} and {untied[0]!r} are one parameter in the old model and two in the grown one; "
                "tie them again before the optimizer is passed on"
            )
        given = [self.index[name] for name in names if name in self.index]
        positions = given[0] if given else (None,) * parameter.dim()
        _check_positions(names[0], parameter, new, positions)
        return ParameterMove(names[0], parameter, new, positions)


def _check_positions(name: str, old: Tensor, new: Tensor, positions: Positions) -> None:
    if not old.dim() == new.dim() == len(positions):
        raise FxgrowError(
            f"parameter {name!r} of shape {list(old.shape)} cannot become {list(new.shape)} with "
            f"{len(positions)} index entries; there must be one per dimension"
        )
    for dim, where in enumerate(positions):
        before, after = old.shape[dim], new.shape[dim]
        if where is None:
            fits, given = before == after, "no index"
        else:
            values = where.tolist()
            fits = len(values) == before == len(set(values)) and all(0 <= v < after for v in values)
            given = f"an index of {len(values)} entries"
        if not fits:
            raise FxgrowError(
                f"dimension {dim} of parameter {name!r} goes from {before} to {after} with {given}; give the "
                f"new position, each once and below {after}, of every old entry"
            )


def spread(old: Tensor, positions: Positions, new: Tensor) -> Tensor:
    """Returns a copy of `new` with the dtype and device of `old`, and the entries of `old` at their positions."""
    out = new.detach().clone().to(device=old.device, dtype=old.dtype)
    put_at(out, positions, old.detach())
    return out


def put_at(out: Tensor, positions: Positions, value: Tensor) -> None:
    """Writes entries at their positions; None is all of a dimension."""
    put(out, [torch.arange(n) if at is None else at for n, at in zip(out.shape, positions, strict=True)], value)
