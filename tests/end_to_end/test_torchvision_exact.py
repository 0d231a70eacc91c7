"""Whole networks: every free width at once, and the network computes what it computed before."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, fx, nn

from fxgrow.analysis.analyse import analyse, widths
from fxgrow.graph.graph import copy_graph
from fxgrow.rewriting.rewrite import rewrite
from fxgrow.tracing.capture import capture

torchvision = pytest.importorskip("torchvision")

BOUND = {torch.float64: 1e-10, torch.float32: 1e-5}
#: name -> side of the images, and how many widths are free and pinned (the output among them). In train mode the norms
#: of the last small maps amplify rounding: at 64 px the float32 of an unchanged googlenet is 4e-5 from its float64
NETWORKS = {
    "resnet18": (64, 12, {"output": 1}),
    "resnet50": (64, 37, {"output": 1}),
    "vgg11_bn": (64, 10, {"output": 1}),
    "mobilenet_v2": (64, 25, {"output": 1}),
    "densenet121": (64, 120, {"output": 1}),
    "googlenet": (128, 57, {"output": 1}),
    "squeezenet1_1": (64, 25, {"output": 1}),
    "efficientnet_b0": (64, 40, {"output": 1}),
    "regnet_y_400mf": (96, 53, {"output": 1}),
    "convnext_tiny": (64, 18, {"output": 1, "norm": 4}),
}
QUICK = ("resnet18", "squeezenet1_1", "mobilenet_v2")


def build(name: str) -> nn.Module:
    options = {"aux_logits": False, "init_weights": False} if name == "googlenet" else {}
    torch.manual_seed(0)
    model: nn.Module = getattr(torchvision.models, name)(weights=None, **options)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, 0, 0.1)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
            nn.init.normal_(module.weight, 1, 0.1)
            nn.init.normal_(module.bias, 0, 0.1)
        elif isinstance(module, nn.Dropout) or type(module).__name__ == "StochasticDepth":
            module.p = 0.0
    return model


def values(module: nn.Module, x: Tensor, training: bool) -> Tensor:
    state = {name: buffer.clone() for name, buffer in module.named_buffers()}
    with torch.no_grad():
        out: Tensor = module.train(training)(x)
    for name, buffer in module.named_buffers():
        buffer.copy_(state[name])
    return out


def new_incoming(gm: fx.GraphModule, index: dict[str, tuple[Tensor | None, ...]]) -> Iterator[tuple[str, Tensor]]:
    """Weights of layers that have new rows, with the mask of these rows."""
    for name in dict.fromkeys(p.weight for p in analyse(gm).structure.projections):
        places = index.get(name, (None,))[0]
        if places is not None:
            mask = torch.ones(len(gm.get_parameter(name)), dtype=torch.bool)
            mask[places] = False
            yield name, mask


@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in NETWORKS])
def test_every_free_width_at_once(name: str) -> None:
    side, free, pinned = NETWORKS[name]
    model = build(name)
    x = torch.randn(4, 3, side, side)
    gm = capture(model, (x[:2],))
    found = widths(gm)
    codes = [w.pinned.code for w in found if w.pinned]
    assert {c: codes.count(c) for c in codes} == pinned
    assert sum(w.pinned is None for w in found) == free
    add = {w.name: w.step * (1 + i % 3) for i, w in enumerate(w for w in found if w.pinned is None)}
    grown, index = rewrite(gm, add)
    assert list(grown.state_dict()) == list(model.state_dict())
    assert {w.name: w.size for w in widths(grown)} == {w.name: w.size + add.get(w.name, 0) for w in found}
    for dtype in (torch.float32, torch.float64):
        model, grown, x = model.to(dtype), grown.to(dtype), x.to(dtype)
        for training in (False, True):
            a, b = values(model, x, training), values(grown, x, training)
            assert (a - b).abs().max() <= BOUND[dtype] * a.abs().max()
            del a, b
        if dtype is torch.float32:
            learns(copy_graph(grown).train(), x, index)


def learns(grown: fx.GraphModule, x: Tensor, index: dict[str, tuple[Tensor | None, ...]]) -> None:
    """Finite gradients everywhere; after one step, gradients reach the new rows."""

    def backward() -> None:
        grown.zero_grad()
        nn.functional.cross_entropy(grown(x), torch.arange(len(x))).backward()

    backward()
    for name, p in grown.named_parameters():
        assert p.grad is not None and p.grad.isfinite().all(), name
    torch.optim.SGD(grown.parameters(), lr=1e-3).step()
    backward()
    reached = []
    for name, mask in new_incoming(grown, index):
        gradient = grown.get_parameter(name).grad
        assert gradient is not None
        reached.append(bool(gradient[mask].abs().amax() > 0))
    # the few new units of a layer may all be silent on so few images, where a ReLU follows
    assert sum(reached) >= 0.8 * len(reached) > 0


def test_streams_of_resnet18() -> None:
    """The residual streams are one width each, with several producers and consumers."""
    found = {w.name: w for w in widths(capture(build("resnet18"), (torch.randn(2, 3, 64, 64),)))}
    stream = found["layer2.0.conv2"]
    assert stream.producers == ("layer2.0.conv2", "layer2.0.downsample.0", "layer2.1.conv2")
    assert stream.consumers == ("layer2.1.conv1", "layer3.0.conv1", "layer3.0.downsample.0")
    assert stream.followers == ("layer2.0.bn2", "layer2.0.downsample.1", "layer2.1.bn2")
    assert {n for n, w in found.items() if len(w.producers) > 1} == {
        "conv1", "layer2.0.conv2", "layer3.0.conv2", "layer4.0.conv2"
    }  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", ["vgg11_bn", "regnet_y_400mf"])
def test_rewrite_is_cheap(name: str) -> None:
    """No pass over the weights but one: a rewrite costs what a few deep copies cost."""
    import copy
    import time

    gm = capture(build(name), (torch.randn(2, 3, 64, 64),))
    add = {w.name: w.step for w in widths(gm) if w.pinned is None}

    def seconds(run: Callable[[], object]) -> float:
        times = []
        for _ in range(3):
            start = time.process_time()
            run()
            times.append(time.process_time() - start)
        return min(times)

    assert seconds(lambda: rewrite(gm, add)) < 0.6 + 4 * seconds(lambda: copy.deepcopy(gm))
