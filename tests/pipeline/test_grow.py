"""`grow` end to end: what the line search predicts is what comes out, old entries and optimisers go on."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fxgrow
from models.decoder import Decoder
from models.mlp import MLP
from models.resnet import DigitsResNet, resnet20

Batches = list[tuple[Tensor, Tensor]]


def digits(count: int = 1024, batch: int = 128) -> Batches:
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    x, y = torch.tensor(x[:count], dtype=torch.float32).reshape(-1, 1, 8, 8) / 8 - 1, torch.tensor(y[:count])
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    return list(zip(x[order].split(batch), y[order].split(batch), strict=True))


def train(
    model: nn.Module, batches: Batches, optimizer: torch.optim.Optimizer, steps: int, seed: int = 0
) -> list[float]:
    losses = []
    generator = torch.Generator().manual_seed(seed)
    model.train()
    for _ in range(steps):
        x, y = batches[int(torch.randint(len(batches), (), generator=generator))]
        loss = F.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def trained(steps: int = 60) -> tuple[nn.Module, torch.optim.Optimizer, Batches]:
    torch.manual_seed(0)
    model, batches = DigitsResNet(0.25), digits()
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    train(model, batches, optimizer, steps)
    return model, optimizer, batches


def settle(model: nn.Module, x: Tensor) -> None:
    """Running statistics of exactly this data, so that both modes agree before growth."""
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    for m in norms:
        m.reset_running_stats()
        m.momentum = 1.0
    with torch.no_grad():
        model.train()(x)
    for m in norms:
        m.momentum = 0.1


def overlap(old: dict[str, Tensor], new: dict[str, Tensor]) -> bool:
    """Whether old entries are found first along every dimension (no stream is spliced), bit for bit."""
    return all(torch.equal(t, new[n][tuple(slice(0, s) for s in t.shape)]) for n, t in old.items())


@pytest.mark.parametrize("settled", [True, False])
def test_losses_are_what_the_search_predicted(settled: bool) -> None:
    """Both modes, measured here on what `grow` returns and on what the plan gives when it is replayed."""
    model, _, batches = trained(200)
    if settled:
        settle(model, torch.cat([x for x, _ in batches]))
    grown = fxgrow.grow(model, batches, neurons=3, progress=False)
    growth = grown.meta["fxgrow"]
    replayed = fxgrow.apply(fxgrow.capture(model, (batches[0][0],)), fxgrow.Plan.from_json(growth.plan.to_json()))
    held = [b for i, b in enumerate(batches) if i % 4 == 3]

    def mean_loss(net: nn.Module, mode: str) -> float:
        net = copy.deepcopy(net).train(mode == "train")
        with torch.no_grad():
            return float(torch.stack([F.cross_entropy(net(x), y) for x, y in held]).mean())

    search = growth.search
    assert search.applied == growth.plan.scale
    for mode, curve in (("eval", search.eval_losses), ("train", search.losses)):
        before, after = growth.losses[mode]
        assert curve[0] == pytest.approx(before, rel=1e-5)
        assert before == pytest.approx(mean_loss(model, mode), rel=1e-5)
        assert after == pytest.approx(mean_loss(grown, mode), rel=1e-5)
        assert search.predicted[mode] == pytest.approx(mean_loss(grown, mode), rel=1e-4)
        assert search.predicted[mode] == pytest.approx(mean_loss(replayed, mode), rel=1e-4)
        assert min(curve) <= after < before
    if settled:  # modes that agreed before growth agree on its effect
        (eval_before, eval_after), (before, after) = growth.losses["eval"], growth.losses["train"]
        assert eval_after / eval_before == pytest.approx(after / before, rel=0.03)


def test_running_statistics_follow() -> None:
    """They move as the statistics of the data do; a plan carries that, and nothing moves where no weight does."""
    model, _, batches = trained(200)
    settle(model, torch.cat([x for x, _ in batches]))
    held = [b for i, b in enumerate(batches) if i % 4 == 3]
    grown = fxgrow.grow(model, batches, neurons=3, progress=False)
    name = "layer1.0.bn2"  # behind the consumer of a grown width
    old, new = model.get_submodule(name), grown.get_submodule(name)
    entered: list[Tensor] = []
    for net in (model, grown):
        net.eval()
        seen: list[Tensor] = []
        hook = net.get_submodule(name).register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0]))
        with torch.no_grad():
            for x, _ in held:
                net(x)
        hook.remove()
        entered.append(torch.cat(seen).mean((0, 2, 3))[: old.num_features])
    moved = new.running_mean[: old.num_features] - old.running_mean
    assert float(moved.norm()) > 0
    torch.testing.assert_close(moved, entered[1] - entered[0], rtol=0.1, atol=0.1 * float(moved.norm()))
    again = fxgrow.apply(
        fxgrow.capture(model, (batches[0][0],)), fxgrow.Plan.from_json(grown.meta["fxgrow"].plan.to_json())
    )
    for key, t in grown.state_dict().items():
        torch.testing.assert_close(again.state_dict()[key], t, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("training", [False, True])
def test_new_batch_norm_channels_put_out_what_they_get(training: bool) -> None:
    """In eval mode exactly; in train mode up to what a batch differs from the calibration data."""
    model, _, batches = trained()
    x = torch.cat([x for i, (x, _) in enumerate(batches) if i % 4 != 3])
    settle(model, x)
    profile = fxgrow.profile(model, batches, units=4, progress=False)
    grown = fxgrow.apply(profile.gm, fxgrow.plan(profile, neurons=4).scaled(0.0)).train(training)
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    for name, module in grown.named_modules():
        if isinstance(module, nn.BatchNorm2d):
            module.register_forward_hook(lambda m, a, out, name=name: seen.__setitem__(name, (a[0], out)))
    with torch.no_grad():
        grown(x)
    assert len(seen) == 6
    for name, (before, after) in seen.items():
        assert before.shape[1] == model.get_submodule(name).num_features + 4
        old, new = before[:, -4:], after[:, -4:]
        assert float((new - old).norm() / old.norm()) < (0.06 if training else 1e-5), name


def test_names_and_old_entries() -> None:
    model, _, batches = trained()
    old = copy.deepcopy(model.state_dict())
    grown = fxgrow.grow(model, batches, neurons=2, update_existing=False, progress=False)
    assert list(grown.state_dict()) == list(old)
    assert overlap(old, grown.state_dict())
    assert {n for n, _ in grown.named_modules()} >= {n for n, _ in model.named_modules()}
    moved = fxgrow.grow(model, batches, neurons=2, progress=False).state_dict()
    assert not overlap(old, moved)
    assert overlap({n: t for n, t in old.items() if "bn" in n and "running" not in n}, moved)


def test_growing_again_and_again() -> None:
    """A grown graph is trained and grown three times; widths and names stay what they are."""
    model, _, batches = trained(30)
    names = list(model.state_dict())
    net: nn.Module = model
    for time in (1, 2, 3):
        net = fxgrow.grow(net, batches, neurons=1, progress=False)
        assert list(net.state_dict()) == names
        assert net.get_submodule("layer1.0.conv1").out_channels == 4 + time
        assert net.meta["fxgrow"].losses["eval"][1] <= net.meta["fxgrow"].losses["eval"][0] + 1e-6
        train(net, batches, torch.optim.Adam(net.parameters(), 1e-2), 5)
        net.eval()
    assert all(torch.isfinite(p).all() for p in net.parameters())


def test_default_budget_on_a_captured_graph() -> None:
    model, _, batches = trained()
    gm = fxgrow.capture(model, (batches[0][0],))
    grown = fxgrow.grow(gm, batches, progress=False)
    before, after = (sum(p.numel() for p in m.parameters()) for m in (model, grown))
    growth = grown.meta["fxgrow"]
    assert before <= after <= 1.25 * before and after - before == growth.plan.parameters[1] - growth.plan.parameters[0]
    assert set(growth.seconds) >= {"capture", "profile", "plan", "search"}
    if growth.plan.units:
        assert growth.losses["eval"][1] < growth.losses["eval"][0] and growth.declined is None


def test_resnet20_option_a() -> None:
    """Zero-padded shortcuts: the padding stands in front of and behind the channels of a stream."""
    torch.manual_seed(0)
    model = resnet20(0.25)
    x, y = torch.randn(48, 3, 16, 16), torch.randint(10, (48,))
    batches = list(zip(x.split(12), y.split(12), strict=True))
    old = model.state_dict()
    grown = fxgrow.grow(model, batches, neurons={"layer1.0.conv1": 3, "layer3.2.conv1": 2}, progress=False)
    assert grown.get_submodule("layer1.0.conv1").out_channels == 7
    assert list(grown.state_dict()) == list(old)
    assert grown(x).shape == (48, 10)


def test_declines_where_nothing_can_be_gained() -> None:
    """Labels from the model's own softmax: an unchanged copy comes back, and says why."""
    torch.manual_seed(1)
    model = MLP([8, 6, 4])
    x = torch.randn(1024, 8)
    with torch.no_grad():
        y = torch.distributions.Categorical(logits=model(x)).sample()
    grown = fxgrow.grow(model, list(zip(x.split(64), y.split(64), strict=True)), progress=False)
    growth = grown.meta["fxgrow"]
    assert growth.plan.units == {} and growth.declined
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), grown.state_dict().values(), strict=True))
    assert grown.get_parameter("layers.0.weight") is not model.layers[0].weight


