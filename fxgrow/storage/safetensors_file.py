"""One `.safetensors` file: tensors, and plain data in its metadata, with a checksum over both.

The metadata has the entries `format`, `fxgrow` (JSON with a format version) and `fxgrow.sha256`, of the JSON text and
of every tensor's name, dtype, shape and bytes. Later versions keep the checksum: a damaged file is no newer one.
ensures: a file appears complete or not at all; reading returns exactly what was written, or raises `FileError`.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import json
import math
import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from fxgrow.data.argument_checks import NEW_FILE, PATH, read_argument
from fxgrow.errors import FileError, MissingExtraError
from fxgrow.storage import schema
from fxgrow.storage.schema import SchemaError, checked
from fxgrow.storage.temporary_folder import temporary_folder

T = TypeVar("T")

VERSION = 1
_BODY, _SUM = "fxgrow", "fxgrow.sha256"
#: longest header in bytes that safetensors accepts
_HEADER = 100_000_000
_DTYPES = {
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2, torch.bool,
    torch.int64, torch.int32, torch.int16, torch.int8, torch.uint64, torch.uint32, torch.uint16, torch.uint8,
}  # fmt: skip
#: bytes of an entry, by the names that safetensors has for dtypes
_SIZES = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "BOOL": 1,
    "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8, "U32": 4, "U16": 2, "U8": 1,
}  # fmt: skip
#: how pickles begin, of zip files and of the protocols
_PICKLES = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")


def write(path: str | os.PathLike[str], tensors: Mapping[str, Tensor], body: Mapping[str, Any]) -> None:
    """Writes a file atomically: to a temporary one in the same folder, to the disk, then under its name.

    `body` is plain data for the metadata. On any error an existing file is unchanged.
    """
    read_argument("path", path, NEW_FILE, FileError)
    safetensors = _safetensors()
    layouts: dict[str, Any] = {}
    stored = _stored(tensors, layouts)
    text = json.dumps({"version": VERSION, **body, "layouts": layouts}, allow_nan=False)
    metadata = {"format": "pt", _BODY: text, _SUM: _digest(text, stored)}
    names = sum(len(json.dumps(name)) + 120 for name in stored)
    if len(json.dumps(text)) + names >= _HEADER:
        raise FileError(
            f"{path} would need a header of {(len(text) + names) // 1_000_000} MB, more than safetensors allows: "
            "store long lists as tensors."
        )
    target = Path(os.path.realpath(path))  # a link stays one
    try:
        with temporary_folder(target) as temporary:
            part = temporary / "part"
            part.touch()
            mode = (target if target.exists() else part).stat().st_mode
            safetensors.torch.save_file(stored, part, metadata)
            part.chmod(stat.S_IMODE(mode))  # safetensors makes it readable for the owner alone
            _to_disk(part)
            os.replace(part, target)
    except (OSError, safetensors.SafetensorError) as error:
        raise FileError(f"{path} could not be written: {error}. Nothing was changed.") from error
    with contextlib.suppress(OSError):  # not every system opens folders
        _to_disk(target.parent)


def read(path: str | os.PathLike[str]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Returns the body and the tensors (on the CPU) that `write` wrote."""
    safetensors, path = _safetensors(), Path(read_argument("path", path, PATH, FileError))
    _check_kind(path)
    _check_header(path)
    try:
        with safetensors.safe_open(path, framework="pt", device="cpu") as file:
            metadata = file.metadata() or {}
            # clones, so that none refers to the mapped file
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    except Exception as error:  # of any kind, on damaged bytes
        raise FileError(f"{path} is damaged ({error}).") from error
    if _BODY not in metadata:
        raise FileError(
            f"{path} is a safetensors file without a recipe: not written by fxgrow, or damaged. "
            "Load plain weights with safetensors.torch.load_model."
        )
    if metadata.get(_SUM) != _digest(metadata[_BODY], tensors):
        raise FileError(f"{path} is damaged: its contents do not match its checksum. Use another copy.")
    try:
        body = schema.parse_json(metadata[_BODY])
        version = body.pop("version", None) if isinstance(body, dict) else None
        if type(version) is int and version > VERSION:
            raise FileError(
                f"{path} has format version {version}, this fxgrow reads version {VERSION}: it was written by a "
                "newer fxgrow. Update fxgrow."
            )
        if version != VERSION or type(version) is not int:
            raise SchemaError(f"its version is {schema.quoted(version)}")
        layouts = schema.mapping(schema.read_as(_Layout))(body.pop("layouts", None), "layouts")
        for name in layouts.keys() & tensors.keys():
            tensors[name] = layouts[name].restored(tensors[name], name)
    except SchemaError as error:
        raise FileError(f"{path} is no file of fxgrow: {error}.") from None
    return body, tensors


