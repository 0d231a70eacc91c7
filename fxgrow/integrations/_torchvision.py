"""Imports torchvision, also with a PyTorch build that its compiled operators were not made for.

torchvision's wheel on the package index is linked against CUDA. With a CPU build of PyTorch its library cannot be
loaded, and the import stops at the first registration for an operator that the library would have declared. Only
detection models call these operators; declaring their schemas is enough for everything else.
"""

from __future__ import annotations

import importlib
import threading
from types import ModuleType

import torch

from fxgrow.errors import MissingExtraError

_SIGNATURE = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
_OPERATORS = ("nms", "qnms")
# a Library withdraws its declarations when it is collected, hence one that lives as long as the process
_declared: list[torch.library.Library] = []
_lock = threading.Lock()


def import_torchvision() -> ModuleType:
    """Returns the torchvision module, and declares the operators it misses where its library cannot be loaded.

    Raises:
        MissingExtraError: torchvision is not installed, or does not fit this PyTorch in another way.

    Example:
        >>> torchvision = import_torchvision()
        >>> torchvision.models.squeezenet1_1().classifier[1].out_channels
        1000
    """
    with _lock:
        try:
            return importlib.import_module("torchvision")
        except ModuleNotFoundError as error:
            raise MissingExtraError(
                f"torchvision needs the package {error.name!r}, which is not installed: pip install fxgrow[vision]"
            ) from error
        except RuntimeError as error:
            fault: Exception = error
        if any(f"torchvision::{name} " in f"{fault} " for name in _OPERATORS):
            _declare_missing()
            try:
                return importlib.import_module("torchvision")
            except Exception as error:
                fault = error
        raise MissingExtraError(
            f"torchvision is installed but does not import under torch {torch.__version__}: {fault}. "
            "Install the pair of versions made for each other: pip install --upgrade fxgrow[vision]"
        ) from fault


def _declare_missing() -> None:
    """Declares the schemas that no loaded library has declared."""
    library = torch.library.Library("torchvision", "FRAGMENT")
    for name in _OPERATORS:
        if not hasattr(torch.ops.torchvision, name):
            library.define(name + _SIGNATURE)
    _declared.append(library)
