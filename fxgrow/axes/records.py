"""Public records: a width, and the reason why it cannot change."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Reason:
    """Why a width cannot change.

    Attributes:
        code: one word: ``input``, ``output``, ``operator``, ``norm``, ``reduce``,
            ``broadcast``, ``size``, ``branch``, ``frozen`` or ``opaque``.
        node: the name of the graph node that pins the width.
        message: one sentence for people.
    """

    code: str
    node: str
    message: str

    def __str__(self) -> str:
        return f"{self.code} at {self.node}: {self.message}"


@dataclass(frozen=True)
class Width:
    """A hidden dimension, with everything that must change with it.

    Attributes:
        name: qualified name of the first producer (``layer1.0.conv1``).
        size: number of units now.
        producers: qualified names of the modules (or parameters) whose output axis is the width.
        followers: those that have one slice per unit (norms, depthwise convolutions, scales).
        consumers: those whose input axis is the width.
        step: the smallest number of units that can be added.
        pinned: None, or why the width cannot change.
    """

    name: str
    size: int
    producers: tuple[str, ...]
    followers: tuple[str, ...]
    consumers: tuple[str, ...]
    step: int = 1
    pinned: Reason | None = None
