"""Growth in a custom training loop: fxgrow.Grower and its checkpoints. Handwritten digits, a small residual network.

python -m examples.loop_plain
python -m examples.loop_plain --checkpoint out/run.safetensors --stop-after 2
python -m examples.loop_plain --resume out/run.safetensors

epoch  1: 10.2 % of the test digits
epoch  2: 59.6 % of the test digits
epoch  3: 73.3 % of the test digits
epoch  4: 91.6 % of the test digits
epoch  5: 93.3 % of the test digits
epoch  6: 92.2 % of the test digits
epoch  7: 95.8 % of the test digits
epoch  8: 95.6 % of the test digits
epoch  9: 97.1 % of the test digits
epoch 10: 96.2 % of the test digits
epoch 11: 96.2 % of the test digits
epoch 12: 96.7 % of the test digits

step  epoch     parameters       loss, eval      loss, train  predicted  gamma  seconds  added
────────────────────────────────────────────────────────────────────────────────────────────────────────────────────────
  22      1  1,382 → 1,766  2.3648 → 2.2225  1.6241 → 1.5660     0.1319   1.27      1.3  conv1 +1, layer2.0.conv1 +1,
                                                                                         layer2.0.conv2 +1
  44      2  1,766 → 2,188  1.2048 → 0.8704  1.0014 → 0.8836     0.4561   4.92      1.2  conv1 +1, layer2.0.conv1 +1,
                                                                                         layer2.0.conv2 +1
  66      3  2,188 → 2,792  0.7698 → 0.5503  0.4633 → 0.4255     0.3941   4.11      1.2  layer1.0.conv1 +2,
                                                                                         layer2.0.conv1 +1,
                                                                                         layer2.0.conv2 +2

3 growths, 0 declined, 3.7 s
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

import fxgrow
from examples.data import accuracy, digits
from examples.options import options
from models import DigitsResNet

EPOCHS, EVERY, BATCH, RATE = 12, 1, 64, 0.01


def run(checkpoint: Path | None = None, stop: int | None = None, resume: Path | None = None) -> nn.Module:
    """Trains for `EPOCHS` epochs, or until `stop`; returns the net."""
    data = digits()
    torch.manual_seed(0)
    order = torch.Generator().manual_seed(0)
    loader = torch.utils.data.DataLoader(
        torch.utils.data.TensorDataset(data.x_train, data.y_train), BATCH, shuffle=True, generator=order
    )
    model: nn.Module = DigitsResNet(width=0.25)
    saved = None if resume is None else fxgrow.load_checkpoint(resume)
    if saved is not None:
        model = saved.model(model)
    optimizer = torch.optim.Adam(model.parameters(), RATE)
    rates = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, EPOCHS, eta_min=RATE / 20)
    schedule = fxgrow.Every(epochs=EVERY).until(growths=3)
    grower = fxgrow.Grower(model, optimizer, schedule, dataloader=loader, budget="+30%", lr_scheduler=rates)
    state = {"optimizer": optimizer, "rates": rates, "grower": grower, "order": order}
    if saved is not None:
        saved.restore(**state)

    while grower.epochs < (stop or EPOCHS):
        for x, y in loader:
            optimizer.zero_grad()
            F.cross_entropy(grower.model(x), y).backward()
            optimizer.step()
            grower.step()
        rates.step()
        print(f"epoch {grower.epochs + 1:2d}: {accuracy(grower.model, data):.1f} % of the test digits")
        grower.epoch_end()
    if checkpoint is not None:
        checkpoint.parent.mkdir(parents=True, exist_ok=True)
        fxgrow.save_checkpoint(checkpoint, grower.model, **state)
    print(f"\n{grower.history}")
    return grower.model


if __name__ == "__main__":
    torch.set_num_threads(1)
    run(*options("epochs"))
