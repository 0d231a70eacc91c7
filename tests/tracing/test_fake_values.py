"""Results on meta tensors are what a fake mode says, or there are none."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from fxgrow.tracing.meta_kernels import fake_tensor, run

IMAGE, TOKENS, VECTOR = (2, 4, 6, 6), (2, 5, 4), (3, 4)
LAYERS: list[tuple[nn.Module, tuple[int, ...]]] = [
    (nn.Linear(4, 3), TOKENS), (nn.Conv2d(4, 3, 3, 2, 1), IMAGE), (nn.ConvTranspose2d(4, 3, 3, 2), IMAGE),
    (nn.BatchNorm2d(4), IMAGE), (nn.BatchNorm1d(4), VECTOR), (nn.LayerNorm(4), TOKENS), (nn.GroupNorm(2, 4), IMAGE),
    (nn.InstanceNorm2d(4), IMAGE), (nn.ReLU6(True), IMAGE), (nn.GELU(), TOKENS), (nn.GLU(1), IMAGE),
    (nn.PReLU(4), IMAGE), (nn.Softmax(-1), TOKENS),
    (nn.Dropout(), TOKENS), (nn.MaxPool2d(2), IMAGE), (nn.AdaptiveAvgPool2d(1), IMAGE),
    (nn.Flatten(), IMAGE), (nn.Upsample(scale_factor=2), IMAGE), (nn.LSTM(4, 3, batch_first=True), TOKENS),
]  # fmt: skip
CALLS: list[tuple[Any, tuple[Any, ...]]] = [
    (torch.cat, ([VECTOR, VECTOR], 1)), ("view", (IMAGE, 2, -1)), ("chunk", (IMAGE, 2, 1)),
    (torch.matmul, (TOKENS, (4, 7))), (F.interpolate, (IMAGE, None, 2.0)), ("float", (VECTOR,)), ("size", (IMAGE,)),
    (torch.einsum, ("bij,bkj->bik", TOKENS, TOKENS)), ("mean", (IMAGE, (2, 3))), (torch.topk, (VECTOR, 2)),
    (torch.zeros_like, (VECTOR,)), ("transpose", (IMAGE, 1, 2)),
]  # fmt: skip


def shapes(value: Any) -> Any:
    if isinstance(value, Tensor):
        assert type(value) is FakeTensor
        return tuple(value.shape), value.stride(), value.dtype, value.device
    return [shapes(item) for item in value] if isinstance(value, (list, tuple)) else value


def tensors(value: Any, mode: FakeTensorMode, dtype: torch.dtype) -> Any:
    if isinstance(value, tuple) and len(value) > 1 and value in (IMAGE, TOKENS, VECTOR, (4, 7)):
        return mode.from_tensor(torch.zeros(value, dtype=dtype))
    return [tensors(item, mode, dtype) for item in value] if isinstance(value, list) else value


def agree(target: Any, call: Callable[..., Any], args: list[Any], mode: FakeTensorMode) -> None:
    found = run(target, tuple(args), {}, mode)
    with mode:
        expected = call(*args)
    assert found is None or shapes(found) == shapes(expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layers(dtype: torch.dtype) -> None:
    answers = 0
    for layer, shape in LAYERS:
        mode = FakeTensorMode(allow_non_fake_inputs=True)
        layer = layer.to(dtype).eval()
        state = {name: t.clone() for name, t in layer.state_dict().items()}
        x = mode.from_tensor(torch.zeros(shape, dtype=dtype))
        agree(layer, layer, [x], mode)
        answers += run(layer.train(), (x,), {}, mode) is not None
        assert all(torch.equal(t, state[name]) for name, t in layer.state_dict().items())
    assert answers == len(LAYERS)


@pytest.mark.parametrize("target, args", CALLS, ids=[getattr(c[0], "__name__", c[0]) for c in CALLS])
def test_calls(target: Any, args: tuple[Any, ...]) -> None:
    mode = FakeTensorMode()
    given = [tensors(a, mode, torch.float64) for a in args]
    agree(target, (lambda x, *rest: getattr(x, target)(*rest)) if isinstance(target, str) else target, given, mode)


def test_no_answer() -> None:
    """Other devices, autocast, values, shapes that change in place, layers that do not fit, and what is not torch's."""
    mode = FakeTensorMode()
    x = mode.from_tensor(torch.zeros(VECTOR))
    for target, args in (("to", (x, "cuda")), ("item", (x,)), ("nonzero", (x,)), ("t_", (x,)), (math_of_our_own, (x,))):
        assert run(target, args, {}, mode) is None
    assert run(nn.BatchNorm1d(5), (x,), {}, mode) is None
    assert run(nn.Linear(5, 2), (x,), {}, mode) is None
    with torch.autocast("cpu", torch.bfloat16):
        assert run(torch.matmul, (x, x.t()), {}, mode) is None
        assert run(nn.LayerNorm(4), (x,), {}, mode) is None


def math_of_our_own(x: Tensor) -> Tensor:
    return x + 1


def test_fake_tensor() -> None:
    mode = FakeTensorMode()
    p = nn.Parameter(torch.zeros(3, 4).t())
    fake = fake_tensor(p, mode)
    assert isinstance(fake, nn.Parameter) and fake.requires_grad and fake.stride() == p.stride()
    sparse = fake_tensor(torch.eye(3).to_sparse(), mode)
    assert sparse.layout is torch.sparse_coo
