"""Growth in Lightning: one callback. Handwritten digits, a LightningModule that keeps its class.

python -m examples.loop_lightning
python -m examples.loop_lightning --checkpoint out/run.ckpt --stop-after 3
python -m examples.loop_lightning --resume out/run.ckpt

epoch  1: 22.9 % of the test digits
epoch  2: 26.0 % of the test digits
epoch  3: 82.4 % of the test digits
epoch  4: 85.8 % of the test digits
epoch  5: 91.8 % of the test digits
epoch  6: 92.9 % of the test digits
epoch  7: 94.4 % of the test digits
epoch  8: 95.8 % of the test digits
epoch  9: 95.6 % of the test digits
epoch 10: 95.6 % of the test digits
epoch 11: 95.6 % of the test digits
epoch 12: 96.2 % of the test digits
epoch 13: 96.2 % of the test digits
epoch 14: 96.2 % of the test digits
epoch 15: 96.0 % of the test digits
epoch 16: 96.0 % of the test digits

step  epoch   parameters       loss, eval      loss, train  predicted  gamma  seconds  added
───────────────────────────────────────────────────────────────────────────────────────────────────────────────
  44      2    502 → 645  1.8354 → 1.0674  1.8354 → 1.0674     0.6198    5.7      0.3  hidden.1 +1, hidden.3 +4
  88      4    645 → 835  0.4382 → 0.3092  0.4382 → 0.3092     0.1455   8.33      0.2  hidden.1 +2, hidden.3 +2
 132      6  835 → 1,066  0.1744 → 0.1531  0.1744 → 0.1531     0.0205   8.95      0.2  hidden.1 +3

3 growths, 0 declined, 0.6 s
"""

from __future__ import annotations

import logging
import warnings
from pathlib import Path

# imported before Lightning: makes torchvision importable with a CPU build of torch
from fxgrow.integrations.lightning import GrowthCallback

# isort: split
import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import fxgrow
from examples.data import digits
from examples.options import options

EPOCHS, EVERY, BATCH, RATE = 16, 2, 64, 5e-3


class Digits(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.hidden = nn.Sequential(nn.Flatten(), nn.Linear(64, 6), nn.GELU(), nn.Linear(6, 6), nn.GELU())
        self.classes = nn.Linear(6, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.classes(self.hidden(x))

    def training_step(self, batch: tuple[Tensor, Tensor], _: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: tuple[Tensor, Tensor], _: int) -> None:
        self.log("accuracy", 100 * (self(batch[0]).argmax(1) == batch[1]).float().mean())

    def on_validation_epoch_end(self) -> None:
        reached = self.trainer.callback_metrics["accuracy"]
        print(f"epoch {self.current_epoch + 1:2d}: {reached:.1f} % of the test digits")

    def configure_optimizers(self):
        optimizer = torch.optim.Adam(self.parameters(), RATE)
        return [optimizer], [torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, EPOCHS, eta_min=RATE / 20)]


def run(checkpoint: Path | None = None, stop: int | None = None, resume: Path | None = None) -> nn.Module:
    """Trains for `EPOCHS` epochs, or until `stop`; returns the module."""
    data = digits()
    train, test = TensorDataset(data.x_train, data.y_train), TensorDataset(data.x_test, data.y_test)
    # Lightning saves no random states: this sampler takes its order from the epoch
    order = DistributedSampler(train, num_replicas=1, rank=0, shuffle=True, seed=0)
    pl.seed_everything(0, verbose=False)
    growth = GrowthCallback(fxgrow.Every(epochs=EVERY).until(growths=3), budget="+30%")
    trainer = pl.Trainer(
        max_epochs=stop or EPOCHS,
        accelerator="cpu",
        callbacks=[growth],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    module = Digits()
    trainer.fit(module, DataLoader(train, BATCH, sampler=order), DataLoader(test, len(test)), ckpt_path=resume)
    if checkpoint is not None:
        trainer.save_checkpoint(checkpoint)
    print(f"\n{growth.grower.history}")
    return module


if __name__ == "__main__":
    torch.set_num_threads(1)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")
    run(*options("epochs"))
