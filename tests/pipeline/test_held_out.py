"""The loss on held-out batches: in both modes, with its noise; growth that would be worse in one of them."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fxgrow
from fxgrow.data.batches import Data, parse
from fxgrow.data.loss_parts import PARTS, losses_of_parts
from fxgrow.pipeline.held_out import HeldOut, Losses
from fxgrow.pipeline.recalibration import recalibrated
from fxgrow.rewriting.batch_norm import RunningStatistics

Batches = list[tuple[Tensor, Tensor]]


def digits(count: int = 768, batch: int = 64) -> Batches:
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    x, y = torch.tensor(x[:count], dtype=torch.float32) / 8 - 1, torch.tensor(y[:count])
    return list(zip(x.split(batch), y.split(batch), strict=True))


def trained(model: nn.Module, batches: Batches, steps: int) -> nn.Module:
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for i in range(steps):
        x, y = batches[i % len(batches)]
        optimizer.zero_grad()
        F.cross_entropy(model.train()(x), y).backward()
        optimizer.step()
    return model


def dropout_net(p: float = 0.5) -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Linear(64, 16), nn.ReLU(), nn.Dropout(p), nn.Linear(16, 16), nn.ReLU(), nn.Dropout(p)]
    return nn.Sequential(*layers, nn.Linear(16, 10))


def norm_net(momentum: float = 0.1) -> nn.Module:
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for n in (64, 12, 12):
        layers += [nn.Linear(n, 12), nn.BatchNorm1d(12, momentum=momentum), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(12, 10))


@torch.no_grad()
def train_loss(model: nn.Module, batches: Batches, masks: int) -> tuple[float, float]:
    """Mean over masks, and its standard error."""
    model = copy.deepcopy(model).train()
    x, y = (torch.cat(parts) for parts in zip(*batches, strict=True))
    losses = torch.stack([F.cross_entropy(model(x), y) for _ in range(masks)])
    return float(losses.mean()), float(losses.std()) / masks**0.5


def test_parts_add_up_to_the_loss_of_the_batch() -> None:
    torch.manual_seed(0)
    batch = parse((torch.randn(37, 5), torch.randint(5, (37,))), 0)
    output = torch.randn(37, 5)
    parts = losses_of_parts(output, batch, F.cross_entropy)
    assert len(parts) >= PARTS and float(parts.std()) > 0
    assert float(parts.mean()) == pytest.approx(float(F.cross_entropy(output, batch.targets)))


def test_a_constant_per_batch_does_not_change_the_growth() -> None:
    """Losses of parts add up to the batch's at some gammas only: those are compared by their means."""
    torch.manual_seed(0)
    true = torch.randn(6, 3)
    data = [(x, (x @ true).sin()) for x in torch.randn(4, 64, 6)]
    scales = set()
    for constant in (0.0, 1.0, 4.0):
        torch.manual_seed(1)
        net = nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 3))
        loss = lambda out, y, c=constant: (out - y).square().sum() + c  # noqa: E731
        grown = fxgrow.grow(net, data, loss_fn=loss, neurons=2, progress=False)
        scales.add(round(grown.meta["fxgrow"].plan.scale, 4))
    assert len(scales) == 1


def whole_batches_only(output: Tensor, targets: Tensor) -> Tensor:
    if len(output) != 37:
        raise ValueError("37 samples")
    return F.cross_entropy(output, targets)


@pytest.mark.parametrize("loss", [whole_batches_only, lambda out, y: out.softmax(0).std() + 0 * y.sum()])
def test_a_loss_that_has_no_parts_is_one_reading(loss: Any) -> None:
    torch.manual_seed(0)
    batch = parse((torch.randn(37, 5), torch.randint(5, (37,))), 0)
    assert len(losses_of_parts(torch.randn(37, 5), batch, loss)) == 1


def test_the_error_is_that_of_the_mean_over_samples() -> None:
    """As often as chance has it, the error of the parts is what repeated draws of the data show."""
    torch.manual_seed(0)
    means, errors = [], []
    net, other = nn.Linear(4, 3), nn.Linear(4, 3)
    for _ in range(40):
        x = torch.randn(128, 4)
        held_out = HeldOut([parse((x, torch.randint(3, (128,))), 0)] * 1, None)
        before, after = (held_out.losses(m) for m in (fxgrow.capture(n, (x,)) for n in (net, other)))
        mean, error = held_out.difference(after, before)
        means.append(mean)
        errors.append(error)
    assert float(torch.tensor(means).std()) == pytest.approx(sum(errors) / 40, rel=0.35)


def test_masks_are_several_and_the_same_before_and_after() -> None:
    model, batches = trained(dropout_net(), digits(), 60), digits()
    gm = fxgrow.capture(model, (batches[0][0],))
    held_out = HeldOut.of(Data(batches), None)
    norms = RunningStatistics(gm, held_out.batches)
    (one, _), (other, _) = (held_out.in_train_mode(gm, norms) for _ in range(2))
    assert torch.equal(one.values, other.values) and len(one.values) > 2 * len(held_out.batches) * PARTS
    mean, error = train_loss(model, batches[3::4], 50)
    assert held_out.mean(one) == pytest.approx(mean, abs=0.05)
    assert held_out.mean(one) > held_out.mean(held_out.in_eval_mode(gm)) + 5 * error


@pytest.mark.parametrize("method", ["default", "tiny", "variance-transfer", "net2wider"])
def test_dropout_does_not_make_growth_worse(method: str) -> None:
    """The loss in train mode, over fifty masks, is no higher than before, unless the report says so."""
    batches = digits()
    model = trained(dropout_net(), batches, 100)
    grown = fxgrow.grow(model, batches, method=method, multiple=2, progress=False)
    (before, one), (after, other) = (train_loss(m, batches, 50) for m in (model, grown))
    assert after < before + 3 * (one**2 + other**2) ** 0.5
    assert (method != "default") or grown.meta["fxgrow"].plan.units


