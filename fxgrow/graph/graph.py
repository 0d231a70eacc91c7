"""What every pass does with a graph: copy it, compile it, and look up its tensors."""

from __future__ import annotations

import copy
import linecache
import warnings
import weakref
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxgrow.errors import FileError
from fxgrow.graph.kept_values import copies_of_activations
from fxgrow.graph.node_meta import RECIPE, RECORD
from fxgrow.graph.parametrizations import hooked_weight, weight_hook


def unwrap(model: nn.Module) -> nn.Module:
    """The model without what torch.compile, DataParallel and DistributedDataParallel wrap around it.

    A wrapper that has itself grown, with its names, is the model.
    """
    if not isinstance(model, nn.Module):
        raise FileError(f"This is a {type(model).__name__}, not a torch.nn.Module.")
    while RECIPE not in vars(model):
        if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            model = model.module
        elif hasattr(model, "_orig_mod"):
            model = model._orig_mod  # type: ignore[assignment]
        else:
            break
    return model


def submodule(root: nn.Module, path: str) -> nn.Module:
    """`root.get_submodule(path)` without its checks, which are most of the time."""
    module = root
    for name in path.split("."):
        module = module._modules[name]  # type: ignore[assignment]
    return module


def lookup(gm: nn.Module, name: str) -> Tensor:
    """The parameter or buffer of that qualified name."""
    module, _, leaf = name.rpartition(".")
    owner = gm.get_submodule(module)
    if owner._forward_pre_hooks and (hook := weight_hook(owner, leaf)) is not None:
        return hooked_weight(owner, hook)  # what its last call left may be of other parameters
    tensor: Tensor = getattr(owner, leaf)
    return tensor


def operator_name(gm: nn.Module, node: fx.Node) -> str:
    """The class of a node's module, or the name of its function, method or attribute."""
    if node.op == "call_module":
        return type(gm.get_submodule(str(node.target))).__name__
    if node.target is getattr:
        return str(node.args[1])
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "?")


def caller(node: fx.Node) -> str:
    """Path of the innermost module whose code made the node."""
    return next((path for path, _ in reversed(node.meta.get("nn_module_stack", {}).values())), "")


def copy_graph(gm: fx.GraphModule, replaced: Mapping[int, Tensor] | None = None) -> fx.GraphModule:
    """A deep copy without gradients and record of earlier growth; `replaced` tensors, by id, stay tied."""
    replaced = replaced or {}
    memo: dict[int, Any] = {**copies_of_activations(gm), **replaced, **_scripted_copies(gm, replaced)}
    record = gm.meta.pop(RECORD, None)
    try:
        out = copy.deepcopy(gm, memo)
    finally:
        if record is not None:
            gm.meta[RECORD] = record
    # a GraphModule copies only what its graph calls, in that order
    for ours, theirs in ((out._modules, gm._modules), (out._parameters, gm._parameters), (out._buffers, gm._buffers)):
        ours.clear()
        ours.update({name: memo.get(id(value), value) for name, value in theirs.items()})
    out._non_persistent_buffers_set = set(gm._non_persistent_buffers_set)
    for p in out.parameters():
        p.grad = None
    _update_hooked_weights(out)
    release_generated_source(out)
    return out


def copy_module(model: nn.Module, replaced: Mapping[int, Tensor]) -> nn.Module:
    """A deep copy without the record of earlier growth; see `copy_graph`."""
    if isinstance(model, fx.GraphModule):
        return copy_graph(model, replaced)
    memo: dict[int, Any] = {**copies_of_activations(model), **replaced, **_scripted_copies(model, replaced)}
    meta = vars(model).get("meta")
    if isinstance(meta, dict) and meta.keys() <= {RECORD}:
        memo[id(meta)] = {}
    out = copy.deepcopy(model, memo)
    _update_hooked_weights(out)
    return out


def _update_hooked_weights(model: nn.Module) -> None:
    """Computes the weights that hooks compute before each call: the parameters may be others."""
    for module in model.modules():
        if module._forward_pre_hooks and (hook := weight_hook(module, "weight")) is not None:
            module.weight = hooked_weight(module, hook).detach()


def _scripted_copies(model: nn.Module, replaced: Mapping[int, Tensor]) -> dict[int, nn.Module]:
    """Copies of TorchScript modules, by id: `copy.deepcopy` gives them results of an operator as parameters."""
    copies: dict[int, nn.Module] = {}
    for module in model.modules():
        if isinstance(module, torch.jit.ScriptModule):
            with torch.no_grad():
                copies[id(module)] = copy.deepcopy(module)
            new = named_tensors(copies[id(module)])
            for name, old in named_tensors(module).items():
                new[name].data.copy_(replaced.get(id(old), old))
                new[name].requires_grad_(old.requires_grad)
    return copies


def compile_graph(gm: fx.GraphModule) -> None:
    """Checks an edited graph and makes it the code of its module."""
    lint(gm)
    gm.recompile()
    release_generated_source(gm)


def lint(gm: fx.GraphModule) -> None:
    """`gm.graph.lint()`, which would have `training` flags be tensors or modules."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*does not reference an nn.Module.*")
        gm.graph.lint()


def release_generated_source(gm: fx.GraphModule) -> None:
    """Frees the text of a graph's code with the code: torch.fx keeps every text, and a long run grows many graphs."""
    code = type(gm).forward.__code__
    weakref.finalize(code, _forget, code.co_filename).atexit = False


def _forget(name: str) -> None:
    linecache.cache.pop(name, None)
    # private; where it is another one the text stays
    loader = getattr(fx.graph_module, "_loader", None)
    getattr(loader, "eval_cache", {}).pop(name, None)


def put(new: Tensor, where: list[Tensor], value: Tensor, dim: int = 0) -> None:
    """`new[ix_(*where)] = value`, dimension by dimension, skipping those that are taken whole."""
    while dim < new.dim() and len(where[dim]) == new.shape[dim]:
        dim += 1
    if dim == new.dim():
        new.copy_(value.reshape(new.shape))
        return
    runs = _runs(where[dim])
    if len(runs) <= 8:
        for start, at, n in runs:
            put(new.narrow(dim, start, n), where, value.narrow(dim, at, n), dim + 1)
        return
    index = where[dim].to(new.device)
    part = new.index_select(dim, index)
    put(part, where, value, dim + 1)
    new.index_copy_(dim, index, part)


def _runs(positions: Tensor) -> list[tuple[int, int, int]]:
    """Neighbouring positions as (first position, index of it, how many): most axes are one run, copied in place."""
    breaks = (positions.diff() != 1).nonzero().flatten() + 1
    edges = [0, *breaks.tolist(), len(positions)]
    return [(int(positions[a]), a, b - a) for a, b in zip(edges, edges[1:], strict=False) if b > a]


def same_kind(value: Tensor, old: Tensor) -> Tensor:
    """Returns a tensor as a parameter where `old` is one."""
    return nn.Parameter(value, old.requires_grad) if isinstance(old, nn.Parameter) else value


def named_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers under all of their names."""
    return dict(module.named_parameters(remove_duplicate=False)) | dict(module.named_buffers(remove_duplicate=False))


def accumulation_dtype(t: Tensor) -> torch.dtype:
    """float64 for float64, float32 for everything shorter."""
    return torch.float64 if t.dtype == torch.float64 else torch.float32
