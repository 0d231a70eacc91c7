"""What a model was captured with, as plain data, so that a fresh one can be captured without being told.

Tracing looks at shapes, dtypes and Python values only. Small tensors keep their entries all the same, since what runs
on them later may fail on others (an attention mask of zeros); large ones come back as noise, or zeros for integers.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxgrow._errors import FileError
from fxgrow._tree import decoded, encoded

#: key in a graph's `.meta`: names of the inputs that were given by keyword, or None
KEYWORDS = "fxgrow.keywords"
#: tensors of more bytes do not keep their entries
SMALL = 16384


@dataclass(frozen=True)
class Example:
    """Example inputs as plain data.

    Attributes:
        data: `inputs` (a tree, see `fxgrow._tree`), `tensors` (shape, dtype and perhaps entries of each), and `dtype`,
            that of the model's weights. An `inputs` of None means: they are no plain data.
    """

    data: Mapping[str, Any]

    @classmethod
    def of(cls, gm: fx.GraphModule) -> Example:
        """The example of a captured graph."""
        values, keywords = gm.meta["example_inputs"], gm.meta.get(KEYWORDS)
        given = tuple(values) if keywords is None else dict(zip(keywords, values, strict=True))
        tensors: dict[str, Tensor] = {}
        try:
            tree = encoded(given, tensors, "inputs")
        except FileError:
            return cls({"inputs": None, "tensors": {}, "dtype": None})
        specs = {name: _spec(t) for name, t in tensors.items()}
        dtype = _dtype_of(gm)
        return cls({"inputs": tree, "tensors": specs, "dtype": None if dtype is None else _name(dtype)})

    @classmethod
    def from_data(cls, data: Any) -> Example:
        """Checks what was read from a file.

        Raises:
            ValueError: it is no example.
        """
        if not isinstance(data, dict) or not {"inputs", "tensors", "dtype"} <= data.keys():
            raise ValueError("no example inputs")
        return cls(data)

    def inputs(self, model: nn.Module) -> tuple[Any, ...] | dict[str, Any] | None:
        """Inputs for a model: on its device, and in the dtype of its weights where they were in that of the old ones.

        Returns:
            None where they were no plain data.
        """
        if self.data["inputs"] is None:
            return None
        device = next((p.device for p in model.parameters()), torch.device("cpu"))
        old, new = self.data["dtype"], _dtype_of(model)
        tensors = {}
        for name, spec in self.data["tensors"].items():
            t = _tensor(spec)
            tensors[name] = t.to(device, new if new is not None and spec["dtype"] == old else None)
        found: tuple[Any, ...] | dict[str, Any] = decoded(self.data["inputs"], tensors)
        return found


def _dtype_of(model: nn.Module) -> torch.dtype | None:
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), None)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _spec(t: Tensor) -> dict[str, Any]:
    spec: dict[str, Any] = {"shape": list(t.shape), "dtype": _name(t.dtype)}
    small = t.numel() * t.element_size() <= SMALL and t.layout is torch.strided and t.device.type != "meta"
    if small and not t.is_complex():
        flat = t.detach().cpu().contiguous().flatten().view(torch.uint8)
        spec["entries"] = base64.b64encode(bytes(flat.tolist())).decode()
    return spec


def _tensor(spec: Mapping[str, Any]) -> Tensor:
    shape, dtype = spec["shape"], getattr(torch, spec["dtype"])
    if spec.get("entries"):
        return torch.frombuffer(bytearray(base64.b64decode(spec["entries"])), dtype=dtype).reshape(shape)
    if not dtype.is_floating_point:
        return torch.zeros(shape, dtype=dtype)
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
