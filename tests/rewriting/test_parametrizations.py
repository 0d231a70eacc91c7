"""Weight and spectral normalisation: such layers grow, exactly and from data; what else computes a weight is named."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn import utils
from torch.nn.utils import parametrizations, prune
from torch.optim.swa_utils import AveragedModel

import fxgrow
from fxgrow.analysis.analyse import analyse
from fxgrow.rewriting.parametrizations import remove_parametrizations
from fxgrow.rewriting.rewrite import rewrite
from fxgrow.rewriting.size_change import SizeChange
from fxgrow.rewriting.values import Values
from fxgrow.rewriting.widened_graph import WidenedGraph


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


def by_hooks(net: nn.Sequential) -> nn.Sequential:
    for layer in net:
        if utils.parametrize.is_parametrized(layer):
            utils.parametrize.remove_parametrizations(layer, "weight")
            utils.spectral_norm(layer)
    return net


@pytest.mark.parametrize("kind", [lambda net: net, by_hooks], ids=["parametrizations", "hooks"])
def test_singular_vectors_are_in_the_index(kind: Any) -> None:
    """So that averages of them, and whoever reads the index, find the old entries at their new positions."""
    model = kind(bounded()).eval()
    before = copy.deepcopy(model.state_dict())
    grown, index = rewrite(fxgrow.capture(model, (torch.randn(4, 3, 6, 6).double(),)), {"0": 3, "2": 2, "5": 2})
    after = grown.state_dict()
    assert index.keys() == {name for name, t in before.items() if t.shape != after[name].shape}
    assert sum(name.endswith(("_u", "_v")) for name in index) == 6 - 1  # the first layer reads the image
    for name in filter(lambda name: name.endswith(("_u", "_v")), index):
        (at,) = index[name]
        assert torch.equal(after[name][at], before[name])
        assert float(after[name].abs().sum()) == pytest.approx(float(before[name].abs().sum()))


def test_averages_of_singular_vectors_keep_their_old_entries() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(parametrizations.spectral_norm(nn.Linear(6, 4)), nn.Tanh(), nn.Linear(4, 2))
    average = AveragedModel(model, use_buffers=True)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for _ in range(3):
        model(torch.randn(8, 6)).square().mean().backward()
        optimizer.step()
        average.update_parameters(model)
    vectors = [average.module[0].parametrizations.weight[0]._u.clone()]
    data = [(x, x[:, :2].sin()) for x in torch.randn(8, 16, 6)]
    never = fxgrow.Every(steps=10**6)
    fxgrow.Grower(model, optimizer, never, dataloader=data, neurons=2, ema=average, into="module").grow_now()
    vectors.append(average.module[0].parametrizations.weight[0]._u)
    assert vectors[1].shape == (6,) and torch.equal(vectors[1][:4], vectors[0])


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


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_old_directions_keep_lengths_and_gradients() -> None:
    torch.manual_seed(0)
    net: Any = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), parametrizations.weight_norm(nn.Linear(6, 3))).double()
    net[2].parametrizations.weight.original0.data = torch.tensor([[-2.0], [0.0], [0.5]]).double()
    x = torch.randn(5, 4, dtype=torch.float64)
    grown: Any = fxgrow.widen(net, (x,), {"0": 2}, into="module")
    for m in (net, grown):
        m(x).sin().sum().backward()
    for name in ("original0", "original1"):
        old, new = (getattr(m[2].parametrizations.weight, name) for m in (net, grown))
        for a, b in ((old, new), (old.grad, new.grad)):
            torch.testing.assert_close(b[:, : a.shape[1]], a, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(
    ("hooked", "parametrized", "names"),
    [
        (utils.weight_norm, parametrizations.weight_norm, {"weight_g": "original0", "weight_v": "original1"}),
        (
            utils.spectral_norm, parametrizations.spectral_norm,
            {"weight_orig": "original", "weight_u": "0._u", "weight_v": "0._v"},
        ),
    ],
    ids=["weight", "spectral"],
)  # fmt: skip
def test_norms_by_hooks_grow_as_parametrizations_do(hooked: Any, parametrized: Any, names: dict[str, str]) -> None:
    def build(norm: Any) -> nn.Sequential:
        torch.manual_seed(0)
        layers = [norm(nn.Conv1d(3, 6, 3)), nn.LeakyReLU(), norm(nn.ConvTranspose1d(6, 4, 2)), nn.Tanh(), nn.Flatten()]
        return nn.Sequential(*layers, norm(nn.Linear(20, 3))).double()

    old, new, x = build(hooked), build(parametrized), torch.randn(8, 3, 6, dtype=torch.float64)
    for _ in range(3):  # power iterations
        old(x)
    state = old.state_dict()
    for i in (0, 2, 5):
        for name, other in names.items():
            new.state_dict()[f"{i}.parametrizations.weight.{other}"].copy_(state[f"{i}.{name}"])
        new[i].bias.data.copy_(old[i].bias.data)
    state = copy.deepcopy(state)
    batches = [(x, x.flatten(1)[:, :3].sin()) for x in torch.randn(8, 16, 3, 6, dtype=torch.float64)]
    results = []
    for net in (old, new):
        torch.manual_seed(1)
        wide: Any = fxgrow.widen(net.eval(), (x,), {"0": 2, "2": 3})  # reading a parametrization may iterate
        torch.testing.assert_close(wide(x), net(x), rtol=1e-12, atol=1e-12)
        assert wide.state_dict().keys() == net.state_dict().keys()
        grown: Any = fxgrow.grow(wide, batches, loss_fn=F.mse_loss, neurons=2, progress=False)
        with torch.no_grad():
            reached = F.mse_loss(grown(batches[-1][0]), batches[-1][1])
        assert grown.meta["fxgrow"].losses["eval"][1] < grown.meta["fxgrow"].losses["eval"][0]
        results += [wide(x), grown(x), reached]
        assert net is new or all(torch.equal(v, state[k]) for k, v in old.state_dict().items())
        for _ in range(5):
            torch.testing.assert_close(wide.train()(x), net.train()(x), rtol=1e-12, atol=1e-12)
    for a, b in zip(results[:3], results[3:], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_changed_weights_have_the_singular_value_of_the_old_ones() -> None:
    """Growth is measured without the norm, which must then find what it divides by as it was."""
    gm = fxgrow.capture(bounded().eval(), (x := torch.randn(4, 3, 6, 6, dtype=torch.float64),))
    values = Values(delta={"5.weight": torch.randn(5, 256, dtype=torch.float64)})
    plain = WidenedGraph(SizeChange(analyse(remove_parametrizations(gm)), {"5": 1}), values)
    grown, _ = rewrite(gm, {"5": 1}, values)
    torch.testing.assert_close(grown(x), plain.gm(x), rtol=1e-12, atol=1e-12)
    assert not torch.allclose(grown(x), gm(x))


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_hooked_layer_of_the_user_is_left_alone() -> None:
    model: Any = nn.Sequential(
        nn.Linear(6, 8), nn.Tanh(), nn.Sequential(utils.weight_norm(nn.Linear(8, 5))), nn.Linear(5, 2)
    )
    model[2][0].weight_g.requires_grad_(False)
    x = torch.randn(4, 6)
    model(x)
    weight = model[2][0].weight
    gm = fxgrow.capture(model, (x,))
    gm(x).sum().backward()
    wide: Any = fxgrow.widen(gm, (x,), {"0": 3})
    assert model[2][0].weight is weight and gm.get_parameter("2.0.weight_v") is model[2][0].weight_v
    assert not wide.get_parameter("2.0.weight_g").requires_grad and wide.get_parameter("2.0.weight_v").requires_grad
    torch.testing.assert_close(wide(x), model(x))
    again = fxgrow.widen(model, (x,), {"0": 3}, into="module")
    assert type(again[2][0]) is nn.Linear and again[2][0].weight_v.shape == (5, 11)
    torch.testing.assert_close(copy.deepcopy(again.requires_grad_(False))(x), model(x))


@pytest.mark.parametrize(
    "wrap, name",
    [
        (parametrizations.orthogonal, "Orthogonal"),
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


def test_a_hook_of_ones_own_that_computes_a_weight_is_no_norm() -> None:
    class Scaled:
        name = "weight"

        def compute_weight(self, layer: Any) -> Tensor:
            return layer.weight_orig * 0.5  # type: ignore[no-any-return]

        def __call__(self, layer: Any, inputs: Any) -> None:
            layer.weight = self.compute_weight(layer)

    torch.manual_seed(0)
    net: Any = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 2)).double()
    weight = net[0]._parameters.pop("weight")
    net[0].weight_orig = weight
    net[0].weight = weight.detach().clone()
    net[0].register_forward_pre_hook(Scaled())
    x = torch.randn(3, 4, dtype=torch.float64)
    found = {w.name: w.pinned for w in fxgrow.widths(fxgrow.capture(net, (x,)))}
    assert found["2"] is None and "Scaled" in str(found["0"])
    torch.testing.assert_close(fxgrow.widen(net, (x,), {"2": 2})(x), net(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("into", ["graph", "module"])
def test_pruned_layers_grow_and_stay_pruned(into: Any) -> None:
    torch.manual_seed(0)
    net: Any = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 2)).double()
    for amount in (0.3, 0.2):  # in turn
        prune.l1_unstructured(net[0], "weight", amount)
    prune.ln_structured(net[2], "weight", 0.4, 2, dim=1)
    data = [(x, x[:, :2].sin()) for x in torch.randn(6, 32, 4, dtype=torch.float64)]
    x, state = data[0][0], copy.deepcopy(net.state_dict())
    wide: Any = fxgrow.widen(net, (x,), {"0": 2, "2": 3}, into=into)
    grown: Any = fxgrow.grow(wide, data, loss_fn=F.mse_loss, neurons=2, into=into, progress=False)
    assert grown.meta["fxgrow"].losses["eval"][1] < grown.meta["fxgrow"].losses["eval"][0]
    torch.testing.assert_close(wide(x), net(x), rtol=1e-12, atol=1e-12)
    for m in (net, wide):
        m(x).sin().sum().backward()
    for i, (rows, columns) in {"0": (6, 4), "2": (5, 6)}.items():
        layers = [m.get_submodule(i) for m in (net, wide, grown)]
        for layer in layers:
            layer(x if i == "0" else x.new_ones(1, layer.in_features))  # computes the weight
            kept, mask = layer.weight_mask[:rows, :columns], layer.weight_mask.clone()
            assert torch.equal(kept, state[f"{i}.weight_mask"])
            mask[:rows, :columns] = 1
            assert bool((mask == 1).all()) and bool((layer.weight[layer.weight_mask == 0] == 0).all())
        old, new = (layer.weight_orig for layer in layers[:2])
        for a, b in ((old, new), (old.grad, new.grad)):
            torch.testing.assert_close(b[:rows, :columns], a, rtol=1e-12, atol=1e-12)
    assert grown.state_dict().keys() == state.keys()
    expected = grown(x)
    for i in ("0", "2"):
        prune.remove(grown.get_submodule(i), "weight")
    torch.testing.assert_close(grown(x), expected)
    assert all(torch.equal(v, state[k]) for k, v in net.state_dict().items())
