"""One progress bar, where tqdm is installed and wanted."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")


def progress(items: Iterable[T], text: str, total: int | None, enabled: bool) -> Iterator[T]:
    """Yields `items`, showing a bar on standard error if `enabled` and tqdm can be imported."""
    if enabled:
        with contextlib.suppress(ImportError):
            from tqdm.auto import tqdm

            items = tqdm(items, desc=f"fxgrow: {text}", total=total, leave=False, unit="batch")
    yield from items
