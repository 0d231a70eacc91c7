"""Pictures of a profile and of a growth, with matplotlib and no global state of pyplot."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from fxgrow.errors import MissingExtraError
from fxgrow.report.table import shorten

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from fxgrow.pipeline.growth_record import Growth
    from fxgrow.pipeline.profile_record import Profile
    from fxgrow.training.history import History


INK, MUTED, GRID = "#22303c", "#6b7a87", "#e3e8ec"
BOTTLENECK, EXPRESSIBLE = "#c8553d", "#f0d3c9"
CHOSEN, ACCEPTED, REJECTED = "#1b7a6e", "#8cc5bc", "#dfe4e7"
#: names on the axes are at most so long
NAME = 26


def plot_profile(profile: Profile, path: str | None = None) -> Figure:
    """Per width: bars of the bottleneck Psi within E|V|^2, and of the predicted gains of its units.

    Args:
        profile: from `fxgrow.profile`.
        path: file to write; the format follows its ending.

    Returns:
        The figure, independent of pyplot.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    figure = _figure(2, len(profile))
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=(1, 1.15))
    _bottlenecks(left, profile)
    _gains(right, profile, None)
    _title(figure, f"fxgrow profile · {profile.method.name} · loss {profile.loss:.4f} over {profile.samples:,} samples")
    return _written(figure, path)


