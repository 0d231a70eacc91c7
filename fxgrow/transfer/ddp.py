"""DistributedDataParallel around a grown module, with the options of the one that was around it before."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from fxgrow.errors import FxgrowError

#: what a constructor takes and what it is remembered under, where that is not the same
_OPTIONS = {
    name: name
    for name in (
        "device_ids", "output_device", "dim", "process_group", "find_unused_parameters", "gradient_as_bucket_view",
        "static_graph", "skip_all_reduce_unused_params", "batched_grad_copy",
    )
}  # fmt: skip
#: names of parameters and buffers that are left to each process
_IGNORED = "_ddp_params_and_buffers_to_ignore"


def check_ddp(model: DistributedDataParallel) -> None:
    """Refuses options that cannot be given to another module.

    Raises:
        FxgrowError: there is one.
    """
    for name, what in (("mixed_precision", "mixed_precision="), ("_delay_all_reduce_params", "delayed parameters")):
        if getattr(model, name, None):
            raise FxgrowError(
                f"This DistributedDataParallel has {what}, which it wove into its module and cannot be wrapped around "
                "another one: leave it out, and use torch.autocast for mixed precision."
            )


def rewrapping(model: DistributedDataParallel) -> Callable[[nn.Module], DistributedDataParallel]:
    """What wraps another module alike; every process of the group must call it, and the first one's weights are sent.

    Options, communication hooks and the mode are carried over; buckets are made anew.
    """
    taken = inspect.signature(DistributedDataParallel.__init__).parameters
    options = {name: getattr(model, kept) for name, kept in _OPTIONS.items() if name in taken and hasattr(model, kept)}
    # torch 2.13 has another name for it
    name = "forward_sync_buffers" if "forward_sync_buffers" in taken else "broadcast_buffers"
    options[name] = getattr(model, name)
    if not getattr(model, "bucket_bytes_cap_default", True):
        options["bucket_cap_mb"] = model.bucket_bytes_cap / 2**20
    hooks: list[tuple[Any, Any]] = list(getattr(model, "_comm_hooks", ()))
    ignored, training = getattr(model.module, _IGNORED, None), model.training

    def wrap(new: nn.Module) -> DistributedDataParallel:
        if ignored is not None:
            DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(new, ignored)
        out = DistributedDataParallel(new, **options)
        for hook, state in hooks:
            out.register_comm_hook(state, hook)
        out.training = training  # of the wrapper alone; its module has its own
        return out

    return wrap