def read_body(cls: type[T], body: Mapping[str, Any], path: str | os.PathLike[str]) -> T:
    """Returns the body of a file as a record; `FileError` where it is none."""
    try:
        return schema.read_as(cls)({key: value for key, value in body.items() if key != "kind"}, "the file")
    except SchemaError as error:
        raise FileError(f"{path} is no file of fxgrow: {error}.") from None


def _safetensors() -> Any:
    try:
        import safetensors
        import safetensors.torch
    except ImportError as error:
        raise MissingExtraError(
            f"files need the package safetensors, which cannot be imported ({error}): pip install fxgrow[files]"
        ) from error
    return safetensors


def _stored(tensors: Mapping[str, Tensor], layouts: dict[str, Any]) -> dict[str, Tensor]:
    """Returns contiguous copies on the CPU without shared storage; `layouts` gets what they lose (strides, complex)."""
    out: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in tensors.items():
        _check_storable(name, tensor)
        t = tensor.detach()
        if t.is_complex():
            t = torch.view_as_real(t.resolve_conj())
            layouts[name] = {"complex": True}
        t = t.resolve_neg()
        # an empty tensor like it has its strides if its entries fill their memory, in any order of the dimensions
        if not t.is_contiguous() and torch.empty_like(t, device="meta").stride() == t.stride():
            layouts[name] = {**layouts.get(name, {}), "strides": list(t.stride())}
        t = t.cpu().contiguous()
        storage = t.untyped_storage()
        if storage.data_ptr() in seen or storage.nbytes() != t.numel() * t.element_size():
            t = t.clone()
        seen.add(t.untyped_storage().data_ptr())
        out[name] = t
    return out


def _check_storable(name: str, t: Tensor) -> None:
    why = None
    if hasattr(t, "placements") or hasattr(t, "local_shards"):
        why = "is a shard of a distributed tensor: gather it first (torch.distributed.checkpoint.state_dict)"
    elif t.device.type == "meta":
        why = "is on the meta device, without values"
    elif t.layout is not torch.strided or t.is_quantized:
        why = f"has the layout {'quantized' if t.is_quantized else t.layout}, which safetensors does not store"
    elif t.dtype not in _DTYPES and not t.is_complex():
        why = f"has the dtype {t.dtype}, which safetensors does not store"
    if why:
        raise FileError(f"Tensor {name!r} {why}. Nothing was written.")


@dataclass(frozen=True)
class _Layout:
    """What a tensor lost in the file."""

    complex: bool = checked(schema.boolean, required=False, default=False)
    strides: tuple[int, ...] | None = checked(schema.array(schema.integer(), longest=64), required=False, default=None)

    def restored(self, t: Tensor, name: str) -> Tensor:
        """Returns a tensor as it was."""
        if self.strides is not None:
            bounded = len(self.strides) == t.dim() and all(stride <= max(1, t.numel()) for stride in self.strides)
            made = torch.empty_strided(t.shape, self.strides, device="meta") if bounded else None
            # as in `_stored`: of strides that fill their memory, each entry once
            if made is None or torch.empty_like(made).stride() != made.stride():
                raise SchemaError(f"the strides of {schema.quoted(name)} do not fill its memory")
            t = torch.empty_like(made, dtype=t.dtype, device="cpu").copy_(t)
        if not self.complex:
            return t
        if t.dtype not in (torch.float16, torch.float32, torch.float64) or t.shape[-1:] != (2,) or t.stride(-1) != 1:
            raise SchemaError(f"{name!r} is no tensor of complex numbers")
        return torch.view_as_complex(t)


