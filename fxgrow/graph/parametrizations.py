"""Weights that are computed from other parameters, by parametrizations or hooks."""

from __future__ import annotations

from typing import Any

from torch import nn


def norm_of(module: nn.Module) -> Any:
    """Returns the weight or spectral normalisation of a weight, if it is the only parametrization."""
    lists = getattr(module, "parametrizations", None)
    if not isinstance(lists, nn.ModuleDict) or list(lists) != ["weight"]:
        return None
    kinds = list(lists["weight"].children())
    known = len(kinds) == 1 and type(kinds[0]).__name__ in ("_WeightNorm", "_SpectralNorm")
    # a vector has no singular vectors
    return kinds[0] if known and (hasattr(kinds[0], "_u") or type(kinds[0]).__name__ == "_WeightNorm") else None


def computed_by(module: nn.Module, name: str) -> str:
    """Returns the names of the parametrizations and hooks that compute a weight."""
    lists = getattr(module, "parametrizations", None)
    kinds = set()
    if isinstance(lists, nn.ModuleDict) and name in lists:
        kinds = {type(p).__name__.strip("_") for p in lists[name].children()}
    kinds |= {type(hook).__name__ for hook in module._forward_pre_hooks.values() if hasattr(hook, "compute_weight")}
    return ", ".join(sorted(kinds))
