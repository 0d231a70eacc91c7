"""Compiled code is followed as the Python code that it was made from, and TorchScript where there is such code."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import fxgrow


def gate(x: Tensor, y: Tensor) -> Tensor:
    return torch.tanh(x) * torch.sigmoid(y)


@torch.jit.script
def scripted_gate(x: Tensor, y: Tensor) -> Tensor:
    return torch.tanh(x) * torch.sigmoid(y)


@torch.compile(backend="eager", dynamic=True)
def compiled_gate(x: Tensor, y: Tensor) -> Tensor:
    return gate(x, y)


def without_source() -> torch.jit.ScriptFunction:
    """A TorchScript function whose Python code is not known, as one from a file."""
    function = torch.jit.CompilationUnit("def gate(x, y):\n    return torch.tanh(x) * torch.sigmoid(y)\n").gate
    assert not hasattr(function, "_torchdynamo_inline")
    return function


class Gated(nn.Module):
    def __init__(self, join: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.join, self.a, self.b, self.out = join, nn.Linear(6, 8), nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.join(self.a(x), self.b(x)))


class Branches(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.sum() * x if x.sum() > 0 else x


def around(inner: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), inner, nn.Linear(8, 7), nn.Tanh(), nn.Linear(7, 3)).double()


def block() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 8))


def compiled_in_place() -> nn.Module:
    inner = block()
    inner.compile(backend="eager")
    return inner


def free(m: nn.Module, x: Tensor) -> set[str]:
    return {width.name for width in fxgrow.widths(fxgrow.capture(m, (x,))) if width.pinned is None}


def check(m: nn.Module, x: Tensor, names: set[str]) -> nn.Module:
    """That these widths are free, and that the wider net computes the same, in both modes and at another batch size."""
    before = copy.deepcopy(m.state_dict())
    assert free(m, x) == names
    wider = fxgrow.widen(m, (x,), dict.fromkeys(names, 2))
    for training in (False, True):
        for inputs in (x, torch.randn(5, 6).double()):
            m.train(training)
            wider.train(training)
            torch.testing.assert_close(wider(inputs), m(inputs), rtol=1e-10, atol=1e-10)
        m.load_state_dict(before)
    return wider


@pytest.mark.parametrize("join", [scripted_gate, torch.jit.trace(gate, (torch.ones(2), torch.ones(2))), compiled_gate])
def test_functions(join: Callable[[Tensor, Tensor], Tensor]) -> None:
    check(Gated(join).double(), torch.randn(4, 6).double(), {"a"})


def test_a_scripted_function_without_python_code_is_tested_like_any_operator() -> None:
    m, x = Gated(without_source()).double(), torch.randn(4, 6).double()
    wider = check(m, x, {"a"})
    assert "gate" in {node.name for node in wider.graph.nodes}


@pytest.mark.parametrize("inner", [lambda: torch.compile(block(), backend="eager"), compiled_in_place])
def test_compiled_modules(inner: Callable[[], nn.Module]) -> None:
    m, x = around(inner()), torch.randn(4, 6).double()
    path = "1._orig_mod" if hasattr(m[1], "_orig_mod") else "1"
    check(m, x, {"0", f"{path}.0", f"{path}.3", "2"})


def scripted() -> nn.Module:
    return torch.jit.script(block())


def traced() -> nn.Module:
    return torch.jit.trace(block().eval(), torch.randn(2, 8))


@pytest.mark.parametrize("inner", [scripted, traced, lambda: torch.jit.script(Branches())])
def test_a_scripted_module_is_closed_and_what_is_around_it_grows(
    inner: Callable[[], nn.Module], tmp_path: Path
) -> None:
    m, x = around(inner()), torch.randn(4, 6).double()
    wider = check(m, x, {"2"})
    width = next(width for width in fxgrow.widths(fxgrow.capture(m, (x,))) if width.name == "0")
    assert width.pinned is not None and "a TorchScript module has no Python code" in width.pinned.message
    for p, q in zip(m[1].parameters(), wider.get_submodule("1").parameters(), strict=True):
        wider(x).sum().backward()
        assert q.is_leaf and q.requires_grad == p.requires_grad and q.grad is not None
    fxgrow.save(wider, tmp_path / "wider.safetensors")
    again = fxgrow.load(around(inner()), tmp_path / "wider.safetensors")
    assert torch.equal(again.eval()(x), wider.eval()(x))


def test_compilation_is_as_before_afterwards() -> None:
    call = torch.jit.ScriptFunction.__call__
    m, x = Gated(compiled_gate), torch.randn(4, 6)
    fxgrow.capture(m, (x,))
    assert torch.jit.ScriptFunction.__call__ == call and torch._dynamo.config.error_on_nested_fx_trace
    compiled: list[int] = []

    def backend(gm: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Tensor]:
        compiled.append(1)
        return gm.forward

    torch.compile(m, backend=backend)(x)
    assert compiled
