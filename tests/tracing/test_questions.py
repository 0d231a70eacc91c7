"""What the model's code asks of values, and reads of its own parameters, is answered as the model would be."""

from __future__ import annotations

import collections.abc
import functools
import math
import numbers
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxgrow

KINDS = {torch.Tensor: "tensor", nn.Parameter: "parameter", int: "size", float: "number"}


@functools.singledispatch
def kind(value: Any) -> str:
    return "other"


@kind.register
def _(value: Tensor) -> str:
    return "tensor"


def matched(value: Any) -> str:
    match value:
        case nn.Parameter():
            return "parameter"
        case Tensor():
            return "tensor"
        case int():
            return "size"
    return "other"


def default(value: Any, other: Any) -> Any:
    return other() if value is None and callable(other) else other


Question = Callable[[nn.Module, Tensor, Tensor], bool]
QUESTIONS: dict[str, Question] = {
    "is": lambda m, x, h: type(h) is Tensor and type(m.a.weight) is nn.Parameter and type(x.shape[0]) is int,
    "not": lambda m, x, h: type(h) is not nn.Parameter and type(h) not in (list, tuple) and type(x.shape) is torch.Size,
    "dict": lambda m, x, h: [KINDS[type(v)][0] for v in (h, m.a.bias, h.size(1), h.shape[1] / 2)] == list("tpsn"),
    "subclass": lambda m, x, h: issubclass(type(m.a.weight), Tensor) and not issubclass(type(h), nn.Parameter),
    "name": lambda m, x, h: type(h).__name__ == h.__class__.__name__ == "Tensor" and isinstance(type(h), type),
    "match": lambda m, x, h: [matched(v)[0] for v in (h, m.a.weight, x.shape[0])] == list("tps"),
    "singledispatch": lambda m, x, h: kind(h) == "tensor" and kind(x.shape[0]) == "other",
    "callable": lambda m, x, h: not callable(h) and callable(m.a) and default(None, h) is h,
    "abstract": lambda m, x, h: not isinstance(x.shape[0], collections.abc.Iterable) and isinstance(h.dim(), int),
    "numbers": lambda m, x, h: isinstance(x.shape[0], numbers.Integral) and isinstance(x.shape[0] / 2, numbers.Real),
    "either": lambda m, x, h: isinstance(h, (list, Tensor)) and isinstance(h, Tensor | None),
    "made": lambda m, x, h: type("Made", (), {"n": 3})().n == 3 and float is float and type[int] is not None,
}


class Asks(nn.Module):
    def __init__(self, question: Question) -> None:
        super().__init__()
        self.a, self.b, self.question = nn.Linear(4, 6), nn.Linear(6, 2), question

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        return self.b(h * 2 if self.question(self, x, h) else h.tanh())


@pytest.mark.parametrize("question", QUESTIONS)
def test_of_kind(question: str) -> None:
    net, x = Asks(QUESTIONS[question]).double(), torch.randn(3, 4, dtype=torch.float64)
    assert QUESTIONS[question](net, x, net.a(x))
    gm = fxgrow.capture(net, (x[:2],))
    assert torch.equal(gm(x), net(x))
    assert [w.name for w in fxgrow.widths(gm) if w.pinned is None] == ["a"]


READS: dict[str, Callable[[nn.Module], Tensor]] = {
    "parameters": lambda m: sum((p.square().sum() for p in m.parameters()), torch.zeros(())),
    "named": lambda m: torch.stack([p.norm() for n, p in m.named_parameters() if "weight" in n]).sum(),
    "of a layer": lambda m: next(m.a.parameters()).abs().mean() * m.a.weight.shape[0],
    "dict": lambda m: m.a._parameters["weight"].sum() + m.state_dict()["b.bias"].sum(),
    "get_parameter": lambda m: m.get_parameter("b.weight").pow(2).sum(),
    "children": lambda m: torch.cat([p.flatten() for c in m.children() for p in c.parameters()]).norm(),
    "data": lambda m: math.prod(m.b.weight.shape) * m.b.weight.data.mean(),
}


class Penalised(nn.Module):
    def __init__(self, read: Callable[[nn.Module], Tensor]) -> None:
        super().__init__()
        self.a, self.b, self.read = nn.Linear(4, 6), nn.Linear(6, 2), read

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.b(self.a(x).relu()), self.read(self)


@pytest.mark.parametrize("read", READS)
def test_parameters_that_are_read_are_no_constants(read: str) -> None:
    net, x = Penalised(READS[read]).double(), torch.randn(3, 4, dtype=torch.float64)
    gm = fxgrow.capture(net, (x,))
    with torch.no_grad():
        for p in net.parameters():
            p.mul_(3)
    torch.testing.assert_close(gm(x)[1], net(x)[1])
    assert gm(x)[1].requires_grad is net(x)[1].requires_grad


CACHE: dict[Any, Any] = {}


@functools.lru_cache
def mask(n: int) -> Tensor:
    return torch.ones(n, n).tril()


class Tables:
    kept: Any = None

    def __init__(self) -> None:
        self.tables: dict[str, list[Tensor]] = {"all": []}


class Caches(nn.Module):
    """Keeps what it computes: in a function's cache, a module, a class, an object, and a list in a dict."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.tables = nn.Linear(4, 4), Tables()

    def forward(self, x: Tensor) -> Tensor:
        n = x.shape[1]
        if n not in CACHE:
            CACHE[n] = torch.ones(n, n).triu()
        self.tables.tables["all"].append(x)
        Tables.kept = h = self.a(x)
        return (mask(n) + CACHE[n]) @ h


def contents() -> Iterator[Any]:
    yield from (*CACHE, *CACHE.values(), Tables.kept, mask(4))


def test_caches_outside_of_the_model_keep_nothing_of_a_trace() -> None:
    net, x = Caches(), torch.randn(2, 4, 4)
    for turn in range(2):
        mask.cache_clear()
        gm = fxgrow.capture(net, (x,))
        assert {type(value) for value in contents()} <= {int, Tensor, type(None)}
        assert len(net.tables.tables["all"]) == 2 * turn and {type(t) for t in net.tables.tables["all"]} <= {Tensor}
        assert torch.equal(gm(x), net(x)) and type(net(x)) is Tensor
