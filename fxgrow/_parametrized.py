"""Weights that are computed from other parameters, and what computes them."""

from __future__ import annotations

from torch import nn


def normed_dimension(module: nn.Module) -> int | None:
    """The dimension with one length each (-1: one length in all), if weight normalisation is all there is."""
    lists = getattr(module, "parametrizations", None)
    if not isinstance(lists, nn.ModuleDict) or list(lists) != ["weight"]:
        return None
    kinds = list(lists["weight"].children())
    dim = getattr(kinds[0], "dim", None)
    return dim if len(kinds) == 1 and type(kinds[0]).__name__ == "_WeightNorm" and isinstance(dim, int) else None


def computed_by(module: nn.Module, name: str) -> str:
    """Names of what computes a weight, as far as the module says so."""
    lists = getattr(module, "parametrizations", None)
    kinds = set()
    if isinstance(lists, nn.ModuleDict) and name in lists:
        kinds = {type(p).__name__.strip("_") for p in lists[name].children()}
    kinds |= {type(hook).__name__ for hook in module._forward_pre_hooks.values() if hasattr(hook, "compute_weight")}
    return ", ".join(sorted(kinds))
