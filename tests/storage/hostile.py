"""Mutants of files, and what must not happen while they are read."""

from __future__ import annotations

import contextlib
import copy
import json
import os
import random
import resource
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from fxgrow.storage import safetensors_file

CODE = "__import__('os').system('true')"
#: what hostile files have for names and texts
TEXTS = [
    CODE, f"**({CODE} or {{}}), out", f"x\n    {CODE}\n", "__class__", "__reduce__", "_forward_hooks", "training",
    "forward", "../../etc/passwd", "/dev/null", "\x00", "\u202etxt", "\ud800", "é" * 5000, "lambda", "", "0", "inf",
]  # fmt: skip
NUMBERS = [0, -1, 1, 7, 2**31, 2**40, 2**62, 2**63, 2**200, 1.5, -0.0, 1e308, float("nan"), float("inf")]
FORMS: list[Any] = [None, True, False, [], {}, [[]], {"tuple": []}, {"tensor": "0.weight"}, {"dict": {}}, {"pairs": []}]
#: virtual memory that one reading may take, beside what the process has: kernels start threads
SPARE = 2**30


class Watch:
    """Counts programs that are started, sources with hostile texts, and files outside of a folder that are written."""

    def __init__(self) -> None:
        self.folder: str | None = None
        self.seen: list[str] = []
        sys.addaudithook(self._hook)  # for the rest of the process

    def _hook(self, event: str, args: tuple[Any, ...]) -> None:
        if self.folder is None:
            return
        if event.startswith(("os.system", "os.exec", "os.fork", "os.posix_spawn", "os.spawn", "subprocess", "socket.")):
            self.seen.append(f"{event} {args}")
        elif event == "compile" and isinstance(args[0], (str, bytes)) and CODE[:13] in str(args[0]):
            self.seen.append(f"compile {args[0]!r}")
        elif event == "open" and isinstance(args[0], str) and isinstance(args[2], int) and args[2] & 3:
            if not args[0].startswith((self.folder, "/dev/")):
                self.seen.append(f"open {args[0]}")

    @contextlib.contextmanager
    def on(self, folder: Path) -> Iterator[None]:
        """Watches, and bounds the memory of the process."""
        limits = resource.getrlimit(resource.RLIMIT_AS)
        used = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
        self.folder, self.seen = str(folder), []
        resource.setrlimit(resource.RLIMIT_AS, (used + SPARE, limits[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_AS, limits)
            self.folder = None
        assert self.seen == []


def places(data: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yields the path of each value within containers."""
    items: Any = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    for key, value in items:
        yield (*path, key)
        yield from places(value, (*path, key))


def get(data: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        data = data[key]
    return data


def mutated(data: Any, generator: random.Random) -> Any:
    """Returns a copy with one value changed, removed, doubled, nested, renamed or moved."""
    out = copy.deepcopy(data)
    everywhere = list(places(out))
    *path, key = generator.choice(everywhere)
    owner = get(out, tuple(path))
    value = owner[key]
    kind = generator.choice(["number", "text", "form", "near", "delete", "double", "nest", "rename", "move"])
    if kind == "near" and isinstance(value, (int, float)) and not isinstance(value, bool):
        owner[key] = value + generator.choice([-1, 1, 0.5, 1000])
    elif kind == "delete":
        del owner[key]
    elif kind == "double" and isinstance(owner, list):
        owner.insert(key, copy.deepcopy(value))
    elif kind == "nest":
        owner[key] = [value] if generator.random() < 0.5 else deep(value, 300)
    elif kind in ("rename", "double") and isinstance(owner, dict):
        owner[generator.choice([*TEXTS, *map(str, owner)])] = owner[key] if kind == "double" else owner.pop(key)
    elif kind == "move":
        owner[key] = copy.deepcopy(get(data, generator.choice(everywhere)))
    else:
        owner[key] = generator.choice({"text": TEXTS, "form": FORMS}.get(kind, NUMBERS))
    return out


def deep(value: Any, levels: int) -> Any:
    for _ in range(levels):
        value = [value]
    return value


def contents(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What is in a file, as it stands in it."""
    with safetensors.safe_open(path, framework="pt") as file:
        return json.loads(file.metadata()["fxgrow"]), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def put(path: Path, body: Any, tensors: dict[str, Tensor]) -> None:
    """Writes a file with a checksum that fits."""
    text = body if isinstance(body, str) else json.dumps(body)
    digest = safetensors_file._digest(text, tensors)
    safetensors.torch.save_file(tensors, path, {"format": "pt", "fxgrow": text, "fxgrow.sha256": digest})


class Net(nn.Module):
    """Attributes, numbers in calls, a norm, a buffer, a tied weight and a keyword that are in its file."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm = nn.Linear(4, 6), nn.LayerNorm(6)
        self.up, self.drop, self.down = nn.Linear(6, 5), nn.Dropout(0.1), nn.Linear(5, 6)
        self.head = nn.Linear(6, 2)
        self.twin = self.head
        self.register_buffer("scale", torch.ones(1))

    def forward(self, x: Tensor, factor: float = 1.0) -> Tensor:
        h = self.embed(x)
        h = h + self.down(self.drop(torch.relu(self.up(self.norm(h)).view(-1, 5)))) * 6**-0.5
        return self.head(h) * self.scale * factor
