"""torchvision's compiled operators in Python, where its library does not fit the installed PyTorch.

Detectors end in non-maximum suppression and read maps by `roi_align`; without these two they do not run at all.
"""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import torch
from torch import Tensor

_LIBRARIES: list[torch.library.Library] = []


def provide_kernels() -> None:
    """Lets detectors run on a CPU; does nothing where torchvision has its own operators, or was given these."""
    import torchvision
    from torchvision.ops import boxes

    if torchvision.extension._has_ops() or _LIBRARIES:
        return
    library = torch.library.Library("torchvision", "IMPL")
    library.impl("nms", _nms, "CPU")
    _LIBRARIES.append(library)
    boxes._assert_has_ops = lambda: None
    # torchvision compiles its Python version on first use, which takes longer than to run it
    module: Any = sys.modules["torchvision.ops.roi_align"]
    module._roi_align = module._roi_align.__wrapped__


def _nms(dets: Tensor, scores: Tensor, iou_threshold: float) -> Tensor:
    order = scores.argsort(descending=True, stable=True)
    x0, y0, x1, y1 = dets[order].detach().double().numpy().T
    area = (x1 - x0) * (y1 - y0)
    gone, keep = np.zeros(len(area), dtype=bool), []
    for i in range(len(area)):
        if gone[i]:
            continue
        keep.append(i)
        width = (np.minimum(x1[i], x1) - np.maximum(x0[i], x0)).clip(0)
        both = width * (np.minimum(y1[i], y1) - np.maximum(y0[i], y0)).clip(0)
        gone |= both > iou_threshold * (area[i] + area - both)
    return order[torch.tensor(keep, dtype=torch.long)]
