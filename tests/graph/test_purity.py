"""Which nodes write into their inputs, and which only compute a value."""

from __future__ import annotations

import operator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn

from fxgrow.graph.purity import is_pure, overwrites

CALLS: list[tuple[str, Any, dict[str, Any], bool]] = [
    ("call_method", "add_", {}, True), ("call_method", "add", {}, False), ("call_method", "__and__", {}, False),
    ("call_function", operator.iadd, {}, True), ("call_function", operator.ixor, {}, True),
    ("call_function", operator.setitem, {}, True), ("call_function", operator.is_not, {}, False),
    ("call_function", operator.and_, {}, False), ("call_function", torch.relu_, {}, True),
    ("call_function", F.relu, {"inplace": True}, True), ("call_function", F.relu, {"inplace": False}, False),
    ("call_module", "0", {}, True), ("call_module", "1", {}, False), ("call_method", "append", {}, True),
]  # fmt: skip


@pytest.mark.parametrize(
    "kind, target, options, expected", CALLS, ids=[f"{getattr(c[1], '__name__', c[1])} {c[2]}" for c in CALLS]
)
def test_what_writes_into_its_first_input(kind: str, target: Any, options: dict[str, Any], expected: bool) -> None:
    root = nn.Sequential(nn.ReLU(inplace=True), nn.ReLU())
    graph = fx.Graph()
    x, y = graph.placeholder("x"), graph.placeholder("y")
    node = graph.create_node(kind, target, (x, y), options)
    assert overwrites(node, root) == ([x] if expected else [])
    assert is_pure(node) == (not expected and kind != "call_module")


def test_out_and_random_numbers() -> None:
    graph = fx.Graph()
    x, y = graph.placeholder("x"), graph.placeholder("y")
    added = graph.call_function(torch.add, (x, x), {"out": y})
    assert overwrites(added, nn.Module()) == [y] and not is_pure(added)
    noise = graph.call_function(torch.rand_like, (x,))
    assert overwrites(noise, nn.Module()) == [] and not is_pure(noise)
