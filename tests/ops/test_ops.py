"""Every row of the table: its widths, and that widening them all, again and again, changes nothing but the size."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from fxgrow.analysis.analyse import widths
from fxgrow.rewriting.rewrite import rewrite
from fxgrow.tracing.capture import capture
from tests.ops.cases import CASES, Case

MODES = (False, True)


def randomise(model: nn.Module) -> None:
    """Statistics and affine parameters as after some training: at their initial values mistakes cancel."""
    for module in model.modules():
        for name, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
            if name == "running_mean":
                nn.init.normal_(tensor, 0, 0.3)
            elif name == "running_var":
                nn.init.uniform_(tensor, 0.5, 1.5)
            elif tensor.is_floating_point() and tensor.dim() == 1:
                nn.init.normal_(tensor, 0.5, 0.3)


def values(module: nn.Module, inputs: tuple[Any, ...], training: bool) -> list[Tensor]:
    """The outputs, with running statistics as before."""
    state = {k: v.clone() for k, v in module.state_dict().items()}
    module.train(training)
    with torch.no_grad():
        out = module(*inputs)
    module.load_state_dict(state)
    return [leaf if isinstance(leaf, Tensor) else torch.tensor(float(leaf)) for leaf in pytree.tree_leaves(out)]


def difference(a: nn.Module, b: nn.Module, inputs: tuple[Any, ...], training: bool) -> float:
    worst = 0.0
    for x, y in zip(values(a, inputs, training), values(b, inputs, training), strict=True):
        assert x.shape == y.shape
        worst = max(worst, float((x - y).abs().max() / x.abs().max().clamp_min(1e-12)))
    return worst


def double(inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for x in inputs)


def prepare(case: Case) -> tuple[nn.Module, fx.GraphModule]:
    torch.manual_seed(0)
    model = case.build()
    randomise(model)
    if not any(p.dtype == torch.float16 for p in model.parameters()):
        model = model.double()
    return model, capture(model, double(case.inputs(4)))


@pytest.mark.parametrize("case", CASES, ids=[c.id for c in CASES])
def test_widths(case: Case) -> None:
    _, gm = prepare(case)
    found = {w.name: (w.size, w.step) if w.pinned is None else w.pinned.code for w in widths(gm)}
    assert found == case.expected
    for w in widths(gm):
        assert w.pinned is None or (w.pinned.node in {n.name for n in gm.graph.nodes} and w.pinned.message)


@pytest.mark.parametrize("case", [c for c in CASES if c.free], ids=[c.id for c in CASES if c.free])
def test_widening_is_exact(case: Case) -> None:
    model, gm = prepare(case)
    grown = gm
    batches = [double(case.inputs(n)) for n in (4, 3)]
    if case.larger is not None:
        batches.append(double(case.larger(4)))
    for times in (1, 2):
        before = {w.name: w.size for w in widths(grown)}
        add = {name: times * step for name, (_, step) in case.free.items()}
        grown, index = rewrite(grown, add)
        assert {w.name: w.size for w in widths(grown)} == {n: s + add.get(n, 0) for n, s in before.items()}
        assert index and list(grown.state_dict()) == list(model.state_dict())
        for name, value in case.fills.items():
            (old,) = index[name]
            new = torch.ones(len(grown.state_dict()[name]), dtype=torch.bool).index_fill(0, old, False)
            assert bool((grown.state_dict()[name][new] == value).all())
        for inputs in batches:
            for training in MODES:
                assert difference(model, grown, inputs, training) <= 1e-10
    _gradients(grown, batches[0])


def _gradients(grown: fx.GraphModule, inputs: tuple[Any, ...]) -> None:
    """Every parameter in use gets a finite gradient."""
    used = {n for n, p in grown.named_parameters() if p.requires_grad}
    out = grown.train()(*inputs)
    loss = sum(t.square().sum() for t in pytree.tree_leaves(out) if isinstance(t, Tensor) and t.requires_grad)
    assert isinstance(loss, Tensor)
    gradients = torch.autograd.grad(loss, [dict(grown.named_parameters())[n] for n in sorted(used)], allow_unused=True)
    for name, gradient in zip(sorted(used), gradients, strict=True):
        if gradient is not None:
            assert gradient.isfinite().all(), name
