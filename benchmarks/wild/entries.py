"""An entry of a table of networks, and what tables are written with.

A table is a file of `benchmarks/wild/tables/` with a list `ENTRIES`. Packages are imported when a network is built.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.coverage.subjects import Inputs, Subject, perturb

TABLES = Path(__file__).parent / "tables"


@dataclass(frozen=True)
class Entry:
    """A network of a package.

    Attributes:
        package: as it is installed.
        name: of the network, short.
        build: makes it, with random weights.
        inputs: for so many samples; the second argument is 1 for another image size or sequence length.
        sizes: whether there is another size.
        outputs: what of the outputs is compared, and what the loss of growth is of.
    """

    package: str
    name: str
    build: Callable[[], nn.Module]
    inputs: Callable[[int, int], Inputs]
    sizes: bool = False
    outputs: Callable[[Any], Any] = lambda given: given

    def subject(self, seed: int = 0) -> Subject:
        torch.manual_seed(seed)
        subject = Subject(self.build(), self.inputs, self.sizes, outputs=self.outputs)
        torch.manual_seed(seed)  # some builders set one of their own
        perturb(subject.model)
        return subject

    @property
    def installed(self) -> bool:
        try:
            metadata.distribution(self.package)
        except metadata.PackageNotFoundError:
            return False
        return True


def entries() -> Iterator[Entry]:
    """Of all tables, in the order of their names."""
    for file in sorted(TABLES.glob("[a-z]*.py")):
        yield from importlib.import_module(f"benchmarks.wild.tables.{file.stem}").ENTRIES


def call(path: str, *args: Any, **kwargs: Any) -> Callable[[], Any]:
    """A builder: `call("package.module:Class", 3, depth=2)`, imported when it is called.

    Arguments that are builders themselves are called first.
    """

    def build() -> Any:
        target = imported(path)()
        return target(*(_made(a) for a in args), **{key: _made(value) for key, value in kwargs.items()})

    build.is_builder = True  # type: ignore[attr-defined]
    return build


def imported(path: str) -> Callable[[], Any]:
    """The thing itself, as an argument of `call`: `imported("package.module:Class")`."""

    def build() -> Any:
        module, _, name = path.partition(":")
        target: Any = importlib.import_module(module)
        for part in name.split("."):
            target = getattr(target, part)
        return target

    build.is_builder = True  # type: ignore[attr-defined]
    return build


def _made(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return type(value)(_made(v) for v in value)
    if isinstance(value, dict):
        return {key: _made(v) for key, v in value.items()}
    return value() if getattr(value, "is_builder", False) else value


_draw = 0


def drawn(inputs: Callable[[int, int], Inputs], sizes: Iterable[int]) -> list[Inputs]:
    """Batches of these sizes, each with other numbers."""
    global _draw
    batches = []
    try:
        for _draw, size in enumerate(sizes, 1):
            batches.append(inputs(size, 0))
    finally:
        _draw = 0
    return batches


def generator(batch: int, other: int) -> torch.Generator:
    return torch.Generator().manual_seed(10000 * _draw + 100 * batch + other)


def floats(*shape: int, longer: tuple[int, ...] | None = None) -> Callable[[int, int], tuple[Tensor, ...]]:
    """Normal numbers, [batch, *shape]; `longer` is the shape at the other size."""
    return lambda batch, other: (
        torch.randn(batch, *(longer if other and longer else shape), generator=generator(batch, other)),
    )


def images(channels: int, side: int, step: int = 32) -> Callable[[int, int], tuple[Tensor, ...]]:
    return floats(channels, side, side, longer=(channels, side + step, side + step))


def tokens(
    vocabulary: int, length: int, longer: int | None = None, first: int = 0
) -> Callable[[int, int], tuple[Tensor, ...]]:
    """Integers below `vocabulary` and from `first` on (1 where 0 is padding), [batch, length]."""

    def inputs(batch: int, other: int) -> tuple[Tensor, ...]:
        shape = batch, longer if other and longer else length
        return (torch.randint(first, vocabulary, shape, generator=generator(batch, other)),)

    return inputs


def integers(below: int) -> Callable[[int, int], tuple[Tensor, ...]]:
    """One integer per sample, [batch]: a timestep, a class."""
    return lambda batch, other: (torch.randint(below, (batch,), generator=generator(batch, other)),)


def fixed(*values: Any) -> Callable[[int, int], tuple[Any, ...]]:
    """The same at any size."""
    return lambda batch, other: values


def lengths(length: int, longer: int | None = None) -> Callable[[int, int], tuple[Tensor, ...]]:
    """All of the sequence, of every sample, [batch]."""
    return lambda batch, other: (torch.full((batch,), longer if other and longer else length),)


def together(*parts: Callable[[int, int], tuple[Any, ...]]) -> Callable[[int, int], tuple[Any, ...]]:
    """The inputs of all parts, one after the other."""
    return lambda batch, other: tuple(value for part in parts for value in part(batch, other))


def positional(part: Callable[[int, int], Any]) -> Callable[[int, int], tuple[Any, ...]]:
    """One positional input, what `part` gives: a dict, say."""
    return lambda batch, other: (part(batch, other),)


def named(**parts: Callable[[int, int], tuple[Any, ...]]) -> Callable[[int, int], dict[str, Any]]:
    """Keyword inputs, each the first one of its part."""
    return lambda batch, other: {key: part(batch, other)[0] for key, part in parts.items()}


def graph(features: int, *, nodes: int = 6, edges: int = 12) -> Callable[[int, int], tuple[Tensor, ...]]:
    """One graph per sample: features of nodes, edges [2, E] and the number of each node's graph."""

    def inputs(batch: int, other: int) -> tuple[Tensor, ...]:
        random = generator(batch, other)
        first = torch.arange(batch).repeat_interleave(edges) * nodes
        ends = torch.randint(nodes, (2, edges * batch), generator=random) + first
        features_ = torch.randn(nodes * batch, features, generator=random)
        return features_, ends, torch.arange(batch).repeat_interleave(nodes)

    return inputs


def edges(features: int, **options: int) -> Callable[[int, int], tuple[Tensor, ...]]:
    """The first two of `graph`."""
    return lambda batch, other: graph(features, **options)(batch, other)[:2]
