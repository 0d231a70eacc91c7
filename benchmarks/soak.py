"""Does memory pile up? Trains, grows, saves, reloads, trains and grows again, many times; memory after each cycle.

python -m benchmarks.soak --minutes 15

Each cycle starts from the same small net, seed and data, so that all cycles hold nets of the same sizes: a count that
rises from one cycle to the next is something that was not freed. Graph modules, graphs, tensors and hooks are those
that are alive after a garbage collection. Ends with an error where the resident memory at the end is more than 5 %
above that after the first cycle. Linux only: the memory is read from /proc.

First and last cycles:

cycle    1      5 s   450.6 MB  1.000     0 graph modules     0 graphs     5 tensors     0 hooks  3,032 parameters
cycle  389    901 s   458.9 MB  1.018     0 graph modules     0 graphs     5 tensors     0 hooks  3,032 parameters

memory after 389 cycles over that after the first: 1.018, 1.05 allowed
"""

from __future__ import annotations

import gc
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.hooks import RemovableHandle

import fxgrow
from benchmarks._command_line import command_line, parse
from examples.data import digits
from models import DigitsResNet

ALLOWED = 1.05
STEPS, BATCH = 8, 32  # between two growths


def cycle(path: Path) -> int:
    """Trains, grows and saves one net; returns its number of parameters at the end."""
    data = digits()
    order = torch.Generator().manual_seed(0)
    loader = DataLoader(TensorDataset(data.x_train[:256], data.y_train[:256]), BATCH, shuffle=True, generator=order)

    def begun(saved: fxgrow.Checkpoint | None = None) -> tuple[fxgrow.Grower, dict[str, object]]:
        torch.manual_seed(0)
        fresh: nn.Module = DigitsResNet(width=0.25)
        net = fresh if saved is None else saved.model(fresh)
        net.register_forward_hook(lambda *_: None)
        optimizer = torch.optim.Adam(net.parameters(), 0.01)
        ema = AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(0.9))
        schedule = fxgrow.Every(steps=STEPS)
        grower = fxgrow.Grower(net, optimizer, schedule, dataloader=loader, neurons=1, samples=128, ema=ema)
        return grower, {"optimizer": optimizer, "grower": grower, "ema": ema, "order": order}

    grower, state = begun()
    train(grower, loader, 2 * STEPS + 1)
    fxgrow.save_checkpoint(path, grower.model, **state)
    saved = fxgrow.load_checkpoint(path)
    grower, state = begun(saved)
    saved.restore(**state)
    train(grower, loader, STEPS)
    assert grower.history.growths == 3
    return sum(p.numel() for p in grower.parameters())


def train(grower: fxgrow.Grower, loader: DataLoader[tuple[Tensor, ...]], steps: int) -> None:
    batches = forever(loader)
    for _ in range(steps):
        x, y = next(batches)
        grower.optimizer.zero_grad()
        F.cross_entropy(grower.model(x), y).backward()
        grower.optimizer.step()
        grower.ema.update_parameters(grower.model)
        grower.step()


def forever(loader: DataLoader[tuple[Tensor, ...]]) -> Iterator[tuple[Tensor, ...]]:
    while True:
        yield from loader


def alive() -> dict[str, int]:
    """How many objects of a kind live."""
    gc.collect()
    kinds = {"graph modules": fx.GraphModule, "graphs": fx.Graph, "tensors": Tensor, "hooks": RemovableHandle}
    counts = dict.fromkeys(kinds, 0)
    for thing in gc.get_objects():
        for name, kind in kinds.items():
            counts[name] += issubclass(type(thing), kind)
    return counts


def resident() -> float:
    """Resident memory in MB."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def soak(minutes: float, show: bool = True) -> tuple[list[float], list[dict[str, int]]]:
    """Memory in MB and live objects after each cycle; two cycles at least."""
    start, memory, counts = time.monotonic(), [], []
    with tempfile.TemporaryDirectory() as folder:
        while len(memory) < 2 or time.monotonic() - start < 60 * minutes:
            size = cycle(Path(folder) / "run.safetensors")
            counts.append(alive())
            memory.append(resident())
            if show:
                found = "  ".join(f"{k:4} {name}" for name, k in counts[-1].items())
                print(
                    f"cycle {len(memory):4}  {time.monotonic() - start:5.0f} s  {memory[-1]:6.1f} MB  "
                    f"{memory[-1] / memory[0]:.3f}  {found}  {size:,} parameters",
                    flush=True,
                )
    return memory, counts


if __name__ == "__main__":
    parser = command_line(__doc__, threads=None)
    parser.add_argument("--minutes", type=float, default=15, help="how long to go on (default: 15)")
    found, _ = soak(parse(parser).minutes)
    print(
        f"\nmemory after {len(found)} cycles over that after the first: {found[-1] / found[0]:.3f}, {ALLOWED} allowed"
    )
    sys.exit(found[-1] > ALLOWED * found[0])
