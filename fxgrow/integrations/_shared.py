"""Parts that the integrations share: batches on the trainer's device, checks, messages."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from fxgrow.errors import FxgrowError, MissingExtraError
from fxgrow.training.data_source import Source, beside_training, check_source
from fxgrow.training.grower import Grower

G = TypeVar("G", bound=Grower)


def missing_package(name: str, error: ImportError) -> MissingExtraError:
    """Returns the error of an integration whose library cannot be imported."""
    return MissingExtraError(
        f"fxgrow.integrations.{name} needs the package {name}, which cannot be imported ({error}): "
        f"pip install 'fxgrow[{name}]'."
    )


def check_one_process(processes: int, who: str) -> None:
    """Refuses several processes: each would grow a network of its own."""
    if processes > 1:
        raise FxgrowError(
            f"{who} runs {processes} processes, and this integration supports one: the networks of the processes would "
            "differ. Run it with one process, or use fxgrow.Grower in a training loop of your own."
        )


def begun(grower: G | None) -> G:
    """Returns the Grower of a callback; refuses calls before training has begun."""
    if grower is None:
        raise FxgrowError("GrowthCallback has no Grower yet: the Trainer makes it when training begins.")
    return grower


def observe(grower: Grower, monitor: str, metrics: Mapping[str, Any], kind: str) -> None:
    """Gives a metric of the trainer to the schedule."""
    if monitor not in metrics:
        raise FxgrowError(f"monitor={monitor!r} is no {kind}; those are: {', '.join(metrics) or 'none'}.")
    grower.observe(metrics[monitor])


def on_device(source: Source, device: torch.device) -> Source:
    """Returns the source itself on the CPU; elsewhere a function that returns its batches on the device."""
    check_source(source)
    if device.type == "cpu":
        return source
    return lambda: _Moved(beside_training(source), device)


@dataclass(frozen=True)
class _Moved:
    loader: Iterable[Any]
    device: torch.device

    def __iter__(self) -> Iterator[Any]:
        for batch in self.loader:
            # batches of transformers are not dicts, and have a method for it
            has_to = hasattr(batch, "to") and not isinstance(batch, Tensor)
            yield batch.to(self.device) if has_to else pytree.tree_map_only(Tensor, lambda t: t.to(self.device), batch)

    def __len__(self) -> int:
        return len(self.loader)  # type: ignore[arg-type]

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or name in ("loader", "device"):
            raise AttributeError(name)
        return getattr(self.loader, name)  # its random generators, whose state growth restores
