"""Shared by grow_gpt.py and grow_vit.py: a net that grows while it trains, and the same net without growth."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn

import fxgrow


class Task(NamedTuple):
    """A net and its data: a function that draws training batches, and held-out batches."""

    build: Callable[[], nn.Module]
    batch: Callable[[torch.Generator], tuple[Tensor, Tensor]]
    held: list[tuple[Tensor, Tensor]]
    loss: Callable[[Tensor, Tensor], Tensor]


class Pace(NamedTuple):
    """How long to train, when to grow, and by how much."""

    steps: int
    every: int  # steps between two growths; the table has two lines for each of them
    growths: int
    units: Mapping[str, int]  # per width, added by a growth
    batches: int  # read by a growth
    rate: float


@dataclass
class Run:
    """The record of one training run."""

    net: nn.Module = field(default_factory=nn.Identity)
    lines: list[tuple[int, int, float, str]] = field(default_factory=list)  # step, parameters, held-out loss, grew
    seconds: float = 0.0  # CPU time of training and growing, without evaluation
    growing: float = 0.0


def train(task: Task, pace: Pace, grow: bool, seed: int = 0, show: bool = True) -> Run:
    """Trains with the same first weights and the same batches, whether the net grows or not."""
    torch.manual_seed(seed)
    net = task.build()
    order = torch.Generator().manual_seed(seed)
    shown = [task.batch(order) for _ in range(pace.batches)]
    optimizer = torch.optim.AdamW(net.parameters(), pace.rate, weight_decay=0.01)
    rates = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, pace.steps, eta_min=pace.rate / 20)
    schedule = fxgrow.Every(steps=pace.every if grow else pace.steps + 1).until(growths=pace.growths)
    grower = fxgrow.Grower(net, optimizer, schedule, dataloader=shown, loss_fn=task.loss, neurons=pace.units)
    run, grew = Run(), ""
    for step in range(1, pace.steps + 1):
        start = time.process_time()
        x, y = task.batch(order)
        optimizer.zero_grad()
        task.loss(grower.model(x), y).backward()
        nn.utils.clip_grad_norm_(grower.parameters(), 1.0)
        optimizer.step()
        rates.step()
        before, grown = time.process_time(), len(grower.history)
        if grower.step():
            grew = ", ".join(f"{name} +{units}" for name, units in grower.history[-1].units.items())
        if len(grower.history) > grown:  # or declined
            run.growing += time.process_time() - before
        run.seconds += time.process_time() - start
        if step % max(1, pace.every // 2) == 0 or step == pace.steps:
            size = sum(p.numel() for p in grower.parameters())
            run.lines.append((step, size, held_out(grower.model, task), grew))
            grew = ""
            if show:
                print("{:6,}  {:10,}  {:8.4f}  {}".format(*run.lines[-1]).rstrip(), flush=True)
    run.net = grower.model
    return run


@torch.no_grad()
def held_out(net: nn.Module, task: Task) -> float:
    net.eval()
    total = sum(float(task.loss(net(x), y)) for x, y in task.held)
    net.train()
    return total / len(task.held)


def compare(task: Task, pace: Pace, show: bool = True) -> tuple[Run, Run]:
    """Trains both and prints the cost and the gain of growth."""
    if show:
        print("  step  parameters  held-out  grew")
    grown = train(task, pace, grow=True, show=show)
    if show:
        share = grown.growing / grown.seconds
        print(f"\ngrowing took {grown.growing:.1f} of {grown.seconds:.1f} CPU seconds: {share:.1%}")
        print("\nthe same net, never grown")
    alone = train(task, pace, grow=False, show=show)
    if show:
        (_, after, loss, _), (_, before, other, _) = grown.lines[-1], alone.lines[-1]
        print(
            f"\nheld-out loss {loss:.4f} with {after:,} parameters in {grown.seconds:.0f} CPU seconds, "
            f"{other:.4f} with {before:,} in {alone.seconds:.0f}"
        )
    return grown, alone
