"""`torch.compile` and growth: no graph break of ours, one compilation for each growth, the same outputs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

import fxgrow
from models.gpt import GPT
from models.mlp import MLP
from models.resnet import DigitsResNet
from models.vit import ViT


class Branches(nn.Module):
    """Looks at shapes, at optional inputs and at its mode, so that the graph has guards and both modes in it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor, scale: float = 2.0, mask: Tensor | None = None) -> Tensor:
        if x.shape[1] != 8:
            x = x[:, :8]
        if mask is not None:
            x = x * mask
        h = F.dropout(F.relu(self.first(x * scale)), 0.1 if self.training else 0.0, self.training)
        with torch.no_grad():
            shift = x.sum()
        return self.second(h) + 0 * shift


MODELS: dict[str, Any] = {
    "mlp": lambda: (MLP((8, 6, 5, 3)), torch.randn(12, 8)),
    "resnet": lambda: (DigitsResNet(0.25), torch.randn(6, 1, 8, 8)),
    "vit": lambda: (ViT(8, 4, in_channels=1, depth=1, heads=2, width=0.25), torch.randn(6, 1, 8, 8)),
    "gpt": lambda: (GPT(11, 16, depth=1, heads=2, width=0.25), torch.randint(0, 11, (6, 16))),
    "branches": lambda: (Branches(), torch.randn(12, 8)),
}


def wider(net: nn.Module, x: Tensor) -> fx.GraphModule:
    """Two growths, of every free width."""
    for _ in range(2):
        free = [w for w in fxgrow.widths(fxgrow.capture(net, (x,))) if w.pinned is None]
        net = fxgrow.widen(net, (x,), {w.name: w.step for w in free})
    assert isinstance(net, fx.GraphModule)
    return net


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow if n in ("vit", "gpt") else ()) for n in MODELS]
)
def test_no_graph_break_and_the_same_outputs(name: str) -> None:
    torch._dynamo.reset()
    net, x = MODELS[name]()
    grown = wider(net, x)
    # fullgraph: a graph break is an error
    compiled = torch.compile(grown, fullgraph=True, backend="aot_eager")
    for training in (False, True):
        grown.train(training)
        outputs = []
        for module in (grown, compiled):
            torch.manual_seed(0)
            grown.zero_grad()
            out = module(x)
            out.float().square().mean().backward()
            outputs.append([out.detach(), *(p.grad.clone() for p in grown.parameters() if p.grad is not None)])
        torch.testing.assert_close(outputs[0], outputs[1])
    assert compiled(x[:2]).shape == grown(x[:2]).shape


def test_dynamo_explains_it_as_one_graph() -> None:
    torch._dynamo.reset()
    net, x = MODELS["branches"]()
    found = torch._dynamo.explain(wider(net, x))(x)
    assert (found.graph_break_count, found.graph_count) == (0, 1)


class Counting:
    """A backend that counts how often it compiles."""

    def __init__(self) -> None:
        self.graphs = 0

    def __call__(self, gm: fx.GraphModule, inputs: list[Tensor]) -> Any:
        self.graphs += 1
        return gm.forward


@pytest.mark.parametrize("into", ["graph", "module"])
def test_one_compilation_for_each_growth(into: Any) -> None:
    torch._dynamo.reset()
    backend = Counting()
    torch.manual_seed(0)
    model = MLP((8, 4, 3))
    x, y = torch.randn(64, 8), torch.randint(0, 3, (64,))
    data = [*zip(x.split(16), y.split(16), strict=True)]
    optimizer = torch.optim.Adam(model.parameters())
    compiled = torch.compile(model, backend=backend, fullgraph=True, dynamic=False)
    schedule = fxgrow.Every(steps=2)
    grower = fxgrow.Grower(compiled, optimizer, schedule, dataloader=data, neurons=1, method="random", into=into)
    # more growths than dynamo compiles one piece of code
    for step in range(20):
        optimizer.zero_grad()
        F.cross_entropy(grower.model(data[step % 4][0]), data[step % 4][1]).backward()
        optimizer.step()
        grower.step()
        assert backend.graphs == 1 + step // 2
    assert grower.history.growths == 10
    assert type(grower.model) is type(compiled)
    inside = grower.model._orig_mod
    assert isinstance(inside, MLP) == (into == "module")
    assert inside.get_parameter("layers.0.weight").shape == (14, 8)
    assert grower.model.training
    torch.testing.assert_close(grower.model(x[:16]), inside(x[:16]))


def test_a_grower_that_does_not_grow_leaves_the_compiled_model() -> None:
    torch._dynamo.reset()
    model = MLP((8, 4, 3))
    compiled = torch.compile(model, backend="eager")
    data = [(torch.randn(4, 8), torch.randint(0, 3, (4,)))] * 4
    grower = fxgrow.Grower(compiled, torch.optim.Adam(model.parameters()), fxgrow.Every(steps=9), dataloader=data)
    grower.step()
    assert grower.model is compiled


def test_a_model_compiled_in_place(caplog: pytest.LogCaptureFixture) -> None:
    model = MLP((8, 4, 3))
    model.compile(backend="eager")
    data = [(torch.randn(4, 8), torch.randint(0, 3, (4,)))] * 4
    fxgrow.Grower(model, torch.optim.Adam(model.parameters()), fxgrow.Every(steps=9), dataloader=data)
    assert "MLP was compiled in place by .compile()" in caplog.text


@pytest.mark.slow
def test_inductor() -> None:
    """Needs a C++ compiler."""
    torch._dynamo.reset()
    net, x = MODELS["mlp"]()
    grown = wider(net, x)
    torch.testing.assert_close(torch.compile(grown, fullgraph=True)(x), grown(x))
