"""The example inputs of a capture as plain data, so that a newly built model can be captured without inputs.

Tracing looks at shapes, dtypes and Python values only. Masks, tensors of one value and tensors of a few entries keep
their entries, since the model may fail on others (an attention mask of zeros). The rest is the user's data, which does
not belong in a file of weights: it is replaced by noise, integers by others between the least and the largest, which
tell positions apart.
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
from fxgrow.graph.node_meta import DTYPE, EXAMPLE_INPUTS, KEYWORDS
from fxgrow.storage import schema
from fxgrow.storage.plain_tree import DTYPES, decoded, encoded
from fxgrow.storage.schema import SchemaError, checked

#: tensors keep up to so many entries
MAX_ENTRIES = 16
#: so many bytes of inputs may always be made
FREE = 2**26
#: masks of up to so many entries keep them
MAX_MASK_ENTRIES = 16384


_dtype = schema.string(choices=DTYPES)


@dataclass(frozen=True)
class TensorSpec:
    """A tensor among the inputs: its bytes where they are kept, those of one entry where all are alike."""

    shape: tuple[int, ...] = checked(schema.array(schema.integer(), longest=64))
    dtype: str = checked(_dtype)
    entries: str | None = checked(schema.optional(schema.string(longest=1_000_000)), required=False, default=None)
    #: least and largest of integers that are not kept, the largest first where they descend
    ends: tuple[int, ...] = checked(schema.array(schema.integer(high=2**52), longest=2), required=False, default=())

    @classmethod
    def of(cls, t: Tensor) -> TensorSpec:
        """Describes a tensor."""
        shape, dtype = tuple(t.shape), str(t.dtype).removeprefix("torch.")
        if t.numel() == 0 or t.layout is not torch.strided or t.device.type == "meta" or t.is_complex():
            return cls(shape, dtype)
        flat = t.detach().cpu().contiguous().flatten()
        entries = flat.view(torch.uint8).view(len(flat), -1)
        if bool((entries == entries[0]).all()):
            entries = entries[:1]
        if len(entries) > MAX_ENTRIES and not (len(entries) <= MAX_MASK_ENTRIES and _is_mask(flat)):
            return cls(shape, dtype, ends=_ends(flat))
        return cls(shape, dtype, base64.b64encode(bytes(entries.flatten().tolist())).decode())

    @property
    def nbytes(self) -> int:
        """The bytes of the tensor."""
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize

    def __post_init__(self) -> None:
        size = DTYPES[self.dtype].itemsize
        if self.entries is not None and len(self.data) not in (size, self.nbytes):
            raise SchemaError(f"a tensor of shape {list(self.shape)} has {len(self.data)} bytes of entries")
        if len(self.ends) == 1:
            raise SchemaError(f"{self.ends[0]} is no range of integers")

    @property
    def data(self) -> bytes:
        """The bytes of the entries."""
        return schema.encoded_bytes(self.entries, "entries")

    def tensor(self) -> Tensor:
        """Returns a tensor with these entries, noise or evenly spaced integers."""
        dtype = DTYPES[self.dtype]
        if self.entries is not None:
            entries = torch.frombuffer(bytearray(self.data), dtype=dtype)
            return entries.expand(math.prod(self.shape)).reshape(self.shape).clone()
        if not dtype.is_floating_point:
            first, last = self.ends or (0, 0)
            return torch.linspace(first, last, math.prod(self.shape), dtype=torch.float64).to(dtype).reshape(self.shape)
        return torch.randn(self.shape, generator=torch.Generator().manual_seed(0)).to(dtype)


def _ends(t: Tensor) -> tuple[int, ...]:
    if t.is_floating_point() or t.dtype is torch.bool:
        return ()
    t = t.long()
    least, largest = int(t.min()), int(t.max())
    ends = (largest, least) if bool((t.diff() <= 0).all()) else (least, largest)
    # negative ones are marks, such as of labels that count for nothing
    return ends if least >= 0 and largest < 2**52 else ()


def _is_mask(t: Tensor) -> bool:
    return not t.is_floating_point() and bool((t.long() >> 1 == 0).all())


@dataclass(frozen=True)
class Example:
    """Example inputs as plain data."""

    #: a plain tree; None where they are not plain data
    inputs: Any = checked(schema.anything)
    #: those in the tree
    tensors: Mapping[str, TensorSpec] = checked(schema.mapping(schema.read_as(TensorSpec)))
    #: of the weights
    dtype: str | None = checked(schema.optional(_dtype))

    @classmethod
    def of(cls, gm: fx.GraphModule) -> Example:
        """Returns the example of a captured graph."""
        values, keywords = gm.meta[EXAMPLE_INPUTS], gm.meta.get(KEYWORDS)
        given = tuple(values) if keywords is None else dict(zip(keywords, values, strict=True))
        tensors: dict[str, Tensor] = {}
        try:
            tree = encoded(given, tensors, "inputs")
        except FileError:
            return cls(None, {}, None)
        return cls(tree, {name: TensorSpec.of(t) for name, t in tensors.items()}, gm.meta.get(DTYPE))

    def within(self, nbytes: int) -> Example:
        """Returns the example, or none where its tensors are much larger than a file with so many bytes of weights."""
        fits = sum(spec.nbytes for spec in self.tensors.values()) <= FREE + 2 * nbytes
        return self if fits else Example(None, {}, None)

    def values(self, model: nn.Module) -> tuple[Any, ...] | dict[str, Any] | None:
        """Returns inputs on the device of a model, and in the dtype of its weights where the old ones were."""
        if self.inputs is None:
            return None
        device = next((p.device for p in model.parameters()), torch.device("cpu"))
        new = weights_dtype(model)
        tensors = {
            name: spec.tensor().to(device, DTYPES[new] if new is not None and spec.dtype == self.dtype else None)
            for name, spec in self.tensors.items()
        }
        inputs = decoded(self.inputs, tensors)
        if type(inputs) is not tuple and (type(inputs) is not dict or not all(type(key) is str for key in inputs)):
            raise FileError("The example inputs of this recipe are no tuple or dict: pass example_inputs.")
        return inputs


def weights_dtype(model: nn.Module) -> str | None:
    """Returns the name of the dtype of a model's first weight that is a real number."""
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), None)
    return None if dtype is None else str(dtype).removeprefix("torch.")
