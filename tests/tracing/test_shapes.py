"""Shapes, strides and dtypes that are told without a run are those of a run."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fxgrow.tracing.shapes import Like, shape_of

IMAGE, TOKENS, HEADS = (2, 4, 6, 7), (3, 5, 4), (2, 3, 5, 4)


def layouts(shape: tuple[int, ...]) -> list[Tensor]:
    """Contiguous, two dimensions swapped in memory, channels last, every second entry, one row for all."""
    twice = (*shape[:-1], 2 * shape[-1])
    swapped = (shape[1], shape[0], *shape[2:])
    last = (shape[0], *shape[2:], shape[1])
    return [
        torch.rand(shape), torch.rand(swapped).transpose(0, 1), torch.rand(last).movedim(-1, 1),
        torch.rand(twice)[..., ::2], torch.rand(1, *shape[1:]).expand(shape),
    ]  # fmt: skip


LAYERS: list[tuple[nn.Module, tuple[int, ...]]] = [
    (nn.Linear(4, 3), TOKENS), (nn.Linear(7, 3, bias=False), IMAGE), (nn.Conv2d(4, 6, 3, 2, 1), IMAGE),
    (nn.Conv2d(4, 6, (1, 3), groups=2, padding="same"), IMAGE),
    (nn.Conv2d(4, 4, 2, dilation=3, padding="valid"), IMAGE),
    (nn.Conv1d(5, 2, 3, padding=1, padding_mode="circular"), TOKENS), (nn.BatchNorm2d(4), IMAGE),
    (nn.BatchNorm1d(5), TOKENS), (nn.GroupNorm(2, 4), IMAGE), (nn.LayerNorm(4), TOKENS), (nn.LayerNorm((6, 7)), IMAGE),
    (nn.Identity(), IMAGE), (nn.GELU(), IMAGE), (nn.Dropout(0.5), TOKENS), (nn.Softmax(-1), TOKENS),
    (nn.AdaptiveAvgPool2d((1, None)), IMAGE), (nn.AdaptiveAvgPool2d(3), IMAGE), (nn.LSTM(4, 3, proj_size=2), TOKENS),
    (nn.LSTM(4, 3, 2, batch_first=True, bidirectional=True), TOKENS), (nn.GRU(4, 3, batch_first=True), TOKENS),
    (nn.RNN(4, 3), TOKENS),
]  # fmt: skip
CALLS: list[tuple[str, Any, tuple[int, ...], Callable[[Tensor], tuple[Any, ...]], dict[str, Any]]] = [
    ("linear", F.linear, TOKENS, lambda x: (x, torch.rand(3, 4), torch.rand(3)), {}),
    ("layer_norm", F.layer_norm, TOKENS, lambda x: (x, (4,), torch.rand(4)), {}),
    ("batch_norm", F.batch_norm, IMAGE, lambda x: (x, torch.zeros(4), torch.ones(4)), {}),
    ("gelu", F.gelu, IMAGE, lambda x: (x,), {"approximate": "tanh"}),
    ("mean", "mean", IMAGE, lambda x: (x, (2, 3)), {}),
    ("mean keepdim", torch.mean, IMAGE, lambda x: (x, -1), {"keepdim": True}),
    ("add", operator.add, IMAGE, lambda x: (x, x), {}),
    ("add one", operator.add, IMAGE, lambda x: (x, 1), {}),
    ("mul bias", operator.mul, IMAGE, lambda x: (torch.rand(4, 1, 1), x), {}),
    ("sub double", torch.sub, IMAGE, lambda x: (x, torch.rand(4, 1, 1, dtype=torch.float64)), {}),
    ("div", "div", TOKENS, lambda x: (x, torch.arange(1, 5)), {}),
    ("resize", F.interpolate, IMAGE, lambda x: (x,), {"scale_factor": 1.5, "mode": "bilinear"}),
    ("resize to", F.interpolate, IMAGE, lambda x: (x, (3, 11)), {}),
    ("attention", F.scaled_dot_product_attention, HEADS, lambda x: (x, x, x), {}),
    ("attention, mask", F.scaled_dot_product_attention, HEADS, lambda x: (x, x, x, torch.zeros(5, 5)), {}),
]  # fmt: skip


def agree(found: Any, real: Any) -> None:
    if found is not None:
        likes, _ = pytree.tree_flatten(found, is_leaf=lambda value: isinstance(value, Like))
        tensors = pytree.tree_leaves(real)
        assert likes == [Like(tuple(t.shape), t.stride(), t.dtype) for t in tensors]


@pytest.mark.parametrize("layer, shape", LAYERS, ids=lambda value: str(value).split("\n")[0][:30])
def test_layers(layer: nn.Module, shape: tuple[int, ...]) -> None:
    for x in layouts(shape):
        with torch.no_grad():
            agree(shape_of(layer, (x,), {}), layer(x))
    assert shape_of(layer, (torch.rand(shape),), {}) is not None
    assert shape_of(layer, (torch.rand(9, 1), torch.rand(2)), {}) is None


@pytest.mark.parametrize("name, target, shape, given, options", CALLS, ids=[c[0] for c in CALLS])
def test_calls(name: str, target: Any, shape: tuple[int, ...], given: Any, options: dict[str, Any]) -> None:
    call = (lambda x, *rest, **named: getattr(x, target)(*rest, **named)) if isinstance(target, str) else target
    for x in layouts(shape):
        args = given(x)
        agree(shape_of(target, args, options), call(*args, **options))
    assert shape_of(target, given(torch.rand(shape)), options) is not None


def test_no_answer() -> None:
    """Shapes and dtypes that do not fit, and integers."""
    x = torch.rand(IMAGE)
    wrong = (nn.Linear(4, 2), nn.Conv2d(3, 2, 3), nn.Conv2d(4, 2, 9), nn.BatchNorm2d(5), nn.BatchNorm1d(4),
             nn.LayerNorm(4), nn.GroupNorm(1, 5), nn.AdaptiveAvgPool1d(2), nn.Linear(7, 2).double(), nn.LSTM(4, 2),
             nn.PReLU(4))  # fmt: skip
    assert [shape_of(layer, (x,), {}) for layer in wrong] == [None] * len(wrong)
    i = torch.arange(4)
    for target, args in ((operator.add, (i, i)), (operator.truediv, (i, 2)), (operator.add, (x, x[0, :2])),
                         (F.relu, (i,)), ("mean", (x,)), (F.interpolate, (x, None, 2, "lanczos"))):  # fmt: skip
        assert shape_of(target, args, {}) is None
