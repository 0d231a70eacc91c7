"""Panels that show a profile, a growth and a history, with matplotlib and no global state of pyplot."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from fxgrow.data.argument_checks import NEW_FILE, read_argument
from fxgrow.errors import FileError, MissingExtraError
from fxgrow.report.bottleneck import Bottleneck
from fxgrow.report.table import shorten

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


INK, MUTED, GRID = "#22303c", "#6b7a87", "#e3e8ec"
BOTTLENECK, EXPRESSIBLE = "#c8553d", "#f0d3c9"
CHOSEN, ACCEPTED, REJECTED = "#1b7a6e", "#8cc5bc", "#dfe4e7"
#: names on the axes are at most so long
NAME = 26


def new_figure(panels: int, rows: int) -> Figure:
    """A figure of panels side by side, high enough for so many rows."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingExtraError("plots need matplotlib: pip install fxgrow[report]") from error
    height = max(3.3, 1.6 + 0.34 * rows)
    return Figure(figsize=(4.6 * panels, height), dpi=130, layout="constrained", facecolor="white")


def save_figure(figure: Figure, title: str, path: str | None) -> Figure:
    """The figure under its title; written to `path` if given, in the format of its ending."""
    if path is not None and (isinstance(path, type) or not hasattr(path, "write")):
        read_argument("path", path, NEW_FILE, FileError)
    figure.suptitle(title, x=0.008, ha="left", fontsize=11, color=INK)
    if path is not None:
        try:
            figure.savefig(path)
        except (OSError, ValueError) as error:
            raise FileError(f"{path} could not be written: {error}.") from error
    return figure


def bottleneck_panel(axes: Axes, bottlenecks: Mapping[str, Bottleneck]) -> None:
    """Per width, a bar of the bottleneck Psi within all gradient energy E|V|^2."""
    rows = range(len(bottlenecks))
    desired = [b.desired for b in bottlenecks.values()]
    axes.barh(rows, desired, 0.62, color=EXPRESSIBLE, label="existing weights can explain")
    axes.barh(rows, [b.bottleneck for b in bottlenecks.values()], 0.62, color=BOTTLENECK, label="they cannot: Ψ")
    for row, b in enumerate(bottlenecks.values()):
        _note(axes, b.desired, row, f"{b.bottleneck:.3g}")
    axes.set_yticks(list(rows), [f"{shorten(name, NAME)}  [{b.width.size}]" for name, b in bottlenecks.items()])
    axes.invert_yaxis()
    axes.set_xlim(0, 1.32 * max(desired, default=0.0) or 1.0)
    _frame(axes, "expressivity bottleneck", "gradient energy at the consumers, E|V|²", "x")
    axes.legend(**_legend(2))


def gain_panel(
    axes: Axes, bottlenecks: Mapping[str, Bottleneck], unit: str, added: Mapping[str, int] | None = None
) -> None:
    """Per width, one segment per unit as long as its predicted gain; `added` units (None: no growth) stand out."""
    from matplotlib.patches import Patch

    for row, (name, b) in enumerate(bottlenecks.items()):
        start = 0.0
        for i, gain in enumerate(b.gains):
            accepted = i < b.significant
            chosen = accepted if added is None else i < added.get(name, 0)
            color = CHOSEN if chosen else ACCEPTED if accepted else REJECTED
            axes.barh(row, gain, 0.62, left=start, color=color, edgecolor="white", linewidth=0.8)
            start += gain
        tested = f"{b.significant} of {len(b.gains)} accepted" if b.tested else "no test"
        text = tested if added is None else f"+{added.get(name, 0)}"
        _note(axes, start, row, text if b.gains else "no prediction")
    axes.set_xlim(0, 1.32 * max((sum(b.gains) for b in bottlenecks.values()), default=0.0) or 1.0)
    _frame(axes, "predicted gain per unit", f"decrease of the loss, {unit}", "x")
    axes.tick_params(labelleft=False)
    colors = {"accepted": CHOSEN} if added is None else {"added": CHOSEN, "accepted": ACCEPTED}
    colors["not accepted"] = REJECTED
    axes.legend(handles=[Patch(color=color, label=kind) for kind, color in colors.items()], **_legend(len(colors)))


def text_panel(axes: Axes, title: str, text: str) -> None:
    """A panel with a text in place of a curve."""
    _title(axes, title)
    axes.axis("off")
    axes.text(0.5, 0.5, text, ha="center", va="center", color=MUTED, wrap=True)


