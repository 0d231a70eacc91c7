"""Integrations are imported by those who ask for them, and say what is missing."""

from __future__ import annotations

import importlib
import subprocess
import sys

import pytest
import torch

import fxgrow
from fxgrow.integrations import _shared

PACKAGES = {"lightning": "lightning.pytorch", "transformers": "transformers", "accelerate": "accelerate"}


@pytest.mark.parametrize("name", PACKAGES)
def test_a_missing_package(name, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, PACKAGES[name], None)
    monkeypatch.delitem(sys.modules, f"fxgrow.integrations.{name}", raising=False)
    with pytest.raises(fxgrow.MissingExtraError, match=rf"pip install 'fxgrow\[{name}\]'"):
        importlib.import_module(f"fxgrow.integrations.{name}")


def test_importing_fxgrow_imports_none_of_them() -> None:
    code = f"import sys, fxgrow; sys.exit(bool({set(PACKAGES)} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_shared_are_moved() -> None:
    """To another device than the CPU, whatever they are made of."""

    class Own(dict):
        def to(self, device):
            return {name: t.to(device) for name, t in self.items()}

    loader = [(torch.zeros(2), {"y": torch.zeros(1)}), Own(x=torch.zeros(3))]
    source = _shared.on_device(loader, torch.device("meta"))
    first, second = source()
    assert first[0].device.type == first[1]["y"].device.type == second["x"].device.type == "meta"
    assert len(source()) == 2
    assert _shared.on_device(loader, torch.device("cpu")) is loader


def test_random_generators_of_a_moved_loader_are_found() -> None:
    order = torch.Generator()
    loader = torch.utils.data.DataLoader([torch.zeros(1)], generator=order)
    moved = _shared.on_device(loader, torch.device("meta"))()
    assert moved.generator is order
