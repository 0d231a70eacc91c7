"""Growth in a loop of Hugging Face Accelerate. Handwritten digits, a small residual network that stays one object.

python -m examples.loop_accelerate
python -m examples.loop_accelerate --checkpoint out/state --stop-after 5
python -m examples.loop_accelerate --resume out/state

epoch  1: 10.7 % of the test digits
epoch  2: 66.7 % of the test digits
epoch  3: 64.2 % of the test digits
epoch  4: 86.0 % of the test digits
epoch  5: 88.0 % of the test digits
epoch  6: 90.2 % of the test digits
epoch  7: 87.3 % of the test digits
epoch  8: 92.7 % of the test digits
epoch  9: 95.1 % of the test digits
epoch 10: 95.1 % of the test digits
epoch 11: 95.1 % of the test digits
epoch 12: 95.8 % of the test digits

step  epoch     parameters       loss, eval      loss, train  predicted  gamma  seconds  added
────────────────────────────────────────────────────────────────────────────────────────────────────────────────────────
  66      3  1,382 → 1,730  0.9583 → 0.7151  0.7474 → 0.6989     0.6711   2.64      0.8  conv1 +1, layer1.0.conv1 +1,
                                                                                         layer2.0.conv2 +1
 132      6  1,730 → 2,226  0.3551 → 0.2779  0.2745 → 0.2480     0.1732   2.34      1.0  conv1 +1, layer1.0.conv1 +2,
                                                                                         layer2.0.conv2 +1
 198      9  2,226 → 2,810  0.1660 → 0.1422  0.1666 → 0.1571     0.0349   51.1      1.0  layer2.0.conv1 +4

3 growths, 0 declined, 2.9 s
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
from examples.data import accuracy, digits
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


if __name__ == "__main__":
    torch.set_num_threads(1)
    run(*options("epochs"))