def test_pinned_widths_are_reported() -> None:
    model, _, batches = trained(5)
    model.layer1[0].conv1.weight.requires_grad_(False)
    growth = fxgrow.grow(model, batches, neurons=1, progress=False).meta["fxgrow"]
    assert growth.pinned["linear"].code == "output" and growth.pinned["layer1.0.conv1"].code == "frozen"
    assert "layer1.0.conv1" not in growth.plan.units


OPTIMISERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "adam": lambda p: torch.optim.Adam(p, 1e-2),
    "adamw": lambda p: torch.optim.AdamW(p, 1e-2, weight_decay=0.01),
    "sgd": lambda p: torch.optim.SGD(p, 0.05, momentum=0.9),
}


@pytest.mark.parametrize("name", OPTIMISERS)
def test_optimiser_goes_on(name: str) -> None:
    torch.manual_seed(0)
    model, batches = DigitsResNet(0.25), digits()
    optimizer = OPTIMISERS[name](model.parameters())
    train(model, batches, optimizer, 60)
    old_state = {n: copy.deepcopy(optimizer.state[p]) for n, p in model.named_parameters()}
    grown = fxgrow.grow(model, batches, neurons=2, optimizer=optimizer, progress=False)

    owned = [p for group in optimizer.param_groups for p in group["params"]]
    assert [id(p) for p in owned] == [id(p) for p in grown.parameters()]
    assert set(map(id, optimizer.state)) <= set(map(id, owned))
    for n, p in grown.named_parameters():
        for key, t in old_state[n].items():
            new = optimizer.state[p][key]
            if not isinstance(t, Tensor) or t.dim() == 0:
                assert new == t
                continue
            assert new.shape == p.shape
            assert torch.equal(new[tuple(slice(0, s) for s in t.shape)], t)
            assert float(new.abs().sum()) == pytest.approx(float(t.abs().sum()), rel=1e-4)  # the rest is zero

    for seed in (1, 2, 3):
        net, kept_optimizer = copy.deepcopy((grown, optimizer))
        kept = train(net, batches, kept_optimizer, 50, seed)
        net = copy.deepcopy(grown)
        fresh = train(net, batches, OPTIMISERS[name](net.parameters()), 50, seed)
        spike = max(k - f for k, f in zip(kept, fresh, strict=True))
        noise = max(abs(a - b) for a, b in zip(fresh, fresh[1:], strict=False))
        assert spike < noise
        assert sum(kept) < sum(fresh) + 50 * 0.02


