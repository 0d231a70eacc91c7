"""Trees of plain values and tensors to JSON and back, exactly and without pickle: `state_dict()` and its like.

ensures: `decoded(encoded(tree, tensors), tensors)` has the same structure, types and values. Anything else than plain
         values is refused with its path. A tensor in several places stays one tensor.
"""

from __future__ import annotations

import base64
import enum
import math
from collections import Counter, OrderedDict
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fxgrow.errors import FileError
from fxgrow.storage.schema import (
    SENTENCE,
    Reader,
    SchemaError,
    anything,
    array,
    check_depth,
    encoded_bytes,
    integer,
    mapping,
    real,
    string,
)


def is_plain(value: Any) -> bool:
    """Whether a value describes a layer or a size: a number, a string, or a tuple, list or `torch.Size` of them."""
    return isinstance(value, (int, float, str)) or (
        type(value) in (tuple, list, torch.Size) and all(map(is_plain, value))
    )


DTYPES = {str(value).removeprefix("torch."): value for value in vars(torch).values() if isinstance(value, torch.dtype)}
_DICTS: dict[str, Any] = {"OrderedDict": OrderedDict, "Counter": Counter}


def encoded(tree: Any, tensors: dict[str, Tensor], path: str = "") -> Any:
    """Returns the tree as JSON data, and enters its tensors into `tensors` under their paths.

    Args:
        tree: None, bool, int, float, complex, str, bytes, torch dtypes, devices and sizes, tensors, NumPy arrays and
            numbers, and lists, tuples and dicts of these (keys may be anything hashable among them).
        tensors: is filled with the tensors.
        path: of the tree, for names and messages.
    """
    return _Encoder(tensors).encode(tree, path)


class _Encoder:
    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self.tensors = tensors
        self.names: dict[int, str] = {}
        self.named: list[Any] = []  # kept alive, since an id identifies living objects only
        self.open: set[int] = set()  # ids of the containers around the current item

    def encode(self, tree: Any, path: str) -> Any:
        if tree is None or type(tree) in (bool, int, str):
            return tree
        if isinstance(tree, enum.Enum):
            raise _refused(tree, path)
        if isinstance(tree, Tensor):
            return {"tensor": self._name(tree, tree.detach(), path)}
        if type(tree).__module__ == "numpy":
            return self._numpy(tree, path)
        if isinstance(tree, (bool, int, float, complex, str, bytes)):
            return _scalar(tree)
        if isinstance(tree, torch.dtype):
            return {"dtype": str(tree).removeprefix("torch.")}
        if isinstance(tree, torch.device):
            return {"device": str(tree)}
        if isinstance(tree, torch.Size):
            return {"size": list(tree)}
        if type(tree) not in (list, tuple, dict, OrderedDict, Counter):
            raise _refused(tree, path)
        if id(tree) in self.open:
            raise FileError(f"{path or 'the tree'} contains itself, which cannot be saved.")
        self.open.add(id(tree))
        try:
            return self._container(tree, path)
        finally:
            self.open.remove(id(tree))

    def _container(self, tree: Any, path: str) -> Any:
        if type(tree) in (list, tuple):
            items = [self.encode(item, f"{path}/{i}") for i, item in enumerate(tree)]
            return items if type(tree) is list else {"tuple": items}
        if type(tree) is dict and all(type(key) is str for key in tree):
            return {"dict": {key: self.encode(value, f"{path}/{key}") for key, value in tree.items()}}
        # keys of JSON are strings; pairs keep other keys
        pairs = [[self.encode(k, f"{path} (a key)"), self.encode(v, f"{path}/{k}")] for k, v in tree.items()]
        return {"pairs": pairs} if type(tree) is dict else {"pairs": pairs, "type": type(tree).__name__}

    def _numpy(self, tree: Any, path: str) -> Any:
        if not hasattr(tree, "dtype") or tree.dtype.kind not in "biuf":
            raise _refused(tree, path)
        if not getattr(tree, "shape", ()) and not hasattr(tree, "setflags"):
            return self.encode(tree.item(), path)
        try:
            tensor = torch.tensor(tree)
        except TypeError as error:
            raise _refused(tree, path) from error
        return {"array": self._name(tree, tensor, path)} if type(tree).__name__ == "ndarray" else tensor.item()

    def _name(self, key: Any, tensor: Tensor, path: str) -> str:
        if id(key) not in self.names:
            name, number = path, 1
            while name in self.tensors:
                number += 1
                name = f"{path}#{number}"
            self.names[id(key)] = name
            self.named.append(key)
            self.tensors[name] = tensor
        return self.names[id(key)]


def _scalar(value: Any) -> Any:
    """Returns a number or a string as JSON data; of a subclass the plain value that it equals."""
    if isinstance(value, bytes):
        return {"bytes": base64.b64encode(value).decode()}
    if isinstance(value, complex):
        return {"complex": [_scalar(value.real), _scalar(value.imag)]}
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else {"float": repr(float(value))}
    return int(value) if isinstance(value, int) else str(value)


def _refused(value: Any, path: str) -> FileError:
    return FileError(
        f"{path or 'The tree'} is a {type(value).__module__}.{type(value).__qualname__}, which cannot be saved without "
        "pickle. Remove it, or replace it by numbers, strings, tensors, and lists, tuples and dicts of them."
    )


def decoded(data: Any, tensors: Mapping[str, Tensor]) -> Any:
    """Returns the tree that `encoded` wrote."""
    try:
        check_depth(data)
        return _Decoder(tensors).decode(data)
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise FileError(f"Invalid or foreign checkpoint data: {str(error)[:SENTENCE] or repr(error)}.") from error


class _Decoder:
    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.tensors = tensors
        self.arrays: dict[str, Any] = {}  # one in several places stays one

    def decode(self, data: Any) -> Any:
        if isinstance(data, list):
            return [self.decode(item) for item in data]
        if not isinstance(data, dict):
            return _plain_leaf(data)
        if "pairs" in data:
            return self._pairs(**data)
        ((tag, value),) = data.items()
        if tag == "dict":
            return {key: self.decode(item) for key, item in mapping(anything, anything)(value, tag).items()}
        if tag == "tuple":
            return tuple(map(self.decode, array(anything)(value, tag)))
        if tag == "tensor":
            return self.tensors[value]
        if tag == "array":
            if value not in self.arrays:
                self.arrays[value] = self.tensors[value].numpy()
            return self.arrays[value]
        if tag == "complex":
            return complex(*(self.decode(part) for part in array(anything, anything)(value, tag)))
        return _LEAVES[tag](value, tag)

    def _pairs(self, pairs: Any, type: str | None = None) -> Any:
        out = {} if type is None else _DICTS[type]()
        for key, value in pairs:
            out[self.decode(key)] = self.decode(value)
        if len(out) < len(pairs):
            raise SchemaError("a key stands in it twice")
        return out


def _plain_leaf(value: Any) -> Any:
    """Checks a number or text; integers of random generators have some hundred bits."""
    known = value is None or type(value) in (bool, str)
    if not known and (type(value) is not int or value.bit_length() > 4096):
        real()(value, "a value")
    return value


_LEAVES: dict[str, Reader] = {
    "float": lambda value, where: float(string(choices=("inf", "-inf", "nan"))(value, where)),
    "bytes": encoded_bytes,
    "dtype": lambda value, where: DTYPES[value],
    "device": lambda value, where: torch.device(string()(value, where)),
    "size": lambda value, where: torch.Size(array(integer())(value, where)),
}
