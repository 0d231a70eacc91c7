"""Growth in a loop of Hugging Face Accelerate. Handwritten digits, a small residual network that stays one object.

python -m examples.loop_accelerate
python -m examples.loop_accelerate --checkpoint out/state --stop-after 5
python -m examples.loop_accelerate --resume out/state

@OUT@
"""

from __future__ import annotations

from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration, set_seed
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import fxgrow
from examples.data import digits
from examples.options import options
from fxgrow.integrations.accelerate import AcceleratedGrower
from models import DigitsResNet

EPOCHS, EVERY, BATCH, RATE = 12, 3, 64, 0.01


def run(checkpoint: Path | None = None, stop: int | None = None, resume: Path | None = None) -> nn.Module:
    """Trains for `EPOCHS` epochs, or until `stop`; returns the net."""
    data = digits()
    set_seed(0)
    accelerator = Accelerator(cpu=True, dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True))
    plain = DataLoader(TensorDataset(data.x_train, data.y_train), BATCH, shuffle=True)
    net = DigitsResNet(width=0.25)
    adam = torch.optim.Adam(net.parameters(), RATE)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(adam, EPOCHS * len(plain), eta_min=RATE / 20)
    model, optimizer, loader, rates = accelerator.prepare(net, adam, plain, cosine)
    schedule = fxgrow.Every(epochs=EVERY).until(growths=3)
    grower = AcceleratedGrower(accelerator, model, optimizer, schedule, dataloader=plain, budget="+30%")
    if resume is not None:
        accelerator.load_state(str(resume))

    while grower.epochs < (stop or EPOCHS):
        loader.set_epoch(grower.epochs)
        for x, y in loader:
            optimizer.zero_grad()
            accelerator.backward(F.cross_entropy(model(x), y))
            optimizer.step()
            rates.step()
            grower.step()
        print(f"epoch {grower.epochs + 1:2d}: {accuracy(model, data):.1f} % of the test digits")
        grower.epoch_end()
    if checkpoint is not None:
        accelerator.save_state(str(checkpoint))
    print(f"\n{grower.history}")
    return model


@torch.no_grad()
def accuracy(model: nn.Module, data) -> float:
    model.eval()
    hits = (model(data.x_test).argmax(1) == data.y_test).float().mean()
    model.train()
    return 100 * float(hits)


if __name__ == "__main__":
    torch.set_num_threads(1)
    run(*options("epochs"))
