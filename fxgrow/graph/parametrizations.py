"""Weights that are computed from other parameters, by parametrizations or hooks."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from torch import Tensor, nn
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm


def norm_of(module: nn.Module) -> Any:
    """Returns the norm or pruning of a weight, if nothing else computes it: its `dim`, `_u` and `_v`, or its `mask`.

    Of the form that is a hook (`torch.nn.utils.weight_norm`) it is a record with the `hook`.
    """
    lists = getattr(module, "parametrizations", None)
    hook = weight_hook(module, "weight")
    if isinstance(hook, BasePruningMethod):
        return SimpleNamespace(hook=hook, mask=module.weight_mask)
    if type(hook) in (WeightNorm, SpectralNorm) and lists is None:
        vectors = {"_u": module.weight_u, "_v": module.weight_v} if hasattr(hook, "n_power_iterations") else {}
        return SimpleNamespace(hook=hook, **vars(hook), **vectors)
    if not isinstance(lists, nn.ModuleDict) or list(lists) != ["weight"]:
        return None
    kinds = list(lists["weight"].children())
    known = len(kinds) == 1 and type(kinds[0]).__name__ in ("_WeightNorm", "_SpectralNorm")
    # a vector has no singular vectors
    return kinds[0] if known and (hasattr(kinds[0], "_u") or type(kinds[0]).__name__ == "_WeightNorm") else None


def weight_hook(module: nn.Module, name: str) -> Any:
    """Returns the hook that computes a weight before each call, if it is the only one."""
    hooks: list[Any] = [hook for hook in module._forward_pre_hooks.values() if _computes_weight(hook)]
    names = [getattr(hook, "name", getattr(hook, "_tensor_name", None)) for hook in hooks]
    return hooks[0] if names == [name] and name not in module._parameters else None


def _computes_weight(hook: Any) -> bool:
    return hasattr(hook, "compute_weight") or isinstance(hook, BasePruningMethod)


def hooked_weight(module: nn.Module, hook: Any) -> Tensor:
    """Returns the weight that a hook would compute, without a power iteration."""
    compute: Any = hook.apply_mask if isinstance(hook, BasePruningMethod) else hook.compute_weight
    out: Tensor = compute(module, False) if hasattr(hook, "n_power_iterations") else compute(module)
    return out


def computed_by(module: nn.Module, name: str) -> str:
    """Returns the names of the parametrizations and hooks that compute a weight."""
    lists = getattr(module, "parametrizations", None)
    kinds = set()
    if isinstance(lists, nn.ModuleDict) and name in lists:
        kinds = {type(p).__name__.strip("_") for p in lists[name].children()}
    kinds |= {type(hook).__name__ for hook in module._forward_pre_hooks.values() if _computes_weight(hook)}
    return ", ".join(sorted(kinds))
