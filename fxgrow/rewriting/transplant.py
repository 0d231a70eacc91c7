"""Moves what growth made of a model into another copy of it: tensors, replaced layers, and attributes such as sizes."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fxgrow.ops.registry import may_change
from fxgrow.storage.plain_tree import is_plain
from fxgrow.tracing.opaque_functions import OpaqueFunction


def transplant(target: nn.Module, grown: nn.Module, before: nn.Module | None = None) -> None:
    """Gives a module the parameters and buffers of a grown one, the very same objects, and its changed attributes.

    `before` is what `grown` is a copy of: `target` itself, or a graph of it.
    """
    before = target if before is None else before
    for path, new in grown.named_modules():
        if isinstance(new, OpaqueFunction):
            continue
        old = before.get_submodule(path)
        if path and type(old) is not type(new):
            target.set_submodule(path, new)
            continue
        module = target.get_submodule(path)
        # the root of a graph has more buffers than the model: constants of its code
        module._parameters.update({name: new._parameters[name] for name in module._parameters})
        module._buffers.update({name: new._buffers[name] for name in module._buffers})
        attributes = vars(module)
        attributes |= {name: value for name, _, value in changed_attributes(old, new) if name in attributes}
        attributes |= {name: v for name, v in vars(new).items() if name in attributes and _is_list_of_tensors(v)}


def changed_attributes(before: nn.Module, after: nn.Module) -> Iterator[tuple[str, Any, Any]]:
    """Yields name, old and new value of the attributes that growth changed in a module: sizes, and `eps` of a norm."""
    old = vars(before)
    for name, value in vars(after).items():
        if name not in old or not may_change(after, name) or not is_plain(value):
            continue
        # None is an `eps` that follows the dtype; NaN differs from itself
        if (old[name] is None or is_plain(old[name])) and old[name] != value and value == value:
            yield name, old[name], value


def _is_list_of_tensors(value: Any) -> bool:
    """Whether an attribute holds tensors without registering them: `nn.RNN`, or `self.tied = [self.embed.weight]`."""
    leaves = pytree.tree_leaves(value) if type(value) in (list, tuple) else []
    return any(isinstance(leaf, (Tensor, weakref.ref)) for leaf in leaves)
