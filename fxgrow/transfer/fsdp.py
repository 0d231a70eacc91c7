"""Models that `torch.distributed.fsdp.fully_shard` has sharded (FSDP2): whole on every process to grow, sharded again.

requires: parameters that are sharded by FSDP2 alone, on one mesh of all its processes.
ensures:  the grown model is sharded on the same mesh, along the same dimensions and with the same policies; so is the
          optimiser's state.

How a module was sharded is read from the state that FSDP2 keeps with it, which is private to torch: what is not found
there is refused.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch.optim import Optimizer

from fxgrow.errors import FxgrowError
from fxgrow.transfer.device_mesh import reshard
from fxgrow.transfer.module_hooks import called
from fxgrow.transfer.parameters import ParameterChange
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
    """A sharded model, whole on this process.

    Attributes:
        sharded: the original.
        model: a plain copy with full parameters and their gradients.
        shardings: how to shard another one, inner modules first.
    """

    sharded: nn.Module
    model: nn.Module
    shardings: list[Sharding]
    #: plain parameters by the sharded ones' ids, and the sharded ones to keep those ids theirs
    plain: dict[int, nn.Parameter] = field(default_factory=dict)

    @classmethod
    def of(cls, sharded: nn.Module) -> UnshardedModel:
        """Gathers; every process of the group must call it."""
        reshard(sharded)
        plain = {id(p): _full_parameter(p) for p in sharded.parameters()}
        return cls(sharded, _plain_copy(sharded, plain), _shardings(sharded), plain)

    def follow(self, around: TrainingState, change: ParameterChange) -> Callable[[], nn.Module]:
        """Prepares everything around the model, and returns what shards the new model and changes all of it."""
        optimizers = [self._whole_optimizer(o) for o in around.optimizers]
        lists = [[self.plain.get(id(t), t) for t in held] for held in around.lists]
        whole = TrainingState(optimizers, None, lists)
        whole.follow(change)()
        placements = self._placements(change.new)

        def assign() -> nn.Module:
            names = {id(p): name for name, p in change.new.named_parameters()}
            kept = {name: p for name, p in change.new.named_parameters()}
            self._shard(change.new, placements)
            now = dict(change.new.named_parameters())
            sharded = {i: now[name] for i, name in names.items()}
            for i, p in sharded.items():
                gradient = kept[names[i]].grad
                p.grad = None if gradient is None else _like(gradient, p)
            for mine, full in zip(around.optimizers, optimizers, strict=True):
                for group, other in zip(mine.param_groups, full.param_groups, strict=True):
                    group["params"][:] = [sharded.get(id(p), p) for p in other["params"]]
                state = {sharded.get(id(p), p): _sharded_state(s, p, sharded) for p, s in full.state.items()}
                mine.state.clear()
                mine.state.update(state)
            for held, whole_ones in zip(around.lists, lists, strict=True):
                held[:] = [sharded.get(id(t), t) for t in whole_ones]
            return change.new

        return assign

    def _whole_optimizer(self, optimizer: Optimizer) -> Optimizer:
        """A twin of the optimiser that owns the plain parameters, with its state in full."""
        twin = copy.copy(optimizer)
        twin.param_groups = [
            {**group, "params": [self.plain.get(id(p), p) for p in group["params"]]} for group in optimizer.param_groups
        ]
        twin.state = copy.copy(optimizer.state)
        twin.state.clear()
        for p, entries in optimizer.state.items():
            full = {key: _full(value) for key, value in entries.items()}
            twin.state[self.plain.get(id(p), p)] = full
        return twin

    def _placements(self, new: nn.Module) -> dict[int, Any]:
        """By id of a new parameter, how the one of its name was placed; None where it was not sharded."""
        old = dict(self.sharded.named_parameters(remove_duplicate=False))
        return {
            id(p): getattr(old.get(name), "placements", None)
            for name, p in new.named_parameters(remove_duplicate=False)
        }

    def _shard(self, new: nn.Module, placements: Mapping[int, Any]) -> None:
        from torch.distributed.fsdp import fully_shard

        own = called(new)
        left = {p for p in new.parameters() if placements.get(id(p)) is None}
        modules = dict(new.named_modules())

        def place(p: nn.Parameter) -> Any:
            found = placements.get(id(p)) or ()
            return next((q for q in found if q.is_shard()), None)

        done: set[str] = set()
        for sharding in self.shardings:
            # a module that the graph does not call has no hooks that run: those inside that it calls take its place
            names = [n for name in sharding.names for n in _called_below(name, own, modules) if n not in done]
            if not names:
                continue
            done.update(names)
            found = [modules[n] for n in names]
            options = {**sharding.options, "shard_placement_fn": place}
            if left:
                options["ignored_params"] = left
            fully_shard(found if len(found) > 1 else found[0], **options)


def _called_below(name: str, own: set[str], modules: Mapping[str, nn.Module]) -> Iterator[str]:
    if name in own:
        yield name
    elif name in modules:
        for child, _ in modules[name].named_children():
            yield from _called_below(f"{name}.{child}", own, modules)


def _full(value: Any) -> Any:
    return value.full_tensor() if isinstance(value, Tensor) and hasattr(value, "full_tensor") else value


def _full_parameter(p: nn.Parameter) -> nn.Parameter:
    out = nn.Parameter(_full(p.detach()).clone(), p.requires_grad)
    out.grad = None if p.grad is None else _full(p.grad.detach()).clone()
    return out


def _like(value: Tensor, p: nn.Parameter) -> Tensor:
    """A full tensor as a parameter is, sharded or not."""
    if not hasattr(p, "device_mesh"):
        return value
    from torch.distributed.tensor import distribute_tensor

    like: Any = p
    return distribute_tensor(value, like.device_mesh, like.placements, src_data_rank=None)


def _sharded_state(entries: Mapping[str, Any], p: Tensor, sharded: Mapping[int, nn.Parameter]) -> dict[str, Any]:
    target = sharded.get(id(p))
    if target is None:
        return dict(entries)
    return {
        key: _like(v, target) if isinstance(v, Tensor) and v.shape == target.shape and v.dim() else v
        for key, v in entries.items()
    }


def _shardings(model: nn.Module) -> list[Sharding]:
    """How the parts of a model were sharded, the innermost first.

    Raises:
        FxgrowError: this torch keeps that in another way.
    """
    names = {id(m): name for name, m in model.named_modules()}
    found: dict[int, Sharding] = {}
    for module in model.modules():
        if not hasattr(module, "_get_fsdp_state"):
            continue
        state = cast(Any, module)._get_fsdp_state()
        if id(state) in found:
            continue
        try:
            groups = getattr(state, "_fsdp_param_groups", None) or [getattr(state, "_fsdp_param_group", None)]
            group = next((g for g in groups if g is not None), None)
            options: dict[str, Any] = {"mp_policy": state._mp_policy}
            if group is not None:
                after, mesh = group.post_forward_mesh_info, group.mesh_info
                again = False if after is None else True if after is mesh else after.shard_mesh_size
                options |= {"mesh": mesh.mesh, "offload_policy": group.offload_policy, "reshard_after_forward": again}
            if state._auto_reshard_after_forward:
                options.pop("reshard_after_forward", None)
            own = [names[id(m)] for m in state._modules]
        except AttributeError as error:
            raise FxgrowError(
                f"How this model was sharded cannot be read back from torch {torch.__version__} ({error}): grow it "
                "before fully_shard."
            ) from error
        found[id(state)] = Sharding(own, options)
    meshes = [s.options["mesh"] for s in found.values() if "mesh" in s.options]
    for sharding in found.values():
        sharding.options.setdefault("mesh", meshes[0])
    return sorted(found.values(), key=lambda s: -max(name.count(".") + bool(name) for name in s.names))


def _plain_copy(model: nn.Module, parameters: Mapping[int, nn.Parameter]) -> nn.Module:
    """A copy with these parameters in which nothing is left of FSDP2; the user's hooks stay the same objects."""
    memo: dict[int, Any] = dict(parameters)
    shards = [m for m in model.modules() if hasattr(m, "_get_fsdp_state")]
    for module in shards:
        memo[id(module)] = _blank(type(module).__bases__[-1])
    for module in shards:
        twin, record = memo[id(module)], None
        state = {key: v for key, v in vars(module).items() if not key.startswith(_MARKS)}
        hooks = {kind: type(state[kind])() for kind in _HOOKS}
        for kind in _HOOKS:
            hooks[kind].update({k: h for k, h in state.pop(kind).items() if not _is_fsdp(h)})
        if isinstance(module, fx.GraphModule):
            # the record of an earlier growth is the model's
            record = module.meta.get("fxgrow")
            state["meta"] = {key: v for key, v in module.meta.items() if key != "fxgrow"}
        twin.__dict__.update(copy.deepcopy(state, memo) | hooks)
        if isinstance(twin, fx.GraphModule):
            twin.graph = twin.__dict__["_graph"]
            if record is not None:
                twin.meta["fxgrow"] = record
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
