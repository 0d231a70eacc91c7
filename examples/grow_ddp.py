"""Growth under torchrun: every process trains on its part of the data, all grow alike, a run continues after a crash.

export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1  # otherwise restarted processes may read old addresses: pytorch#135712
torchrun --standalone --nproc-per-node 2 --max-restarts 1 -m examples.grow_ddp run.safetensors
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import fxgrow
from examples.data import digits


def build() -> nn.Module:
    """Returns a network that is too small for the digits."""
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 6), nn.GELU(), nn.Linear(6, 6), nn.GELU(), nn.Linear(6, 10))


def train(
    checkpoint: Path, epochs: int = 8, loss_fn: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy
) -> tuple[nn.Module, float]:
    """Trains, from the checkpoint if there is one; returns the model and its test loss."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    data = digits()
    dataset = TensorDataset(data.x_train, data.y_train)
    sampler: DistributedSampler[int] = DistributedSampler(dataset)
    loader = DataLoader(dataset, batch_size=32, sampler=sampler)

    found = fxgrow.load_checkpoint(checkpoint) if checkpoint.exists() else None
    model = DistributedDataParallel(build() if found is None else found.model(build()))
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    grower = fxgrow.Grower(
        model, optimizer, fxgrow.Every(epochs=2).until(growths=2), dataloader=loader, loss_fn=loss_fn, budget="+50%"
    )
    if found is not None:
        found.restore(optimizer=optimizer, grower=grower)

    for epoch in range(0 if found is None else found["epoch"], epochs):
        sampler.set_epoch(epoch)
        for x, y in loader:
            optimizer.zero_grad()
            F.cross_entropy(grower.model(x), y).backward()
            optimizer.step()
            grower.step()
        grower.epoch_end()
        if dist.get_rank() == 0:
            fxgrow.save_checkpoint(checkpoint, grower.model, optimizer=optimizer, grower=grower, epoch=epoch + 1)
        dist.barrier()

    with torch.no_grad():
        loss = F.cross_entropy(grower.model.module(data.x_test), data.y_test)
    if dist.get_rank() == 0:
        print(grower.history)
        print(f"test loss {loss:.4f}, {sum(p.numel() for p in grower.model.parameters()):,} parameters")
    return grower.model.module, float(loss)


if __name__ == "__main__":
    dist.init_process_group("gloo")
    train(Path(sys.argv[1]))
    dist.destroy_process_group()
