"""One file: complete or absent, exact, and never read when it is not what was written."""

from __future__ import annotations

import builtins
import contextlib
import json
import os
import random
import re
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import safetensors
import safetensors.torch
import torch
from torch import nn

import fxgrow
from fxgrow.storage.safetensors_file import read, write


def build() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A small grown net."""
    path = tmp_path / "net.safetensors"
    fxgrow.save(fxgrow.widen(build(), (torch.ones(1, 3),), {"0": 2}), path)
    return path


def folder_of(path: Path) -> list[str]:
    return sorted(os.listdir(path.parent))


FLOATS = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2]
WHOLE = [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool]


@pytest.mark.parametrize("dtype", [*FLOATS, *WHOLE, torch.complex64, torch.complex128], ids=str)
def test_dtypes_come_back_bit_for_bit(dtype: torch.dtype, tmp_path: Path) -> None:
    made = torch.randn(5, 3, dtype=torch.complex128 if dtype.is_complex else torch.float64) * 3
    t = made.to(dtype)
    write(tmp_path / "f", {"t": t, "none": t[:0], "one": t[0, 0]}, {})
    _, found = read(tmp_path / "f")
    for name, expected in {"t": t, "none": t[:0], "one": t[0, 0]}.items():
        out = found[name]
        assert out.dtype == dtype and out.shape == expected.shape
        if expected.numel():
            real = [torch.view_as_real(v) if dtype.is_complex else v for v in (out, expected)]
            assert torch.equal(*(v.contiguous().view(torch.uint8) for v in map(torch.atleast_1d, real)))


def test_strides_views_conjugates_and_shared_memory(tmp_path: Path) -> None:
    base = torch.randn(4, 6)
    image = torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)
    wave = torch.randn(3, dtype=torch.complex64)
    tensors = {
        "base": base,
        "rows": base[1:3],
        "t": base.t(),
        "image": image,
        "wave": wave.conj(),
        "every": base[:, ::2],
    }
    write(tmp_path / "f", tensors, {})
    _, found = read(tmp_path / "f")
    assert all(torch.equal(found[name], t) for name, t in tensors.items())
    assert found["image"].stride() == image.stride() and found["t"].stride() == base.t().stride()
    assert len({t.untyped_storage().data_ptr() for t in found.values()}) == len(tensors)


def shard() -> torch.Tensor:
    """Has what a tensor of torch.distributed is known by."""
    t = torch.zeros(2)
    t.placements = ()  # type: ignore[attr-defined]
    return t


@pytest.mark.parametrize(
    ("tensor", "why"),
    [
        (torch.eye(3).to_sparse(), "layout torch.sparse_coo"),
        (torch.zeros(2, device="meta"), "meta device"),
        (torch.quantize_per_tensor(torch.zeros(2), 0.1, 0, torch.qint8), "quantized"),
        (shard(), "shard of a distributed tensor: gather it first"),
    ],
    ids=["sparse", "meta", "quantized", "distributed"],
)
def test_what_cannot_be_stored(tensor: torch.Tensor, why: str, tmp_path: Path) -> None:
    with pytest.raises(fxgrow.FileError, match=why):
        write(tmp_path / "f", {"w": tensor}, {})
    assert os.listdir(tmp_path) == []


def test_opens_with_safetensors_alone(file: Path) -> None:
    grown = fxgrow.load(build(), file)
    with safetensors.safe_open(file, framework="pt") as opened:
        assert set(opened.keys()) == set(grown.state_dict())
        assert opened.metadata()["format"] == "pt"
    net = fxgrow.resize(build(), file)
    net.load_state_dict(safetensors.torch.load_file(file))
    x = torch.randn(5, 3)
    assert torch.equal(net(x), grown(x))


@pytest.mark.parametrize("first", [b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05"])
def test_headers_that_begin_like_a_pickle(first: bytes, tmp_path: Path) -> None:
    """A file begins with the length of its header, which may be any number."""
    t = torch.ones(2)
    write(tmp_path / "f", {"t": t}, {"padding": ""})
    missing = int.from_bytes(first, "little") - int.from_bytes((tmp_path / "f").read_bytes()[:8], "little")
    write(tmp_path / "f", {"t": t}, {"padding": "x" * missing})
    assert (tmp_path / "f").read_bytes()[:2] == first
    assert torch.equal(read(tmp_path / "f")[1]["t"], t)


# -- damage


def test_flipped_and_cut_files_are_refused_or_the_same(file: Path) -> None:
    """Six hundred damaged copies: a clear error, or the very same net."""
    whole, out = file.read_bytes(), file.with_name("damaged")
    expected = fxgrow.load(build(), file).state_dict()
    generator, refused = random.Random(0), 0
    cuts = [whole[:n] for n in {*range(0, 16), *(generator.randrange(len(whole)) for _ in range(100))}]
    flips = []
    for _ in range(400):
        data = bytearray(whole)
        for _ in range(generator.choice([1, 1, 1, 2, 8])):
            data[generator.randrange(len(data))] ^= 1 << generator.randrange(8)
        flips.append(bytes(data))
    header = 8 + int.from_bytes(whole[:8], "little")
    swaps = [whole[:i] + bytes([whole[i + 1], whole[i]]) + whole[i + 2 :] for i in range(header, len(whole) - 1, 3)]
    longer = [whole + b"\0", whole + whole, whole[:header] + b"\0" * (len(whole) - header)]
    for data in [*cuts, *flips, *swaps, *longer]:
        out.write_bytes(data)
        try:
            found = fxgrow.load(build(), out).state_dict()
        except fxgrow.FileError as error:
            assert str(out) in str(error)
            refused += 1
        else:
            assert found.keys() == expected.keys()
            assert all(torch.equal(found[name], t) for name, t in expected.items())
    assert refused > 500


def test_every_bit_of_the_recipe_counts(file: Path) -> None:
    """Other metadata than what was written is damage, also where it is valid."""
    with safetensors.safe_open(file, framework="pt") as opened:
        tensors, metadata = {k: opened.get_tensor(k) for k in opened.keys()}, opened.metadata()  # noqa: SIM118
    body = json.loads(metadata["fxgrow"])
    body["recipe"]["steps"][0]["units"]["0"] = 3
    safetensors.torch.save_file(tensors, file, {**metadata, "fxgrow": json.dumps(body)})
    with pytest.raises(fxgrow.FileError, match="is damaged: its contents do not match its checksum"):
        fxgrow.load(build(), file)


def other(path: Path, kind: str) -> None:
    if kind == "pickle":
        torch.save(build().state_dict(), path)
    elif kind == "old pickle":
        torch.save(build().state_dict(), path, _use_new_zipfile_serialization=False)
    elif kind == "plain":
        safetensors.torch.save_file(build().state_dict(), path)
    elif kind == "folder":
        path.mkdir()
    elif kind != "missing":
        path.write_text({"text": "epoch,loss\n1,0.5\n" * 9, "empty": "", "short": "hi"}[kind])


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("pickle", "is a pickle, such as torch.save writes"),
        ("old pickle", "is a pickle"),
        ("plain", "is a safetensors file without a recipe"),
        ("folder", "is a folder, not a file"),
        ("missing", "There is no file"),
        ("text", "is not a safetensors file"),
        ("empty", "is empty"),
        ("short", "is truncated or foreign: 2 bytes"),
    ],
)
def test_foreign_files_are_named(kind: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "net.safetensors"
    other(path, kind)
    for call in (fxgrow.load, fxgrow.resize):
        with pytest.raises(fxgrow.FileError, match=re.escape(message)):
            call(build(), path)
    with pytest.raises(fxgrow.FileError, match=re.escape(message)):
        fxgrow.load_checkpoint(path)


def test_truncated_files_say_how_much_is_missing(file: Path) -> None:
    whole = file.read_bytes()
    file.write_bytes(whole[:-10])
    with pytest.raises(fxgrow.FileError, match="is truncated: its last 10 bytes are missing"):
        fxgrow.load(build(), file)


def test_a_newer_format_is_told_from_damage(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fxgrow.storage.safetensors_file.VERSION", 2)
    fxgrow.save(build(), file)
    monkeypatch.undo()
    with pytest.raises(fxgrow.FileError, match="format version 2, this fxgrow reads version 1"):
        fxgrow.load(build(), file)


# -- atomicity


@pytest.mark.parametrize("at", ["save_file", "fsync", "replace"])
def test_a_failure_while_writing_leaves_the_old_file(at: str, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before, listed = file.read_bytes(), folder_of(file)

    def fails(*args: Any, **kwargs: Any) -> None:
        if at == "save_file":
            Path(args[1]).write_bytes(b"half of it")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr({"save_file": "safetensors.torch.save_file"}.get(at, f"os.{at}"), fails)
    with pytest.raises(fxgrow.FileError, match="No space left on device.*Nothing was changed"):
        fxgrow.save(build(), file)
    monkeypatch.undo()
    assert file.read_bytes() == before and folder_of(file) == listed


def test_an_interruption_while_writing_leaves_the_old_file(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before, listed = file.read_bytes(), folder_of(file)

    def interrupted(*args: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("os.replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        fxgrow.save(build(), file)
    monkeypatch.undo()
    assert file.read_bytes() == before and folder_of(file) == listed


def killed_while_saving(path: Path, model: nn.Module, delay: float) -> None:
    child = os.fork()
    if not child:
        with contextlib.suppress(BaseException):
            while True:
                fxgrow.save(model, path)
        os._exit(1)
    time.sleep(delay)
    os.kill(child, signal.SIGKILL)
    assert os.WIFSIGNALED(os.waitpid(child, 0)[1])


@pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")
def test_killed_while_writing(tmp_path: Path) -> None:
    """Twenty times, at any instant: the file is whole, there is at most one leftover, and the next save removes it."""
    path, model = tmp_path / "net", nn.Linear(300, 300)
    fxgrow.save(model, path)
    generator, left = random.Random(0), 0
    for _ in range(20):
        killed_while_saving(path, model, 0.01 + generator.random() / 20)
        assert len(folder_of(path)) <= 2
        left += len(folder_of(path)) - 1
        assert torch.equal(fxgrow.load(nn.Linear(300, 300), path).weight, model.weight)
    fxgrow.save(model, path)
    assert folder_of(path) == ["net"] and left > 0


def test_what_a_killed_writer_has_left_at_each_point(file: Path) -> None:
    (file.with_name(f".{file.name}.abcd1234.fxgrow")).mkdir()
    killed = file.with_name(f".{file.name}.abcd1235.fxgrow")
    killed.mkdir()
    (killed / "lock").touch()
    (killed / "part").write_bytes(b"half of it")
    others = [f".{file.name}.backup", ".other.safetensors.abcd1234.fxgrow", f".{file.name}.notes.fxgrow"]
    for name in others:
        file.with_name(name).mkdir()
    fxgrow.save(build(), file)
    assert folder_of(file) == sorted([file.name, *others])


def test_a_writer_that_lives_keeps_what_it_writes(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    replace, slow = os.replace, nn.Linear(3, 3)

    def replaced_late(*args: Any) -> None:
        monkeypatch.setattr("os.replace", replace)
        fxgrow.save(build(), file)  # another one, in the middle of the first
        replace(*args)

    monkeypatch.setattr("os.replace", replaced_late)
    fxgrow.save(slow, file)
    assert torch.equal(fxgrow.load(nn.Linear(3, 3), file).weight, slow.weight) and folder_of(file) == [file.name]


def test_nowhere_to_write(tmp_path: Path) -> None:
    with pytest.raises(fxgrow.FileError, match="could not be written"):
        fxgrow.save(build(), tmp_path / "absent" / "net.safetensors")
    with pytest.raises(fxgrow.FileError, match="is a folder"):
        fxgrow.save(build(), tmp_path)


def test_new_files_have_the_usual_permissions(file: Path) -> None:
    usual = file.with_name("usual")
    usual.touch()
    assert file.stat().st_mode == usual.stat().st_mode
    file.chmod(0o640)
    link = file.with_name("link")
    link.symlink_to(file)
    fxgrow.save(build(), link)
    assert file.stat().st_mode & 0o777 == 0o640 and link.is_symlink()
    assert fxgrow.Recipe.of(fxgrow.load(build(), file)).steps == ()


def test_without_safetensors(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    real = builtins.__import__

    def absent(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith("safetensors"):
            raise ModuleNotFoundError("No module named 'safetensors'")
        return real(name, *args, **kwargs)

    for name in [n for n in sys.modules if n.startswith("safetensors")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(builtins, "__import__", absent)
    with pytest.raises(fxgrow.MissingExtraError, match=r"pip install fxgrow\[files\]"):
        fxgrow.save(build(), tmp_path / "f")
    (tmp_path / "g").touch()
    with pytest.raises(fxgrow.MissingExtraError, match=r"fxgrow\[files\]"):
        fxgrow.load(build(), tmp_path / "g")
    assert os.listdir(tmp_path) == ["g"]
