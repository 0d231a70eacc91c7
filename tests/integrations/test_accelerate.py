"""Growth in a loop of Accelerate."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import fxgrow

growing = pytest.importorskip("fxgrow.integrations.accelerate")
accelerate = pytest.importorskip("accelerate")

X = torch.randn(64, 6, generator=torch.Generator().manual_seed(0))
LOADER = DataLoader(TensorDataset(X, X.prod(1, keepdim=True)), 16)


@pytest.fixture(autouse=True)
def _fresh_state():
    """Accelerate keeps one state for all of a process's accelerators."""
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    accelerate.state.GradientState._reset_state()


class Loop:
    """Training as a user of Accelerate writes it."""

    def __init__(self, seed: int = 0, every: int = 3, **options) -> None:
        torch.manual_seed(seed)
        net = nn.Sequential(nn.Linear(6, 3), nn.ReLU(), nn.Linear(3, 1))
        self.accelerator = accelerate.Accelerator(cpu=True, **options)
        self.model, self.optimizer, self.loader = self.accelerator.prepare(
            net, torch.optim.Adam(net.parameters(), 1e-2), copy.copy(LOADER)
        )
        self.grower = growing.AcceleratedGrower(
            self.accelerator, self.model, self.optimizer, fxgrow.Every(steps=every), dataloader=LOADER, neurons=2
        )

    def train(self, epochs: int = 1) -> None:
        for _ in range(epochs):
            for x, y in self.loader:
                with self.accelerator.accumulate(self.model):
                    self.accelerator.backward(F.mse_loss(self.model(x), y))
                    self.optimizer.step()
                    self.optimizer.zero_grad()
                self.grower.step()

    def weights(self) -> dict[str, torch.Tensor]:
        return copy.deepcopy(self.accelerator.unwrap_model(self.model).state_dict())


def test_grows_saves_and_resumes_bit_for_bit(tmp_path) -> None:
    loop = Loop()
    loop.train()
    loop.accelerator.save_state(str(tmp_path))
    halfway = loop.weights()
    assert halfway["0.weight"].shape == (5, 6) and loop.grower.model is loop.model
    loop.train()
    end = loop.weights()
    assert end["0.weight"].shape == (7, 6) and [e.step for e in loop.grower.history] == [3, 6]

    other = Loop(seed=1)
    other.accelerator.load_state(str(tmp_path))
    assert all(torch.equal(value, halfway[name]) for name, value in other.weights().items())
    other.train()
    assert all(torch.equal(value, end[name]) for name, value in other.weights().items())
    assert [e.units for e in other.grower.history] == [e.units for e in loop.grower.history]

    loop.accelerator.load_state(str(tmp_path))  # back to what was smaller
    loop.train()
    assert all(torch.equal(value, end[name]) for name, value in loop.weights().items())


def test_counts_accumulated_gradients_once() -> None:
    loop = Loop(every=2, gradient_accumulation_steps=2)
    loop.train()
    assert loop.grower.steps == 2 and [e.step for e in loop.grower.history] == [2]


def test_mixed_precision_goes_on() -> None:
    loop = Loop(mixed_precision="bf16")
    seen = []
    loop.model[0].register_forward_hook(lambda module, inputs, out: seen.append(out.dtype))
    loop.train(2)
    assert [e.step for e in loop.grower.history] == [3, 6]
    # training runs in bfloat16 after growth too; growth itself in the model's own precision
    loop.model(X)
    assert seen[-1] == torch.bfloat16
    assert all(p.dtype == torch.float32 for p in loop.model.parameters())


def test_a_prepared_loader_is_refused() -> None:
    accelerator = accelerate.Accelerator(cpu=True)
    net = nn.Linear(6, 1)
    prepared = accelerator.prepare(copy.copy(LOADER))
    with pytest.raises(fxgrow.FxgrowError, match="prepared"):
        growing.AcceleratedGrower(
            accelerator, net, torch.optim.SGD(net.parameters(), 0.1), fxgrow.Every(steps=1), dataloader=prepared
        )


@pytest.mark.parametrize("damage", ["missing", "cut", "other"])
def test_a_folder_without_growth(damage, tmp_path) -> None:
    loop = Loop()
    loop.accelerator.save_state(str(tmp_path))
    file = tmp_path / growing.FILE
    if damage == "missing":
        file.unlink()
    else:
        file.write_text(file.read_text()[:100] if damage == "cut" else json.dumps({"recipe": {}}))
    before = loop.weights()
    with pytest.raises(fxgrow.FileError):
        loop.accelerator.load_state(str(tmp_path))
    assert all(torch.equal(value, before[name]) for name, value in loop.weights().items())


def test_items_that_are_no_batches() -> None:
    accelerator, net = accelerate.Accelerator(cpu=True), nn.Sequential(nn.Linear(6, 3), nn.ReLU(), nn.Linear(3, 1))
    net, optimizer = accelerator.prepare(net, torch.optim.Adam(net.parameters()))
    rows = DataLoader(TensorDataset(X, X.prod(1, keepdim=True), torch.arange(64)), 16)
    make = lambda *given, **options: growing.AcceleratedGrower(  # noqa: E731
        *given, optimizer, fxgrow.Every(steps=3), dataloader=rows, neurons=2, **options
    )
    with pytest.raises(fxgrow.ProfileError, match="a list of 3 items"):
        make(accelerator, net).grow_now()
    assert make(accelerator, net, batch=lambda row: row[:2]).grow_now() and net[0].out_features == 5
    with pytest.raises(fxgrow.FxgrowError, match="accelerator='cpu'"):
        make("cpu", net)
    with pytest.raises(fxgrow.CaptureError, match="the class Linear"):
        make(accelerator, nn.Linear)
    with pytest.raises(fxgrow.FxgrowError, match="unexpected keyword argument 'unit'"):
        make(accelerator, net, unit=2)
