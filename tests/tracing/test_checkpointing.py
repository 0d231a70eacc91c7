"""Activation checkpointing: what it runs is followed, and the captured and grown graphs compute it again as well."""

from __future__ import annotations

import copy
import functools
import inspect
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn import functional as F
from torch.utils import checkpoint as module
from torch.utils.checkpoint import checkpoint

import fxgrow


class Net(nn.Module):
    """`part` runs the layers `b` on what the first layer returns."""

    def __init__(self, part: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.part, self.a, self.out = part, nn.Linear(6, 8), nn.Linear(8, 3)
        self.b: nn.Module = nn.Sequential(nn.Linear(8, 5), nn.GELU(), nn.Linear(5, 8))
        self.gradient_checkpointing = functools.partial(checkpoint, use_reentrant=False)

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x).tanh()
        y = self.part(self, h)
        return self.out(h + y)

    def scaled(self, h: Tensor, scale: float, shift: Tensor | None = None) -> Tensor:
        y = self.b(h) * scale / h.shape[0]
        if self.training:
            y = y + torch.rand(y.shape[0], 1, dtype=y.dtype)
        return y if shift is None else y + shift


class OwnCheckpoint(torch.autograd.Function):
    """As in guided diffusion and Latent Diffusion."""

    @staticmethod
    def forward(ctx: Any, run: Any, length: int, *tensors: Tensor) -> Tensor:
        ctx.run, ctx.inputs, ctx.parameters = run, list(tensors[:length]), list(tensors[length:])
        with torch.no_grad():
            return run(*ctx.inputs)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        inputs = [x.detach().requires_grad_() for x in ctx.inputs]
        with torch.enable_grad():
            out = ctx.run(*inputs)
        gradients = torch.autograd.grad(out, inputs + ctx.parameters, gradient, allow_unused=True)
        return None, None, *gradients


def in_training_alone(m: Net, h: Tensor) -> Tensor:
    return checkpoint(m.scaled, h, 2.0, use_reentrant=False) if m.training else m.scaled(h, 2.0)


FORMS: dict[str, Callable[[Net, Tensor], Tensor]] = {
    "not reentrant": lambda m, h: checkpoint(m.b, h, use_reentrant=False),
    "reentrant": lambda m, h: module.checkpoint(m.b, h, use_reentrant=True),
    "method": lambda m, h: checkpoint(m.scaled, h, 2.0, shift=h, use_reentrant=False, determinism_check="none"),
    "closure": lambda m, h: checkpoint(lambda scale: m.scaled(h, scale), 2.0, use_reentrant=False),
    "in training alone": in_training_alone,
    "sequential": lambda m, h: module.checkpoint_sequential([m.b, F.relu, m.b], 2, h, use_reentrant=False),
    "attribute": lambda m, h: m.gradient_checkpointing(m.b.__call__, h),
    "nested": lambda m, h: checkpoint(
        lambda t: checkpoint(m.b, t, use_reentrant=False).sin(), h, use_reentrant=False, preserve_rng_state=False
    ),
    "own function": lambda m, h: OwnCheckpoint.apply(m.b, 1, h, *m.b.parameters()),
}


def build(form: str) -> Net:
    torch.manual_seed(0)
    return Net(FORMS[form]).double()


def gradients(m: nn.Module, x: Tensor, training: bool) -> tuple[list[Tensor], int]:
    """Output and gradients of a seeded pass, and how often the first checkpointed layer ran."""
    calls: list[int] = []
    hook = m.get_submodule("b.0").register_forward_hook(lambda *_: calls.append(1))
    m.train(training)
    torch.manual_seed(1)
    out = m(x)
    m.zero_grad()
    out.square().sum().backward()  # the reentrant form refuses `autograd.grad`
    hook.remove()
    named = sorted(m.named_parameters(), key=lambda item: item[0])
    return [out.detach(), *(p.grad for _, p in named if p.grad is not None)], len(calls)


@pytest.mark.parametrize("form", FORMS)
def test_what_is_checkpointed_is_followed_and_computed_again(form: str) -> None:
    m, x = build(form), torch.randn(4, 6).double()
    gm = fxgrow.capture(m, (x,))
    free = {width.name for width in fxgrow.widths(gm) if width.pinned is None}
    assert free == {"a", "b.0"}
    wider = fxgrow.widen(m, (x,), {"a": 2, "b.0": 3})
    for training in (True, False):
        expected, calls = gradients(m, x, training)
        for graph in (gm, copy.deepcopy(gm)):
            found, again = gradients(graph, x, training)
            torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
            assert 1 < again <= calls or not training
        (out, *_), again = gradients(wider, x, training)
        torch.testing.assert_close(out, expected[0], rtol=1e-10, atol=1e-10)
        assert 1 < again <= calls or not training


@pytest.mark.parametrize("form", ["method", "sequential", "closure"])
def test_a_graph_that_is_pickled_or_traced_again_still_checkpoints(form: str) -> None:
    m, x = build(form), torch.randn(4, 6).double()
    gm = fxgrow.capture(m.eval(), (x,))
    file = io.BytesIO()
    torch.save(gm, file)
    file.seek(0)
    expected, calls = gradients(gm, x, False)
    for again in (torch.load(file, weights_only=False), fx.symbolic_trace(gm)):
        assert again.code.count("run_checkpointed(") == gm.code.count("run_checkpointed(") > 0
        found, count = gradients(again, x, False)
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
        assert count == calls


def test_the_backward_pass_keeps_no_activations_of_a_checkpointed_part() -> None:
    sizes: list[int] = []

    def kept(m: nn.Module) -> int:
        sizes.clear()
        with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
            m(x)
        return sum(sizes)

    x = torch.randn(64, 6)
    plain, net = Net(lambda m, h: m.b(h)), Net(FORMS["not reentrant"])
    assert kept(fxgrow.capture(net, (x,))) == kept(net) < kept(fxgrow.capture(plain, (x,))) == kept(plain)


def test_growth_and_files_and_exports_of_a_checkpointed_net(tmp_path: Path) -> None:
    m = Net(FORMS["method"])
    batches = [(torch.randn(16, 6), torch.randn(16, 3)) for _ in range(4)]
    grown = fxgrow.grow(m, batches, neurons=2, progress=False)
    assert "run_checkpointed(" in grown.code
    fxgrow.save(grown, tmp_path / "grown.safetensors")
    again = fxgrow.load(Net(FORMS["method"]), tmp_path / "grown.safetensors").eval()
    x = batches[0][0]
    assert torch.equal(again(x), grown.eval()(x))
    pytest.importorskip("onnxscript")
    fxgrow.export_onnx(grown, tmp_path / "grown.onnx", (x,))


def test_a_wrapper_of_modules() -> None:
    m, x = build("not reentrant"), torch.randn(4, 6).double()
    m.part = lambda m, h: m.b(h)
    m.b = checkpoint_wrapper(m.b)
    gm = fxgrow.capture(m, (x,))
    assert {width.name for width in fxgrow.widths(gm) if width.pinned is None} == {
        "a",
        "b._checkpoint_wrapped_module.0",
    }
    assert "run_checkpointed(" in gm.code


def test_other_code_checkpoints_as_before_afterwards() -> None:
    before = dict(vars(inspect.unwrap(checkpoint)))
    with pytest.raises(fxgrow.CaptureError):
        fxgrow.capture(Net(lambda m, h: checkpoint(lambda t: t @ t, h, use_reentrant=False)), (torch.randn(4, 6),))
    assert vars(inspect.unwrap(checkpoint)) == before