def test_optimiser_that_owns_a_part() -> None:
    """Parameters that are not the model's, and groups, stay what they are."""
    model, _, batches = trained(5)
    extra = nn.Parameter(torch.zeros(3))
    optimizer = torch.optim.SGD(
        [{"params": [model.conv1.weight], "lr": 0.5}, {"params": [extra, model.linear.weight]}], lr=0.1
    )
    grown = fxgrow.grow(model, batches, neurons=1, optimizer=optimizer, progress=False)
    first, second = optimizer.param_groups
    assert first["lr"] == 0.5 and first["params"][0] is grown.get_parameter("conv1.weight")
    assert second["params"][0] is extra and second["params"][1] is grown.get_parameter("linear.weight")


def test_widen_then_train_goes_on() -> None:
    model, optimizer, batches = trained(20)
    x = batches[0][0]
    wide = fxgrow.widen(model, (x,), {"layer1.0.conv1": 5, "conv1": 2}, optimizer=optimizer)
    assert torch.allclose(wide.eval()(x), copy.deepcopy(model).eval()(x), atol=1e-5)
    train(wide, batches, optimizer, 2)
    new = [
        wide.get_parameter("layer1.0.conv1.weight").grad[4:], wide.get_parameter("layer1.0.conv2.weight").grad[:, 4:],
    ]  # fmt: skip
    assert all(bool(g.abs().max() > 0) and bool(torch.isfinite(g).all()) for g in new)


