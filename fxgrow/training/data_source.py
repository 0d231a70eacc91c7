"""Batches that growth reads from a loader which the training loop may be reading too."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, cast

from torch.utils.data import DataLoader, IterableDataset

from fxgrow.data.batches import check_iterable
from fxgrow.errors import ProfileError

#: an iterable that each growth reads anew, or a function that returns one
Source = Iterable[Any] | Callable[[], Iterable[Any]]


def check_source(source: Source) -> None:
    """Refuses data that can be read only once, or not at all."""
    if hasattr(source, "__next__"):
        raise ProfileError(
            f"The dataloader is a {type(source).__name__}, which can be read only once, and each growth reads it anew: "
            "give a DataLoader, a list of batches, or a function that returns one of these."
        )
    if isinstance(source, type) or not callable(source):
        check_iterable(source)


def beside_training(source: Source) -> Iterable[Any]:
    """Returns the batches of a source without disturbing an iterator that is in use.

    A DataLoader with persistent workers has a single iterator, which every `iter` resets: its data set is then read
    without workers.
    """
    loader = source() if callable(source) and not hasattr(source, "__iter__") else cast(Iterable[Any], source)
    if not isinstance(loader, DataLoader) or not (loader.persistent_workers and loader.num_workers):
        return loader
    batches: dict[str, Any] = {"batch_sampler": loader.batch_sampler}
    if isinstance(loader.dataset, IterableDataset):
        batches = {"batch_size": loader.batch_size, "drop_last": loader.drop_last}
    elif loader.batch_sampler is None:
        batches = {"batch_size": None, "sampler": loader.sampler}
    return DataLoader(loader.dataset, collate_fn=loader.collate_fn, generator=loader.generator, **batches)
