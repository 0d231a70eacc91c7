"""Processes with different settings, models or loaders: what each of them gets, and how soon.

python -m tests.distributed.differing <folder> <number of processes>, with RANK set
"""

from __future__ import annotations

import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import fxgrow
from tests.distributed.processes import Batches, mlp, shard, state


class Activation(nn.Module):
    """A net whose activation is a function of its code, not a module."""

    def __init__(self, activation: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.activation = activation
        self.hidden, self.out = nn.Linear(6, 4).double(), nn.Linear(4, 1).double()

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.activation(self.hidden(x)))


def with_module(activation: nn.Module) -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 4), activation, nn.Linear(4, 1)).double()


def squared(scale: float) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda output, target: scale * (output - target).square().mean()


class Scaled:
    """A loss that is an object of a class of the user."""

    def __init__(self, scale: float) -> None:
        self.scale = scale

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        return self.scale * (output - target).square().mean()

    __call__ = loss


def power(n: int) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda output, target: (output - target).pow(n).mean()


def power_of(n: int) -> Callable[[Tensor], Tensor]:
    return lambda x: x**n


class Loader:
    """Raises in the middle of its second reading, as a broken file does."""

    def __init__(self, batches: Batches, broken: bool) -> None:
        self.batches, self.broken = batches, broken

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for i, batch in enumerate(self.batches):
            if self.broken and i == 3:
                raise OSError("disk on fire")
            yield batch


def calls(rank: int, group: Any) -> dict[str, Callable[[], Any]]:
    """What the last process does differently, by name."""
    own, last = shard(rank), rank == dist.get_world_size() - 1

    def grow(model: nn.Module | None = None, batches: Any = own, **settings: Any) -> Callable[[], Any]:
        net = mlp() if model is None else model
        return lambda: fxgrow.grow(net, batches, progress=False, process_group=group, **settings)

    def grower(run: Callable[[fxgrow.Grower], Any] = lambda g: g, **settings: Any) -> Callable[[], Any]:
        def call() -> Any:
            net = DistributedDataParallel(mlp())
            optimizer = settings.pop("kind", torch.optim.SGD)(net.parameters(), lr=0.1)
            options = {"schedule": fxgrow.Every(steps=4), "dataloader": own, "neurons": 1} | settings
            return run(fxgrow.Grower(net, optimizer, options.pop("schedule"), **options))

        return call

    def other_state(made: fxgrow.Grower) -> None:
        made.load_state_dict(made.state_dict() | {"steps": 3 + last})

    return {
        "activation module": grow(with_module(nn.GELU() if last else nn.ReLU())),
        "activation option": grow(with_module(nn.LeakyReLU(0.3 if last else 0.1))),
        "activation function": grow(Activation(torch.tanh if last else torch.relu)),
        "budget": grow(budget="+50%" if last else "+25%"),
        "invalid budget": grow(budget="much" if last else "+25%"),
        "neurons": grow(neurons=1 + last),
        "update_existing": grow(neurons=1, update_existing=last),
        "loss": grow(loss_fn=nn.functional.l1_loss if last else nn.functional.mse_loss),
        "loss closure": grow(loss_fn=squared(2.0 if last else 1.0)),
        "loss lambda": grow(
            loss_fn=(lambda o, y: (o - y).abs().mean()) if last else lambda o, y: (o - y).pow(2).mean()
        ),
        "loss object": grow(loss_fn=Scaled(2.0 if last else 1.0)),
        "loss method": grow(loss_fn=Scaled(2.0 if last else 1.0).loss),
        "loss module": grow(loss_fn=nn.HuberLoss(delta=2.0 if last else 1.0)),
        "seed": grow(seed=int(last)),
        "method": grow(method="tiny" if last else "default"),
        "unknown option": grow(**({"buget": 1} if last else {})),
        "optimizer": grow(optimizer="adam" if last else None),
        "no optimizer": grow(net := mlp(), optimizer=None if last else torch.optim.SGD(net.parameters(), lr=0.1)),
        "whole number in a loss": grow(loss_fn=power(4 if last else 2)),
        "whole number in a model": grow(Activation(power_of(3 if last else 2))),
        "loader": grow(batches=Loader(own, last)),
        "profile's seed": lambda: fxgrow.profile(mlp(), own, seed=int(last), progress=False, process_group=group),
        "kind of optimizer": grower(kind=torch.optim.AdamW if last else torch.optim.SGD),
        "schedule": grower(schedule=fxgrow.Every(steps=4 + last)),
        "kind of schedule": grower(schedule=fxgrow.OnPlateau(every=4) if last else fxgrow.Every(steps=4)),
        "Grower's budget": grower(neurons=1 + last),
        "Grower's loader": grower(lambda g: g.grow_now(), dataloader=Loader(own, last)),
        "grow_now": grower(lambda g: g.grow_now(neurons=1 + last)),
        "state": grower(other_state),
    }


def kept_readings(rank: int) -> str:
    """A growth that fails on one process leaves the readings of the schedule on all."""
    net = DistributedDataParallel(mlp())
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    loader = Loader(shard(rank), rank == 0)
    schedule = fxgrow.OnPlateau(every=3, patience=1)
    grower = fxgrow.Grower(net, optimizer, schedule, dataloader=loader, neurons=1)
    grown = [grower.step(1.0) for _ in range(5)]
    before = grower.state_dict()
    try:
        grower.step(1.0)
        return "nothing"
    except fxgrow.FxgrowError:
        after = grower.state_dict()
    same = after | {"steps": 5, "losses": after["losses"][:-1]} == before
    loader.broken = False
    return f"{any(grown)} {same} {any(grower.step(1.0) for _ in range(3))}"


def main(folder: Path, size: int) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    rank = int(os.environ["RANK"])
    meeting = f"file://{folder}/meeting"
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=size, timeout=timedelta(seconds=60))
    group = dist.group.WORLD
    results: dict[str, tuple[str, float]] = {}
    fxgrow.capture(mlp(), (shard(rank)[0][0],))  # imports
    for name, call in calls(rank, group).items():
        dist.barrier()
        start, net = time.perf_counter(), mlp()
        try:
            call()
            found = "nothing"
        except Exception as error:
            found = f"{type(error).__name__}: {error}"
        results[name] = found, time.perf_counter() - start
        assert all(t.equal(state(mlp())[n]) for n, t in state(net).items())
    results["kept readings"] = kept_readings(rank), 0.0
    torch.save(results, folder / f"{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
