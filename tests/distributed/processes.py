"""What two processes do in `test_distributed.py`: every case in turn, results in a file per process.

python -m tests.distributed.processes <folder>, with RANK set
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import fxgrow

Batches = list[tuple[Tensor, Tensor]]
#: for growth: in each process, or in one process with the data of both
Setting = dict[str, Any]


def shard(rank: int, shape: tuple[int, ...] = (6,), size: int = 16, count: int = 8) -> Batches:
    g = torch.Generator().manual_seed(rank)
    out = []
    for _ in range(count):
        x = torch.randn(size, *shape, generator=g, dtype=torch.float64)
        flat = x.flatten(1)
        out.append((x, flat[:, :3].prod(1, keepdim=True) + flat.sum(1, keepdim=True).sin()))
    return out


def joined(*shards: Batches) -> Batches:
    """Batch i of one process is batch i of all."""
    return [tuple(map(torch.cat, zip(*own, strict=True))) for own in zip(*shards, strict=True)]  # type: ignore[misc]


def mlp() -> nn.Module:
    torch.manual_seed(1)
    net = nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 1))
    return net.double()


def convolutions() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4),
        nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 1),
    ).double()  # fmt: skip


def attention() -> nn.Module:
    """A width that is found by sketching, beside others."""
    torch.manual_seed(1)

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.value, self.out, self.head = nn.Linear(4, 6), nn.Linear(6, 4), nn.Linear(4, 1)

        def forward(self, x: Tensor) -> Tensor:
            weights = (x @ x.mT).softmax(-1)
            return self.head(self.out((weights @ self.value(x)).tanh()).tanh().mean(1))

    return Block().double()


def state(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers in full, without what wraps the model."""
    for module in model.modules():
        getattr(module, "reshard", lambda: None)()
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {n.removeprefix("module."): getattr(t, "full_tensor", lambda t=t: t)().detach() for n, t in tensors.items()}


# -- cases


def grown(net: Callable[[], nn.Module], method: str) -> Callable[[Batches, Setting], Any]:
    def case(batches: Batches, setting: Setting) -> Any:
        out = fxgrow.grow(net(), batches, neurons=2, method=method, progress=False, **setting)
        growth = out.meta["fxgrow"]
        bottlenecks = {name: (b.bottleneck, b.gains, b.significant, b.samples) for name, b in growth.profile.items()}
        return state(out), growth.plan.units, growth.plan.scale, growth.losses, bottlenecks

    return case


def trained(wrap: Callable[[nn.Module], nn.Module], net: Callable[[], nn.Module] = mlp) -> Callable[..., Any]:
    """Two growths in a training loop, one of them on a plateau; SGD's momentum and Adam's moments go along."""

    def case(batches: Batches, setting: Setting) -> Any:
        model = wrap(net()) if setting else net()
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
        schedule = (fxgrow.Every(steps=6) | fxgrow.OnPlateau(every=4, patience=1)).until(growths=2, total=400)
        grower = fxgrow.Grower(model, optimizer, schedule, dataloader=batches, neurons=2)
        for _ in range(3):
            for i, (x, y) in enumerate(batches):
                nn.functional.mse_loss(grower.model(x), y).backward()
                if i % 2:  # gradients accumulate over two batches
                    optimizer.step()
                    optimizer.zero_grad()
                    grower.step(nn.functional.mse_loss(grower.model(x), y))
        found = state(grower.model)
        moments = {
            name.removeprefix("module."): getattr(t := optimizer.state[p]["exp_avg"], "full_tensor", lambda t=t: t)()
            for name, p in grower.model.named_parameters()
        }
        history = [(e.step, dict(e.units)) for e in grower.history]
        return found, moments, history, type(grower.model).__name__

    return case


def ddp(net: nn.Module) -> nn.Module:
    return DistributedDataParallel(net, gradient_as_bucket_view=True, bucket_cap_mb=1)


def fsdp(net: nn.Module) -> nn.Module:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for part in (net[0], net[2]):
        fully_shard(part, mesh=mesh, reshard_after_forward=True)
    return fully_shard(net, mesh=mesh)


def single(case: Callable[[Batches, Setting], Any]) -> Callable[[Batches, Setting], Any]:
    """The case on data in float32."""
    return lambda batches, setting: case([(x.float(), y.float()) for x, y in batches], setting)


EQUAL: dict[str, tuple[Callable[..., Any], tuple[int, ...]]] = {
    "default": (grown(mlp, "default"), (6,)),
    "tiny": (grown(mlp, "tiny"), (6,)),
    "sketch": (grown(attention, "default"), (3, 4)),
    "ddp": (trained(ddp), (6,)),
    "fsdp": (trained(fsdp), (6,)),
}
#: the same to rounding
SINGLE = {m: single(grown(lambda: mlp().float(), m)) for m in ("default", "tiny")}
#: norms in training see each process's own batch, as in DistributedDataParallel: one process reads them one by one
ONE_BY_ONE = {
    "norms": (grown(convolutions, "default"), (2, 2, 2)),
    "norms, tiny": (grown(convolutions, "tiny"), (2, 4, 4)),
}
#: few enough samples that no second moment is estimated from a part of them
SIZES = {"sketch": 4, "norms": 8, "norms, tiny": 8}


def failing(rank: int, group: Any) -> dict[str, str]:
    """Messages of errors that one process alone would run into."""
    own = shard(rank)
    broken = [(x, y / 0 if rank == 1 and i == 2 else y) for i, (x, y) in enumerate(own)]
    other = mlp()
    if rank == 1:
        with torch.no_grad():
            other[0].bias += 1e-12

    def grow(model: nn.Module, batches: Batches, **settings: Any) -> Callable[[], Any]:
        return lambda: fxgrow.grow(model, batches, progress=False, process_group=group, **({"neurons": 1} | settings))

    calls: dict[str, Callable[[], Any]] = {
        "a loss that is no number": grow(mlp(), broken),
        "other weights": grow(other, own),
        "other settings": grow(mlp(), own, neurons=1 + rank),
        "a shard of one batch": grow(mlp(), own[: 1 if rank else 8]),
        "no data": grow(mlp(), own if rank == 0 else []),
        "a small budget": grow(mlp(), own, neurons=None, budget=1, method="tiny"),
        "splitting": grow(mlp(), own, method="splitting"),
        "moments": lambda: fxgrow.profile(mlp(), own, keep_moments=True, progress=False, process_group=group),
    }
    found = {}
    for name, call in calls.items():
        try:
            call()
            found[name] = "nothing"
        except Exception as error:
            found[name] = f"{type(error).__name__}: {error}"
    net = ddp(mlp())
    before = state(net)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    grower = fxgrow.Grower(net, optimizer, fxgrow.Every(steps=1), dataloader=broken, neurons=1, on_error="skip")
    found["skipped"] = f"{grower.step()} {grower.model is net} {all(t.equal(before[n]) for n, t in state(net).items())}"
    return found


def main(folder: Path) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    rank = int(os.environ["RANK"])
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    group = dist.group.WORLD
    results: dict[str, Any] = {}
    for name, (case, shape) in (EQUAL | ONE_BY_ONE).items():
        results[name] = case(shard(rank, shape, SIZES.get(name, 16)), {"process_group": group})
    results["float32"] = {method: case(shard(rank), {"process_group": group}) for method, case in SINGLE.items()}
    results["failing"] = failing(rank, group)
    torch.save(results, folder / f"{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
