"""Growth by a callback of Lightning."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import fxgrow

growing = pytest.importorskip("fxgrow.integrations.lightning")
pl = pytest.importorskip("lightning.pytorch")
pytestmark = pytest.mark.filterwarnings("ignore")

X = torch.randn(64, 6, generator=torch.Generator().manual_seed(0))
DATA = TensorDataset(X, X.prod(1, keepdim=True))


class Net(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 3), nn.ReLU(), nn.Linear(3, 1))
        self.heard: list[str] = []

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, _):
        return F.mse_loss(self.net(batch[0]), batch[1])

    def validation_step(self, batch, _):
        self.log("val_loss", F.mse_loss(self.net(batch[0]), batch[1]))

    def test_step(self, batch, _):
        self.log("test_loss", F.mse_loss(self.net(batch[0]), batch[1]))

    def on_load_checkpoint(self, checkpoint):
        self.heard.append("load")

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), 1e-2)


def loader() -> DataLoader:
    return DataLoader(DATA, 16)


def trainer_of(*callbacks, **options):
    quiet = {name: False for name in ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")}
    return pl.Trainer(accelerator="cpu", callbacks=list(callbacks), **{**quiet, **options})


def callback(schedule=None, **options):
    return growing.GrowthCallback(schedule or fxgrow.Every(epochs=1), neurons=2, **options)


@pytest.mark.parametrize("module", ["", "net"])
def test_grows_saves_and_resumes_bit_for_bit(module, tmp_path) -> None:
    torch.manual_seed(0)
    start = Net()
    whole, growth = copy.deepcopy(start), callback(module=module)
    trainer_of(growth, max_epochs=3).fit(whole, loader())
    assert [e.step for e in growth.grower.history] == [4, 8]
    assert whole.net.get_submodule("0").out_features == 7
    assert isinstance(whole.net, nn.Sequential) == (module == "")
    assert "on_load_checkpoint" not in vars(whole)

    part, first = copy.deepcopy(start), callback(module=module)
    trainer = trainer_of(first, max_epochs=2)
    trainer.fit(part, loader())
    trainer.save_checkpoint(tmp_path / "run.ckpt")
    assert part.net.get_submodule("0").out_features == 5

    resumed, second = copy.deepcopy(start), callback(module=module)
    trainer_of(second, max_epochs=3).fit(resumed, loader(), ckpt_path=tmp_path / "run.ckpt")
    assert resumed.heard == ["load"]  # the module's own hook is called too
    assert [e.step for e in second.grower.history] == [4, 8]
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name

    # a fresh module gets the sizes before the weights for testing too
    tested = copy.deepcopy(start)
    trainer_of(callback(module=module)).test(tested, loader(), ckpt_path=tmp_path / "run.ckpt", verbose=False)
    for name, value in part.state_dict().items():
        assert torch.equal(value, tested.state_dict()[name]), name


def test_weights_alone_have_their_recipe_too(tmp_path) -> None:
    folder = pl.callbacks.ModelCheckpoint(tmp_path, filename="run", save_weights_only=True)
    grown = Net()
    trainer_of(callback(), folder, max_epochs=2, enable_checkpointing=True).fit(grown, loader())
    tested = Net()
    trainer_of(callback()).test(tested, loader(), ckpt_path=tmp_path / "run.ckpt", verbose=False)
    assert all(torch.equal(value, tested.state_dict()[name]) for name, value in grown.state_dict().items())


def test_counts_steps_of_the_optimiser() -> None:
    growth = callback(fxgrow.Every(steps=2).until(growths=1))
    trainer_of(growth, max_epochs=2, accumulate_grad_batches=2).fit(Net(), loader())
    assert growth.grower.steps == 4 and [e.step for e in growth.grower.history] == [2]


def test_a_metric_is_read_after_each_validation() -> None:
    plateau = fxgrow.OnPlateau(patience=1, min_delta=1e9)
    growth = callback(plateau.until(growths=1), monitor="val_loss", module="net")
    trainer_of(growth, max_epochs=4, num_sanity_val_steps=1).fit(Net(), loader(), loader())
    assert [e.step for e in growth.grower.history] == [8]  # the second reading is no better


def test_a_metric_that_nobody_logs() -> None:
    growth = callback(fxgrow.OnPlateau(), monitor="loss")
    with pytest.raises(fxgrow.FxgrowError, match="'loss' is no logged metric; those are: val_loss"):
        trainer_of(growth, max_epochs=1).fit(Net(), loader(), loader())


def test_no_such_module() -> None:
    with pytest.raises(fxgrow.FxgrowError, match="has no module named 'body'; it has: net"):
        trainer_of(callback(module="body"), max_epochs=1).fit(Net(), loader())


def test_several_processes_are_refused(monkeypatch) -> None:
    trainer = trainer_of(callback(), max_epochs=1)
    monkeypatch.setattr(type(trainer), "world_size", 2)
    with pytest.raises(fxgrow.FxgrowError, match="2 processes"):
        trainer.callbacks[0].on_train_start(trainer, Net())


def test_other_growths_than_the_checkpoints(tmp_path) -> None:
    trainer = trainer_of(callback(), max_epochs=2)
    trainer.fit(Net(), loader())
    trainer.save_checkpoint(tmp_path / "run.ckpt")
    other = Net()
    other.net = fxgrow.widen(other.net, (X,), {"0": 1})
    with pytest.raises(fxgrow.FileError, match="other growths"):
        trainer_of(callback(module="net"), max_epochs=3).fit(other, loader(), ckpt_path=tmp_path / "run.ckpt")


def test_items_that_are_no_batches() -> None:
    class Rows(Net):
        def training_step(self, batch, _):
            return super().training_step(batch[:2], _)

    rows = DataLoader(TensorDataset(*loader().dataset.tensors, torch.arange(len(loader().dataset))), 32)
    growth = callback(fxgrow.Every(epochs=1), batch=lambda row: row[:2])
    trainer_of(growth, max_epochs=2).fit(Rows(), rows)
    assert growth.grower.history.growths == 1
    with pytest.raises(fxgrow.ProfileError, match="a list of 3 items"):
        trainer_of(callback(fxgrow.Every(epochs=1)), max_epochs=2).fit(Rows(), rows)
