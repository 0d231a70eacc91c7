"""torchvision imports under this PyTorch; a healthy one is left alone; any other fault is told."""

from __future__ import annotations

import importlib
import sys
from types import ModuleType

import pytest
import torch

from fxgrow.errors import MissingExtraError
from fxgrow.integrations import _torchvision
from fxgrow.integrations._torchvision import import_torchvision


def test_networks_build() -> None:
    pytest.importorskip("torchvision")
    torchvision = import_torchvision()
    model = torchvision.models.resnet18(num_classes=5).eval()
    with torch.no_grad():
        assert model(torch.randn(1, 3, 32, 32)).shape == (1, 5)
    assert import_torchvision() is torchvision
    # Declared by torchvision's own library or by us, and never twice.
    assert torch.ops.torchvision.nms.default._schema.arguments[2].name == "iou_threshold"
    assert len(_torchvision._declared) <= 1


def test_healthy_torchvision_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    healthy = ModuleType("torchvision")
    monkeypatch.setattr(importlib, "import_module", lambda name: healthy)
    monkeypatch.setattr(_torchvision, "_declare_missing", lambda: pytest.fail("declared a schema"))
    assert import_torchvision() is healthy


def test_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchvision", None)
    with pytest.raises(MissingExtraError, match=r"not installed: pip install fxgrow\[vision\]"):
        import_torchvision()


def test_another_fault_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(name: str) -> ModuleType:
        raise RuntimeError("compiled with another major version")

    monkeypatch.setattr(importlib, "import_module", broken)
    monkeypatch.setattr(_torchvision, "_declare_missing", lambda: pytest.fail("declared a schema"))
    with pytest.raises(MissingExtraError, match="does not import under torch.*another major version"):
        import_torchvision()
