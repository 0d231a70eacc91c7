"""What the arms say: which were harmed, how often growth declined and why, and the losses of both."""

from __future__ import annotations

import math
import re
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks._command_line import difference, markdown

#: the worst batch against that of the arm that does not grow, which counts as at least `FLOOR`
WORST, FLOOR = 2.0, 0.1
#: the largest parameter of a layer against its old one
LARGEST = 10.0
FINAL = ("ungrown_final", "grown_final")
Record = Mapping[str, Any]


def worst(record: Record) -> float:
    """The worst batch after growth against the other arm's."""
    grown, ungrown = (_largest(record[arm]) for arm in ("grown", "ungrown"))
    return grown / max(ungrown, FLOOR) if math.isfinite(grown) else math.inf


def _largest(losses: Sequence[float]) -> float:
    return max((loss if math.isfinite(loss) else math.inf for loss in losses), default=math.nan)


def harms(record: Record) -> list[str]:
    """What is out of bounds; empty for an arm that growth has not harmed."""
    if "crash" in record:
        return [record["crash"]]
    if "grown" not in record:
        return []
    found = []
    if not all(math.isfinite(x) for x in [*record["grown"], *record["grown_final"].values()]):
        found.append("not finite")
    if (ratio := worst(record)) > WORST:
        found.append(f"worst batch {ratio:.3g} times the other's")
    for when in ("at_growth", "later"):
        layer, ratio = record[when]
        if not ratio <= LARGEST:
            found.append(f"{layer} {ratio:.3g} times its largest {when.replace('_', ' ')}")
    return found


def summary(record: Record) -> str:
    """One line."""
    if "grown" not in record:
        return record.get("crash") or record.get("declined") or "no answer"
    state = f"declined: {kind(record['declined'])}" if record["declined"] else f"{record['units']} units"
    losses, after = record["losses"], record["losses_grown"]
    jumps = ", ".join(f"{mode} {losses[mode]:.3g} -> {after[mode]:.3g}" for mode in losses)
    ratios = f"worst batch x{worst(record):.2f}, parameter x{record['at_growth'][1]:.2f} x{record['later'][1]:.2f}"
    harmed = "; ".join(harms(record))
    return f"{state}; {jumps}; {ratios}; {record['cpu']:.0f} s" + f"; HARMED: {harmed}" * bool(harmed)


def kind(reason: str) -> str:
    """A reason without its numbers and names."""
    return re.sub(r"'[^']*'|[-+]?\d[\d.,e+-]*", "…", re.split(r"[\n;]|\. ", reason)[0])[:90]


def tables(records: Sequence[Record]) -> str:
    """All tables."""
    parts = [_overview(records), _declines(records)]
    if harmed := [[r["family"], r["name"], "; ".join(harms(r))] for r in records if harms(r)]:
        parts.append(markdown(["", "arm", "harmed"], harmed))
    if seeds := [r for r in records if r["family"] == "mobilenet" and "grown" in r]:
        parts.append(_mobilenet(seeds))
    unstable = [r["name"] for r in records if "ungrown" in r and not math.isfinite(_largest(r["ungrown"]))]
    parts.append(f"not finite without growth: {', '.join(unstable) or 'none'}")
    return "\n\n".join(parts)


def _overview(records: Sequence[Record]) -> str:
    rows = []
    for field in ("family", "optimizer", "stage", "samples"):
        for value in dict.fromkeys(str(r[field]) for r in records if field in r):
            rows.append(_row(value, [r for r in records if str(r.get(field)) == value]))
    head = ["", "arms", "grew", "declined", "harmed", "worst batch", "largest parameter at growth", "later",
            "eval loss at growth", "train loss at growth", "final eval loss", "s"]  # fmt: skip
    note = (
        "Against the arm that does not grow, over arms that grew: the largest ratio; of losses the median and largest."
    )
    return f"{note}\n\n{markdown(head, [*rows, _row('all', records)])}"


def _row(name: str, records: Sequence[Record]) -> list[str]:
    grew = [r for r in records if r.get("units") and "grown" in r]
    counts = [
        len(records),
        len(grew),
        sum(bool(r.get("declined")) for r in records),
        sum(bool(harms(r)) for r in records),
    ]
    tops = [[worst(r) for r in grew], *([r[when][1] for r in grew] for when in ("at_growth", "later"))]
    pairs = [[(r["losses_grown"][m], r["losses"][m]) for r in grew] for m in ("eval", "train")]
    pairs.append([(r["grown_final"]["eval"], r["ungrown_final"]["eval"]) for r in grew])
    ratios = [[a / max(b, FLOOR) if math.isfinite(a) else math.inf for a, b in part] for part in pairs]
    seconds = sum(r.get("cpu", r["wall"]) for r in records) / max(1, len(records))
    losses = [f"{statistics.median(part):.2f}, {max(part):.2f}" if part else "" for part in ratios]
    return [name, *map(str, counts), *(f"{max(part):.2f}" if part else "" for part in tops), *losses, f"{seconds:.0f}"]


def _declines(records: Sequence[Record]) -> str:
    reasons = Counter(kind(r["declined"]) for r in records if r.get("declined"))
    return markdown(["declined because", "arms"], [[reason, str(count)] for reason, count in reasons.most_common()])


def _mobilenet(records: Sequence[Record]) -> str:
    rows = [
        [r["name"], str(r.get("units")), *(f"{r[arm][mode]:.3f}" for mode in ("eval", "train") for arm in FINAL)]
        for r in records
    ]
    ungrown, grown = ([r[arm]["eval"] for r in records] for arm in FINAL)
    head = ["seed", "units", "final eval loss, ungrown", "grown", "train loss, ungrown", "grown"]
    return f"{markdown(head, rows)}\n\ngrown minus ungrown, eval: {difference(grown, ungrown, 3)}"
