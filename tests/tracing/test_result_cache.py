"""A result that is known from an equal node is what the node would give."""

from __future__ import annotations

import operator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from fxgrow.tracing import result_cache
from fxgrow.tracing.capture import capture
from fxgrow.tracing.fake_values import FakeRunner

IMAGE, TOKENS, VECTOR = (2, 4, 6, 6), (2, 5, 4), (3, 4)
LAYERS: list[tuple[nn.Module, tuple[int, ...]]] = [
    (nn.Linear(4, 3), TOKENS), (nn.Conv2d(4, 3, 3, 2, 1), IMAGE), (nn.BatchNorm2d(4), IMAGE), (nn.PReLU(4), IMAGE),
    (nn.LayerNorm(4), TOKENS), (nn.ReLU6(True), IMAGE), (nn.MaxPool2d(2, return_indices=True), IMAGE),
    (nn.LSTM(4, 3, batch_first=True), TOKENS), (nn.Identity(), VECTOR),
]  # fmt: skip
CALLS: list[tuple[Any, tuple[Any, ...]]] = [
    (torch.cat, ([VECTOR, VECTOR], 1)), ("view", (IMAGE, 2, -1)), ("chunk", (IMAGE, 2, 1)), ("size", (IMAGE,)),
    (torch.matmul, (TOKENS, (4, 7))), (F.interpolate, (IMAGE, None, 2.0)), ("max", (VECTOR, 1)),
    (getattr, (VECTOR, "dtype")),
    (operator.getitem, (IMAGE, (slice(None), slice(1, 3), None))), (operator.truediv, (VECTOR, 2)), (len, (TOKENS,)),
]  # fmt: skip


@pytest.fixture(autouse=True)
def empty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(result_cache, "_cache", {})


def node(target: Any, args: tuple[Any, ...], runner: FakeRunner) -> fx.Node:
    graph = fx.Graph()

    def arg(value: Any) -> Any:
        if isinstance(value, list):
            return [arg(item) for item in value]
        if not (isinstance(value, tuple) and len(value) > 1 and all(type(n) is int for n in value)):
            return value
        x = graph.placeholder(f"x{len(graph.nodes)}")
        x.meta["val"] = runner.fake(torch.zeros(value))
        return x

    kind = "call_function" if callable(target) else "call_module" if target == "0" else "call_method"
    return graph.create_node(kind, target, tuple(map(arg, args)), {})


def spec(value: Any) -> Any:
    if isinstance(value, Tensor):
        return tuple(value.shape), value.stride(), value.dtype, value.device, value.requires_grad
    return type(value), [spec(v) for v in value] if isinstance(value, (list, tuple)) else value


ROWS = [*(("0", (layer, s)) for layer, s in LAYERS), *CALLS]
IDS = [f"{getattr(target, '__name__', target)}-{args}" for target, args in ROWS]


@pytest.mark.parametrize("target, args", ROWS, ids=IDS)
def test_equal_nodes_have_equal_results(target: Any, args: tuple[Any, ...]) -> None:
    root = nn.Sequential(args[0]) if target == "0" else nn.Sequential()
    given = args[1:] if target == "0" else args
    first, second = (runner.call(node(target, given, runner), root) for runner in (FakeRunner(), FakeRunner()))
    assert len(result_cache._cache) == 1 and spec(first) == spec(second)


def test_what_changes_a_result_changes_the_key() -> None:
    runner = FakeRunner()
    layer = nn.Conv2d(4, 3, 3)

    def shape(size: tuple[int, ...] = IMAGE) -> tuple[int, ...]:
        return tuple(runner.call(node("0", (size,), runner), nn.Sequential(layer)).shape)

    shapes = [shape(), shape((2, 4, 8, 8))]
    layer.stride = (2, 2)
    shapes.append(shape())
    layer.weight = nn.Parameter(torch.zeros(5, 4, 1, 1))
    layer.bias = None
    assert [*shapes, shape()] == [(2, 3, 4, 4), (2, 3, 6, 6), (2, 3, 2, 2), (2, 5, 3, 3)]
    divided = node(operator.truediv, (VECTOR, 2), runner)
    divided.args[0].meta["val"] = runner.fake(torch.zeros(VECTOR, dtype=torch.int64))  # type: ignore[union-attr]
    with torch.autocast("cpu", torch.bfloat16):
        assert result_cache.result_key(divided, None, (torch.zeros(2), 2), {}) is None
    before = torch.get_default_dtype()
    try:
        assert runner.call(divided, nn.Module()).dtype == torch.float32
        torch.set_default_dtype(torch.float64)
        assert runner.call(divided, nn.Module()).dtype == torch.float64
    finally:
        torch.set_default_dtype(before)


def test_results_that_are_not_kept() -> None:
    """In place, random, of the user's code, or of tensors that a shape does not describe."""
    runner = FakeRunner()
    for target, args in (("t_", (VECTOR,)), (torch.rand_like, (VECTOR,)), (double, (VECTOR,))):
        runner.call(node(target, args, runner), nn.Module())
    sparse = node(torch.neg, (VECTOR,), runner)
    sparse.args[0].meta["val"] = runner.fake(torch.eye(3).to_sparse())  # type: ignore[union-attr]
    runner.call(sparse, nn.Module())
    assert result_cache._cache == {}


def double(x: Tensor) -> Tensor:
    return 2 * x


def test_tensors_made_of_a_number_know_it() -> None:
    class Halved(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            for _ in range(2):
                x = x[:, : torch.as_tensor(x.shape[1] / 2).ceil().long()]
            return x

    x = torch.randn(2, 12)
    for _ in range(2):
        assert torch.equal(capture(Halved(), (x,))(x), x[:, :3])
