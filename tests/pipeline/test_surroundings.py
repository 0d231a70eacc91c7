"""Growth in the surroundings it is called in: autocast, inference mode, half precision, meta, batches of one size."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxgrow


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))


def data(*sizes: int) -> list[tuple[Tensor, Tensor]]:
    torch.manual_seed(1)
    return [(x := torch.randn(n, 6), x[:, :3] * x[:, 3:]) for n in sizes or (16,) * 6]


@pytest.mark.parametrize("inside", [torch.no_grad, torch.inference_mode, lambda: torch.autocast("cpu", torch.bfloat16)])
def test_what_the_caller_has_switched_on_changes_nothing(inside: Callable[[], Any]) -> None:
    results = []
    for context in (contextlib.nullcontext, inside):
        net, batches = mlp(), data()
        optimizer = torch.optim.Adam(net.parameters())
        with context():
            # a loader may make its tensors inside
            batches = [(x.clone(), y.clone()) for x, y in batches]
            grown = fxgrow.grow(net, batches, neurons=2, optimizer=optimizer, progress=False)
            wide = fxgrow.widen(net, (batches[0][0],), {"0": 2})
        for model in (grown, wide):
            assert not any(p.is_inference() for p in model.parameters())
            model(data()[0][0]).square().mean().backward()
        optimizer.step()
        results.append([*grown.parameters(), *wide.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_parameters_of_inference_mode_are_refused() -> None:
    with torch.inference_mode():
        net = mlp()
    with pytest.raises(fxgrow.ProfileError, match="build the model outside"):
        fxgrow.grow(net, data(), progress=False)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_grows(dtype: torch.dtype) -> None:
    grown = fxgrow.grow(mlp().to(dtype), [(x.to(dtype), y.to(dtype)) for x, y in data()], neurons=2, progress=False)
    before, after = grown.meta["fxgrow"].losses["eval"]
    assert after < before and {p.dtype for p in grown.parameters()} == {dtype}


class OneSize(nn.Module):
    """A state for every sample of a batch, as a stateful network keeps it."""

    def __init__(self, normed: bool) -> None:
        super().__init__()
        self.a, self.b, self.norm = nn.Linear(6, 5), nn.Linear(5, 3), nn.BatchNorm1d(5) if normed else nn.Identity()
        self.register_buffer("state", torch.randn(16, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.norm(self.a(x) + self.state).tanh())


@pytest.mark.parametrize("method", ["default", "tiny", "firefly"])
@pytest.mark.parametrize("sizes", [(16, 9), (16, 16, 16, 9), (16, 16, 7, 16, 16, 16)])
def test_batches_that_a_model_of_one_size_refuses_are_left_out(
    sizes: tuple[int, ...], method: str, caplog: pytest.LogCaptureFixture
) -> None:
    torch.manual_seed(0)
    net = OneSize(normed=method != "firefly")
    with caplog.at_level(logging.WARNING, "fxgrow"):
        grown = fxgrow.grow(net, data(*sizes), neurons=2, method=method, progress=False)
    assert f"left out: 1 of {len(sizes)}" in caplog.text and "16 samples at once only" in caplog.text
    assert caplog.text.count("left out") == 1
    before, after = grown.meta["fxgrow"].losses["eval"]
    assert after <= before


def test_no_batch_is_left_out_where_the_model_takes_it(caplog: pytest.LogCaptureFixture) -> None:
    profile = fxgrow.profile(mlp(), data(16, 16, 9, 3), progress=False)
    assert profile.samples == 44 and not caplog.text


def test_widen_needs_no_values() -> None:
    def build() -> nn.Module:
        layer = nn.TransformerEncoderLayer(8, 2, 12, batch_first=True)
        return nn.Sequential(nn.Linear(6, 8), layer, nn.Linear(8, 3))

    with torch.device("meta"):
        net, x = build(), torch.randn(4, 5, 6)
    units = {w.name: w.step for w in fxgrow.widths(fxgrow.capture(net, (x,))) if w.pinned is None}
    real = fxgrow.widen(build(), (torch.randn(4, 5, 6),), units)
    wide = fxgrow.widen(net, (x,), units)
    assert all(p.is_meta for p in wide.parameters())
    assert {n: p.shape for n, p in wide.named_parameters()} == {n: p.shape for n, p in real.named_parameters()}
    assert type(fxgrow.widen(mlp().to("meta"), (x,), {"0": 2}, into="module")) is nn.Sequential
    with pytest.raises(fxgrow.ProfileError, match="meta device"):
        fxgrow.grow(net, [(x, x[..., :3])], progress=False)


def test_channels_last_stays() -> None:
    net = nn.Sequential(
        nn.Conv2d(2, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 6, 3, groups=6), nn.Conv2d(6, 3, 1)
    )
    batches = [(torch.randn(8, 2, 6, 6), torch.randn(8, 3, 2, 2)) for _ in range(4)]

    for memory_format in (torch.contiguous_format, torch.channels_last):
        net = net.to(memory_format=memory_format)
        optimizer = torch.optim.SGD(net.parameters(), 0.1, momentum=0.9)
        net(batches[0][0]).sum().backward()
        optimizer.step()
        wide = fxgrow.widen(net, (batches[0][0],), {"0": 2}, optimizer=optimizer)
        for model in (wide, fxgrow.grow(net, batches, neurons=2, progress=False)):
            weights = [p for p in model.parameters() if p.dim() == 4]
            assert len(weights) == 3 and all(p.is_contiguous(memory_format=memory_format) for p in weights)
        for p in wide.parameters():
            assert optimizer.state[p]["momentum_buffer"].stride() == p.stride()


class WritesIntoItsInput(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm, self.b = nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        x *= 2
        x[:, 0].add_(1)
        return self.b(self.norm(self.a(x)).relu())


def test_a_model_that_writes_into_its_input_leaves_the_batches_as_they_are() -> None:
    torch.manual_seed(0)
    net, batches = WritesIntoItsInput(), data()
    grown = fxgrow.grow(net, batches, neurons=2, progress=False)
    wide = fxgrow.widen(net, (batches[0][0],), {"a": 2})
    assert all(
        torch.equal(a, b) for given, same in zip(batches, data(), strict=True) for a, b in zip(given, same, strict=True)
    )
    expected = net.eval()(batches[0][0].clone())
    assert torch.allclose(wide.eval()(batches[0][0].clone()), expected, atol=1e-6)
    before, after = grown.meta["fxgrow"].losses["eval"]
    assert after < before


def test_a_backward_pass_that_fails_is_an_error_of_fxgrow() -> None:
    class Overwrites(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            y = self[2](self[1](self[0](x)))
            z = y.tanh() * y
            y.zero_()
            return z

    with pytest.raises(fxgrow.ProfileError, match="eval mode failed on batch 0: .*modified by an inplace"):
        fxgrow.grow(Overwrites(*mlp()), data(), neurons=2, progress=False)


def test_a_stream_under_a_norm_grows_where_nothing_else_can() -> None:
    torch.manual_seed(0)
    stream = nn.Linear(6, 8), nn.LayerNorm(8)
    only = nn.Sequential(*stream, nn.Linear(8, 3))
    both = nn.Sequential(*stream, nn.Linear(8, 5), nn.ReLU(), nn.Linear(5, 3))
    for net, units in ((only, {"0": 2}), (both, {"2": 2})):
        grown = fxgrow.grow(net, data(), neurons=2, progress=False)
        before, after = grown.meta["fxgrow"].losses["eval"]
        assert grown.meta["fxgrow"].plan.units == units and after < before
