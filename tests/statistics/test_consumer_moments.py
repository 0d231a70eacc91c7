"""Statistics of transposed convolutions (a linear layer at every input position) and of grouped ones."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fxgrow

GEOMETRIES: list[dict[str, Any]] = [
    {"kernel_size": 2, "stride": 2},
    {"kernel_size": 4, "stride": 2, "padding": 1},
    {"kernel_size": 3, "stride": 2, "padding": 1, "output_padding": 1},
    {"kernel_size": (3, 2), "stride": (1, 3), "padding": (1, 0), "dilation": (2, 1)},
]


class Decoder(nn.Module):
    """A transposed convolution between two convolutions; `as_columns`: a 1x1 convolution whose output is folded."""

    def __init__(self, geometry: dict[str, Any], as_columns: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.up = nn.Conv2d(2, 4, 3, padding=1), nn.ConvTranspose2d(4, 3, **geometry, bias=False)
        self.last = nn.Conv2d(3, 2, 1)
        self.geometry = {k: v for k, v in geometry.items() if k != "output_padding"}
        if as_columns:
            self.columns = nn.Conv2d(4, self.up.weight[0].numel(), 1, bias=False)
            self.columns.weight.data = self.up.weight.data.flatten(1).T[:, :, None, None].clone()
            self.size = tuple(self.up(torch.zeros(1, 4, 5, 6)).shape[2:])
            del self.up

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.conv(x))
        if hasattr(self, "columns"):
            out = F.fold(self.columns(h).flatten(2), self.size, **self.geometry)
        else:
            out = self.up(h)
        return self.last(torch.tanh(out)).mean((2, 3))


def data() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(4, 16, 2, 5, 6, dtype=torch.float64, generator=generator)
    return [(b, b.square().mean((2, 3))) for b in x]


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=lambda g: f"kernel {g['kernel_size']}")
@pytest.mark.parametrize("method", ["tiny", "default"])
def test_statistics_are_those_of_the_columns(geometry: dict[str, Any], method: str) -> None:
    options = {"method": method, "positions": "all", "widths": ["conv"], "progress": False}
    found, expected = (
        fxgrow.profile(Decoder(geometry, as_columns).double(), data(), F.mse_loss, **options)["conv"]
        for as_columns in (False, True)
    )
    assert expected.bottleneck > 0 and expected.desired > expected.bottleneck
    for name in ("bottleneck", "desired"):
        assert getattr(found, name) == pytest.approx(getattr(expected, name), rel=1e-9)
    few = slice(8)
    assert found.singular_values[few] == pytest.approx(expected.singular_values[few], rel=1e-6)
    assert found.gains == pytest.approx(expected.gains, rel=1e-6, abs=1e-12)


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=lambda g: f"kernel {g['kernel_size']}")
@pytest.mark.parametrize("method", ["tiny", "default"])
def test_growth_in_front_lowers_the_loss(geometry: dict[str, Any], method: str) -> None:
    model = Decoder(geometry, False).double()
    grown = fxgrow.grow(model, data(), loss_fn=F.mse_loss, method=method, neurons={"conv": 3, "up": 2}, progress=False)
    before, after = grown.meta["fxgrow"].losses["eval"]
    assert after < before
    assert grown.get_parameter("up.weight").shape[:2] == (7, 5)
    # along gamma the grown graph starts at the old function
    x = data()[0][0]
    same = fxgrow.apply(fxgrow.capture(model, (x,)), grown.meta["fxgrow"].plan.scaled(0.0))
    torch.testing.assert_close(same(x), model(x), rtol=1e-10, atol=1e-12)


def test_the_width_before_a_transposed_convolution_has_gains() -> None:
    """So that growth can choose it, in the decoder of a U-Net for example."""
    profile = fxgrow.profile(Decoder(GEOMETRIES[0], False).double(), data(), F.mse_loss, progress=False)
    assert profile["conv"].bottleneck > 0 and profile["conv"].gains[0] > 0
    assert profile["conv"].positions > 0


class Grouped(nn.Module):
    """A convolution in three groups, or three that each read a third of the channels."""

    def __init__(self, separate: bool, bias: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, whole = nn.Conv2d(2, 6, 3, padding=1), nn.Conv2d(6, 9, 3, 2, 1, groups=3, bias=bias)
        self.last = nn.Conv2d(9, 2, 1)
        self.groups = nn.ModuleList(nn.Conv2d(2, 3, 3, 2, 1, bias=bias) for _ in range(3 * separate))
        if not separate:
            self.whole = whole
        for g, part in enumerate(self.groups):
            part.load_state_dict({name: p.chunk(3)[g] for name, p in whole.state_dict().items()})

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.conv(x))
        if hasattr(self, "whole"):
            out = self.whole(h)
        else:
            out = torch.cat([part(t) for part, t in zip(self.groups, h.chunk(3, 1), strict=True)], 1)
        return self.last(torch.tanh(out)).mean((2, 3))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("positions", ["all", "sampled"])
def test_groups_are_measured_one_by_one(bias: bool, positions: str) -> None:
    options: dict[str, Any] = {"positions": positions, "widths": ["conv"], "progress": False, "units": {"conv": 6}}
    found, expected = (
        fxgrow.profile(Grouped(separate, bias).double(), data(), F.mse_loss, method="random-refit", **options)["conv"]
        for separate in (False, True)
    )
    assert found.width.step == expected.width.step == 3
    assert expected.bottleneck > 0 and expected.desired > expected.bottleneck
    for name in ("bottleneck", "desired"):
        assert getattr(found, name) == pytest.approx(getattr(expected, name), rel=1e-9)
    if positions == "all":  # the same new units, so the same refit and the same test of it
        assert found.gains == pytest.approx(expected.gains, rel=1e-6, abs=1e-12)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("method", ["default", "random-refit"])
def test_growth_between_groups_lowers_the_loss(method: str, bias: bool) -> None:
    model = Grouped(False, bias).double()
    wanted = {"conv": 6, "whole": 3}
    grown = fxgrow.grow(model, data(), loss_fn=F.mse_loss, method=method, neurons=wanted, progress=False)
    before, after = grown.meta["fxgrow"].losses["eval"]
    assert after < before
    assert grown.get_parameter("whole.weight").shape[:2] == (12, 4)
    x = data()[0][0]
    same = fxgrow.apply(fxgrow.capture(model, (x,)), grown.meta["fxgrow"].plan.scaled(0.0))
    torch.testing.assert_close(same(x), model(x), rtol=1e-10, atol=1e-12)


def test_many_groups_have_no_statistics() -> None:
    net = nn.Sequential(
        nn.Conv2d(2, 80, 1), nn.ReLU(), nn.Conv2d(80, 80, 3, groups=40), nn.Flatten(), nn.Linear(960, 2)
    )
    profile = fxgrow.profile(net.double(), data(), F.mse_loss, progress=False)
    assert profile["0"].bottleneck == 0 and not profile["0"].gains and profile["2"].bottleneck > 0
