"""The records of a growth: what was done, and what it hands over."""

from __future__ import annotations

import statistics
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import torch
from torch import fx, nn

from fxgrow.axes.records import Reason
from fxgrow.graph.node_meta import RECORD
from fxgrow.pipeline.line_search import Search
from fxgrow.pipeline.profile_record import Profile
from fxgrow.report.bottleneck import LEGEND, bottleneck_table, parameters_added, pinned_table, random_units
from fxgrow.report.plot import bottleneck_panel, gain_panel, line_search_panel, new_figure, save_figure, text_panel
from fxgrow.report.table import WIDTH
from fxgrow.rewriting.plan import Plan

if TYPE_CHECKING:
    from matplotlib.figure import Figure

M = TypeVar("M", bound=nn.Module)
#: for each parameter and buffer that grew, the new positions of its old entries per dimension (None: unchanged)
Index = Mapping[str, tuple[torch.Tensor | None, ...]]


def keep_record(grown: nn.Module, growth: Any) -> None:
    """Puts the record of a growth at `grown.meta["fxgrow"]`, unless `meta` is something of the user's."""
    meta: Any = getattr(grown, "meta", None)
    if isinstance(grown, fx.GraphModule) or (isinstance(meta, dict) and meta.keys() <= {RECORD}):
        meta[RECORD] = growth


@dataclass(frozen=True)
class Growth:
    """The record of one growth, at `grown.meta["fxgrow"]`; prints as a report.

    Attributes:
        plan: what was added, with the gamma that was applied.
        profile: what it was decided on.
        search: held-out losses along gamma; None where nothing was added, or the function stays.
        losses: mean held-out loss before and after, `{"eval": (before, after), "train": (before, after)}`.
        pinned: widths that cannot change, and why.
        seconds: wall time per stage.
        declined: why nothing was added, or None.
        decreases: predicted and realised decrease of the held-out loss (eval mode), of the growths before this one
            and of this one, where its method predicts.
        notes: what was done so that growth does no harm: statistics measured again, entries scaled down, a smaller
            gamma; and what it could not do.
    """

    plan: Plan
    profile: Profile
    search: Search | None
    losses: Mapping[str, tuple[float, float]]
    pinned: Mapping[str, Reason]
    seconds: Mapping[str, float]
    declined: str | None = None
    decreases: tuple[tuple[float, float], ...] = ()
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        """Lines of at most 120 characters: what happened, the profile's rows with added units, and pinned widths."""
        plan = self.plan
        lines = [f"Growth by {plan.method}: " + (parameters_added(plan) if plan.units else "nothing added")]
        if self.declined:
            lines += textwrap.wrap(f"declined: {self.declined}", WIDTH, subsequent_indent=" " * 10)
        elif plan.reason:
            lines += textwrap.wrap(f"less than asked for: {plan.reason}", WIDTH, subsequent_indent=" " * 21)
        name = f" ({self.profile.loss_name})" if self.profile.loss_name else ""
        lines.append(
            f"held-out loss{name}: " + ", ".join(f"{mode} {_change(*loss)}" for mode, loss in self.losses.items())
        )
        lines += [*self._predictions(), *self._line_search()]
        lines += [
            line for note in self.notes for line in textwrap.wrap(f"note: {note}", WIDTH, subsequent_indent=" " * 6)
        ]
        if self.seconds:
            stages = ", ".join(f"{stage} {seconds:.2f}" for stage, seconds in self.seconds.items())
            lines.append(f"seconds: {sum(self.seconds.values()):.2f} ({stages})")
        lines += ["", bottleneck_table(self.profile, "added", plan.units), "", LEGEND]
        grown = {name: b for name, b in self.profile.items() if name in plan.units}
        lines += [*random_units(plan.method, grown), *pinned_table(self.pinned)]
        return "\n".join(lines)

    def _predictions(self) -> list[str]:
        """The predicted and the realised decrease; over several growths, their correlation."""
        if not self.decreases or not self.plan.units:
            return []
        predicted, realised = self.decreases[-1]
        line = f"decrease: {predicted:.4f} predicted, {realised:.4f} realised"
        sides = list(zip(*self.decreases, strict=True))
        if len(self.decreases) > 2 and all(len(set(side)) > 1 for side in sides):
            line += f" (correlation over {len(self.decreases)} growths {statistics.correlation(*sides):.2f})"
        return [line]

    def _line_search(self) -> list[str]:
        search = self.search
        if search is None:
            return ["gamma: function kept; no line search"] if self.plan.units else []
        seen = "  ".join(f"{g:.3g}:\xa0{loss:.4f}" for g, loss in zip(search.gammas, search.losses, strict=True))
        return [
            f"gamma: {self.plan.scale:.3g} applied, {search.best:.3g} best on held-out batches",
            *textwrap.wrap(f"loss along gamma: {seen}", WIDTH, subsequent_indent=" " * 18),
        ]

    def plot(self, path: str | None = None) -> Figure:
        """Bars of bottleneck and gains per width and the loss against gamma. Needs matplotlib."""
        profile, plan, search = self.profile, self.plan, self.search
        figure = new_figure(3, len(profile))
        left, middle, right = figure.subplots(1, 3, width_ratios=(1, 1.15, 1.25))
        middle.sharey(left)
        bottleneck_panel(left, profile)
        gain_panel(middle, profile, profile.unit_of_gains, plan.units)
        if search is None:
            text_panel(right, "line search", self.declined or "no line search")
        else:
            applied = (plan.scale, self.losses["train"][1]) if plan.units else None
            line_search_panel(right, search.gammas, search.losses, search.eval_losses, search.best, applied)
        before, after = plan.parameters
        what = f"{before:,} → {after:,} parameters" if plan.units else "nothing added"
        losses = [f"{mode} loss {b:.4f} → {a:.4f}" for mode, (b, a) in self.losses.items()]
        return save_figure(figure, " · ".join([f"fxgrow growth · {plan.method}", what, *losses]), path)


def _change(before: float, after: float) -> str:
    share = f" ({(after - before) / abs(before):+.1%})" if before else ""
    return f"{before:.4f} → {after:.4f}{share}"


@dataclass(frozen=True)
class GrowthResult(Generic[M]):
    """What a growth made, before anything around the model knows of it: the wider copy, where old entries are now."""

    model: M
    index: Index
    record: Growth
