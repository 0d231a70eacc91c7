"""What a row of the table of operators is: a small network around an operator, and the widths it must have.

The widths that must be free are `name=(size, step)`, those that must be pinned `name="code"`. The last layer is called
`out` and is pinned as the model's output.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

Forward = Callable[..., Any]
Expected = tuple[int, int] | str


class Net(nn.Module):
    """Named parts and what is done with them."""

    def __init__(self, forward: Forward, parts: dict[str, Any]) -> None:
        super().__init__()
        self.compute = forward
        for name, part in parts.items():
            if isinstance(part, Tensor) and not isinstance(part, nn.Parameter):
                self.register_buffer(name, part)
            else:
                setattr(self, name, part)

    def forward(self, *inputs: Any) -> Any:
        return self.compute(self, *inputs)


@dataclass(frozen=True)
class Case:
    """One row: `inputs(n)` is a batch of n samples, `larger(n)` one of another size where the net allows it.

    `fills`: what new entries of a parameter are, where the rule of the operator says so.
    """

    id: str
    build: Callable[[], nn.Module]
    inputs: Callable[[int], tuple[Any, ...]]
    expected: dict[str, Expected]
    larger: Callable[[int], tuple[Any, ...]] | None = None
    fills: dict[str, float] = field(default_factory=dict)

    @property
    def free(self) -> dict[str, tuple[int, int]]:
        return {name: e for name, e in self.expected.items() if not isinstance(e, str)}


@dataclass
class Table:
    """Rows are added by a call per kind of input."""

    rows: list[Case] = field(default_factory=list)

    def add(self, id: str, shape: tuple[int, ...], larger: Any, parts: Any, forward: Forward, **expected: Any) -> None:
        fills = expected.pop("fills", {})
        named = {name.replace("__", "."): e for name, e in expected.items()}
        if not any(name == "out" for name in named):
            named["out"] = "output"
        self.rows.append(
            Case(
                id=id,
                build=lambda: Net(forward, parts()),
                inputs=lambda n: (torch.randn(n, *shape),),
                expected={name: e for name, e in named.items() if e is not None},
                larger=None if larger is None else lambda n: (torch.randn(n, *larger),),
                fills=fills,
            )
        )

    def vector(self, id: str, parts: Callable[[], dict[str, Any]], forward: Forward, **expected: Any) -> None:
        """Inputs [n, 6]; parts get `a`: 6 to 8 and `out`: 8 to 3 unless they bring their own."""
        self.add(id, (6,), None, lambda: {"a": nn.Linear(6, 8), "out": nn.Linear(8, 3), **parts()}, forward, **expected)

    def image(self, id: str, parts: Callable[[], dict[str, Any]], forward: Forward, **expected: Any) -> None:
        """Inputs [n, 3, 6, 6]; `a`: 3 to 8 channels, 3x3, and `out`: 8 to 3, 1x1."""
        larger = None if expected.pop("one_size", False) else (3, 8, 8)
        given = lambda: {"a": nn.Conv2d(3, 8, 3, padding=1), "out": nn.Conv2d(8, 3, 1), **parts()}  # noqa: E731
        self.add(id, (3, 6, 6), larger, given, forward, **expected)

    def tokens(self, id: str, parts: Callable[[], dict[str, Any]], forward: Forward, **expected: Any) -> None:
        """Inputs [n, 5, 6], channels last; `a`: 6 to 8 and `out`: 8 to 3."""
        given = lambda: {"a": nn.Linear(6, 8), "out": nn.Linear(8, 3), **parts()}  # noqa: E731
        self.add(id, (5, 6), None, given, forward, **expected)


def nothing() -> dict[str, Any]:
    return {}


T = Table()
F8 = (8, 1)