def test_units_that_are_asked_for_are_warned_of_where_dropout_pulls_them_apart() -> None:
    batches = digits()
    model = trained(dropout_net(), batches, 100)
    growth = fxgrow.grow(model, batches, method="variance-transfer", neurons=8, progress=False).meta["fxgrow"]
    before, after = growth.losses["train"]
    assert growth.plan.units and after > before
    assert "cancel in eval mode only" in str(growth).replace("\n", " ")


def test_running_statistics_that_lag_are_measured_again() -> None:
    batches = digits()
    model = trained(norm_net(momentum=0.003), batches, 150)
    stale = copy.deepcopy(model.state_dict())
    grown = fxgrow.grow(model.eval(), batches, neurons=3, progress=False)
    growth = grown.meta["fxgrow"]
    assert "running statistics of BatchNorm lag behind" in growth.profile.recalibrated
    assert "running statistics of BatchNorm lag behind" in str(growth)
    assert all(torch.equal(t, stale[n]) for n, t in model.state_dict().items())
    x, y = (torch.cat(parts) for parts in zip(*batches, strict=True))
    with torch.no_grad():
        old, new = (float(F.cross_entropy(m.eval()(x), y)) for m in (model, grown))
    assert new < 0.6 * old and new == pytest.approx(growth.losses["eval"][1], rel=0.3)
    # what is added has the size of what is there
    assert max(float(p.detach().abs().max()) for p in grown.parameters()) < 5 * max(
        float(p.detach().abs().max()) for p in model.parameters()
    )


def test_statistics_of_a_model_that_declines_stay_as_they_are() -> None:
    model = trained(norm_net(momentum=0.003), digits(), 150).eval()
    few = [(x[:4], y[:4]) for x, y in digits(256)]
    grown = fxgrow.grow(model, few, progress=False)
    growth = grown.meta["fxgrow"]
    assert growth.declined and "neurons=" in growth.declined and "samples" in growth.declined
    assert all(torch.equal(t, model.state_dict()[n]) for n, t in grown.state_dict().items())


def test_statistics_that_do_not_lag_are_kept() -> None:
    model = trained(norm_net(), digits(), 150).eval()
    gm = fxgrow.capture(model, (digits()[0][0],))
    assert recalibrated(gm, Data(digits()), None) == (gm, None)


def test_eval_mode_is_no_worse_with_few_samples() -> None:
    """Five held-out samples: the step of the search fits them in train mode, with statistics of five samples."""
    for seed in range(4):
        torch.manual_seed(seed)
        model = trained(norm_net(), digits(), 30 + seed * 10).eval()
        few = [(x[:5], y[:5]) for x, y in digits()[:8]]
        growth = fxgrow.grow(model, few, neurons=3, progress=False).meta["fxgrow"]
        for before, after in growth.losses.values():
            assert after <= before * (1 + 1e-5)
        assert growth.plan.units


def test_a_decrease_within_the_noise_is_no_growth() -> None:
    """The held-out samples disagree about the step: it is declined, but added where it is asked for."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 4))
    x = torch.randn(64, 8)
    batches = list(zip(x.split(16), torch.randint(4, (64,)).split(16), strict=True))
    declined = fxgrow.grow(model, batches, method="tiny", progress=False).meta["fxgrow"]
    assert not declined.plan.units and "samples" in declined.declined
    forced = fxgrow.grow(model, batches, method="tiny", neurons=2, progress=False)
    assert forced.meta["fxgrow"].plan.units == {"0": 2}
    assert bool(forced.get_parameter("0.weight")[6:].any())  # units without weights on either side would never learn
    before, after = forced.meta["fxgrow"].losses["eval"]
    assert after <= before * (1 + 1e-5)


def test_losses_of_single_samples_and_of_a_whole_batch_are_compared_by_their_means() -> None:
    held_out = HeldOut([parse((torch.randn(4, 2), torch.zeros(4, dtype=torch.long)), 0)], None)
    single = Losses(torch.tensor([1.0, 2.0, 3.0, 4.0]).double(), torch.ones(4).double())
    batch = Losses(torch.tensor([3.0]).double(), torch.tensor([4.0]).double())
    assert held_out.difference(batch, single) == (0.5, 0.0)


class WithAuxiliaryHead(nn.Module):
    """Returns a second output in train mode, as GoogLeNet does."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Sequential(nn.Linear(64, 12), nn.ReLU()), nn.Linear(12, 10)
        self.extra = nn.Sequential(nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 10))

    def forward(self, x: Tensor) -> Any:
        h = self.body(x)
        return (self.head(h), self.extra(h)) if self.training else self.head(h)


def of_both_heads(output: Any, targets: Tensor) -> Tensor:
    outputs = output if isinstance(output, tuple) else (output,)
    return torch.stack([F.cross_entropy(out, targets) for out in outputs]).sum()


def test_a_head_of_train_mode_counts_in_train_mode() -> None:
    torch.manual_seed(0)
    model, batches = WithAuxiliaryHead(), digits()
    grown = fxgrow.grow(model, batches, loss_fn=of_both_heads, neurons=2, progress=False)
    held, train = (grown.meta["fxgrow"].losses[mode] for mode in ("eval", "train"))
    assert train[0] > 1.5 * held[0] and train[1] < train[0] and held[1] < held[0]
    # without a loss for it, train mode is eval mode
    growth = fxgrow.grow(model, batches, loss_fn=F.cross_entropy, neurons=2, progress=False).meta["fxgrow"]
    assert growth.losses["train"] == growth.losses["eval"] and growth.plan.units
