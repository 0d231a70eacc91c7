"""Torch-function modes under which a network and a wider copy of it can be compared."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree


class InDouble(TorchFunctionMode):
    """Code that computes in float32 by name (norms, softmax) would round away what is compared."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        args, kwargs = pytree.tree_map(lambda a: torch.float64 if a is torch.float32 else a, (args, kwargs or {}))
        return (torch.Tensor.double if func is torch.Tensor.float else func)(*args, **kwargs)


class SameNoise(TorchFunctionMode):
    """Random numbers are a function of their place in the tensor; a functional dropout keeps everything.

    New units stand after the old ones, so that the old ones of a wider tensor get the numbers they had.
    """

    def __init__(self) -> None:
        super().__init__()
        self.drawn = 0

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _KEEPS:
            return args[0] if args else kwargs["input"]
        out = func(*args, **kwargs)
        if func in _DRAWS and out.is_floating_point():
            self.drawn += 1
            given = [a for a in (*args, *kwargs.values()) if isinstance(a, (float, Tensor)) and a is not out]
            with torch.no_grad():
                out.copy_(_DRAWS[func](_by_place(tuple(out.shape), self.drawn), *given))
        return out


def _by_place(shape: tuple[int, ...], draw: int) -> Tensor:
    """Numbers in (0, 1)."""
    place = torch.tensor(0.7 * draw, dtype=torch.float64)
    for dim, size in enumerate(shape):
        steps = torch.arange(size, dtype=torch.float64) * math.sqrt(2 + 3 * dim)
        place = place.unsqueeze(-1) + steps
    return (place.sin() * 43758.5453).remainder(1.0).clamp(1e-6, 1 - 1e-6)


def _uniform(u: Tensor, *given: Any) -> Tensor:
    return u


def _normal(u: Tensor, *given: Any) -> Tensor:
    return torch.special.ndtri(u)


def _moved_normal(u: Tensor, mean: float | Tensor = 0.0, std: float | Tensor = 1.0) -> Tensor:
    return mean + std * torch.special.ndtri(u)


def _coins(u: Tensor, probability: float | Tensor = 0.5) -> Tensor:
    return (u < probability).to(u)


_DRAWS: dict[Callable[..., Tensor], Callable[..., Tensor]] = {
    torch.rand: _uniform, torch.rand_like: _uniform, Tensor.uniform_: _uniform,
    torch.randn: _normal, torch.randn_like: _normal,
    torch.normal: _moved_normal, Tensor.normal_: _moved_normal,
    torch.bernoulli: _coins, Tensor.bernoulli_: _coins,
}  # fmt: skip
_KEEPS = (
    F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout, F.feature_alpha_dropout, torch.dropout,
)  # fmt: skip
