"""A profile and a growth as text: what happened first, then one row per width, then why the others are pinned."""

from __future__ import annotations

import statistics
import textwrap
from collections.abc import Mapping
from typing import TYPE_CHECKING

from fxgrow.axes.records import Reason
from fxgrow.errors import PlanError
from fxgrow.report.table import WIDTH, Column, count, flow, table

if TYPE_CHECKING:
    from fxgrow.pipeline.growth_record import Growth
    from fxgrow.pipeline.profile_record import Bottleneck, Profile
    from fxgrow.rewriting.plan import Plan


#: gains of so many units are printed
GAINS = 3


def profile_table(profile: Profile) -> str:
    """The table that `print(profile)` shows.

    Args:
        profile: from `fxgrow.profile`, or the record of one in a `Growth`.

    Returns:
        Lines of at most 120 characters: loss and samples; per width its size and step, what writes and reads it, the
        bottleneck Psi and its share of E|V|^2, predicted gains of the best units, how many units the held-back test
        accepts, and how many `fxgrow.plan` would add with its default budget; then the pinned widths and why.

    Example:
        >>> import torch, fxgrow
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.ReLU(), torch.nn.Linear(3, 2))
        >>> batches = [(torch.randn(32, 4), torch.randn(32, 2)) for _ in range(4)]
        >>> print(fxgrow.profile(net, batches, progress=False))  # doctest: +ELLIPSIS
        Profile by default: loss ... over 128 samples, 1 free width, 1 pinned
        ...
    """
    decided = _suggestion(profile)
    pinned = [w for w in profile.widths if w.pinned is not None]
    lines = [
        f"Profile by {profile.method.name}: loss {profile.loss:.4f} over {profile.samples:,} samples, "
        f"{count(len(profile), 'free width')}, {len(pinned)} pinned",
        "",
        _bottlenecks(profile, "add", {} if decided is None else decided.units),
        "",
    ]
    if decided is not None:
        said = f"with the default budget: {_parameters(decided)}" if decided.units else str(decided)
        lines += [f"add: {said}", ""]
    return "\n".join([*lines, LEGEND, *_pinned({w.name: w.pinned for w in pinned if w.pinned})])


def growth_report(growth: Growth) -> str:
    """The report that `print(grown.meta["fxgrow"])` shows.

    Args:
        growth: the record of one growth.

    Returns:
        Lines of at most 120 characters: parameters, held-back loss before and after, gamma and what the line search
        saw, seconds per stage; then the profile's rows with the units that were added, and the pinned widths.
    """
    plan, search = growth.plan, growth.search
    lines = [f"Growth by {plan.method}: {_parameters(plan) if plan.units else 'nothing added'}"]
    if growth.declined:
        lines.append(f"declined: {growth.declined}")
    elif plan.reason:
        lines += textwrap.wrap(f"less than asked for: {plan.reason}", WIDTH, subsequent_indent=" " * 21)
    lines.append("held-back loss: " + ", ".join(f"{mode} {_change(*loss)}" for mode, loss in growth.losses.items()))
    lines += _predictions(growth)
    if search is not None:
        seen = "  ".join(f"{g:.3g}:\xa0{loss:.4f}" for g, loss in zip(search.gammas, search.losses, strict=True))
        lines.append(f"gamma: {plan.scale:.3g} applied, {search.best:.3g} best on held-back batches")
        lines += textwrap.wrap(f"loss along gamma: {seen}", WIDTH, subsequent_indent=" " * 18)
    elif plan.units:
        lines.append("gamma: function kept; no line search")
    stages = ", ".join(f"{stage} {seconds:.2f}" for stage, seconds in growth.seconds.items())
    if stages:
        lines.append(f"seconds: {sum(growth.seconds.values()):.2f} ({stages})")
    lines += ["", _bottlenecks(growth.profile, "added", plan.units), "", LEGEND, *_pinned(growth.pinned)]
    return "\n".join(lines)


def _predictions(growth: Growth) -> list[str]:
    """What the profile promised and what came of it; over several growths, how well the two go together."""
    pairs = growth.decreases
    if not pairs or not growth.plan.units:
        return []
    predicted, realised = pairs[-1]
    line = f"decrease: {predicted:.4f} predicted, {realised:.4f} realised"
    if len(pairs) > 2 and all(len(set(side)) > 1 for side in zip(*pairs, strict=True)):
        line += f" (correlation over {len(pairs)} growths {statistics.correlation(*zip(*pairs, strict=True)):.2f})"
    return [line]


LEGEND = (
    "Ψ: what the loss asks of the consumers and no change of their weights can express; share: of all it asks for.\n"
    "best gains: predicted decrease of the loss per unit; ok: units that a test on held-back batches accepts.\n"
    "worth: of a few more units, against other widths'; shares of a budget lean towards worth for the size."
)
COLUMNS = (
    Column("width", shrink=True),
    Column("size", right=True),
    Column("step", right=True),
    Column("producers → consumers", shrink=True),
    Column("Ψ", right=True),
    Column("share", right=True),
    Column("best gains", right=True),
    Column("worth", right=True),
    Column("ok", right=True),
)


def _bottlenecks(profile: Profile, title: str, units: Mapping[str, int]) -> str:
    rows = [(*_row(b), f"+{units[name]}" if name in units else "·") for name, b in profile.items()]
    return table([*COLUMNS, Column(title, right=True)], rows)


def _row(b: Bottleneck) -> tuple[str, ...]:
    gains = " ".join(f"{g:.4f}" if g >= 5e-5 else f"{g:.0e}" if g > 0 else "0" for g in b.gains[:GAINS])
    share = f"{b.bottleneck / b.desired:.1%}" if b.desired > 0 else "·"
    width = b.width
    return (
        width.name, str(width.size), str(width.step), flow(width), f"{b.bottleneck:.3g}", share, gains or "·",
        f"{b.worth:.2g}" if b.worth else "·",
        f"{b.significant} of {max(len(b.gains) * b.width.step, b.significant)}",
    )  # fmt: skip


def _suggestion(profile: Profile) -> Plan | None:
    """The default plan; None for the record of a growth, and where the default budget allows no unit."""
    from fxgrow.pipeline.plan import plan

    if profile.gm is None:
        return None
    try:
        return plan(profile)
    except PlanError:
        return None


def _parameters(plan: Plan) -> str:
    before, after = plan.parameters
    share = f" ({(after - before) / before:+.1%})" if before else ""
    return f"{count(sum(plan.units.values()), 'unit')}, {before:,} → {after:,} parameters{share}"


def _change(before: float, after: float) -> str:
    share = f" ({(after - before) / abs(before):+.1%})" if before else ""
    return f"{before:.4f} → {after:.4f}{share}"


def _pinned(pinned: Mapping[str, Reason]) -> list[str]:
    if not pinned:
        return []
    rows = [(name, reason.node, reason.message) for name, reason in pinned.items()]
    columns = [Column("pinned width", shrink=True), Column("at node", shrink=True), Column("because", wrap=True)]
    return ["", table(columns, rows)]
