"""Arguments of a node are read and replaced by their paths."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import fx

from fxgrow.graph.arguments import argument_leaves, get_argument, replaced_argument, replaced_item, set_argument


def node() -> fx.Node:
    graph = fx.Graph()
    x = graph.placeholder("x")
    return graph.call_function(torch.add, (x, [1, (2, 3)], slice(None, 4)), {"alpha": 5, "more": {"a": [6]}})


def test_every_leaf_has_a_path() -> None:
    found = {path: value for path, value in argument_leaves(node()) if not isinstance(value, fx.Node)}
    assert found == {
        (1, 0): 1, (1, 1, 0): 2, (1, 1, 1): 3, (2, 0): None, (2, 1): 4, (2, 2): None, ("alpha",): 5,
        ("more", "a", 0): 6,
    }  # fmt: skip


@pytest.mark.parametrize("path", [(1, 0), (1, 1, 1), (2, 1), ("alpha",), ("more", "a", 0), ("new",)])
def test_one_value_is_replaced(path: tuple[int | str, ...]) -> None:
    n = node()
    before = dict(argument_leaves(n))
    args, kwargs = replaced_argument(n.args, n.kwargs, path, 9)
    assert dict(argument_leaves(n)) == before
    set_argument(n, path, 9)
    assert dict(argument_leaves(n)) == {**before, path: 9}
    assert (args, kwargs) == (n.args, n.kwargs)


@pytest.mark.parametrize("container", [[8], (8,), torch.Size([8])])
def test_kinds_of_containers(container: Any) -> None:
    out = replaced_item(container, [0], 12)
    assert list(out) == [12] and isinstance(out, list) == isinstance(container, list) and list(container) == [8]


def test_a_value_is_read_by_its_path() -> None:
    n = node()
    assert all(get_argument(n, path) is value for path, value in argument_leaves(n))
    assert get_argument(n, (0, 3)) is n.args[0]  # its entry 3 is in its value, not in the graph
    assert [get_argument(n, path) for path in ((), (1, 7), ("dim",), (2, 1, 0))] == [None] * 4
