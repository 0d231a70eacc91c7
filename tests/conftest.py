"""What holds for every test: one thread, a fixed seed, a torchvision that imports."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator

import pytest
import torch

from fxgrow.integrations._torchvision import import_torchvision

# Plots are written to files, never shown.
os.environ.setdefault("MPLBACKEND", "Agg")
# Most tensors are so small that threads would only wait for each other.
torch.set_num_threads(1)

if importlib.util.find_spec("torchvision") is not None:
    import_torchvision()


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture
def float64() -> Iterator[None]:
    """float64 as the default dtype."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests marked ``gpu`` where there is no CUDA device."""
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu") is not None:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
