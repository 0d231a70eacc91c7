"""Every key that fxgrow keeps in `node.meta` and `gm.meta`, and the values of nodes."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch.fx.passes.shape_prop import _extract_tensor_metadata

KEY = "opaque"
#: key in a graph's `.meta`: names of the inputs that were given by keyword, or None
KEYWORDS = "fxgrow.keywords"
#: key in `node.meta`: the module that a node stands for a part of, where it is no call of that module
OWNER = "fxgrow.owner"
#: key in `node.meta`: names of nodes with a truth value, and the values at which the node runs
CONDITIONS = "fxgrow.conditions"
#: key in `node.meta` of a guard: whether the model's code raises where it gives another answer
CHECK = "fxgrow.check"


def set_value(node: fx.Node, value: Any) -> None:
    """Store a node's value, and its tensor metadata in the form ``ShapeProp`` writes."""
    node.meta["val"] = value
    node.meta["type"] = type(value)
    found = False

    def extract(item: Any) -> Any:
        nonlocal found
        if isinstance(item, torch.Tensor):
            found = True
            return _metadata(item)
        return item

    with torch._C.DisableTorchFunction():
        meta = fx.node.map_aggregate(value, extract)
    if found:
        node.meta["tensor_meta"] = meta


_known: dict[Any, Any] = {}


def _metadata(tensor: torch.Tensor) -> Any:
    """A network has few different ones, and finding the memory format takes long."""
    if tensor.is_quantized or tensor.layout is not torch.strided:
        return _extract_tensor_metadata(tensor)
    key = tensor.shape, tensor.stride(), tensor.dtype, tensor.requires_grad
    if key not in _known:
        _known[key] = _extract_tensor_metadata(tensor)
    return _known[key]
