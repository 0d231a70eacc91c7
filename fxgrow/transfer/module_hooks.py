"""Hooks that users registered on modules: kept where the module is still called, else reported.

Copying a module copies its hooks too, and the objects whose methods they are. The user's objects must still be called,
so the original hooks are put back. Only a hook that is a method of one of the model's modules stays the copy's. What a
hook does to values is in the nodes of a captured graph: it is not put back there.
"""

from __future__ import annotations

import logging
from collections.abc import Collection
from typing import Any

from torch import nn

from fxgrow.graph.node_meta import FOLLOWED_HOOKS, is_captured
from fxgrow.transfer.parameter_change import Assign, ParameterChange

log = logging.getLogger("fxgrow")
_KINDS = {
    "_forward_pre_hooks": "forward pre-hook",
    "_forward_hooks": "forward hook",
    "_backward_pre_hooks": "backward pre-hook",
    "_backward_hooks": "backward hook",
}
#: how a hook is called, by its key
_FLAGS = ("_forward_pre_hooks_with_kwargs", "_forward_hooks_with_kwargs", "_forward_hooks_always_called")


def prepare_module_hooks(change: ParameterChange) -> Assign:
    """Prepares the user's hooks on the modules of the old names."""
    after, before = called(change.new), called(change.old)
    modules = {id(module) for module in change.old.modules()}
    followed = change.new.meta.get(FOLLOWED_HOOKS, {}) if is_captured(change.new) else {}
    hooked = [
        (name, old, change.new.get_submodule(name))
        for name, old in change.old.named_modules()
        if any(getattr(old, kind) for kind in _KINDS)
    ]

    def assign() -> None:
        for name, old, new in hooked:
            if name in after:
                _keep(old, new, modules, followed.get(name, ()))
            else:
                if name in before:
                    _report(name, old)
                for kind in _KINDS:
                    getattr(new, kind).clear()

    return assign


def called(model: nn.Module) -> set[str]:
    """Returns names of the modules whose hooks run: in a graph, the graph itself and those that a node calls."""
    if not is_captured(model):
        return {name for name, _ in model.named_modules()}
    targets = {str(node.target) for node in model.graph.find_nodes(op="call_module")}
    return {"", *(name for t in targets for name, _ in model.get_submodule(t).named_modules(prefix=t))}


def _keep(old: nn.Module, new: nn.Module, modules: set[int], followed: Collection[int]) -> None:
    """Puts the original hooks on a new module; `modules` are ids of the old model's, `followed` keys of hooks."""
    for kind in _KINDS:
        hooks: dict[int, Any] = getattr(old, kind)
        if not hooks:
            continue
        own = {k for k, hook in hooks.items() if id(getattr(hook, "__self__", None)) in modules}
        if not own and not hooks.keys() & set(followed):
            # the dict itself, so that the user's handles still remove what is in it
            setattr(new, kind, hooks)
            continue
        copies = getattr(new, kind)
        kept = {k: copies.get(k) if k in own else h for k, h in hooks.items() if k not in followed}
        copies.clear()
        copies.update((k, hook) for k, hook in kept.items() if hook is not None)
    for flag in _FLAGS:
        getattr(new, flag).update(getattr(old, flag))
    # a full backward hook is called in another way than the deprecated kind
    new._is_full_backward_hook = old._is_full_backward_hook


def _report(name: str, module: nn.Module) -> None:
    for kind, what in _KINDS.items():
        for hook in getattr(module, kind).values():
            log.warning(
                f"The {what} {getattr(hook, '__qualname__', type(hook).__name__)} on {name!r} is no longer called: the "
                "grown model is a graph without a node for that module (an output that the hook changed is changed "
                'there too). Register it on a layer inside, or take into="module".'
            )