def plot_growth(growth: Growth, path: str | None = None) -> Figure:
    """Bars of the bottleneck, of gains with the units that were added, and the held-back loss along gamma.

    Args:
        growth: the record at `grown.meta["fxgrow"]`.
        path: file to write; the format follows its ending.

    Returns:
        The figure, independent of pyplot.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    figure = _figure(3, len(growth.profile))
    left, middle, right = figure.subplots(1, 3, width_ratios=(1, 1.15, 1.25))
    middle.sharey(left)
    _bottlenecks(left, growth.profile)
    _gains(middle, growth.profile, growth.plan.units)
    _line_search(right, growth)
    before, after = growth.plan.parameters
    what = f"{before:,} → {after:,} parameters" if growth.plan.units else "nothing added"
    losses = [f"{mode} loss {b:.4f} → {a:.4f}" for mode, (b, a) in growth.losses.items()]
    _title(figure, " · ".join([f"fxgrow growth · {growth.plan.method}", what, *losses]))
    return _written(figure, path)


def _figure(panels: int, rows: int) -> Figure:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingExtraError("plots need matplotlib: pip install fxgrow[report]") from error
    height = max(3.3, 1.6 + 0.34 * rows)
    return Figure(figsize=(4.6 * panels, height), dpi=130, layout="constrained", facecolor="white")


def _bottlenecks(axes: Axes, profile: Profile) -> None:
    found = list(profile.values())
    rows = range(len(found))
    axes.barh(rows, [b.desired for b in found], 0.62, color=EXPRESSIBLE, label="existing weights can")
    axes.barh(rows, [b.bottleneck for b in found], 0.62, color=BOTTLENECK, label="they cannot: Ψ")
    for row, b in enumerate(found):
        share = b.bottleneck / b.desired if b.desired > 0 else 0.0
        _note(axes, b.desired, row, f"{b.bottleneck:.3g}  ({share:.0%})")
    axes.set_yticks(list(rows), [f"{shorten(name, NAME)}  [{b.width.size}]" for name, b in profile.items()])
    axes.invert_yaxis()
    _bars(
        axes,
        "expressivity bottleneck",
        "what the loss asks of the consumers, E|V|²",
        max((b.desired for b in found), default=0.0),
    )
    axes.legend(**_legend(2))


def _gains(axes: Axes, profile: Profile, added: Mapping[str, int] | None) -> None:
    """One segment per unit; in a growth the units that were added stand out."""
    for row, (name, b) in enumerate(profile.items()):
        start = 0.0
        for i, gain in enumerate(b.gains):
            accepted = i < b.significant
            chosen = accepted if added is None else i < added.get(name, 0)
            color = CHOSEN if chosen else ACCEPTED if accepted else REJECTED
            axes.barh(row, gain, 0.62, left=start, color=color, edgecolor="white", linewidth=0.8)
            start += gain
        text = f"{b.significant} of {len(b.gains)} accepted" if added is None else f"+{added.get(name, 0)}"
        _note(axes, start, row, text if b.gains else "no prediction")
    unit = "nats" if profile.method.needs.refit else "per unit of γ"
    _bars(
        axes,
        "predicted gain per unit",
        f"decrease of the loss, {unit}",
        max((sum(b.gains) for b in profile.values()), default=0.0),
    )
    axes.tick_params(labelleft=False)
    kinds = {"accepted": CHOSEN} if added is None else {"added": CHOSEN, "accepted": ACCEPTED}
    _swatches(axes, {**kinds, "not accepted": REJECTED})


def _line_search(axes: Axes, growth: Growth) -> None:
    search = growth.search
    axes.set_title("line search", loc="left", fontsize=10, color=INK, fontweight="bold", pad=20)
    if search is None:
        axes.axis("off")
        axes.text(0.5, 0.5, growth.declined or "no line search", ha="center", va="center", color=MUTED, wrap=True)
        return
    start = search.losses[0]
    axes.axhline(start, color=MUTED, linewidth=0.9, linestyle=(0, (4, 3)))
    axes.plot(search.gammas, search.losses, color=INK, linewidth=1.4, marker="o", markersize=4, zorder=3)
    if search.eval_losses != search.losses:
        axes.plot(search.gammas, search.eval_losses, color=MUTED, linewidth=1.2, marker="o", markersize=3, zorder=2)
        axes.annotate("eval mode", (search.gammas[-1], search.eval_losses[-1]), (0, -12), textcoords="offset points",
                      ha="center", fontsize=8, color=MUTED)  # fmt: skip
    axes.annotate("without growth", (max(search.gammas) / 2, start), (0, 4), textcoords="offset points",
                  ha="center", fontsize=8, color=MUTED)  # fmt: skip
    chosen = growth.plan.scale
    if growth.plan.units:
        axes.axvline(chosen, color=CHOSEN, linewidth=1, alpha=0.5)
        axes.plot([chosen], [growth.losses["train"][1]], marker="o", markersize=9, color=CHOSEN, zorder=4)
        axes.annotate(f"γ = {chosen:.3g} applied", (chosen, 0.93), (5, 0), xycoords=("data", "axes fraction"),
                      textcoords="offset points", fontsize=8.5, color=CHOSEN, fontweight="bold")  # fmt: skip
    if search.best not in (0.0, chosen):
        axes.annotate(f"best: {search.best:.3g}", (search.best, min(search.losses)), (0, -13),
                      textcoords="offset points", ha="center", fontsize=8, color=MUTED)  # fmt: skip
    lowest = min(search.losses)
    low = min(lowest, *search.eval_losses)
    high = min(max(search.losses), max(start, search.eval_losses[0]) + 2.5 * (start - lowest) + 1e-12)
    margin = 0.2 * max(high - low, 1e-3 * abs(start), 1e-12)
    axes.set_ylim(low - margin, high + margin)
    axes.set_xlabel("γ: scale of the new outgoing weights and of δW", fontsize=8.5, color=MUTED)
    axes.set_ylabel("held-back loss (train mode)", fontsize=8.5, color=MUTED)
    axes.grid(color=GRID, linewidth=0.7)
    _frame(axes)


def _bars(axes: Axes, title: str, label: str, longest: float) -> None:
    axes.set_title(title, loc="left", fontsize=10, color=INK, fontweight="bold", pad=20)
    axes.set_xlabel(label, fontsize=8.5, color=MUTED)
    axes.set_xlim(0, 1.32 * longest or 1.0)
    axes.grid(axis="x", color=GRID, linewidth=0.7)
    _frame(axes)


def _frame(axes: Axes) -> None:
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


def _swatches(axes: Axes, kinds: Mapping[str, str]) -> None:
    from matplotlib.patches import Patch

    axes.legend(handles=[Patch(color=color, label=label) for label, color in kinds.items()], **_legend(len(kinds)))


def _title(figure: Figure, text: str) -> None:
    figure.suptitle(text, x=0.008, ha="left", fontsize=11, color=INK)


def _written(figure: Figure, path: str | None) -> Figure:
    if path is not None:
        figure.savefig(path)
    return figure


def plot_history(history: History, path: str | None = None) -> Figure:
    """Parameters over steps, and the held-back loss before and after each growth.

    Args:
        history: of a `Grower`.
        path: file to write; the format follows its ending.

    Returns:
        The figure, independent of pyplot.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    figure = _figure(2, 4)
    left, right = figure.subplots(1, 2)
    grown = [e for e in history if e.declined is None]
    for axes, title in ((left, "parameters"), (right, "held-back loss (eval mode)")):
        axes.set_title(title, loc="left", fontsize=10, color=INK, fontweight="bold", pad=20)
        axes.set_xlabel("optimiser steps", fontsize=8.5, color=MUTED)
        axes.grid(color=GRID, linewidth=0.7)
        _frame(axes)
    if grown:
        steps = [0, *(e.step for e in grown)]
        left.step(steps, [grown[0].parameters[0], *(e.parameters[1] for e in grown)], where="post", color=CHOSEN)
    for e in history:
        color = CHOSEN if e.declined is None else REJECTED
        right.plot([e.step, e.step], e.loss, color=color, linewidth=1.4)
        right.plot([e.step], [e.loss[0]], marker="o", markersize=4, color=MUTED)
        right.plot([e.step], [e.loss[1]], marker="o", markersize=6, color=color)
    declined = len(history) - len(grown)
    _title(figure, f"fxgrow · {len(grown)} growths, {declined} declined · {history.seconds:.1f} s growing")
    return _written(figure, path)