@pytest.mark.parametrize("unit", [1e-2, 1e2])
def test_unit_of_a_regression_changes_nothing(unit: float) -> None:
    """Targets in metres or centimetres: the relative decrease of the loss is the same."""
    torch.manual_seed(0)
    x = torch.randn(2048, 6)
    y = x[:, :1].abs() + x[:, 1:2].abs() + x[:, 2:3].abs()
    model = MLP([6, 3, 1])
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(300):
        optimizer.zero_grad()
        F.mse_loss(model(x), y).backward()
        optimizer.step()
    decreases = []
    for scale in (1.0, unit):
        scaled = copy.deepcopy(model)
        with torch.no_grad():
            scaled.layers[-1].weight *= scale
            scaled.layers[-1].bias *= scale
        batches = list(zip(x.split(128), (y * scale).split(128), strict=True))
        before, after = fxgrow.grow(scaled, batches, neurons=3, progress=False).meta["fxgrow"].losses["eval"]
        decreases.append(1 - after / before)
    assert decreases[0] > 0.01
    assert decreases[1] == pytest.approx(decreases[0], rel=0.3)


class Rows(nn.Module):
    """The same two layers with weights stored [in, out]."""

    def __init__(self, first: nn.Linear, last: nn.Linear) -> None:
        super().__init__()
        self.w, self.b = (nn.Parameter(t.detach().mT.clone()) for t in (first.weight, last.weight))
        self.v, self.c = (nn.Parameter(t.detach().clone()) for t in (first.bias, last.bias))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.c, torch.addmm(self.v, x, self.w).tanh(), self.b)


class Equalised(nn.Module):
    """The same two layers without biases, with weights of unit variance that the code scales and transposes."""

    def __init__(self, first: nn.Linear, last: nn.Linear) -> None:
        super().__init__()
        self.w, self.b = (nn.Parameter(t.detach() * 4) for t in (first.weight, last.weight.mT))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.linear(x, self.w * 0.25).tanh(), -self.b.t() / -4)


