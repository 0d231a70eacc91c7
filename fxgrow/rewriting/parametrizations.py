"""Layers with weight or spectral normalisation, as parametrizations or by hooks, and pruned ones grow as plain layers.

Any weight has a length and a direction (Salimans and Kingma 2016, eq. 2). Under spectral normalisation the largest
singular value must stay, through later power iterations too (Miyato et al. 2018, algorithm 1): new rows are orthogonal.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn, norm_except_dim
from torch.nn.utils import parametrizations, remove_spectral_norm, remove_weight_norm

from fxgrow.graph.graph import copy_graph, lookup
from fxgrow.graph.node_meta import PARAMETRIZATIONS
from fxgrow.graph.parametrizations import hooked_weight, norm_of, weight_hook

#: per parameter and dimension, the new positions of old entries (None: unchanged)
Index = dict[str, tuple[Tensor | None, ...]]
#: the names of what a hook makes of a weight, by those of its parametrization
HOOKED = {
    "original0": "weight_g", "original1": "weight_v", "original": "weight_orig",
    "_u": "weight_u", "_v": "weight_v", "mask": "weight_mask",
}  # fmt: skip


def remove_parametrizations(gm: fx.GraphModule) -> fx.GraphModule:
    """The graph itself, or a copy without these norms where it has some."""
    found = {name: norm for name, m in gm.named_modules() if (norm := norm_of(m)) is not None}
    if not found:
        return gm
    out = copy_graph(gm)
    for name in found:
        layer: Any = out.get_submodule(name)
        norm = found[name] = copy.deepcopy(found[name])
        parts = _parts(layer, norm)
        norm.trained = {part: p.requires_grad for part, p in parts.items()}
        layer.eval()  # in training reading the weight runs a power iteration
        if hasattr(norm, "_u"):
            matrix = parts["original"].detach().movedim(norm.dim, 0)
            norm.columns = tuple(matrix.shape[1:])
            norm.sigma = float(norm._u.double() @ matrix.flatten(1).double() @ norm._v.double())
        elif hasattr(norm, "mask"):
            norm.original, norm.mask = parts["original"].detach().clone(), parts["mask"].clone()
        else:
            norm.length, norm.direction = (parts[part].detach().clone() for part in ("original0", "original1"))
        weight = lookup(layer, "weight").detach().clone()
        layer.train(gm.get_submodule(name).training)
        if hasattr(norm, "mask"):
            hooks = layer._forward_pre_hooks
            hooks.pop(next(key for key, hook in hooks.items() if hook is weight_hook(layer, "weight")))
            del layer.weight, layer.weight_orig, layer.weight_mask
        elif hasattr(norm, "hook"):
            (remove_spectral_norm if hasattr(norm, "_u") else remove_weight_norm)(layer)
            del layer.weight
        else:
            # by hand: `remove_parametrizations` takes the property off a class that the original shares
            layer.__class__ = type(layer).__bases__[0]
            del layer._modules["parametrizations"]
        layer.register_parameter("weight", nn.Parameter(weight, any(norm.trained.values())))
    out.meta[PARAMETRIZATIONS] = found
    return out


def _parts(layer: Any, norm: Any) -> dict[str, Tensor]:
    """The tensors of a norm, by their names as parametrizations."""
    if not hasattr(norm, "hook"):
        weight = layer.parametrizations.weight
        return dict(weight.named_parameters()) | dict(weight[0].named_buffers())
    return {part: tensor for part, name in HOOKED.items() if (tensor := getattr(layer, name, None)) is not None}


def restore_parametrizations(
    grown: fx.GraphModule, index: Mapping[str, tuple[Tensor | None, ...]]
) -> tuple[fx.GraphModule, Index]:
    """The graph with the norms of its original, and the index by the names of the parameters with norms."""
    index = dict(index)
    for name, norm in grown.meta.pop(PARAMETRIZATIONS, {}).items():
        layer = grown.get_submodule(name)
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():  # singular vectors start random
            warnings.simplefilter("ignore", FutureWarning)
            _enter(layer, norm)
        restore = _restore_spectral_norm if hasattr(norm, "_u") else _restore_weight_norm
        restore = _restore_pruning if hasattr(norm, "mask") else restore
        parts = _parts(layer, norm)
        moved = restore(parts, norm, index.pop(f"{name}.weight", None))
        for part, trained in norm.trained.items():
            parts[part].requires_grad_(trained)
        layer.train(layer.training)
        if hasattr(norm, "mask"):
            layer.weight = hooked_weight(layer, norm.hook).detach()
        for part, at in moved.items():
            parametrized = f"parametrizations.weight.{'0.' if part in ('_u', '_v') else ''}{part}"
            index[f"{name}.{HOOKED[part] if hasattr(norm, 'hook') else parametrized}"] = at
    return grown, index


def _enter(layer: nn.Module, norm: Any) -> None:
    space: Any = torch.nn.utils if hasattr(norm, "hook") else parametrizations
    if hasattr(norm, "mask"):
        weight: Any = layer._parameters.pop("weight")
        layer.register_parameter("weight_orig", weight)
        layer.register_buffer("weight_mask", torch.ones_like(weight.data))
        layer.register_forward_pre_hook(norm.hook)
    elif hasattr(norm, "_u"):
        space.spectral_norm(layer, "weight", norm.n_power_iterations, norm.eps, norm.dim)
    else:
        space.weight_norm(layer, "weight", norm.dim)


def _restore_weight_norm(parts: dict[str, Tensor], norm: Any, moved: tuple[Tensor | None, ...] | None) -> Index:
    """Directions of old rows keep their length, on which their gradients depend, and their sign."""
    length, direction = parts["original0"].data, parts["original1"].data
    where = moved or (None,) * direction.dim()
    rows = tuple(at if d == norm.dim else None for d, at in enumerate(where))
    scale = _padded(norm_except_dim(norm.direction, 2, norm.dim) / norm.length, rows[: length.dim()], length.shape)
    scale.masked_fill_((scale == 0) | ~scale.isfinite(), 1.0)
    old = _padded(norm.direction, where, direction.shape)
    old += norm_except_dim(old, 2, norm.dim) == 0  # zero rows need a direction
    direction.copy_(torch.where(length == 0, old, direction * scale))
    length.mul_(scale.sign())
    if moved is None:
        return {}
    return {"original1": moved, **({"original0": rows} if any(at is not None for at in rows) else {})}


def _restore_pruning(parts: dict[str, Tensor], norm: Any, moved: tuple[Tensor | None, ...] | None) -> Index:
    """Pruned entries stay pruned, with the values behind the mask; new ones are not."""
    weight, mask, where = parts["original"].data, parts["mask"], moved or (None,) * parts["mask"].dim()
    mask -= _padded(1 - norm.mask, where, weight.shape)
    weight += _padded(norm.original * (1 - norm.mask), where, weight.shape) * (1 - mask)
    return {} if moved is None else {"original": moved, "mask": moved}


def _restore_spectral_norm(parts: dict[str, Tensor], norm: Any, moved: tuple[Tensor | None, ...] | None) -> Index:
    """Singular vectors get zeros at new rows and columns, which keeps the largest singular value."""
    weight = parts["original"]
    weight.data.mul_(norm.sigma)
    where = list(moved or (None,) * weight.dim())
    columns = [n for d, n in enumerate(weight.shape) if d != norm.dim]
    parts["_u"].copy_(_padded(norm._u, [where.pop(norm.dim)], parts["_u"].shape))
    parts["_v"].copy_(_padded(norm._v.view(norm.columns), where, columns).flatten())
    if moved is None:
        return {}
    numbers = _padded(torch.arange(1, norm._v.numel() + 1).view(norm.columns), where, columns).flatten()
    places = torch.full_like(norm._v, -1, dtype=torch.long, device="cpu")
    places[numbers[numbers > 0] - 1] = numbers.nonzero().flatten()
    vectors = {"_u": moved[norm.dim], "_v": None if all(at is None for at in where) else places}
    return {"original": moved} | {name: (at,) for name, at in vectors.items() if at is not None}


def _padded(old: Tensor, where: Sequence[Tensor | None], shape: Sequence[int]) -> Tensor:
    """Old entries that stay at their new positions, zeros elsewhere."""
    for d, (at, n) in enumerate(zip(where, shape, strict=True)):
        if at is not None:
            stay, at = (at >= 0).nonzero().flatten().to(old.device), at[at >= 0].to(old.device)
            zeros = old.new_zeros(*old.shape[:d], n, *old.shape[d + 1 :])
            old = zeros.index_copy_(d, at, old.index_select(d, stay))
    return old


def spectral(gm: fx.GraphModule, name: str) -> bool:
    """Whether a parameter of a graph without parametrizations keeps its largest singular value."""
    return hasattr(gm.meta.get(PARAMETRIZATIONS, {}).get(name.removesuffix(".weight")), "_u")


def keep_norm(gm: fx.GraphModule, name: str, delta: Tensor) -> Tensor:
    """The part of a change of old entries that leaves the largest singular value, by its estimate, and pruned ones."""
    mask: Tensor | None = getattr(gm.meta.get(PARAMETRIZATIONS, {}).get(name.removesuffix(".weight")), "mask", None)
    if mask is not None:
        return delta * mask.to(delta)
    if not spectral(gm, name):
        return delta
    norm = gm.meta[PARAMETRIZATIONS][name.removesuffix(".weight")]
    rows = delta.movedim(norm.dim, 0)
    u, v = norm._u.to(delta), norm._v.to(delta)
    part = torch.outer(u, v) * (u @ rows.flatten(1) @ v) / (u.square().sum() * v.square().sum())
    out: Tensor = (rows - part.view(rows.shape)).movedim(0, norm.dim)
    return out


def orthogonalise_new_rows(gm: fx.GraphModule, name: str, weight: Tensor, old: Sequence[Tensor]) -> None:
    """Under spectral normalisation, makes new rows orthogonal to old ones and to the singular vector, and short.

    `old` has the positions of old entries per dimension; a weight without the norm stays as it is.
    """
    if not spectral(gm, name):
        return
    norm = gm.meta[PARAMETRIZATIONS][name.removesuffix(".weight")]
    rows = weight.movedim(norm.dim, 0)
    is_new = torch.ones(len(rows), dtype=torch.bool).index_fill(0, old[norm.dim], False).to(rows.device)
    columns = [at for d, at in enumerate(old) if d != norm.dim]
    for d, at in enumerate(columns):  # an old row reads no new column
        gone = torch.ones(rows.shape[d + 1], dtype=torch.bool).index_fill(0, at, False).nonzero().flatten()
        kept = rows[is_new]
        rows.index_fill_(d + 1, gone.to(rows.device), 0)
        rows[is_new] = kept
    if not bool(is_new.any()):
        return
    # the estimate of the singular vector need not lie in the span of the rows
    vector = _padded(norm._v.view(norm.columns), columns, rows.shape[1:]).flatten()
    basis, _ = torch.linalg.qr(torch.cat([rows[~is_new].flatten(1), vector[None]]).double().mT)
    new = rows[is_new].flatten(1).double()
    for _ in range(2):  # a second time against rounding
        new = new - (new @ basis) @ basis.mT
    new *= (0.5 / new.norm(dim=1, keepdim=True).clamp_min(1e-30)).clamp_max(1)
    rows[is_new] = new.view_as(rows[is_new]).to(rows)
