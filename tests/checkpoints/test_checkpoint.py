"""Training goes on from a checkpoint bit for bit, whatever takes part in it."""

from __future__ import annotations

import copy
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.optim import lr_scheduler
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import fxgrow
from tests.storage.test_plain_tree import alike


def build() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.3), nn.Tanh(), nn.Linear(4, 2))


def grown() -> torch.fx.GraphModule:
    return fxgrow.widen(build(), (torch.zeros(2, 3),), {"0": 3})


def step(model: nn.Module, optimizer: torch.optim.Optimizer, generator: torch.Generator) -> None:
    x = torch.randn(8, 3, generator=generator)
    y = x[:, :2] * random.random() + np.random.rand()

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = (model(x) - y).square().mean()
        loss.backward()
        return loss

    optimizer.step(closure)


def same(a: nn.Module, b: nn.Module) -> bool:
    ours, theirs = a.state_dict(), b.state_dict()
    return list(ours) == list(theirs) and all(torch.equal(ours[name], t) for name, t in theirs.items())


class Run:
    """All that a training loop may hold."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.optimizer = torch.optim.Adam(
            [{"params": [p for p in model.parameters() if p.dim() > 1], "weight_decay": 0.1},
             {"params": [p for p in model.parameters() if p.dim() == 1], "lr": 0.02}], lr=0.01, amsgrad=True,
        )  # fmt: skip
        warm = lr_scheduler.LinearLR(self.optimizer, 0.1, total_iters=3)
        self.scheduler = lr_scheduler.SequentialLR(
            self.optimizer, [warm, lr_scheduler.MultiStepLR(self.optimizer, [2, 4])], [3]
        )
        self.ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)
        self.generator = torch.Generator().manual_seed(7)
        self.scaler = torch.amp.GradScaler("cpu", init_scale=64.0)

    def parts(self) -> dict[str, Any]:
        names = ("optimizer", "scheduler", "ema", "generator", "scaler")
        return {name: getattr(self, name) for name in names}

    def train(self, steps: int) -> None:
        for _ in range(steps):
            step(self.model, self.optimizer, self.generator)
            self.scheduler.step()
            self.ema.update_parameters(self.model)
            self.scaler.scale(torch.ones(()))  # makes its state
            self.scaler.update(self.scaler.get_scale() / 2)
        self.history = [random.random(), float(np.random.rand()), float(torch.rand(()))]


@pytest.mark.filterwarnings("ignore:.*epoch parameter.*")
def test_resumes_bit_for_bit(tmp_path: Path) -> None:
    random.seed(0)
    np.random.seed(0)
    run = Run(grown())
    run.train(5)
    fxgrow.save_checkpoint(tmp_path / "run", run.model, **run.parts(), sampler={"epoch": 1, "at": 5}, loss=0.1)
    run.train(5)

    random.seed(99)
    np.random.seed(99)
    torch.manual_seed(99)
    ckpt = fxgrow.load_checkpoint(tmp_path / "run")
    again = Run(ckpt.model(build()))
    again.generator.manual_seed(1)
    ckpt.restore(**again.parts())
    again.train(5)

    assert same(again.model, run.model) and same(again.ema, run.ema)
    assert again.history == run.history
    assert alike(again.optimizer.state_dict(), run.optimizer.state_dict())
    assert alike(again.scheduler.state_dict(), run.scheduler.state_dict())
    assert again.scaler.state_dict() == run.scaler.state_dict()
    assert ckpt["sampler"] == {"epoch": 1, "at": 5} and ckpt["loss"] == 0.1
    assert set(ckpt) == {*run.parts(), "sampler", "loss"}
    assert str(ckpt.recipe) == "widen: 0 +3"


def optimisers() -> list[Any]:
    found = [v for v in vars(torch.optim).values() if isinstance(v, type) and issubclass(v, torch.optim.Optimizer)]
    return sorted({v for v in found if v is not torch.optim.Optimizer}, key=lambda v: v.__name__)


class Matrices(nn.Module):
    """For those that take matrices alone, or sparse gradients."""

    def __init__(self, sparse: bool) -> None:
        super().__init__()
        self.table = nn.Embedding(6, 4, sparse=sparse)
        self.out = nn.Linear(4, 2, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.out(self.table(tokens))


@pytest.mark.parametrize("kind", optimisers(), ids=lambda k: k.__name__)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_every_optimiser_goes_on(kind: Any, dtype: torch.dtype, tmp_path: Path) -> None:
    sparse = kind is torch.optim.SparseAdam
    inputs = torch.tensor([[0, 1], [2, 2], [5, 3]])

    def fresh() -> nn.Module:
        return Matrices(sparse).to(dtype)

    def made(model: nn.Module) -> torch.optim.Optimizer:
        options = {"momentum": 0.9} if kind in (torch.optim.SGD, torch.optim.RMSprop) else {}
        parameters = model.table.parameters() if sparse else model.parameters()
        optimizer: torch.optim.Optimizer = kind(parameters, **options)
        return optimizer

    def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
        for _ in range(steps):

            def closure() -> Tensor:
                optimizer.zero_grad()
                loss = (model(inputs).float() - 1).square().mean()
                loss.backward()
                return loss

            optimizer.step(closure)

    model = fxgrow.widen(fresh(), (inputs,), {"table": 2})
    optimizer = made(model)
    train(model, optimizer, 3)
    fxgrow.save_checkpoint(tmp_path / "run", model, optimizer=optimizer)
    ckpt = fxgrow.load_checkpoint(tmp_path / "run")
    assert alike(ckpt["optimizer"], optimizer.state_dict())
    again = ckpt.model(fresh())
    optimizer_again = made(again)
    ckpt.restore(optimizer=optimizer_again)
    assert alike(optimizer_again.state_dict(), optimizer.state_dict())
    train(model, optimizer, 2)
    train(again, optimizer_again, 2)
    assert same(again, model)


SCHEDULERS: dict[str, Callable[[torch.optim.Optimizer], Any]] = {
    "StepLR": lambda o: lr_scheduler.StepLR(o, 2),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [2, 3, 3]),
    "ConstantLR": lambda o: lr_scheduler.ConstantLR(o, 0.5, 3),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.9),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, 8),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 6),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 3),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 0.1, total_steps=20),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.1, 3),
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda n: 0.9**n),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=1),
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(o, 0.5, 3), lr_scheduler.ExponentialLR(o, 0.9)]
    ),
}


@pytest.mark.filterwarnings("ignore:Detected call of")
@pytest.mark.parametrize("name", SCHEDULERS)
def test_every_scheduler_goes_on(name: str, tmp_path: Path) -> None:
    def advance(scheduler: Any, steps: int) -> list[float]:
        rates = []
        for _ in range(steps):
            scheduler.step(1.0) if name == "ReduceLROnPlateau" else scheduler.step()
            rates.append(scheduler.optimizer.param_groups[0]["lr"] if hasattr(scheduler, "optimizer") else 0.0)
        return rates

    model = grown()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    scheduler = SCHEDULERS[name](optimizer)
    advance(scheduler, 3)
    fxgrow.save_checkpoint(tmp_path / "run", model, optimizer=optimizer, scheduler=scheduler)
    ckpt = fxgrow.load_checkpoint(tmp_path / "run")
    other = torch.optim.SGD(ckpt.model(build()).parameters(), lr=0.1, momentum=0.9)
    again = SCHEDULERS[name](other)
    ckpt.restore(optimizer=other, scheduler=again)
    assert advance(again, 4) == advance(scheduler, 4)
    assert other.param_groups[0]["lr"] == optimizer.param_groups[0]["lr"]


def test_random_generators_of_all_kinds(tmp_path: Path) -> None:
    parts: dict[str, Any] = {
        "torch": torch.Generator().manual_seed(3),
        "python": random.Random(3),
        "pcg": np.random.default_rng(3),
        "mt": np.random.Generator(np.random.MT19937(3)),
    }
    fxgrow.save_checkpoint(tmp_path / "run", build(), **parts)

    def draw(parts: dict[str, Any]) -> list[float]:
        return [float(torch.rand((), generator=parts["torch"])), *(parts[k].random() for k in ("python", "pcg", "mt"))]

    expected = draw(parts)
    assert draw(parts) != expected
    fxgrow.load_checkpoint(tmp_path / "run").restore(**parts)
    assert draw(parts) == expected


def test_plain_entries_and_reading_twice(tmp_path: Path) -> None:
    history = [{"step": 3, "losses": (0.5, float("inf")), "units": {"0": 2}, 7: None}]
    fxgrow.save_checkpoint(tmp_path / "run", grown(), history=history, best=torch.tensor([1.0, 2.0]))
    ckpt = fxgrow.load_checkpoint(tmp_path / "run")
    ckpt["best"].zero_()
    assert torch.equal(ckpt["best"], torch.tensor([1.0, 2.0])) and alike(ckpt["history"], history)
    first = ckpt.model(build())
    with torch.no_grad():
        first.get_parameter("0.weight").zero_()
    assert bool(ckpt.model(build()).get_parameter("0.weight").any())


def test_a_model_alone_can_be_taken_from_a_checkpoint(tmp_path: Path) -> None:
    model = grown()
    fxgrow.save_checkpoint(tmp_path / "run", model, epoch=1)
    assert same(fxgrow.load(build(), tmp_path / "run"), model)
    net = fxgrow.resize(build(), tmp_path / "run")
    assert net.get_parameter("0.weight").shape == (7, 3)
    fxgrow.save(model, tmp_path / "net")
    with pytest.raises(fxgrow.FileError, match="holds a model, not a checkpoint. Load it with fxgrow.load"):
        fxgrow.load_checkpoint(tmp_path / "net")


# -- refusals


def test_what_cannot_be_saved_is_named_and_nothing_is_written(tmp_path: Path) -> None:
    with pytest.raises(fxgrow.FileError, match="sampler/order/0 is a .*object"):
        fxgrow.save_checkpoint(tmp_path / "run", build(), sampler={"order": [object()]})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("things", "message"),
    [
        (lambda m: {"optimiser": torch.optim.Adam(m.parameters())}, "has no 'optimiser'; it has: optimizer, epoch"),
        (
            lambda m: {"optimizer": torch.optim.Adam(build().parameters())},
            "0.weight [7, 3] where this one has one [4, 3]",
        ),
        (
            lambda m: {"optimizer": torch.optim.Adam([m.get_parameter("0.weight")])},
            "[4] parameters per group, and this",
        ),
        (
            lambda m: {"optimizer": torch.optim.Adam(list(m.parameters())[::-1])},
            "0.weight [7, 3] where this one has 3.bias [2]",
        ),
        (lambda m: {"epoch": object()}, "epoch is a object without load_state_dict"),
    ],
    ids=["name", "old model", "fewer", "order", "value"],
)
def test_objects_that_do_not_fit(things: Callable[[Any], dict[str, Any]], message: str, tmp_path: Path) -> None:
    model = grown()
    fxgrow.save_checkpoint(tmp_path / "run", model, optimizer=torch.optim.Adam(model.parameters()), epoch=1)
    ckpt = fxgrow.load_checkpoint(tmp_path / "run")
    given = things(ckpt.model(build()))
    state = torch.get_rng_state()
    with pytest.raises(fxgrow.FileError, match=re.escape(message)):
        ckpt.restore(**given)
    assert torch.equal(torch.get_rng_state(), state)


class Picky:
    """Refuses its state."""

    def state_dict(self) -> dict[str, int]:
        return {"n": 1}

    def load_state_dict(self, state: dict[str, int]) -> None:
        raise KeyError("n is not what it was")


def test_a_refused_state_leaves_the_others_as_they_were(tmp_path: Path) -> None:
    model = grown()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)
    step(model, optimizer, torch.Generator())
    fxgrow.save_checkpoint(tmp_path / "run", model, optimizer=optimizer, picky=Picky())
    other = torch.optim.SGD(grown().parameters(), lr=0.1)
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(fxgrow.FileError, match="picky does not take its state: KeyError"):
        fxgrow.load_checkpoint(tmp_path / "run").restore(optimizer=other, picky=Picky())
    assert alike(other.state_dict(), before)


def test_damaged_checkpoints(tmp_path: Path) -> None:
    model = grown()
    fxgrow.save_checkpoint(tmp_path / "run", model, optimizer=torch.optim.Adam(model.parameters()), epoch=1)
    whole = (tmp_path / "run").read_bytes()
    generator = random.Random(1)
    for _ in range(40):
        data = bytearray(whole)
        data[generator.randrange(len(data))] ^= 1 << generator.randrange(8)
        (tmp_path / "run").write_bytes(data)
        try:
            ckpt = fxgrow.load_checkpoint(tmp_path / "run")
        except fxgrow.FileError:
            continue
        assert same(ckpt.model(build()), model) and ckpt["epoch"] == 1
