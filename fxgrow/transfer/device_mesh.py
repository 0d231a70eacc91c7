"""Tells which models FSDP2 has sharded, and over which processes."""

from __future__ import annotations

from typing import Any, cast

import torch.distributed as dist
from torch import nn

from fxgrow.errors import FxgrowError


def is_sharded(model: nn.Module) -> bool:
    """Whether `fully_shard` has been called on the model or a part of it."""
    return any(type(m).__name__.startswith("FSDP") and hasattr(m, "_get_fsdp_state") for m in model.modules())


def reshard(model: nn.Module) -> None:
    """Frees parameters that FSDP2 has gathered, as after a forward pass without a backward one."""
    for module in model.modules():
        if hasattr(module, "_get_fsdp_state"):
            cast(Any, module).reshard()


def group_of_mesh(model: nn.Module) -> Any:
    """Returns the process group that the model is sharded over.

    Raises:
        FxgrowError: parameters are on several meshes, or sharded in another way too (tensor parallelism).
    """
    reshard(model)
    meshes: list[Any] = []
    for name, p in model.named_parameters():
        mesh = getattr(p, "device_mesh", None)
        if mesh is not None and all(mesh != known for known in meshes):
            meshes.append(mesh)
        shards = [q for q in getattr(p, "placements", ()) if q.is_shard()]
        if len(shards) > 1:
            raise FxgrowError(
                f"{name!r} is sharded along {len(shards)} dimensions of its mesh: growth supports FSDP2 only, without "
                "tensor parallelism."
            )
    if len(meshes) != 1:
        raise FxgrowError(f"The model's parameters are on {len(meshes)} meshes: growth of a sharded model needs one.")
    (mesh,) = meshes
    if mesh.ndim == 1:
        return mesh.get_group()
    if mesh.size() == dist.get_world_size():
        return dist.group.WORLD
    raise FxgrowError(f"The mesh {mesh} has {mesh.ndim} dimensions and not all processes: growth needs all of them.")
