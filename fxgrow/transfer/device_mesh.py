"""Tells which models FSDP2 has sharded, and over which processes."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from torch import nn

from fxgrow.errors import FxgrowError


def sharded_modules(model: nn.Module) -> list[Any]:
    """Returns the modules that `fully_shard` has been called on, which gave them classes of FSDP2."""
    return [m for m in model.modules() if type(m).__name__.startswith("FSDP") and hasattr(m, "_get_fsdp_state")]


def reshard(model: nn.Module) -> None:
    """Frees parameters that FSDP2 has gathered, as after a forward pass without a backward one."""
    for module in sharded_modules(model):
        module.reshard()


def group_of_mesh(model: nn.Module) -> Any:
    """Returns the process group that the model is sharded over, which must be all of one mesh."""
    reshard(model)
    for name, p in model.named_parameters():
        shards = sum(placement.is_shard() for placement in getattr(p, "placements", ()))
        if shards > 1:
            raise FxgrowError(
                f"{name!r} is sharded along {shards} dimensions of its mesh: growth supports FSDP2 only, without "
                "tensor parallelism."
            )
    meshes: set[Any] = {getattr(p, "device_mesh", None) for p in model.parameters()} - {None}
    if len(meshes) != 1:
        raise FxgrowError(f"The model's parameters are on {len(meshes)} meshes: growth of a sharded model needs one.")
    (mesh,) = meshes
    if mesh.ndim == 1:
        return mesh.get_group()
    if mesh.size() == dist.get_world_size():
        return dist.group.WORLD
    raise FxgrowError(f"The mesh {mesh} has {mesh.ndim} dimensions and not all processes: growth needs all of them.")
