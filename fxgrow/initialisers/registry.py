"""One door for every way to initialise new units: `@initialiser(name)`.

An initialiser proposes units for one width from its moments; its flags say what the profile must do for it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor

from fxgrow.analysis.analyse import AnalysedGraph
from fxgrow.analysis.widths import GrowableWidth
from fxgrow.data.batches import Data
from fxgrow.data.loss import LossFn
from fxgrow.errors import ProfileError
from fxgrow.initialisers.splits import Splits
from fxgrow.rewriting.copied_units import CopiedUnits
from fxgrow.statistics.consumer_moments import ConsumerMoments
from fxgrow.statistics.width_moments import WidthMoments


@dataclass(frozen=True)
class Proposal:
    """New units of one width, best first.

    Attributes:
        alpha: per producer weight, incoming weights `[k, P]` (a trailing bias entry where the producer has one).
            Empty: random rows, and k is what was asked for.
        omega: per consumer weight, outgoing weights `[k, taps, O]`. Empty: zero, or refitted.
        values: singular values, as many as were computed.
        splits: instead of all these: units that start as old ones (see `finder`).
    """

    alpha: dict[str, Tensor] = field(default_factory=dict)
    omega: dict[str, Tensor] = field(default_factory=dict)
    values: Tensor = field(default_factory=lambda: torch.zeros(0))
    splits: Splits | None = None


@dataclass(frozen=True)
class Written:
    """New entries of a width.

    Attributes:
        new: per parameter and dimension, slices for the new units; those of one unit stand together.
        copies: the old units that new ones are like, if any.
    """

    new: dict[tuple[str, int], Tensor] = field(default_factory=dict)
    copies: CopiedUnits | None = None


@dataclass(frozen=True)
class Setting:
    """What a finder looks for units in: `additions` per width of `hiddens`, in steps of the width."""

    analysed: AnalysedGraph
    hiddens: Sequence[GrowableWidth]
    additions: Mapping[str, int]
    data: Data
    loss_fn: LossFn | None
    generator: torch.Generator


#: the graph, the width, how many units, random numbers
Write = Callable[[AnalysedGraph, GrowableWidth, int, torch.Generator], Written]
Find = Callable[[Setting], dict[str, Splits]]
Propose = Callable[[WidthMoments, Mapping[str, ConsumerMoments], int], Proposal]
Function = TypeVar("Function", bound=Callable[..., Any])


@dataclass(frozen=True)
class Initialiser:
    """An entry of the table.

    Attributes:
        name: what `method=` says.
        propose: proposes at most k units from a width's moments.
        project: subtract from E[b V^T] what the existing weights can express.
        moments: whether E[b V^T] and E[b b^T] are needed at all.
        output_side: whether E[V V^T] is needed for the units (a refit has it anyway).
        rows: sampled rows of b per feature that E[b b^T] needs; the larger the ridge on it, the fewer.
        sketch: widths without a window between producer and consumer get units from the slope of silent ones.
        refit: fit outgoing weights and the update of existing ones on what the units really put out.
        symmetric: the line search scales incoming and outgoing weights alike (by the root of gamma).
        share: the part of the best gamma that is applied.
        write: instead of proposals: writes new entries of every parameter; the function is the same at any gamma, so
            that there is no line search.
        find: instead of proposals from moments: reads the data itself.
        nothing: why a plan without units has none.
    """

    name: str
    propose: Propose
    project: bool = True
    moments: bool = True
    output_side: bool = False
    rows: float | None = None
    sketch: bool = False
    refit: bool = False
    symmetric: bool = False
    share: float = 1.0
    write: Write | None = None
    find: Find | None = None
    nothing: str = "no width has a unit that the held-back test accepts"


_TABLE: dict[str, Initialiser] = {}


def initialiser(name: str, **flags: bool | float) -> Callable[[Propose], Propose]:
    """Enters a function that proposes units into the table under `name`; flags as in `Initialiser`."""

    def enter(propose: Propose) -> Propose:
        _TABLE[name] = Initialiser(name, propose, **flags)  # type: ignore[arg-type]
        return propose

    return enter


def writer(name: str) -> Callable[[Write], Write]:
    """Enters a function that writes all entries of new units itself, and keeps the function, under `name`."""

    def enter(write: Write) -> Write:
        _TABLE[name] = Initialiser(name, _no_proposal, moments=False, write=write)
        return write

    return enter


def finder(name: str, nothing: str) -> Callable[[Find], Find]:
    """Enters a function that finds units like old ones with passes of its own over the data, under `name`."""

    def enter(find: Find) -> Find:
        _TABLE[name] = Initialiser(name, _no_proposal, moments=False, find=find, nothing=nothing)
        return find

    return enter


def _no_proposal(width: WidthMoments, consumers: Mapping[str, ConsumerMoments], k: int) -> Proposal:
    return Proposal()


def find_initialiser(name: str) -> Initialiser:
    """The entry of that name.

    Raises:
        ProfileError: there is none.
    """
    if name not in _TABLE:
        raise ProfileError(f"There is no method {name!r}; there are {', '.join(method_names())}.")
    return _TABLE[name]


def method_names() -> list[str]:
    """What `method=` may say, in alphabetical order."""
    return sorted(_TABLE)


def lists_methods(function: Function) -> Function:
    """Puts the names of the library's methods in place of `{methods}` in a docstring."""
    function.__doc__ = (function.__doc__ or "").replace("{methods}", ", ".join(method_names()))
    return function


def split_rows(alpha: Tensor, width: WidthMoments) -> dict[str, Tensor]:
    """Stacked incoming weights `[P, k]` as rows per producer, `[k, P_p]`."""
    return {name: alpha[start:stop].T.contiguous() for name, (start, stop) in width.spans.items()}
