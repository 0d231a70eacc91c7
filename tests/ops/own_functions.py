"""A function of another file than its callers, as a user's code has them."""

from __future__ import annotations

import torch
from torch import Tensor


def swirl(x: Tensor, gain: Tensor) -> Tensor:
    return torch.sin(x * gain[:, None, None]) + x
