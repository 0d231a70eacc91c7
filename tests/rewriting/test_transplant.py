"""Attributes that growth changes are the same in the graph, in the user's module, in place, and after a file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxgrow
from fxgrow.rewriting.transplant import changed_attributes
from fxgrow.training.in_place import GrowerInPlace


class RMSNorm(nn.RMSNorm):
    """Keeps its shape as people write it: a list, a tuple, a `torch.Size`."""

    def __init__(self, shape: Any) -> None:
        super().__init__(8, eps=1e-3)
        self.normalized_shape = shape
        nn.init.uniform_(self.weight, 0.5, 1.5)


class OwnNorm(nn.Module):
    """Reads its epsilon from an attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.epsilon = nn.Parameter(torch.linspace(0.5, 1.5, 8)), 1e-3

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.epsilon) * self.weight


class Tied(nn.Module):
    """Uses a weight a second time through a list, which registers nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(4, 8)
        self.tied = [self.a.weight]

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.a(x)) @ self.tied[0]


def net(norm: Callable[[], nn.Module]) -> nn.Module:
    return nn.Sequential(nn.Linear(4, 8), norm(), nn.Linear(8, 2))


def grown_in_place(model: nn.Module, x: Tensor, width: str) -> nn.Module:
    batches = [(torch.randn(16, 4), torch.randn(16, model(x).shape[1])) for _ in range(4)]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    grower = GrowerInPlace(model, optimizer, fxgrow.Every(steps=9), dataloader=batches, neurons={width: 4})
    assert grower.grow_now()
    return model


@pytest.mark.parametrize("shape", [[8], (8,), torch.Size([8])], ids=["list", "tuple", "size"])
@pytest.mark.parametrize("into", ["graph", "module"])
def test_shape_of_a_norm(shape: Any, into: Any) -> None:
    model, x = net(lambda: RMSNorm(shape)), torch.randn(5, 4)
    grown = fxgrow.widen(model, (x,), {"0": 4}, into=into)
    norm: Any = grown.get_submodule("1")
    assert norm.weight.shape == (12,) and list(norm.normalized_shape) == [12]
    assert list(shape) == [8] and model.get_submodule("1").normalized_shape is shape
    torch.testing.assert_close(grown(x), model(x))


@pytest.mark.parametrize("shape", [[8], (8,), torch.Size([8])], ids=["list", "tuple", "size"])
def test_shape_of_a_norm_in_place(shape: Any) -> None:
    norm: Any = grown_in_place(net(lambda: RMSNorm(shape)), torch.randn(5, 4), "0").get_submodule("1")
    assert norm.weight.shape == (12,) and list(norm.normalized_shape) == [12]


def test_epsilon_of_an_own_norm() -> None:
    model, x = net(OwnNorm), torch.randn(5, 4)
    grown: Any = fxgrow.widen(model, (x,), {"0": 4}, into="module")
    assert grown[1].epsilon == pytest.approx(1e-3 * 8 / 12) and model.get_submodule("1").epsilon == 1e-3
    torch.testing.assert_close(grown(x), model(x))


@pytest.mark.parametrize("into", ["graph", "module"])
def test_eps_that_was_none_is_in_the_file(into: Any, tmp_path: Path) -> None:
    """`nn.RMSNorm` takes the dtype's `eps` until growth writes a smaller one."""
    x = torch.randn(5, 4)
    grown = fxgrow.widen(net(lambda: nn.RMSNorm(8)), (x,), {"0": 4}, into=into)
    fxgrow.save(grown, tmp_path / "net.safetensors")
    loaded = fxgrow.load(net(lambda: nn.RMSNorm(8)), tmp_path / "net.safetensors")
    assert loaded.get_submodule("1").eps == grown.get_submodule("1").eps < torch.finfo(torch.float32).eps
    assert torch.equal(loaded(x), grown(x))


def test_parameter_in_a_list() -> None:
    model, x = Tied(), torch.randn(5, 4)
    (name,) = [w.name for w in fxgrow.widths(fxgrow.capture(model, (x,))) if w.pinned is None]
    grown: Any = fxgrow.widen(model, (x,), {name: 4}, into="module")
    assert grown.tied[0] is grown.a.weight and len(grown.a.weight) == 12
    assert grown_in_place(model, x, name) is model
    assert model.tied[0] is model.a.weight and len(model.a.weight) == 12
    assert model(x).shape == (5, 4)


def test_changed_attributes() -> None:
    before, after = nn.RMSNorm(3), nn.RMSNorm(4, eps=0.5)
    before.groups = after.groups = float("nan")  # type: ignore[assignment]
    before.table, after.table = {"a": 1}, {"a": 2}  # type: ignore[assignment]
    before.rate, after.rate = 0.1, 0.5  # type: ignore[assignment]
    after.new = 1  # type: ignore[assignment]
    after.eval()
    assert list(changed_attributes(before, after)) == [("normalized_shape", (3,), (4,)), ("eps", None, 0.5)]
