"""Averages of weights grow with the model: `swa_utils.AveragedModel`, or a plain copy that the user updates."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from fxgrow.errors import FxgrowError
from fxgrow.graph.graph import copy_module, named_tensors, same_kind
from fxgrow.transfer.parameter_change import Assign, ParameterChange, spread
from fxgrow.transfer.wrappers import unwrapped


def check_average(average: nn.Module, model: nn.Module) -> tuple[nn.Module, Callable[[nn.Module], nn.Module]]:
    """Returns the module that holds the averages and a function that wraps another; refuses one of another model."""
    if not isinstance(average, nn.Module):
        raise FxgrowError(f"ema is a {type(average).__name__}: give torch.optim.swa_utils.AveragedModel(model), say.")
    averaged, wrap = unwrapped(average.module if isinstance(average, AveragedModel) else average)
    averages = named_tensors(averaged)
    for name, parameter in model.named_parameters():
        tensor = averages.get(name)
        if tensor is None or tensor.shape != parameter.shape:
            what = "is missing" if tensor is None else f"has the shape {list(tensor.shape)}"
            raise FxgrowError(
                f"ema= is no average of this model: {name!r} {what} in it and has the shape {list(parameter.shape)} in "
                "the model. Make it from the model, before growth."
            )
    return averaged, wrap


@torch.no_grad()
def prepare_average(average: nn.Module, change: ParameterChange) -> tuple[nn.Module, Assign]:
    """Returns the grown average: the same `AveragedModel` once `Assign` is called, or a new plain module.

    Old entries keep their averages, new ones start at the new weights.
    """
    averaged, wrap = check_average(average, change.old)
    averages = named_tensors(averaged)
    replaced: dict[int, Tensor] = {}
    for name, tensor in named_tensors(change.new).items():
        old = averages.get(name)
        if old is None or id(tensor) in replaced:
            continue  # a constant that only a graph has; tied parameters are one
        positions = change.index.get(name)
        if positions is None and old.shape != tensor.shape:
            continue
        value = old.detach().clone() if positions is None else spread(old, positions, tensor)
        replaced[id(tensor)] = same_kind(value, old)
    grown = copy_module(change.new, replaced)
    modes = {path: module.training for path, module in averaged.named_modules()}
    for path, module in grown.named_modules():
        module.training = modes.get(path, averaged.training)
    wrapped = wrap(grown)
    if not isinstance(average, AveragedModel):
        return wrapped, lambda: None
    return average, functools.partial(setattr, average, "module", wrapped)
