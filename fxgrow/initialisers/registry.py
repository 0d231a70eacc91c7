"""The protocol of initialisers and the table of them: `@initialiser(name)`.

A method takes part in up to three places. It proposes units from the moments of a width (`propose`), or looks for them
with passes of its own over the data (`search`); and it may write the entries of new units itself (`write`). What it
leaves out the pipeline does: random rows, outgoing weights that are zero or fitted, a line search.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeVar, cast

import torch
from torch import Tensor, fx
from torch.nn.functional import pad

from fxgrow.analysis.analyse import AnalysedGraph
from fxgrow.analysis.widths import GrowableWidth
from fxgrow.data.argument_checks import NAME, read_argument
from fxgrow.data.batches import Data
from fxgrow.data.loss import LossFn
from fxgrow.errors import ProfileError
from fxgrow.graph.graph import lookup
from fxgrow.rewriting.values import Values
from fxgrow.statistics.consumer_moments import ConsumerMoments
from fxgrow.statistics.width_moments import WidthMoments


@dataclass(frozen=True)
class Splits:
    """New units of one width that start as old ones, best first."""

    #: the old unit that each is split from, `[k]`; a fresh one takes only what follows on the path from it
    origin: Tensor
    #: which are no splits, `[k]`
    fresh: Tensor
    #: delta, or incoming weights of fresh units, `[k, D]`, all entries of a unit in a row
    incoming: Tensor
    #: outgoing weights of fresh units, `[k, D']`; zero for splits
    outgoing: Tensor | None = None
    #: predicted decrease of the loss by each, `[k]`
    gains: Tensor = field(default_factory=lambda: torch.zeros(0))
    #: running statistics of the norms on the path, `[k, entries]`, where they are not the origin's
    buffers: dict[str, Tensor] = field(default_factory=dict)

    def take(self, units: Tensor) -> Splits:
        """Those of these numbers."""
        tensors = {name: t for name, t in vars(self).items() if isinstance(t, Tensor)}
        tensors, buffers = (
            {name: t.detach()[units.to(t.device)] for name, t in parts.items()} for parts in (tensors, self.buffers)
        )
        return Splits(**tensors, buffers=buffers)


@dataclass(frozen=True)
class Proposal:
    """New units of one width, best first.

    Attributes:
        alpha: per producer weight, incoming weights `[k, P]` (a trailing bias entry where the producer has one).
            Empty: random rows, and k is what was asked for.
        omega: per consumer weight, outgoing weights `[k, taps, O]`. Empty: zero, or refitted.
        values: singular values, as many as were computed.
        splits: instead of all these: units that start as old ones.
    """

    alpha: dict[str, Tensor] = field(default_factory=dict)
    omega: dict[str, Tensor] = field(default_factory=dict)
    values: Tensor = field(default_factory=lambda: torch.zeros(0))
    splits: Splits | None = None


@dataclass(frozen=True)
class InitialiserRequest:
    """What a method searches or writes: `additions` per width of `widths`, in steps of the width."""

    analysed: AnalysedGraph
    widths: Sequence[GrowableWidth]
    additions: Mapping[str, int]
    generator: torch.Generator
    data: Data = field(default_factory=lambda: Data(()))
    loss_fn: LossFn | None = None


@dataclass(frozen=True)
class Needs:
    """What the pipeline does for a method: the flags of `@initialiser`."""

    #: subtract from E[b V^T] what the existing weights can express
    project: bool = True
    #: collect E[b V^T] and E[b b^T] at all
    moments: bool = True
    #: collect E[V V^T] for the units (a refit has it anyway)
    output_side: bool = False
    #: sampled rows of b per feature that E[b b^T] needs; the larger the ridge on it, the fewer
    rows: float | None = None
    #: widths without a window between producer and consumer get units from the slope of zero units
    sketch: bool = False
    #: fit outgoing weights and the update of existing ones on the activations of the new units
    refit: bool = False
    #: the line search scales incoming and outgoing weights alike (by the root of gamma)
    symmetric: bool = False
    #: the part of the best gamma that is applied
    share: float = 1.0


#: parameter, width and dimension of new slices
Outgoing = list[tuple[str, str, int]]
Function = TypeVar("Function", bound=Callable[..., Any])
Consumers = Mapping[str, ConsumerMoments]
Propose = Callable[[WidthMoments, Consumers, int], Proposal]


@dataclass(frozen=True)
class Initialiser:
    """A method, an entry of the table; its parts are overridden in a subclass, or `propose` is a function."""

    #: what `method=` says
    name: str
    needs: Needs = Needs()
    #: takes the place of `propose`
    function: Propose | None = None
    #: why a plan without units has none
    nothing: ClassVar[str] = "no width has a unit that the held-out test accepts"

    def check_profile(self, processes: int, keep_moments: bool) -> None:
        """Raises a `ProfileError` for settings of a profile that the method does not have."""

    def check_width(self, analysed: AnalysedGraph, width: GrowableWidth) -> None:
        """Raises a `PlanError` for a width that the method is not defined for."""

    def propose(self, width: WidthMoments, consumers: Consumers, k: int) -> Proposal:
        """At most k units from a width's moments, and those of the weights that read it."""
        return Proposal() if self.function is None else self.function(width, consumers, k)

    def search(self, request: InitialiserRequest) -> dict[str, Proposal] | None:
        """Units per width, from the data themselves; widths without an entry get none. None: those of `propose`."""
        return None

    def write(
        self, request: InitialiserRequest, width: GrowableWidth, proposal: Proposal, values: Values
    ) -> Outgoing | None:
        """Enters new units of a width at gamma = 1 into `values`; returns those of the new slices that gamma scales.

        None: the pipeline writes what was proposed.
        """
        return None


_TABLE: dict[str, Initialiser] = {}


def initialiser(name: str, **flags: bool | float) -> Callable[[Function], Function]:
    """Enters a function that proposes units, or a subclass of `Initialiser`, into the table; flags as in `Needs`."""
    read_argument("name", name, NAME, ProfileError)

    def enter(part: Function) -> Function:
        needs = Needs(**flags)  # type: ignore[arg-type]
        _TABLE[name] = part(name, needs) if isinstance(part, type) else Initialiser(name, needs, part)
        return part

    return enter


def find_initialiser(name: str) -> Initialiser:
    """The entry of that name."""
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


def existing_rows(width: WidthMoments) -> Tensor:
    """Rows of all producers in the basis of b, `[P, units]`; a producer's own rows are zero in the others' part."""
    columns = []
    for p in {p.weight: p for p in width.growable.producers}.values():
        start, stop = width.spans[p.weight]
        gm = cast(fx.GraphModule, p.node.graph.owning_module)
        rows = lookup(gm, p.weight).detach().movedim(p.out_dim, 0).flatten(1) * (p.scale or 1.0)
        if p.bias is not None:
            rows = torch.cat([rows, lookup(gm, p.bias).detach()[:, None]], 1)
        columns.append(pad(rows.mT, (0, 0, start, width.features - stop)))
    # producers of a sum write one unit together
    return sum(columns[1:], columns[0]) if len({c.shape for c in columns}) == 1 else torch.cat(columns, 1)
