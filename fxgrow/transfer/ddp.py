"""DistributedDataParallel around a grown module, with the options of the old wrapper."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from fxgrow.errors import FxgrowError

#: arguments of the constructor that are attributes of the same names
_OPTIONS = (
    "device_ids", "output_device", "dim", "process_group", "find_unused_parameters", "gradient_as_bucket_view",
    "static_graph", "skip_all_reduce_unused_params", "batched_grad_copy",
)  # fmt: skip


def check_ddp(model: DistributedDataParallel) -> None:
    """Refuses options that cannot be carried over to another module."""
    for name, what in (("mixed_precision", "mixed_precision="), ("_delay_all_reduce_params", "delayed parameters")):
        if getattr(model, name, None):
            raise FxgrowError(
                f"This DistributedDataParallel has {what}, which changes its module and cannot be carried over to the "
                "grown one: leave it out, and use torch.autocast for mixed precision."
            )


def rewrapping(model: DistributedDataParallel) -> Callable[[nn.Module], DistributedDataParallel]:
    """Returns a function that wraps another module with the same options, communication hooks and mode.

    Every process of the group must call that function; it sends the weights of rank 0 to all.
    """
    accepted = inspect.signature(DistributedDataParallel.__init__).parameters
    options = {name: getattr(model, name) for name in _OPTIONS if name in accepted and hasattr(model, name)}
    # torch 2.13 has another name for it
    name = "forward_sync_buffers" if "forward_sync_buffers" in accepted else "broadcast_buffers"
    options[name] = getattr(model, name)
    if not getattr(model, "bucket_bytes_cap_default", True):
        options["bucket_cap_mb"] = model.bucket_bytes_cap / 2**20
    hooks: list[tuple[Any, Any]] = list(getattr(model, "_comm_hooks", ()))
    # names of parameters and buffers that are not synchronised
    ignored, training = getattr(model.module, "_ddp_params_and_buffers_to_ignore", None), model.training

    def wrap(new: nn.Module) -> DistributedDataParallel:
        if ignored is not None:
            DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(new, ignored)
        out = DistributedDataParallel(new, **options)
        for hook, state in hooks:
            out.register_comm_hook(state, hook)
        out.training = training  # of the wrapper only; its module has its own
        return out

    return wrap