def line_search_panel(
    axes: Axes,
    gammas: Sequence[float],
    losses: Sequence[float],
    eval_losses: Sequence[float],
    best: float,
    applied: tuple[float, float] | None,
) -> None:
    """The held-out loss (in train and in eval mode) along gamma; `applied` is the gamma of the growth and its loss."""
    start = losses[0]
    axes.axhline(start, color=MUTED, linewidth=0.9, linestyle=(0, (4, 3)))
    axes.plot(gammas, losses, color=INK, linewidth=1.4, marker="o", markersize=4, zorder=3)
    note = partial(axes.annotate, textcoords="offset points", ha="center", fontsize=8, color=MUTED)
    if eval_losses != losses:
        axes.plot(gammas, eval_losses, color=MUTED, linewidth=1.2, marker="o", markersize=3, zorder=2)
        note("eval mode", (gammas[-1], eval_losses[-1]), (0, -12))
    note("without growth", (max(gammas) / 2, start), (0, 4))
    if applied is not None:
        gamma, loss = applied
        axes.axvline(gamma, color=CHOSEN, linewidth=1, alpha=0.5)
        axes.plot([gamma], [loss], marker="o", markersize=9, color=CHOSEN, zorder=4)
        axes.annotate(f"γ = {gamma:.3g} applied", (gamma, 0.93), (5, 0), xycoords=("data", "axes fraction"),
                      textcoords="offset points", fontsize=8.5, color=CHOSEN, fontweight="bold")  # fmt: skip
    if best not in (0.0, 0.0 if applied is None else applied[0]):
        note(f"best: {best:.3g}", (best, min(losses)), (0, -13))
    lowest = min(losses)
    low = min(lowest, *eval_losses)
    high = min(max(losses), max(start, eval_losses[0]) + 2.5 * (start - lowest) + 1e-12)
    margin = 0.2 * max(high - low, 1e-3 * abs(start), 1e-12)
    axes.set_ylim(low - margin, high + margin)
    axes.set_ylabel("held-out loss (train mode)", fontsize=8.5, color=MUTED)
    _frame(axes, "line search", "γ: scale of the new outgoing weights and of δW")


def history_panels(
    figure: Figure,
    steps: Sequence[int],
    parameters: Sequence[tuple[int, int]],
    losses: Sequence[tuple[float, float]],
    grown: Sequence[bool],
) -> None:
    """Parameters and held-out losses before and after each growth (`grown`: whether it added units) over the steps."""
    left, right = figure.subplots(1, 2)
    _frame(left, "parameters", "optimiser steps")
    _frame(right, "held-out loss (eval mode)", "optimiser steps")
    corners = [(step, after) for step, (_, after), g in zip(steps, parameters, grown, strict=True) if g]
    if corners:
        first = parameters[grown.index(True)][0]
        left.step(*zip((0, first), *corners, strict=True), where="post", color=CHOSEN)
    for step, (before, after), g in zip(steps, losses, grown, strict=True):
        color = CHOSEN if g else REJECTED
        right.plot([step, step], (before, after), color=color, linewidth=1.4)
        right.plot([step], [before], marker="o", markersize=4, color=MUTED)
        right.plot([step], [after], marker="o", markersize=6, color=color)


def _frame(axes: Axes, title: str, label: str, grid: Literal["both", "x"] = "both") -> None:
    _title(axes, title)
    axes.set_xlabel(label, fontsize=8.5, color=MUTED)
    axes.grid(axis=grid, color=GRID, linewidth=0.7)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=8.5, colors=INK, length=0)
    for side, spine in axes.spines.items():
        spine.set_visible(side == "bottom")
        spine.set_color(MUTED)
    axes.locator_params(axis="x", nbins=5)


def _note(axes: Axes, x: float, row: int, text: str) -> None:
    axes.annotate(text, (x, row), (5, 0), textcoords="offset points", va="center", fontsize=8, color=MUTED)


def _legend(columns: int) -> dict[str, Any]:
    return {
        "loc": "lower left", "bbox_to_anchor": (-0.01, 0.985), "ncols": columns, "fontsize": 8, "frameon": False,
        "handlelength": 1.0, "handleheight": 0.8, "columnspacing": 1.1, "borderaxespad": 0.1, "labelcolor": MUTED,
    }  # fmt: skip


def _title(axes: Axes, text: str) -> None:
    axes.set_title(text, loc="left", fontsize=10, color=INK, fontweight="bold", pad=20)
