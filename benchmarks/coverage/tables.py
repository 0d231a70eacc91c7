"""Records of networks as tables: a row per family, failures by name, pinned parameters by reason."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

Record = Mapping[str, Any]
_HEAD = (
    "family | captured | exact at every free width | other sizes | train step | into module | seconds (worst) | "
    "× symbolic_trace + forward (median, worst) | widths free of all | parameters in layers with a free width | "
    "behind opaque leaves"
)
_PEER = "family | Torch-Pruning builds | runs after | layers narrower (mean where it runs) | fxgrow exact"


def tables(records: Sequence[Record]) -> str:
    families: dict[str, list[Record]] = defaultdict(list)
    for r in records:
        families[r["family"]].append(r)
    rows = [_row(name, of) for name, of in families.items()]
    lines = [*_markdown(_HEAD, [*rows, _row("all", records)]), "", *_reasons(records), "", *_failures(records)]
    peers = {n: [r for r in of if "peer_builds" in r] for n, of in families.items()}
    if any(peers.values()):
        lines += ["", *_markdown(_PEER, [_peer(n, of) for n, of in peers.items() if of])]
    return "\n".join([*lines, "", _summary(records)])


def _row(name: str, of: Sequence[Record]) -> list[str]:
    captured = [r for r in of if r.get("captured")]
    growing = [r for r in captured if r.get("free")]
    ratios = sorted(
        r["seconds"] / (r["symbolic_trace"] + r["forward"]) for r in captured if r.get("symbolic_trace") is not None
    )
    parameters = sum(r["parameters"] for r in captured)
    pinned = [sum(r["pinned"].values()) for r in captured if "pinned" in r]
    worst = max((r["seconds"] for r in captured), default=0.0)
    return [
        name,
        f"{len(captured)}/{len(of)}",
        f"{sum(bool(r.get('widened')) for r in growing)}/{len(growing)}",
        _of(growing, "other_size"),
        _of(growing, "train_step"),
        _of(growing, "into_module"),
        f"{worst:.1f}",
        f"{ratios[len(ratios) // 2]:.1f}, {ratios[-1]:.1f} of {len(ratios)}" if ratios else "·",
        f"{sum(r.get('free', 0) for r in captured)}/{sum(r.get('free', 0) for r in captured) + sum(pinned)}",
        f"{sum(r.get('open', 0) for r in captured) / max(1, parameters):.1%}",
        f"{sum(sum(r['opaque'].values()) for r in captured) / max(1, parameters):.1%}",
    ]


def _of(records: Iterable[Record], key: str) -> str:
    known = [bool(r[key]) for r in records if key in r]
    return f"{sum(known)}/{len(known)}"


def _peer(name: str, of: Sequence[Record]) -> list[str]:
    shares = [r["peer_narrower"] for r in of if r["peer_runs"]]
    growing = [r for r in of if r.get("free") or not r.get("captured")]
    return [
        name,
        _of(of, "peer_builds"),
        _of(of, "peer_runs"),
        f"{sum(shares) / max(1, len(shares)):.0%}",
        _of([{"x": r.get("widened", False)} for r in growing], "x"),
    ]


def _reasons(records: Sequence[Record]) -> list[str]:
    """Pinned parameters; a message's own numbers and names do not tell reasons apart."""
    share: dict[str, float] = defaultdict(float)
    count: dict[str, set[str]] = defaultdict(set)
    models = [r for r in records if r.get("parameters") and "pinned_parameters" in r]
    for r in models:
        for reason, parameters in r["pinned_parameters"].items():
            reason = re.sub(r"[\w.]+\.(weight|bias)\b", "…", re.sub(r"\d+", "N", reason))
            # each network counts the same, or the largest would be all there is to see
            share[reason] += parameters / r["parameters"] / len(models)
            count[reason].add(f"{r['family']}/{r['name']}")
    rows = [
        [reason, f"{share[reason]:.2%}", f"{len(count[reason])}", ", ".join(sorted(count[reason])[:3])]
        for reason in sorted(share, key=lambda k: -share[k])
    ]
    return _markdown("pinned because | parameters (mean share) | networks | such as", rows[:40])


def _failures(records: Sequence[Record]) -> list[str]:
    rows = []
    for r in records:
        name = f"{r['family']}/{r['name']}"
        if "crash" in r:
            rows.append([name, "crash", r["crash"]])
        if r.get("captured") is False:
            rows.append([name, "not captured", r["capture_error"]])
        if r.get("free") and r.get("widened") is False:
            differs = {k: f"{v:.1g}" for k, v in r.get("differences", {}).items()}
            rows.append([name, "not exact", f"{r.get('error', differs)}; alone: {r.get('blame', {})}"])
        for key, what in (("other_size", "another size"), ("train_step", "train step"), ("into_module", "into module")):
            if r.get(key) is False:
                rows.append([name, what, r.get(f"{key}_error", "gradients are not finite")])
    return _markdown("network | failed at | with", [[_cell(c) for c in row] for row in rows])


def _cell(text: str) -> str:
    return " ".join(str(text).replace("|", "/").split())[:400]


def _markdown(head: str, rows: Sequence[Sequence[str]]) -> list[str]:
    columns = [c.strip() for c in head.split("|")]
    lines = [columns, ["---"] * len(columns), *rows]
    return ["| " + " | ".join(line) + " |" for line in lines]


def _summary(records: Sequence[Record]) -> str:
    captured = [r for r in records if r.get("captured")]
    growing = [r for r in captured if r.get("free")]
    parameters = sum(r["parameters"] for r in captured)
    mean = sum(r.get("open", 0) / max(1, r["parameters"]) for r in captured) / max(1, len(captured))
    return (
        f"{len(captured)} of {len(records)} networks captured; {sum(bool(r.get('widened')) for r in growing)} of "
        f"{len(growing)} exact with every free width widened at once; "
        f"{sum(r.get('open', 0) for r in captured) / max(1, parameters):.1%} of all parameters in layers with a free "
        f"width ({mean:.1%} in the mean over networks)"
    )
