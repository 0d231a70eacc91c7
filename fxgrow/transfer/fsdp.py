"""Models that `torch.distributed.fsdp.fully_shard` has sharded (FSDP2): gathered to grow, then sharded again.

requires: parameters that are sharded by FSDP2 alone, on one mesh of all its processes.
ensures:  the grown model is sharded on the same mesh, along the same dimensions and with the same policies; so is the
          optimiser's state.

How a module was sharded is read from the state that FSDP2 keeps with it. That state is private to torch: growth is
refused where it cannot be read.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch.optim import Optimizer

from fxgrow.errors import FxgrowError
from fxgrow.graph.node_meta import RECORD
from fxgrow.transfer.device_mesh import reshard
from fxgrow.transfer.module_hooks import called
from fxgrow.transfer.parameter_change import Assign, ParameterChange
from fxgrow.transfer.transfer import TrainingState

#: what `fully_shard` leaves in a module's attributes
_MARKS = ("__composable_api", "_is_fsdp_managed_module", "_fsdp_use_orig_params")
_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")


@dataclass
class Sharding:
    """How one module was sharded: the arguments of `fully_shard`, and the names of the modules in its group."""

    names: list[str]
    options: dict[str, Any]


@dataclass
class UnshardedModel:
    """A sharded model with all of its parameters on this process.

    Attributes:
        sharded: the original.
        model: a plain copy with full parameters and their gradients.
        shardings: how to shard the grown one, inner modules first.
    """

    sharded: nn.Module
    model: nn.Module
    shardings: list[Sharding]
    #: full parameters by id of the sharded ones, which `sharded` keeps alive
    plain: dict[int, nn.Parameter] = field(default_factory=dict)

    @classmethod
    def of(cls, sharded: nn.Module) -> UnshardedModel:
        """Gathers all parameters; every process of the group must call it."""
        reshard(sharded)
        plain = {id(p): _full_parameter(p) for p in sharded.parameters()}
        return cls(sharded, _plain_copy(sharded, plain), _shardings(sharded), plain)

    def prepare(self, state: TrainingState, change: ParameterChange) -> Assign:
        """Prepares the change of all that holds parameters; `assign` also shards the new model."""
        optimizers = [self._full_optimizer(optimizer) for optimizer in state.optimizers]
        lists = [[self.plain.get(id(t), t) for t in tensors] for tensors in state.lists]
        TrainingState(optimizers, None, lists).prepare(change)()
        placements = self._placements(change.new)

        def assign() -> None:
            full = dict(change.new.named_parameters())
            self._shard(change.new, placements)
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
        """A copy of the optimiser that owns the plain parameters, with its state in full."""
        full = copy.copy(optimizer)
        full.param_groups = [
            {**group, "params": [self.plain.get(id(p), p) for p in group["params"]]} for group in optimizer.param_groups
        ]
        full.state = copy.copy(optimizer.state)
        full.state.clear()
        for p, entries in optimizer.state.items():
            full.state[self.plain.get(id(p), p)] = {key: _full(value) for key, value in entries.items()}
        return full

    def _placements(self, new: nn.Module) -> dict[int, Any]:
        """By id of a new parameter, the placements of the old one of its name; None where it was not sharded."""
        old = dict(self.sharded.named_parameters(remove_duplicate=False))
        return {
            id(p): getattr(old.get(name), "placements", None)
            for name, p in new.named_parameters(remove_duplicate=False)
        }

    def _shard(self, new: nn.Module, placements: Mapping[int, Any]) -> None:
        from torch.distributed.fsdp import fully_shard

        with_hooks = called(new)
        ignored = {p for p in new.parameters() if placements.get(id(p)) is None}
        modules = dict(new.named_modules())

        def placement(p: nn.Parameter) -> Any:
            return next((q for q in placements.get(id(p)) or () if q.is_shard()), None)

        done: set[str] = set()
        for sharding in self.shardings:
            # a module that the graph does not call runs no hooks: the called modules inside it take its place
            names = [n for name in sharding.names for n in _called_below(name, with_hooks, modules) if n not in done]
            if not names:
                continue
            done.update(names)
            group = [modules[name] for name in names]
            options = {**sharding.options, "shard_placement_fn": placement}
            if ignored:
                options["ignored_params"] = ignored
            fully_shard(group if len(group) > 1 else group[0], **options)


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
    state = {sharded.get(id(p), p): _sharded_state(entries, p, sharded) for p, entries in full.state.items()}
    optimizer.state.clear()
    optimizer.state.update(state)


def _full(value: Any) -> Any:
    return value.full_tensor() if isinstance(value, Tensor) and hasattr(value, "full_tensor") else value


def _full_parameter(p: nn.Parameter) -> nn.Parameter:
    out = nn.Parameter(_full(p.detach()).clone(), p.requires_grad)
    out.grad = None if p.grad is None else _full(p.grad.detach()).clone()
    return out


def _shard_like(value: Tensor, p: nn.Parameter) -> Tensor:
    """Shards a full tensor as a parameter is; it stays whole where that is."""
    if not hasattr(p, "device_mesh"):
        return value
    from torch.distributed.tensor import distribute_tensor

    sharded: Any = p
    return distribute_tensor(value, sharded.device_mesh, sharded.placements, src_data_rank=None)


def _sharded_state(entries: Mapping[str, Any], p: Tensor, sharded: Mapping[int, nn.Parameter]) -> dict[str, Any]:
    target = sharded.get(id(p))
    if target is None:
        return dict(entries)
    return {
        key: _shard_like(v, target) if isinstance(v, Tensor) and v.shape == target.shape and v.dim() else v
        for key, v in entries.items()
    }


def _shardings(model: nn.Module) -> list[Sharding]:
    """Reads how the parts of a model were sharded, the innermost first.

    Raises:
        FxgrowError: this torch keeps that in another way.
    """
    names = {id(m): name for name, m in model.named_modules()}
    shardings: dict[int, Sharding] = {}
    for module in model.modules():
        if not hasattr(module, "_get_fsdp_state"):
            continue
        state = cast(Any, module)._get_fsdp_state()
        if id(state) in shardings:
            continue
        try:
            groups = getattr(state, "_fsdp_param_groups", None) or [getattr(state, "_fsdp_param_group", None)]
            group = next((g for g in groups if g is not None), None)
            options: dict[str, Any] = {"mp_policy": state._mp_policy}
            if group is not None:
                after, mesh = group.post_forward_mesh_info, group.mesh_info
                reshard_after = False if after is None else True if after is mesh else after.shard_mesh_size
                options |= {"mesh": mesh.mesh, "offload_policy": group.offload_policy}
                options["reshard_after_forward"] = reshard_after
            if state._auto_reshard_after_forward:
                options.pop("reshard_after_forward", None)
            group_names = [names[id(m)] for m in state._modules]
        except AttributeError as error:
            raise FxgrowError(
                f"How this model was sharded cannot be read back from torch {torch.__version__} ({error}): grow it "
                "before fully_shard."
            ) from error
        shardings[id(state)] = Sharding(group_names, options)
    meshes = [s.options["mesh"] for s in shardings.values() if "mesh" in s.options]
    for sharding in shardings.values():
        sharding.options.setdefault("mesh", meshes[0])
    return sorted(shardings.values(), key=lambda s: -max(name.count(".") + bool(name) for name in s.names))


def _plain_copy(model: nn.Module, parameters: Mapping[int, nn.Parameter]) -> nn.Module:
    """Copies a model with these parameters and without FSDP2; the user's hooks stay the same objects."""
    memo: dict[int, Any] = dict(parameters)
    shards = [m for m in model.modules() if hasattr(m, "_get_fsdp_state")]
    for module in shards:
        memo[id(module)] = _blank(type(module).__bases__[-1])
    for module in shards:
        plain, record = memo[id(module)], None
        state = {key: value for key, value in vars(module).items() if not key.startswith(_MARKS)}
        hooks = {kind: type(state[kind])() for kind in _HOOKS}
        for kind in _HOOKS:
            hooks[kind].update({key: hook for key, hook in state.pop(kind).items() if not _is_fsdp(hook)})
        if isinstance(module, fx.GraphModule):
            # the record of an earlier growth is not copied
            record = module.meta.get(RECORD)
            state["meta"] = {key: value for key, value in module.meta.items() if key != RECORD}
        plain.__dict__.update(copy.deepcopy(state, memo) | hooks)
        if isinstance(plain, fx.GraphModule):
            plain.graph = plain.__dict__["_graph"]
            if record is not None:
                plain.meta[RECORD] = record
    out: nn.Module = memo[id(model)] if id(model) in memo else copy.deepcopy(model, memo)
    for module in out.modules():
        for mark in _MARKS[1:]:
            vars(module).pop(mark, None)
    return out


def _is_fsdp(hook: Any) -> bool:
    return "FSDPState" in getattr(hook, "__qualname__", type(hook).__name__)


def _blank(kind: type) -> Any:
    # every graph has a class of its own, which holds its code
    return fx.GraphModule.__new__(fx.GraphModule) if issubclass(kind, fx.GraphModule) else kind.__new__(kind)
