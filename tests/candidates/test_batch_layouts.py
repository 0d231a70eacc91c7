"""Growth of networks whose samples do not lie one by one along the first dimension."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fxgrow


class Clips(nn.Module):
    """Frames in the batch dimension; they are joined before the head."""

    def __init__(self, joined: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.a, self.b, self.c, self.joined = nn.Conv2d(2, 5, 3), nn.Conv2d(5, 6, 3), nn.Linear(6, 3), joined

    def forward(self, x: Tensor) -> Tensor:
        y = self.b(self.a(x.reshape(-1, *x.shape[2:])).relu()).relu().amax((2, 3))
        return self.c(self.joined(y.unflatten(0, (len(x), -1))))


class Patches(nn.Module):
    """Patches of one picture in the batch dimension, and in the length of a sequence afterwards."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(2, 5, 3), nn.Conv1d(5, 6, 2), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        patches = x.unfold(2, 4, 4).unfold(3, 4, 4).permute(0, 2, 3, 1, 4, 5).flatten(0, 2)
        y = self.a(patches).relu().mean((2, 3)).view(x.shape[0], 4, -1)
        return self.c(self.b(y.mT).relu().mean(2))


class StepsFirst(nn.Module):
    """`[steps, samples, features]` in and out."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.r, self.b, self.c = nn.Linear(4, 6), nn.GRU(6, 5), nn.Conv1d(5, 6, 3, padding=1), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.r(self.a(x).tanh())[0]
        return self.c(self.b(y.permute(1, 2, 0)).relu().permute(2, 0, 1))


class MadeWeights(nn.Module):
    """The weights of the last layer are made by layers through which no sample goes."""

    def __init__(self) -> None:
        super().__init__()
        self.z, self.h, self.w = nn.Parameter(torch.randn(4)), nn.Linear(4, 6), nn.Linear(6, 15)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.w(self.h(self.z).relu()).view(3, 5))


NETS: dict[str, tuple[Callable[[], nn.Module], Callable[[int], Tensor]]] = {
    "mean of frames": (lambda: Clips(lambda y: y.mean(1)), lambda n: torch.randn(n, 3, 2, 6, 6)),
    "maximum of frames": (lambda: Clips(lambda y: y.max(1)[0]), lambda n: torch.randn(n, 3, 2, 6, 6)),
    "last frame": (lambda: Clips(lambda y: y[:, -1]), lambda n: torch.randn(n, 3, 2, 6, 6)),
    "frames side by side": (lambda: Clips(lambda y: y.transpose(0, 1)[0]), lambda n: torch.randn(n, 3, 2, 6, 6)),
    "patches": (Patches, lambda n: torch.randn(n, 2, 8, 8)),
    "steps first": (StepsFirst, lambda n: torch.randn(5, n, 4)),
    "as many steps as samples": (StepsFirst, lambda n: torch.randn(12, n, 4)),
    "made weights": (MadeWeights, lambda n: torch.randn(n, 5)),
}


@pytest.mark.parametrize("method", ["default", "tiny"])
@pytest.mark.parametrize("name", NETS)
def test_every_free_width_grows(name: str, method: str) -> None:
    torch.manual_seed(0)
    build, inputs = NETS[name]
    net, teacher = build(), build()
    batches = [(x, teacher(x).detach()) for x in map(inputs, (12, 12, 12, 12, 12, 12, 12, 7))]
    names = [w.name for w in fxgrow.widths(fxgrow.capture(net, (batches[0][0],))) if w.pinned is None]
    grown = fxgrow.grow(net, batches, neurons=dict.fromkeys(names, 2), method=method, progress=False)
    record = grown.meta["fxgrow"]
    before, after = record.losses["eval"]
    assert record.plan.units == dict.fromkeys(names, 2) and after <= before * 1.001
    assert torch.isfinite(grown(batches[-1][0])).all()


def test_a_unit_is_worth_as_much_with_frames_beside_samples_as_with_frames_for_samples() -> None:
    torch.manual_seed(0)
    net = Clips(lambda y: y.mean(1)).double()
    teacher, x = Clips(lambda y: y.mean(1)).double(), torch.randn(96, 1, 2, 6, 6).double()
    single = [(part, teacher(part).detach()) for part in x.split(12)]
    # a clip that repeats its only frame
    repeated = [(part.expand(-1, 4, -1, -1, -1), y) for part, y in single]
    profiles = [fxgrow.profile(net, data, widths=["a"], progress=False) for data in (single, repeated)]
    first, second = (profile["a"] for profile in profiles)
    assert abs(second.significant - first.significant) <= 1
    assert sum(second.gains) == pytest.approx(sum(first.gains), rel=0.05)


class Shared(nn.Module):
    """One weight with a bias, with another and with none, and a complex one."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 6), nn.Linear(5, 3)
        self.w = nn.Parameter(torch.randn(5, 6) / 2)
        self.first, self.second = nn.Parameter(torch.randn(5)), nn.Parameter(torch.randn(5))
        self.rotation = nn.Parameter(torch.randn(6, 6, dtype=torch.complex64))

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x).tanh()
        h = h + torch.einsum("nk,ko->no", h.to(torch.complex64), self.rotation).abs()
        y = F.linear(h, self.w, self.first).relu() + F.linear(h.cos(), self.w, self.second).relu()
        return self.b(y - F.linear(h.relu(), self.w).relu())


@pytest.mark.parametrize("method", ["default", "tiny", "random"])
def test_one_weight_with_several_biases(method: str) -> None:
    torch.manual_seed(0)
    net, teacher = Shared(), Shared()
    batches = [(x, teacher(x).detach()) for x in torch.randn(8, 16, 4)]
    names = {w.name: w.step for w in fxgrow.widths(fxgrow.capture(net, (batches[0][0],))) if w.pinned is None}
    assert "w" in names
    wide = fxgrow.widen(net, (batches[0][0],), names)
    assert torch.allclose(wide(batches[0][0]), net(batches[0][0]), atol=1e-5)
    assert not wide.first[5:].any() and not wide.second[5:].any()
    grown = fxgrow.grow(net, batches, neurons=names, method=method, progress=False)
    before, after = grown.meta["fxgrow"].losses["eval"]
    assert grown.meta["fxgrow"].plan.units == names and after <= before * 1.0001


class NoisyInTraining(nn.Module):
    """A layer reads noise, and runs, in train mode only."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.noise, self.b, self.c = nn.Linear(4, 6), nn.Linear(4, 6), nn.Linear(6, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        if self.training:
            h = h + self.noise(torch.randn_like(x))
        return self.c(self.b(h.relu()).relu())


@pytest.mark.parametrize("method", ["default", "tiny"])
@pytest.mark.parametrize("training", [True, False])
def test_a_layer_that_runs_in_train_mode_only_grows_with_the_others(training: bool, method: str) -> None:
    torch.manual_seed(0)
    net, teacher = NoisyInTraining().train(training), NoisyInTraining().eval()
    batches = [(x, teacher(x).detach()) for x in torch.randn(8, 16, 4)]
    grown = fxgrow.grow(net, batches, neurons=2, method=method, progress=False)
    before, after = grown.meta["fxgrow"].losses["eval"]
    assert grown.noise.out_features == grown.a.out_features == 8 and after <= before
    assert torch.isfinite(grown.train()(batches[0][0])).all()
