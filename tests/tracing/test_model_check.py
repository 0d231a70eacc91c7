"""A graph that computes something else than its model is never returned."""

from __future__ import annotations

import random
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import fxgrow
from fxgrow import CaptureError


class ByType(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.asked = nn.Linear(4, 6), nn.Linear(6, 2), "__class__"

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        return self.b(h * 2 if getattr(h, self.asked) is torch.Tensor else h)


class InTraining(ByType):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if self.training else self.b(self.a(x))


@pytest.mark.parametrize(("cls", "mode"), [(ByType, "eval"), (InTraining, "train")])
def test_what_differs_is_refused_with_the_module(cls: type[nn.Module], mode: str) -> None:
    net = cls().eval()
    message = rf"something else than the model does in {mode} mode, first at module .b."
    with pytest.raises(fxgrow.CaptureError, match=message):
        fxgrow.capture(net, (torch.randn(2, 4),))
    assert not net.training and not net.a.training


def test_a_model_that_does_not_run_on_the_values_of_the_example_is_captured() -> None:
    net = nn.Sequential(nn.Embedding(3, 4), nn.Linear(4, 2))
    assert fxgrow.capture(net, (torch.tensor([[7, 8]]),)) is not None


def test_on_meta_nothing_is_run() -> None:
    with torch.device("meta"):
        net = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
    gm = fxgrow.capture(net, (torch.zeros(1, 4, device="meta"),))
    assert [w.name for w in fxgrow.widths(gm) if w.pinned is None] == ["0"]


def test_a_model_that_writes_into_its_input_leaves_the_example_as_it_is() -> None:
    class Scales(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            x *= 255
            return self.b(self.a(x).relu())

    net, x = Scales(), torch.randn(2, 4)
    before = x.clone()
    gm = fxgrow.capture(net, (x,))
    assert torch.equal(x, before)
    assert torch.equal(gm(x.clone()), net(x.clone()))


class Codebook(nn.Module):
    """Codes that are frozen parameters, and the means of what they were chosen for."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 2)
        self.codes = nn.Parameter(torch.randn(3, 6), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        chosen = (h.unsqueeze(1) - self.codes).square().sum(-1).argmin(1)
        if self.training:
            shares = nn.functional.one_hot(chosen, 3).to(h).detach()
            self.codes.data.mul_(0.9).add_(shares.t() @ h.detach(), alpha=0.1)
        return self.b(h + self.codes[chosen])


@pytest.mark.parametrize("training", [False, True])
def test_parameters_that_forward_writes_into_are_left_as_they_are(training: bool) -> None:
    net = Codebook().train(training)
    codes = net.codes.clone()
    gm = fxgrow.capture(net, (torch.randn(8, 4),))
    assert torch.equal(net.codes, codes)
    x = torch.randn(5, 4)
    for module in (net.train(), gm.train()):
        with torch.no_grad():
            net.codes.copy_(codes)
        assert torch.equal(module(x), module.b(module.a(x) + net.codes[_chosen(net, x, codes)]))
        assert not torch.equal(net.codes, codes)


def _chosen(net: Codebook, x: Tensor, codes: Tensor) -> Tensor:
    return (net.a(x).unsqueeze(1) - codes).square().sum(-1).argmin(1)


class DropsLayers(nn.Module):
    """Leaves out a layer, in training, where a number is small; with `chance` 0 never."""

    def __init__(self, draw: Callable[[], float], chance: float) -> None:
        super().__init__()
        self.draw, self.chance, self.a, self.b = draw, chance, nn.Linear(4, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        if not self.training or self.draw() >= self.chance:
            h = h.relu()
        return self.b(h)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(
    "draw", [random.random, np.random.rand, lambda: random.choice(range(99)) / 99, np.random.uniform]
)
def test_numbers_of_other_generators_are_never_kept(draw: Callable[[], float], training: bool) -> None:
    x = torch.randn(3, 4)
    with pytest.raises(CaptureError, match="draws from Python's `random` or from NumPy"):
        fxgrow.capture(DropsLayers(draw, 0.05).train(training), (x,))
    net = DropsLayers(draw, 0.0).train(training)
    assert torch.equal(fxgrow.capture(net, (x,)).train()(x), net.train()(x))


class Merged(nn.Module):
    """Two branches in training, whose sum is written into the data of a layer of its own in eval mode."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv, self.skip, self.merged = (nn.Linear(inputs, outputs) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            return self.conv(x) + self.skip(x)
        self.merged.weight.data = self.conv.weight.data.clone() + self.skip.weight.data.clone()
        self.merged.bias.data = self.conv.bias.data.clone() + self.skip.bias.data.clone()
        return self.merged(x)


def test_a_write_to_the_data_of_a_parameter_is_part_of_the_graph() -> None:
    torch.manual_seed(0)
    m, x = nn.Sequential(Merged(6, 8), nn.SiLU(), Merged(8, 7), nn.SiLU(), nn.Linear(7, 3)), torch.randn(4, 6)
    before = m[0].merged.weight.clone()
    gm = fxgrow.capture(m.eval(), (x,))
    assert torch.equal(m[0].merged.weight, before)
    free = {w.name: 1 for w in fxgrow.widths(gm) if w.pinned is None}
    assert len(free) == 2
    for wider in (gm, fxgrow.widen(gm, (x,), free)):
        with torch.no_grad():
            for p in wider.get_submodule("0.conv").parameters():
                p.mul_(2)
        torch.testing.assert_close(wider.eval()(x), wider.train()(x), rtol=1e-5, atol=1e-5)
    m[0].conv.requires_grad_(False).bias.zero_()
    torch.testing.assert_close(gm.eval()(x), m.eval()(x), rtol=1e-5, atol=1e-5)