def _digest(text: str, tensors: Mapping[str, Tensor]) -> str:
    total = hashlib.sha256(json.dumps(text).encode())
    for name in sorted(tensors):
        t = tensors[name].contiguous()
        total.update(json.dumps([name, str(t.dtype), list(t.shape)]).encode())
        size = t.numel() * t.element_size()
        if size:
            total.update((ctypes.c_char * size).from_address(t.data_ptr()))
    return total.hexdigest()


def _to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _check_kind(path: Path) -> None:
    """Refuses what is not a readable, non-empty file."""
    if path.is_dir():
        raise FileError(f"{path} is a folder, not a file.")
    try:
        with path.open("rb") as file:
            start = file.read(1)
    except FileNotFoundError as error:
        raise FileError(f"There is no file {path}.") from error
    except OSError as error:
        raise FileError(f"{path} could not be read: {error}.") from error
    if not start:
        raise FileError(f"{path} is empty.")


def _check_header(path: Path) -> None:
    """Refuses a file whose header does not describe it exactly: truncated, damaged or foreign."""
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        length = int.from_bytes(start, "little")
        header = file.read(length) if length <= _HEADER else b""
    if header[:1] != b"{":
        # a valid file starts with the length of its header, which can have the same bytes
        if start.startswith(_PICKLES):
            raise FileError(
                f"{path} is a pickle, such as torch.save writes, not a file of fxgrow. It was not opened, since "
                "pickles can run code: load it with torch.load(..., weights_only=True) if you trust it."
            )
        why = "or its first bytes are damaged" if length > _HEADER else "or its header is damaged"
        if size < 8:
            raise FileError(f"{path} is truncated or foreign: {size} bytes are too few for a safetensors file.")
        raise FileError(f"{path} is not a safetensors file, {why}.")
    if len(header) < length:
        raise FileError(f"{path} is truncated: it has {size} bytes, and its header alone has {length}.")
    try:
        entries = schema.parse_json(header.decode())
        schema.mapping(schema.string(_HEADER))(entries.pop("__metadata__", {}), "metadata")
        tensors = schema.mapping(schema.read_as(_Entry))(entries, "the header").values()
        end = 0
        for entry in sorted(tensors, key=lambda entry: entry.data_offsets):
            if entry.data_offsets[0] != end:
                raise SchemaError("its tensors overlap or leave gaps")
            end = entry.data_offsets[1]
    except (SchemaError, UnicodeDecodeError) as error:
        raise FileError(f"{path} is damaged: its header cannot be read ({error}).") from None
    if missing := 8 + length + end - size:
        why = f"truncated: its last {missing} bytes are missing" if missing > 0 else "damaged: it is too long"
        raise FileError(f"{path} is {why}.")


@dataclass(frozen=True)
class _Entry:
    """A tensor in the header of safetensors."""

    dtype: str = checked(schema.string(choices=_SIZES))
    shape: tuple[int, ...] = checked(schema.array(schema.integer(), longest=64))
    data_offsets: tuple[int, int] = checked(schema.array(schema.integer(), schema.integer()))

    def __post_init__(self) -> None:
        begin, end = self.data_offsets
        if end - begin != math.prod(self.shape) * _SIZES[self.dtype]:
            raise SchemaError(f"a tensor of shape {list(self.shape)} has {end - begin} bytes")


def require_kind(body: Mapping[str, Any], kind: str, path: str | os.PathLike[str], advice: str) -> None:
    """Refuses a file of the other kind."""
    if (found := body.get("kind")) != kind:
        what = f"a {found}" if found in ("model", "checkpoint", "moments") else "something else"
        raise FileError(f"{path} holds {what}, not a {kind}. {advice}")
