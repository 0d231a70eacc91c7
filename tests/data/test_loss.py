"""Which loss is used, what it is called, and whether it is a mean."""

from __future__ import annotations

import functools
import logging
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fxgrow

X = torch.randn(192, 6, generator=torch.Generator().manual_seed(0))
CLASSES = (X[:, 0] * X[:, 1] > 0).long()
BINARY = CLASSES[:, None].float()


def batches(targets: Tensor) -> list[tuple[Tensor, Tensor]]:
    return list(zip(X.split(48), targets.split(48), strict=True))


def net(outputs: int, *last: nn.Module) -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, outputs), *last)


def profile(model: nn.Module, targets: Tensor, **options: Any) -> fxgrow.Profile:
    return fxgrow.profile(model, batches(targets), progress=False, **options)


class Sigmoid(nn.Module):
    """Spelled out."""

    def forward(self, x: Tensor) -> Tensor:
        return 1 / (1 + (-x).exp())


WARNED: dict[str, tuple[nn.Module, Tensor, str]] = {
    "binary": (net(1), BINARY, "BCEWithLogitsLoss"),
    "labels of several kinds": (net(3), (X[:, :3] > 0).float(), "BCEWithLogitsLoss"),
    "degrees": (net(3), X[:, :3].sigmoid(), "BCEWithLogitsLoss"),
    "logits between 0 and 1": (net(1, nn.Hardtanh(0.2, 0.8)), BINARY, "BCEWithLogitsLoss.*after a sigmoid nn.BCELoss"),
    "sigmoid": (net(1, nn.Sigmoid()), BINARY, r"nn.BCELoss\(\), or loss_fn=nn.MSELoss"),
    "sigmoid, spelled out": (net(1, Sigmoid()), BINARY, "BCELoss"),
    "classes after a sigmoid": (net(2, nn.Sigmoid()), CLASSES, "nll_loss"),
    "classes after a hard sigmoid": (net(2, nn.Hardsigmoid()), CLASSES, "nll_loss"),
    "numbers after a sigmoid": (net(2, nn.Sigmoid()), X[:, :2], "L1Loss"),
    "classes after a softmax": (net(2, nn.Softmax(1)), CLASSES, "nll_loss"),
    "classes after a log-softmax": (net(2, nn.LogSoftmax(1)), CLASSES, "NLLLoss"),
}


@pytest.mark.parametrize("case", WARNED)
def test_a_default_loss_that_seems_wrong_is_warned_of_with_what_to_pass(case: str) -> None:
    model, targets, instead = WARNED[case]
    with pytest.warns(fxgrow.LossWarning, match=f"loss_fn=.*{instead}") as seen:
        profile(model, targets)
    assert [w.filename for w in seen] == [__file__]


def test_a_few_targets_of_0_and_1_say_enough() -> None:
    with pytest.warns(fxgrow.LossWarning, match="BCEWithLogitsLoss"):
        fxgrow.profile(net(1), list(zip(X.split(4), BINARY.split(4), strict=True)), progress=False)


@pytest.mark.parametrize(
    ("model", "targets", "instead"),
    [
        (net(2), F.one_hot(CLASSES).float(), "CrossEntropyLoss"),
        (net(2), F.one_hot(CLASSES) * 0.9 + 0.05, "CrossEntropyLoss"),
        (net(2, nn.LogSoftmax(1)), F.one_hot(CLASSES) * 0.9 + 0.05, "KLDivLoss"),
        (net(2, nn.LogSoftmax(1)), X[:, :2], "KLDivLoss"),
    ],
    ids=["one-hot", "soft", "log-softmax", "log-softmax of anything"],
)
def test_a_default_loss_that_is_wrong_is_refused(model: nn.Module, targets: Tensor, instead: str) -> None:
    with pytest.raises(fxgrow.ProfileError, match=f"mean squared error.*targets are [a-z].*loss_fn=.*{instead}"):
        profile(model, targets)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert profile(model, targets, loss_fn=nn.MSELoss()).loss_name == "MSELoss"


def test_other_defaults_pass_without_a_word() -> None:
    maps = nn.Sequential(nn.Unflatten(1, (1, 6)), nn.Conv1d(1, 3, 3), nn.ReLU(), nn.Conv1d(3, 2, 3))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert profile(net(2), CLASSES).loss_name == "cross-entropy"
        within = net(2)  # logits between 0 and 1 by chance
        with torch.no_grad():
            within[2].weight /= 10
            within[2].bias.fill_(0.5)
        assert profile(within, CLASSES).loss_name == "cross-entropy"
        assert profile(net(2), X.new_zeros(192, 2)).loss_name == "mean squared error"
        assert profile(maps, CLASSES[:, None].expand(-1, 2)).loss_name == "cross-entropy"


class Scorer(nn.Module):
    """Returns its own loss."""

    def __init__(self, total: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.net, self.total = net(2), total

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        return {"loss": self.total(F.cross_entropy(self.net(x), labels, reduction="none"))}


def summed_nll(output: Tensor, target: Tensor) -> Tensor:
    return F.nll_loss(F.log_softmax(output, 1), target) * len(target)


@pytest.mark.parametrize(
    "loss",
    [nn.CrossEntropyLoss(reduction="sum"), functools.partial(F.cross_entropy, reduction="sum"), summed_nll],
    ids=["module", "partial", "function"],
)
def test_a_sum_over_samples_gives_what_the_mean_gives(loss: Any) -> None:
    uneven = [(X[:20], CLASSES[:20]), (X[20:], CLASSES[20:]), *batches(CLASSES)]
    first, second = (fxgrow.profile(net(2), uneven, loss_fn=f, progress=False) for f in (nn.CrossEntropyLoss(), loss))
    assert second.loss == pytest.approx(first.loss)
    assert second["0"].bottleneck == pytest.approx(first["0"].bottleneck, rel=1e-4)
    assert "a sum: divided" in str(second) and "a sum" not in str(first)


def test_a_model_that_returns_a_sum_is_found_out() -> None:
    data = [{"x": x, "labels": y} for x, y in batches(CLASSES)]
    mean, total = (fxgrow.profile(Scorer(f), data, progress=False) for f in (torch.mean, torch.sum))
    assert (mean.loss_name, total.loss_name) == (
        "the model's own loss", "the model's own loss, a sum: divided by the number of samples",
    )  # fmt: skip
    assert total.loss == pytest.approx(mean.loss)


def test_losses_that_depend_on_other_samples_are_no_sums() -> None:
    def contrast(output: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(output @ output.T, torch.arange(len(output)))

    def sized(output: Tensor, target: Tensor) -> Tensor:
        assert len(output) == 48
        return F.cross_entropy(output, target)

    for loss in (contrast, sized):
        assert profile(net(2), CLASSES, loss_fn=loss).loss_name == loss.__name__


def test_report_and_log_name_the_loss(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "fxgrow"):
        grown = fxgrow.grow(net(2), batches(CLASSES), neurons=2, progress=False, method="random")
    assert "held-out loss (cross-entropy): eval" in str(grown.meta["fxgrow"])
    assert "loss: cross-entropy" in caplog.text
