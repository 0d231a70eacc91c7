"""The records of a growth: what was done, and what it hands over."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import torch
from torch import fx, nn

from fxgrow.axes.records import Reason
from fxgrow.pipeline.line_search import Search
from fxgrow.pipeline.profile_record import Profile
from fxgrow.rewriting.plan import Plan

if TYPE_CHECKING:
    from matplotlib.figure import Figure


M = TypeVar("M", bound=nn.Module)
#: for each parameter and buffer that grew, the new positions of its old entries per dimension (None: unchanged)
Index = Mapping[str, tuple[torch.Tensor | None, ...]]


def keep_record(grown: nn.Module, growth: Any) -> None:
    """Puts the record of a growth at `grown.meta["fxgrow"]`, unless `meta` is something of the user's."""
    meta: Any = getattr(grown, "meta", None)
    if isinstance(grown, fx.GraphModule) or (isinstance(meta, dict) and meta.keys() <= {"fxgrow"}):
        meta["fxgrow"] = growth


@dataclass(frozen=True)
class Growth:
    """The record of one growth, at `grown.meta["fxgrow"]`; prints as a report.

    Attributes:
        plan: what was added, with the gamma that was applied.
        profile: what it was decided on.
        search: held-back losses along gamma; None where nothing was added, or the function stays.
        losses: mean held-back loss before and after, `{"eval": (before, after), "train": (before, after)}`.
        pinned: widths that cannot change, and why.
        seconds: wall time per stage.
        declined: why nothing was added, or None.
        decreases: predicted and realised decrease of the held-back loss (eval mode), of the growths before this one
            and of this one, where its method predicts.
    """

    plan: Plan
    profile: Profile
    search: Search | None
    losses: Mapping[str, tuple[float, float]]
    pinned: Mapping[str, Reason]
    seconds: Mapping[str, float]
    declined: str | None = None
    decreases: tuple[tuple[float, float], ...] = ()

    def __str__(self) -> str:
        from fxgrow.pipeline.report import growth_report

        return growth_report(self)

    def plot(self, path: str | None = None) -> Figure:
        """Bars of bottleneck and gains per width and the loss against gamma. Needs matplotlib."""
        from fxgrow.report.plot import plot_growth

        return plot_growth(self, path)


@dataclass(frozen=True)
class GrowthResult(Generic[M]):
    """What a growth made, before anything around the model knows of it.

    Attributes:
        model: the wider copy.
        index: where old entries are now.
        record: what was done, and why.
    """

    model: M
    index: Index
    record: Growth
