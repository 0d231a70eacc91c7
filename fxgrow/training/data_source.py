"""A loader that growth may read while the training loop reads it too."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, cast

from torch.utils.data import DataLoader, IterableDataset

from fxgrow.errors import ProfileError

#: what a Grower takes: something to iterate over anew at each growth, or a function that makes it
Source = Iterable[Any] | Callable[[], Iterable[Any]]


def check_source(source: Source) -> None:
    """Refuses what only one growth could read.

    Raises:
        ProfileError: it is an iterator, or nothing to iterate over.
    """
    if hasattr(source, "__next__"):
        raise ProfileError(
            f"The dataloader is a {type(source).__name__}, which can be read only once, and each growth reads it anew: "
            "give a DataLoader, a list of batches, or a function that returns one of these."
        )
    if not hasattr(source, "__iter__") and not callable(source):
        raise ProfileError(f"The dataloader is a {type(source).__name__}, which cannot be iterated over.")


def beside_training(source: Source) -> Iterable[Any]:
    """The batches of a source, without touching an iterator of it that is in use.

    A DataLoader with persistent workers has one iterator, which every `iter` winds back: its data set is read without
    workers then.
    """
    loader = source() if callable(source) and not hasattr(source, "__iter__") else cast(Iterable[Any], source)
    if not isinstance(loader, DataLoader) or not (loader.persistent_workers and loader.num_workers):
        return loader
    if isinstance(loader.dataset, IterableDataset) or loader.batch_sampler is None:
        batches: dict[str, Any] = {"batch_size": loader.batch_size, "drop_last": loader.drop_last}
        if not isinstance(loader.dataset, IterableDataset):
            batches = {"batch_size": None, "sampler": loader.sampler}
    else:
        batches = {"batch_sampler": loader.batch_sampler}
    return DataLoader(loader.dataset, collate_fn=loader.collate_fn, generator=loader.generator, **batches)
