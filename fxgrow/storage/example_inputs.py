"""The example inputs of a capture as plain data, so that a newly built model can be captured without inputs.

Tracing looks at shapes, dtypes and Python values only. Masks, tensors of one value and tensors of a few entries keep
their entries, since the model may fail on others (an attention mask of zeros). The rest is the user's data, which does
not belong in a file of weights: it is replaced by noise, integers by zeros.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxgrow.errors import FileError
from fxgrow.graph.node_meta import EXAMPLE_INPUTS, KEYWORDS
from fxgrow.storage.plain_tree import decoded, encoded

#: tensors keep up to so many entries
MAX_ENTRIES = 16
#: masks of up to so many entries keep them
MAX_MASK_ENTRIES = 16384


@dataclass(frozen=True)
class Example:
    """Example inputs as plain data."""

    #: `inputs` (None where they are not plain data), shape, dtype and perhaps entries of `tensors`, `dtype` of weights
    data: Mapping[str, Any]

    @classmethod
    def of(cls, gm: fx.GraphModule) -> Example:
        """Returns the example of a captured graph."""
        values, keywords = gm.meta[EXAMPLE_INPUTS], gm.meta.get(KEYWORDS)
        given = tuple(values) if keywords is None else dict(zip(keywords, values, strict=True))
        tensors: dict[str, Tensor] = {}
        try:
            tree = encoded(given, tensors, "inputs")
        except FileError:
            return cls({"inputs": None, "tensors": {}, "dtype": None})
        specs = {name: _spec(t) for name, t in tensors.items()}
        return cls({"inputs": tree, "tensors": specs, "dtype": _name(_dtype_of(gm))})

    @classmethod
    def from_data(cls, data: Any) -> Example:
        """Checks the data of a file."""
        if not isinstance(data, dict) or not {"inputs", "tensors", "dtype"} <= data.keys():
            raise ValueError("no example inputs")
        return cls(data)

    def inputs(self, model: nn.Module) -> tuple[Any, ...] | dict[str, Any] | None:
        """Returns inputs on the device of a model, and in the dtype of its weights where the old ones were."""
        if self.data["inputs"] is None:
            return None
        device = next((p.device for p in model.parameters()), torch.device("cpu"))
        old, new = self.data["dtype"], _dtype_of(model)
        tensors = {
            name: _tensor(spec).to(device, new if spec["dtype"] == old else None)
            for name, spec in self.data["tensors"].items()
        }
        inputs: tuple[Any, ...] | dict[str, Any] = decoded(self.data["inputs"], tensors)
        return inputs


def _dtype_of(model: nn.Module) -> torch.dtype | None:
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), None)


def _name(dtype: torch.dtype | None) -> str | None:
    return None if dtype is None else str(dtype).removeprefix("torch.")


def _spec(t: Tensor) -> dict[str, Any]:
    spec: dict[str, Any] = {"shape": list(t.shape), "dtype": _name(t.dtype)}
    if t.numel() == 0 or t.layout is not torch.strided or t.device.type == "meta" or t.is_complex():
        return spec
    flat = t.detach().cpu().contiguous().flatten()
    entries = flat.view(torch.uint8).view(len(flat), -1)
    if bool((entries == entries[0]).all()):
        entries = entries[:1]
    if len(entries) <= MAX_ENTRIES or (len(entries) <= MAX_MASK_ENTRIES and _is_mask(flat)):
        spec["entries"] = base64.b64encode(bytes(entries.flatten().tolist())).decode()
    return spec


def _is_mask(t: Tensor) -> bool:
    return not t.is_floating_point() and bool((t.long() >> 1 == 0).all())


def _tensor(spec: Mapping[str, Any]) -> Tensor:
    shape, dtype = spec["shape"], getattr(torch, spec["dtype"])
    if "entries" in spec:
        entries = torch.frombuffer(bytearray(base64.b64decode(spec["entries"])), dtype=dtype)
        return entries.reshape(shape) if len(entries) > 1 else entries.expand(math.prod(shape)).reshape(shape).clone()
    if not dtype.is_floating_point:
        return torch.zeros(shape, dtype=dtype)
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
