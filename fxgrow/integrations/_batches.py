"""Batches for a growth that a trainer's own loop would have moved to its device."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from fxgrow.errors import FxgrowError
from fxgrow.training.data_source import Source, beside_training, check_source


def on_device(source: Source, device: torch.device) -> Source:
    """The source itself on the CPU; elsewhere a function that gives its batches on the device."""
    check_source(source)
    if device.type == "cpu":
        return source
    made: Callable[[], Iterable[Any]] = lambda: _Moved(beside_training(source), device)  # noqa: E731
    return made


def check_one_process(processes: int, who: str) -> None:
    """Refuses to let each of several processes grow a net of its own.

    Raises:
        FxgrowError: there are several.
    """
    if processes > 1:
        raise FxgrowError(
            f"{who} runs {processes} processes, and this integration grows in one: the processes' networks would come "
            "apart. Run it with one process, or use fxgrow.Grower in a loop of your own."
        )


@dataclass(frozen=True)
class _Moved:
    loader: Iterable[Any]
    device: torch.device

    def __iter__(self) -> Iterator[Any]:
        for batch in self.loader:
            # batches of transformers are no dicts, and move themselves
            moves = hasattr(batch, "to") and not isinstance(batch, Tensor)
            yield batch.to(self.device) if moves else pytree.tree_map_only(Tensor, self._move, batch)

    def __len__(self) -> int:
        return len(self.loader)  # type: ignore[arg-type]

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or name in ("loader", "device"):
            raise AttributeError(name)
        return getattr(self.loader, name)  # its random generators, which growth winds back

    def _move(self, t: Tensor) -> Tensor:
        return t.to(self.device)
