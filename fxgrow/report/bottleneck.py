"""The figures of one width, and the tables that show them."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fxgrow.axes.records import Reason, Width
from fxgrow.report.table import WIDTH, Column, count, few, number, table, text
from fxgrow.rewriting.plan import Plan

LEGEND = (
    "bottleneck: gradient energy that the consumers' existing weights cannot explain; accepted: by a held-out test.\n"
    "predicted gain: decrease of the loss by the best unit; share of loss: by all accepted units, as a part of it.\n"
    "priority: of a few more units here, against the other widths; budgets lean towards priority for the size."
)
COLUMNS = (
    text("width"),
    *map(number, ("size", "step")),
    text("producers → consumers"),
    *map(number, ("bottleneck", "share of\nloss", "predicted\ngain", "priority", "accepted")),
)


@dataclass(frozen=True)
class Bottleneck:
    """What the profile says of one width.

    Attributes:
        width: the width.
        bottleneck: expressivity bottleneck Psi = E|V - dW* h|^2, in squared units of loss per pre-activation: the
            gradient energy of the consumers' outputs that no update of their existing weights can explain
            (Verbockhaven et al. 2024, def. 2.3).
        desired: E|V|^2, all of that energy; `bottleneck / desired` is between 0 and 1.
        gains: predicted decrease of the loss per step of the width (one unit for most), best first. For `tiny` the
            squared singular values (decrease per unit of gamma); with a refit, nats measured on held-out batches.
        singular_values: of the whitened E[b V^T], largest first.
        significant: how many units a held-out test accepts (with no test: how many there are).
        samples: samples that were read.
        positions: sampled positions behind the second moments.
        worth: priority score, for a few more units now and after further training: the predicted decrease by units and
            dW together times the root of Psi. The first alone forgets what training would bring anyway, the second what
            the data can tell; `benchmarks.where_to_grow` compares scores. 0 with no prediction.
        share: predicted decrease by the significant units, as a part of the loss; 0 without a test. It is what the data
            say beyond noise, also where Psi is nearly all of the gradient energy, as at any stationary point.
        random: how many of the `proposed` units have random incoming weights, because the method has none for them.
        tested: whether a held-out test was made.
    """

    width: Width
    bottleneck: float
    desired: float
    gains: tuple[float, ...]
    singular_values: tuple[float, ...]
    significant: int
    samples: int
    positions: int
    worth: float = 0.0
    share: float = 0.0
    random: int = 0
    proposed: int = 0
    tested: bool = False


def bottleneck_table(bottlenecks: Mapping[str, Bottleneck], title: str, units: Mapping[str, int]) -> str:
    """One row per width; the last column, `title`, has the units that are added."""
    rows = [(*_row(b), f"+{units[name]}" if name in units else "·") for name, b in bottlenecks.items()]
    return table([*COLUMNS, number(title)], rows)


def _row(b: Bottleneck) -> tuple[str, ...]:
    width = b.width
    return (
        width.name, str(width.size), str(width.step), f"{few(width.producers, 1)} → {few(width.consumers, 1)}",
        f"{b.bottleneck:.3g}", f"{b.share:.1%}" if b.tested else "·", _gain(b.gains),
        f"{b.worth:.2g}" if b.worth else "·", f"{b.significant} of {b.proposed}" if b.tested else "no test",
    )  # fmt: skip


def _gain(gains: Sequence[float]) -> str:
    if not gains:
        return "·"
    return f"{gains[0]:.4f}" if gains[0] >= 5e-5 else f"{gains[0]:.0e}" if gains[0] > 0 else "0"


def random_units(method: str, bottlenecks: Mapping[str, Bottleneck]) -> list[str]:
    """An empty line, and at which of these widths units are random instead of the method's; nothing where at none."""
    parts = []
    for name, b in bottlenecks.items():
        why = f"it finds {b.proposed - b.random}" if b.proposed > b.random else "it is not defined there, or finds none"
        parts += [f"{name} ({b.random} of {b.proposed}: {why})"] if b.random else []
    if not parts:
        return []
    text = f"random incoming weights instead of those of {method}: {', '.join(parts)}"
    return ["", *textwrap.wrap(text, WIDTH, subsequent_indent="  ")]


def pinned_table(pinned: Mapping[str, Reason]) -> list[str]:
    """An empty line and the widths that cannot change, with the reasons; nothing where there are none."""
    if not pinned:
        return []
    rows = [(name, reason.node, reason.message) for name, reason in pinned.items()]
    return ["", table([text("pinned width"), text("at node"), Column("because", wrap=True)], rows)]


def parameters_added(plan: Plan) -> str:
    """Such as `2 units, 100 → 120 parameters (+20.0%)`."""
    before, after = plan.parameters
    share = f" ({(after - before) / before:+.1%})" if before else ""
    return f"{count(sum(plan.units.values()), 'unit')}, {before:,} → {after:,} parameters{share}"