@pytest.mark.parametrize("method", ["default", "tiny", "gradmax", "north"])
def test_scaled_weights_grow_alike(method: str) -> None:
    """Moments and new entries are those of the parameters, whatever number the code multiplies them by."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 8, bias=False), nn.Tanh(), nn.Linear(8, 3, bias=False)).double()
    scaled = Equalised(net[0], net[2])
    x = torch.randn(256, 6, dtype=torch.float64)
    batches = [(x[i : i + 32], (x[i : i + 32, :1] * x[i : i + 32, 1:2]).expand(-1, 3)) for i in range(0, 256, 32)]
    one, other = (fxgrow.grow(m, batches, neurons=3, method=method, progress=False) for m in (net, scaled))
    torch.testing.assert_close(one(x), other(x), rtol=1e-8, atol=1e-10)
    assert (one.get_parameter("0.weight").shape, other.get_parameter("w").shape) == ((11, 6), (11, 6))


@pytest.mark.parametrize("method", ["default", "tiny"])
def test_weights_stored_the_other_way_round_grow_alike(method: str) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    rows = Rows(net[0], net[2])
    x = torch.randn(256, 6, dtype=torch.float64)
    batches = [(x[i : i + 32], (x[i : i + 32, :1] * x[i : i + 32, 1:2]).expand(-1, 3)) for i in range(0, 256, 32)]
    one, other = (fxgrow.grow(m, batches, neurons=3, method=method, progress=False) for m in (net, rows))
    torch.testing.assert_close(one(x), other(x), rtol=1e-10, atol=1e-12)
    first, second = one.meta["fxgrow"].profile["0"], other.meta["fxgrow"].profile["w"]
    assert first.bottleneck == pytest.approx(second.bottleneck, rel=1e-10) and first.bottleneck > 0
    assert one.meta["fxgrow"].losses["eval"][1] < one.meta["fxgrow"].losses["eval"][0]


def test_batches_of_different_lengths_and_outputs_without_a_loss() -> None:
    class Tagger(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tokens, self.up, self.down = nn.Embedding(20, 8), nn.Linear(8, 16), nn.Linear(16, 5)
            self.other = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3))

        def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
            h = self.tokens(ids).mean(1)
            return self.down(self.up(h).relu()), self.other(h)

    torch.manual_seed(0)
    batches = [(torch.randint(20, (16, t)), torch.randint(5, (16,))) for t in (7, 9, 7, 12, 5, 9, 8, 3)]
    loss = lambda out, y: F.cross_entropy(out[0], y)  # noqa: E731
    grown = fxgrow.grow(Tagger(), batches, loss_fn=loss, neurons=2, progress=False)
    profile = grown.meta["fxgrow"].profile
    assert profile["up"].bottleneck > 0 == profile["other.0"].bottleneck
    assert grown.get_submodule("up").out_features == 18


def test_random_columns_of_silent_units_do_not_move_with_gamma():
    torch.manual_seed(0)
    net = Decoder(11, 12, depth=1, heads=2, head_size=4, width=0.25)
    tokens = torch.randint(11, (40, 13))
    data = [(t[:, :-1], t[:, 1:]) for t in tokens.split(10)]
    grown = fxgrow.grow(net, data, neurons={"tokens": 4}, progress=False)
    new = grown.blocks[0].mlp.gate.weight[:, 16:]
    again = fxgrow.apply(fxgrow.capture(net, (data[0][0],)), grown.meta["fxgrow"].plan)
    assert 0.2 < new.std() < 0.6  # Kaiming for 20 inputs: 0.32
    assert torch.equal(again.blocks[0].mlp.gate.weight[:, 16:], new)
    torch.testing.assert_close(grown(tokens[:2, :-1]), again(tokens[:2, :-1]))


def test_nothing_moves_along_gamma_where_units_start_at_zero() -> None:
    model, _, batches = trained(20)
    grown = fxgrow.grow(model, batches, neurons={"conv1": 2}, method="random", progress=False)
    record = grown.meta["fxgrow"]
    assert record.search is None and record.plan.units == {"conv1": 2}
    assert list(record.profile) == ["conv1"]
    assert record.losses["eval"][0] == pytest.approx(record.losses["eval"][1], abs=1e-5)


def test_predictions_come_true_and_are_kept() -> None:
    torch.manual_seed(0)
    model, batches = MLP([64, 12, 10]), [(x.flatten(1), y) for x, y in digits()]
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    train(model, batches, optimizer, 200)
    net: nn.Module = model
    for times in (1, 2, 3):
        net = fxgrow.grow(net, batches, neurons=2, optimizer=optimizer, progress=False)
        record = net.meta["fxgrow"]
        assert len(record.decreases) == times
        predicted, realised = record.decreases[-1]
        before, after = record.losses["eval"]
        assert realised == before - after > 0
        assert predicted == record.plan.decrease(record.plan.scale) == pytest.approx(realised, rel=0.8)
        assert f"decrease: {predicted:.4f} predicted, {realised:.4f} realised" in str(record)
        train(net, batches, optimizer, 20)
    assert "(correlation over 3 growths " in str(record)
    again = fxgrow.Plan.from_json(record.plan.to_json())
    assert (again.slope, again.curvature) == (record.plan.slope, record.plan.curvature)


@pytest.mark.parametrize("method", ["tiny", "default"])
def test_the_line_search_sees_what_nothing_was_fitted_on(method: str) -> None:
    model, _, batches = trained(20)
    # other labels for the held-out batches: the units stay as they were
    broken = [(x, y if i % 4 != 3 else y.flip(0)) for i, (x, y) in enumerate(batches)]
    plans = [
        fxgrow.grow(model, data, method=method, neurons={"conv1": 2}, progress=False).meta["fxgrow"].plan
        for data in (batches, broken)
    ]
    assert plans[0].scale != plans[1].scale
    for name, slices in plans[0].values.new.items():
        for key, t in slices.items():
            if "running" not in name:  # those move along with gamma
                torch.testing.assert_close(plans[1].values.new[name][key], t)


def test_steps_at_which_the_loss_is_not_a_number_are_too_long() -> None:
    torch.manual_seed(0)
    model = MLP([6, 4, 3])
    inputs = [torch.randn(32, 6) for _ in range(6)]
    with torch.no_grad():
        batches = [(x, (torch.randn(32, 3), model(x))) for x in inputs]

    def loss(output: Tensor, targets: tuple[Tensor, Tensor]) -> Tensor:
        expected, before = targets
        far = (output - before).abs().amax(1) > 0.01
        return (output - expected).square().mean(1).masked_fill(far, torch.nan)

    record = fxgrow.grow(model, batches, neurons=2, loss_fn=loss, progress=False).meta["fxgrow"]
    assert torch.inf in record.search.losses and record.plan.scale > 0
    before, after = record.losses["eval"]
    assert after < before
    with pytest.raises(fxgrow.ProfileError, match="is nan"):
        fxgrow.grow(model, batches, loss_fn=lambda output, targets: output.sum() * torch.nan, progress=False)


class MonteCarlo(nn.Module):
    """Drops units in eval mode too."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.o = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.o(F.dropout(self.a(x).relu(), 0.5, training=True))


def test_networks_with_dropout_in_eval_mode_grow() -> None:
    torch.manual_seed(0)
    batches = [(torch.randn(32, 6), torch.randn(32, 3)) for _ in range(4)]
    assert fxgrow.widen(MonteCarlo(), (batches[0][0],), {"a": 2}).a.out_features == 10
    grown = fxgrow.grow(MonteCarlo(), batches, neurons={"a": 2}, loss_fn=F.mse_loss, progress=False)
    assert grown.meta["fxgrow"].search is not None
