"""Models that `fully_shard` has sharded (FSDP2): gathered to grow, then sharded again in the same way.

How a module was sharded is read from the state that FSDP2 keeps with it. That state is private to torch: growth is
refused where it cannot be read.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.optim import Optimizer

from fxgrow.errors import FxgrowError
from fxgrow.graph.node_meta import RECORD
from fxgrow.transfer.device_mesh import reshard, sharded_modules
from fxgrow.transfer.module_hooks import called
from fxgrow.transfer.parameter_change import Assign, ParameterChange
from fxgrow.transfer.transfer import TrainingState

#: what `fully_shard` leaves in a module's attributes
_MARKS = ("__composable_api", "_is_fsdp_managed_module", "_fsdp_use_orig_params")
_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")


class UnshardedModel:
    """A sharded model, and `model`, a plain copy with full parameters and gradients.

    It gathers all parameters, so every process of the group must make one.
    """

    def __init__(self, sharded: nn.Module) -> None:
        reshard(sharded)
        self.sharded = sharded
        # by id of the sharded parameters
        self.plain = {id(p): _full_parameter(p) for p in sharded.parameters()}
        self.model = _plain_copy(sharded, self.plain)
        self.shardings = _shardings(sharded)

    def prepare(self, state: TrainingState, change: ParameterChange) -> Assign:
        """Prepares the change of all that holds parameters; `assign` also shards the new model."""
        optimizers = [self._full_optimizer(optimizer) for optimizer in state.optimizers]
        lists = [[self.plain.get(id(t), t) for t in tensors] for tensors in state.lists]
        TrainingState(optimizers, None, lists).prepare(change)()

        def assign() -> None:
            full = dict(change.new.named_parameters())
            self._shard(change.new)
            sharded = {id(full[name]): p for name, p in change.new.named_parameters()}
            for name, p in change.new.named_parameters():
                gradient = full[name].grad
                p.grad = None if gradient is None else _shard_like(gradient, p)
            for optimizer, full_optimizer in zip(state.optimizers, optimizers, strict=True):
                _shard_optimizer(optimizer, full_optimizer, sharded)
            for tensors, full_tensors in zip(state.lists, lists, strict=True):
                tensors[:] = [sharded.get(id(t), t) for t in full_tensors]

        return assign

    def _full_optimizer(self, optimizer: Optimizer) -> Optimizer:
        """Returns a copy of the optimiser that owns the plain parameters, with its state in full."""
        full = copy.copy(optimizer)
        full.param_groups = [
            {**group, "params": [self.plain.get(id(p), p) for p in group["params"]]} for group in optimizer.param_groups
        ]
        full.state = copy.copy(optimizer.state)
        full.state.clear()
        for p, entries in optimizer.state.items():
            full.state[self.plain.get(id(p), p)] = {key: _full(value) for key, value in entries.items()}
        return full

    def _shard(self, new: nn.Module) -> None:
        from torch.distributed.fsdp import fully_shard

        old, named = (dict(m.named_parameters(remove_duplicate=False)) for m in (self.sharded, new))
        placements = {id(p): getattr(old.get(name), "placements", None) for name, p in named.items()}
        with_hooks, modules = called(new), dict(new.named_modules())
        ignored = {p for p in new.parameters() if placements[id(p)] is None}

        def placement(p: nn.Parameter) -> Any:
            return next((q for q in placements.get(id(p)) or () if q.is_shard()), None)

        done: set[str] = set()
        for sharded_names, options in self.shardings:
            # a module that the graph does not call runs no hooks: the called modules inside it take its place
            names = [n for name in sharded_names for n in _called_below(name, with_hooks, modules) if n not in done]
            if not names:
                continue
            done.update(names)
            group = [modules[name] for name in names]
            if ignored:
                options["ignored_params"] = ignored
            fully_shard(group if len(group) > 1 else group[0], **options, shard_placement_fn=placement)


def _called_below(name: str, called_names: set[str], modules: Mapping[str, nn.Module]) -> Iterator[str]:
    if name in called_names:
        yield name
    elif name in modules:
        for child, _ in modules[name].named_children():
            yield from _called_below(f"{name}.{child}", called_names, modules)


def _shard_optimizer(optimizer: Optimizer, full: Optimizer, sharded: Mapping[int, nn.Parameter]) -> None:
    """Gives an optimiser the groups and the state of its full copy, for the sharded parameters."""
    for group, full_group in zip(optimizer.param_groups, full.param_groups, strict=True):
        group["params"][:] = [sharded.get(id(p), p) for p in full_group["params"]]
    optimizer.state.clear()
    for p, entries in full.state.items():
        target = sharded.get(id(p), p)
        optimizer.state[target] = {
            key: _shard_like(v, target) if isinstance(v, Tensor) and v.shape == target.shape and v.dim() else v
            for key, v in entries.items()
        }


def _full(value: Any) -> Any:
    return value.full_tensor() if isinstance(value, Tensor) and hasattr(value, "full_tensor") else value


def _full_parameter(p: nn.Parameter) -> nn.Parameter:
    out = nn.Parameter(_full(p.detach()).clone(), p.requires_grad)
    out.grad = None if p.grad is None else _full(p.grad.detach()).clone()
    return out


def _shard_like(value: Tensor, p: Any) -> Tensor:
    """Shards a full tensor as a parameter is; where that is not sharded, returns it as it is."""
    if not hasattr(p, "device_mesh"):
        return value
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value, p.device_mesh, p.placements, src_data_rank=None)


def _shardings(model: nn.Module) -> list[tuple[list[str], dict[str, Any]]]:
    """Reads how a model was sharded: names of modules and the arguments of `fully_shard` for them, inner ones first."""
    names = {id(m): name for name, m in model.named_modules()}
    states = {id(state): state for state in (module._get_fsdp_state() for module in sharded_modules(model))}
    shardings: list[tuple[list[str], dict[str, Any]]] = []
    for state in states.values():
        try:
            groups = getattr(state, "_fsdp_param_groups", None) or [getattr(state, "_fsdp_param_group", None)]
            group = next((g for g in groups if g is not None), None)
            options: dict[str, Any] = {"mp_policy": state._mp_policy}
            if group is not None:
                after, mesh = group.post_forward_mesh_info, group.mesh_info
                options |= {"mesh": mesh.mesh, "offload_policy": group.offload_policy}
                if not state._auto_reshard_after_forward:
                    reshard_after = False if after is None else True if after is mesh else after.shard_mesh_size
                    options["reshard_after_forward"] = reshard_after
            shardings.append(([names[id(m)] for m in state._modules], options))
        except AttributeError as error:
            raise FxgrowError(
                f"How this model was sharded cannot be read back from torch {torch.__version__} ({error}): grow it "
                "before fully_shard."
            ) from error
    meshes = [options["mesh"] for _, options in shardings if "mesh" in options]
    for _, options in shardings:
        options.setdefault("mesh", meshes[0])
    return sorted(shardings, key=lambda sharding: -max(name.count(".") + bool(name) for name in sharding[0]))


def _plain_copy(model: nn.Module, parameters: Mapping[int, nn.Parameter]) -> nn.Module:
    """Copies a model with these parameters and without FSDP2; the user's hooks stay the same objects."""
    memo: dict[int, Any] = dict(parameters)
    shards = sharded_modules(model)
    for module in shards:
        kind = type(module).__bases__[-1]
        if issubclass(kind, fx.GraphModule):
            kind = fx.GraphModule  # every graph has a class of its own, which holds its code
            record = module.meta.get(RECORD)
            memo[id(record)] = record  # of an earlier growth: not copied
        memo[id(module)] = kind.__new__(kind)
    for module in shards:
        plain = memo[id(module)]
        state = {key: value for key, value in vars(module).items() if not key.startswith(_MARKS)}
        hooks = {
            kind: OrderedDict((key, hook) for key, hook in state.pop(kind).items() if not _is_fsdp(hook))
            for kind in _HOOKS
        }
        plain.__dict__.update(copy.deepcopy(state, memo) | hooks)
        if isinstance(plain, fx.GraphModule):
            plain.graph = plain.__dict__["_graph"]
    out: nn.Module = memo[id(model)] if id(model) in memo else copy.deepcopy(model, memo)
    for module in out.modules():
        for mark in _MARKS[1:]:
            vars(module).pop(mark, None)
    return out


def _is_fsdp(hook: Any) -> bool:
    return "FSDPState" in getattr(hook, "__qualname__", type(hook).__name__)
