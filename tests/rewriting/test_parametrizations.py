"""Weight and spectral normalisation: such layers grow, exactly and from data; what else computes a weight is named."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, spectral_norm
from torch.nn.utils import weight_norm as hooked

import fxgrow


def network(dim: int | None = 0) -> nn.Sequential:
    """A convolution and two linear layers, directions twice as long as the weights."""
    torch.manual_seed(0)
    norm = lambda layer: parametrizations.weight_norm(layer, dim=dim)  # noqa: E731
    layers = [
        norm(nn.Conv1d(3, 4, 3)),
        nn.ReLU(),
        nn.Flatten(),
        norm(nn.Linear(16, 6)),
        nn.Tanh(),
        norm(nn.Linear(6, 2)),
    ]
    for layer in (layers[0], layers[3], layers[5]):
        layer.parametrizations.weight.original1.data.mul_(2)
        layer.parametrizations.weight.original0.data.mul_(1.5)
    return nn.Sequential(*layers).double()


@pytest.mark.parametrize("dim", [0, 1, None])
def test_widening_is_exact(dim: int | None) -> None:
    model, x = network(dim), torch.randn(5, 3, 6, dtype=torch.float64)
    state, kinds = copy.deepcopy(model.state_dict()), [type(m) for m in model.modules()]
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    model(x).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    expected = model(x)
    moments = {n: optimizer.state[p]["exp_avg"].clone() for n, p in model.named_parameters()}
    grown = fxgrow.widen(model, (x,), {"0": 2, "3": 3}, optimizer=optimizer)
    torch.testing.assert_close(grown(x), expected, rtol=1e-12, atol=1e-12)
    assert [type(m) for m in model.modules()] == kinds and model.state_dict().keys() == state.keys()
    torch.testing.assert_close(model(x), expected)
    assert grown.state_dict().keys() == state.keys()
    assert {id(p) for g in optimizer.param_groups for p in g["params"]} == {id(p) for p in grown.parameters()}
    for name, p in grown.named_parameters():
        new = optimizer.state[p]["exp_avg"]
        assert new.shape == p.shape and float(new.abs().sum()) == pytest.approx(float(moments[name].abs().sum()))
    grown(x).square().sum().backward()
    optimizer.step()
    again = fxgrow.widen(grown, (x,), {"3": 1})
    torch.testing.assert_close(again(x), grown(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("into", ["graph", "module"])
def test_growth_is_that_of_the_plain_network(into: Any) -> None:
    """The same weights without normalisation are profiled, planned and grown alike."""
    model = network()
    plain = nn.Sequential(
        nn.Conv1d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 6), nn.Tanh(), nn.Linear(6, 2)
    ).double()
    for a, b in zip(plain, model, strict=True):
        if isinstance(a, (nn.Conv1d, nn.Linear)):
            a.load_state_dict({"weight": b.weight.detach(), "bias": b.bias.detach()})
    batches = [(x, x.flatten(1)[:, :2].sin()) for x in torch.randn(8, 32, 3, 6, dtype=torch.float64)]
    options = {"loss_fn": F.mse_loss, "neurons": 2, "progress": False, "into": into}
    a, b = fxgrow.grow(plain, batches, **options), fxgrow.grow(model, batches, **options)
    torch.testing.assert_close(a(batches[0][0]), b(batches[0][0]))
    assert b.meta["fxgrow"].losses["eval"][1] < b.meta["fxgrow"].losses["eval"][0]
    assert type(b[0] if into == "module" else b.get_submodule("0")).__name__ == "ParametrizedConv1d"
    profile = fxgrow.profile(fxgrow.capture(model, (batches[0][0],)), batches, F.mse_loss, progress=False)
    grown = fxgrow.apply(fxgrow.capture(model, (batches[0][0],)), fxgrow.plan(profile, neurons=2))
    assert "0.parametrizations.weight.original0" in grown.state_dict()


def bounded() -> nn.Sequential:
    """As discriminators are made, after some training."""
    torch.manual_seed(0)
    norm = parametrizations.spectral_norm
    layers = [norm(nn.Conv2d(3, 6, 3)), nn.Tanh(), norm(nn.ConvTranspose2d(6, 4, 2, 2)), nn.ReLU(), nn.Flatten()]
    net = nn.Sequential(*layers, norm(nn.Linear(256, 5)), nn.Tanh(), nn.Linear(5, 2)).double()
    optimizer = torch.optim.SGD(net.parameters(), 0.5)
    for _ in range(3):
        optimizer.zero_grad()
        net(torch.randn(4, 3, 6, 6, dtype=torch.float64)).square().mean().backward()
        optimizer.step()
    return net


@pytest.mark.parametrize("training", [False, True])
def test_spectral_norm_stays_through_power_iterations(training: bool) -> None:
    model, x = bounded().train(training), torch.randn(4, 3, 6, 6, dtype=torch.float64)
    state, random = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    twin = copy.deepcopy(model)
    grown = fxgrow.widen(model, (x,), {"0": 3, "5": 2}, optimizer=optimizer)
    grown = fxgrow.widen(grown, (x,), {"2": 2, "0": 1}, optimizer=optimizer)
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert grown.state_dict().keys() == state.keys() and torch.equal(torch.get_rng_state(), random)
    assert grown.training is training and all(m.training is training for m in grown.modules())
    for _ in range(20):
        torch.testing.assert_close(grown(x), twin(x), rtol=1e-12, atol=1e-12)
    grown(x).square().sum().backward()
    gradient = grown.get_parameter("0.parametrizations.weight.original").grad
    assert gradient is not None and gradient.shape[0] == 10
    optimizer.step()
    assert bool(grown(x).isfinite().all())


def test_spectral_norm_without_a_direction_left_is_pinned() -> None:
    model = nn.Sequential(parametrizations.spectral_norm(nn.Linear(6, 5)), nn.Tanh(), nn.Linear(5, 3))
    (width, _) = fxgrow.widths(fxgrow.capture(model, (torch.randn(2, 6),)))
    assert width.pinned is not None and "no direction" in width.pinned.message


def test_spectral_norm_grows_from_data() -> None:
    batches = [(x, x.flatten(1)[:, :2].sin()) for x in torch.randn(8, 16, 3, 6, 6, dtype=torch.float64)]
    grown = fxgrow.grow(bounded(), batches, loss_fn=F.mse_loss, neurons={"5": 2}, progress=False)
    before, after = grown.meta["fxgrow"].losses["eval"]
    with torch.no_grad():
        reached = torch.stack([F.mse_loss(grown.eval()(x), y) for x, y in batches]).mean()
    assert after < before and float(reached) < before


def hook_norm(layer: nn.Module) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return hooked(layer)


@pytest.mark.parametrize(
    "wrap, name",
    [
        (hook_norm, "WeightNorm"), (spectral_norm, "SpectralNorm"), (parametrizations.orthogonal, "Orthogonal"),
        (lambda layer: parametrizations.spectral_norm(parametrizations.weight_norm(layer)), "SpectralNorm, WeightNorm"),
    ],
)  # fmt: skip
def test_other_parametrizations_are_named(wrap: Any, name: str) -> None:
    model: Any = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), wrap(nn.Linear(6, 5)), nn.ReLU(), nn.Linear(5, 3))
    found = {w.name: w.pinned for w in fxgrow.widths(fxgrow.capture(model, (torch.randn(2, 4),)))}
    for width in ("0", "2"):
        assert found[width] is not None and f"({name})" in found[width].message
    with pytest.raises(fxgrow.FxgrowError, match=name):
        fxgrow.widen(model, (torch.randn(2, 4),), {"0": 1})


def test_frozen() -> None:
    model, x = network(), torch.randn(2, 3, 6, dtype=torch.float64)
    model[3].requires_grad_(False)
    found = {w.name: w.pinned.code if w.pinned else None for w in fxgrow.widths(fxgrow.capture(model, (x,)))}
    assert found == {"0": "frozen", "3": "frozen", "5": "output"}
    model[3].requires_grad_(True)
    model[0].requires_grad_(False)
    grown: Any = fxgrow.widen(model, (x,), {"3": 1})
    trained: dict[str, Tensor] = {n: p for n, p in grown.named_parameters() if p.requires_grad}
    assert not any(n.startswith("0.") for n in trained) and "3.parametrizations.weight.original0" in trained
