"""One pass over the data: layer inputs, output gradients, and what stays alive afterwards."""

from __future__ import annotations

import gc
import weakref

import torch
import torch.nn.functional as F
from torch import nn

import fxgrow
from fxgrow.data.batches import Data
from fxgrow.statistics.forward_backward import BatchRecord, PassRequest, forward_backward


class InPlace(nn.Module):
    """Every kind of write into an activation that somebody else still needs."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 3)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x):
        h = self.relu(self.a(x))
        y = self.b(h)
        y += h
        y.mul_(2.0)
        y = F.relu(y, inplace=True)
        return self.c(y)


def collect(model: nn.Module, batches: list):
    gm = fxgrow.capture(model, (batches[0][0],))
    linear = [n for n in gm.graph.nodes if n.op == "call_module" and isinstance(gm.get_submodule(n.target), nn.Linear)]
    seen_v, seen_h, alive = [], [], []

    def reader(seen: BatchRecord, node, v) -> None:
        seen_v.append((str(node.target), v))
        seen_h.append((str(node.target), seen.inputs[node.args[0]].clone()))
        alive.append(weakref.ref(seen))

    weights = {f"{n.target}.weight": gm.get_submodule(n.target).weight for n in linear}
    weights = {name: w for name, w in weights.items() if w.requires_grad}
    gradients = []
    sources, done = [n.args[0] for n in linear], lambda batch, record: gradients.append(dict(record.gradients))
    forward_backward(gm, Data(batches), None, PassRequest(sources, done, linear, reader, weights))
    return seen_v, seen_h, gradients, alive


def test_v_times_h_is_the_weight_gradient_behind_in_place_writes():
    torch.manual_seed(0)
    model = InPlace().double()
    batches = [(torch.randn(5, 4).double(), torch.randint(0, 3, (5,)))]
    seen_v, seen_h, gradients, _ = collect(model, batches)
    F.cross_entropy(model(batches[0][0]), batches[0][1]).backward()
    for (name, v), (_, h) in zip(seen_v, seen_h, strict=True):
        expected = -5 * model.get_submodule(name).weight.grad
        assert torch.allclose(v.T @ h, expected, rtol=1e-12, atol=1e-14), name
        assert torch.allclose(gradients[0][f"{name}.weight"], expected, rtol=1e-12, atol=1e-14)


def test_no_gradient_is_left_on_the_model():
    model = InPlace()
    model.a.weight.grad = torch.ones_like(model.a.weight)
    model.b.weight.requires_grad_(False)
    collect(model, [(torch.randn(5, 4), torch.randint(0, 3, (5,)))])
    assert bool((model.a.weight.grad == 1).all()) and model.c.weight.grad is None
    assert not model.b.weight.requires_grad


def test_every_batch_is_let_go():
    _, _, _, alive = collect(InPlace(), [(torch.randn(5, 4), torch.randint(0, 3, (5,))) for _ in range(4)])
    gc.collect()
    assert len(alive) == 12 and not any(ref() is not None for ref in alive)
