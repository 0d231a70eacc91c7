"""Trees of plain values survive JSON exactly; anything else is refused by its path."""

from __future__ import annotations

import enum
import json
import math
from collections import Counter, OrderedDict
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import fxgrow
from fxgrow.storage.plain_tree import decoded, encoded, is_plain


def through_json(tree: Any) -> Any:
    tensors: dict[str, Tensor] = {}
    data = json.loads(json.dumps(encoded(tree, tensors, "root"), allow_nan=False))
    return decoded(data, tensors)


def alike(a: Any, b: Any) -> bool:
    """Equal, of the same types all the way down, NaN with NaN."""
    if type(a) is not type(b):
        return False
    if isinstance(a, Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, np.ndarray):
        return a.dtype == b.dtype and bool((a == b).all())
    if isinstance(a, dict):
        pairs = zip(a.items(), b.items(), strict=True)
        return len(a) == len(b) and all(alike(k, m) and alike(v, w) for (k, v), (m, w) in pairs)
    if isinstance(a, (list, tuple)) and not isinstance(a, torch.Size):
        return len(a) == len(b) and all(alike(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(a, float):
        return a.hex() == b.hex() if math.isfinite(a) else repr(a) == repr(b)
    return bool(a == b)


LEAVES = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(), st.binary(), st.complex_numbers(allow_nan=False)
)
KEYS = st.one_of(st.text(), st.integers(), st.booleans(), st.none(), st.tuples(st.integers(), st.text()))
TREES = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        st.lists(inner), st.lists(inner).map(tuple), st.dictionaries(KEYS, inner), st.dictionaries(st.text(), inner)
    ),
    max_leaves=8,
)


@settings(max_examples=50, deadline=None)
@given(TREES)
def test_any_tree_comes_back_as_it_was(tree: Any) -> None:
    assert alike(through_json(tree), tree)


@pytest.mark.parametrize(
    "tree",
    [
        {"dict": 1, "pairs": 2, "tensor": "x"},
        OrderedDict([(2, "b"), (1, "a")]),
        Counter({30: 1, 80: 2}),
        (torch.float16, torch.device("cpu"), torch.Size([2, 3])),
        [torch.arange(3), torch.tensor(1.5, dtype=torch.bfloat16), torch.zeros(0, 2)],
        {"a/b": torch.zeros(1), "a": {"b": torch.ones(1)}},
        np.arange(6, dtype=np.uint32).reshape(2, 3),
    ],
    ids=str,
)
def test_types_of_state_dicts(tree: Any) -> None:
    assert alike(through_json(tree), tree)


def test_numbers_of_numpy_become_python_s() -> None:
    out = through_json([np.float64(0.1), np.float32(0.5), np.int64(3), np.bool_(True)])
    assert alike(out, [0.1, 0.5, 3, True])


def test_one_tensor_in_two_places_stays_one() -> None:
    t = torch.ones(2)
    out = through_json({"a": t, "b": [t]})
    assert out["a"] is out["b"][0]


class Colour(str, enum.Enum):
    RED = "red"


@pytest.mark.parametrize(
    "thing", [object(), {1, 2}, lambda: 0, Colour.RED, range(3), np.array(["a"])], ids=lambda x: type(x).__name__
)
def test_what_is_not_plain_is_refused_by_its_path(thing: Any) -> None:
    with pytest.raises(fxgrow.FileError, match="root/state/0/callback"):
        encoded({"state": {0: {"callback": thing}}}, {}, "root")


def test_a_tree_that_contains_itself() -> None:
    tree: list[Any] = []
    tree.append(tree)
    with pytest.raises(fxgrow.FileError, match="root/0 contains itself"):
        encoded(tree, {}, "root")


@pytest.mark.parametrize(
    "data", [{"unknown": 1}, {"tensor": "absent"}, {"a": 1, "b": 2}, {"dtype": "nothing"}], ids=str
)
def test_other_json_is_refused(data: Any) -> None:
    with pytest.raises(fxgrow.FileError, match="Invalid or foreign checkpoint data"):
        decoded(data, {})


def test_what_describes_a_layer_is_plain() -> None:
    plain = [3, 0.5, True, "same", (1, (2, "a")), [8], torch.Size([8, 2])]
    assert all(map(is_plain, plain))
    assert not any(map(is_plain, [None, torch.ones(1), {"a": 1}, (1, None), [torch.ones(1)], range(3)]))
