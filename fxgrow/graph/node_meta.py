"""The keys of fxgrow in `node.meta` and `gm.meta`, and the values of nodes."""

from __future__ import annotations

from typing import Any, TypeGuard

import torch
from torch import fx
from torch.fx.passes.shape_prop import _extract_tensor_metadata

from fxgrow.errors import FxgrowError

# -- in a graph's `.meta`

#: the record of the last growth; in a node's `.meta`, the bottleneck of the width whose first producer the node is
RECORD = "fxgrow"
#: what the model was captured with, in the order of the placeholders
EXAMPLE_INPUTS = "example_inputs"
#: name of the dtype of the weights at that time, or None
DTYPE = "fxgrow.dtype"
#: names of the inputs that were given by keyword, or None
KEYWORDS = "fxgrow.keywords"
#: by mode, the modules that `train(mode)` of the model leaves in the other one
OTHER_MODE = "fxgrow.other_mode"
#: keys of the hooks whose changes of values are nodes of the graph, by the name of their module
FOLLOWED_HOOKS = "fxgrow.followed_hooks"
#: names of buffers that are no part of the state
NON_PERSISTENT = "fxgrow.non_persistent"
#: the growths that the model has been through; of another module than a graph, an attribute
RECIPE = "fxgrow_recipe"
#: norms of weights, removed while the graph is rewritten, by the name of their module
PARAMETRIZATIONS = "fxgrow.parametrizations"

# -- in a node's `.meta`

#: why the code of the node's module or function could not be followed
OPAQUE = "opaque"
#: the module that a node stands for a part of, where it is no call of that module
OWNER = "fxgrow.owner"
#: names of nodes with a truth value, and the values at which the node runs
CONDITIONS = "fxgrow.conditions"
#: the number of the checkpointed part that the node belongs to
CHECKPOINT = "fxgrow.checkpoint"
#: of a guard: whether the model's code raises where it gives another answer
CHECK = "fxgrow.check"


def is_captured(model: object) -> TypeGuard[fx.GraphModule]:
    """Whether a module is a graph that `capture` or a growth made."""
    return isinstance(model, fx.GraphModule) and EXAMPLE_INPUTS in model.meta


def check_captured(gm: object) -> None:
    """Raises an `FxgrowError` where something is no graph that `capture` or a growth made."""
    if not is_captured(gm):
        raise FxgrowError(
            f"This is a {type(gm).__name__}, not a captured graph: give what fxgrow.capture(model, example_inputs) "
            "or a growth returned."
        )


def set_value(node: fx.Node, value: Any) -> None:
    """Stores a node's value, and its tensor metadata in the form of ``ShapeProp``."""
    node.meta.update(val=value, type=type(value))
    found = []

    def extract(item: Any) -> Any:
        if not isinstance(item, torch.Tensor):
            return item
        found.append(_metadata(item))
        return found[-1]

    with torch._C.DisableTorchFunction():
        meta = fx.node.map_aggregate(value, extract)
    if found:
        node.meta["tensor_meta"] = meta


_metadata_cache: dict[Any, Any] = {}


def _metadata(tensor: torch.Tensor) -> Any:
    """Returns tensor metadata, from a cache: a network has few different ones, and the memory format takes long."""
    if tensor.is_quantized or tensor.layout is not torch.strided:
        return _extract_tensor_metadata(tensor)
    key = tensor.shape, tensor.stride(), tensor.dtype, tensor.requires_grad
    if key not in _metadata_cache:
        _metadata_cache[key] = _extract_tensor_metadata(tensor)
    return _metadata_cache[key]
