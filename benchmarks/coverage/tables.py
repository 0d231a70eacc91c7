"""Records of networks as tables: a row per family, failures by name, pinned parameters by reason."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

Record = Mapping[str, Any]
Column = Callable[[Sequence[Record]], str]
#: checks whose error stands under the same key
CHECKS = {
    "faithful": "graph equals model", "other_size": "another size", "train_step": "train step",
    "into_module": "into module", "onnx": "ONNX", "grown": "grown on batches", "saved": "saved and loaded",
}  # fmt: skip
_PEER = "family | Torch-Pruning builds | runs after | layers narrower (mean where it runs) | fxgrow exact"


def tables(records: Sequence[Record], columns: Mapping[str, Column] | None = None) -> str:
    """A row per family with these columns, or those of `COLUMNS`; then reasons and failures of all networks."""
    columns = COLUMNS if columns is None else columns
    families: dict[str, list[Record]] = defaultdict(list)
    for r in records:
        families[r["family"]].append(r)
    rows = [
        [name, *(of(members) for of in columns.values())] for name, members in (*families.items(), ("all", records))
    ]
    lines = [*_markdown(" | ".join(("family", *columns)), rows), "", *_reasons(records), "", *_failures(records)]
    peers = {n: [r for r in of if "peer_builds" in r] for n, of in families.items()}
    if any(peers.values()):
        lines += ["", *_markdown(_PEER, [_peer(n, of) for n, of in peers.items() if of])]
    return "\n".join([*lines, "", _summary(records)])


def _captured(of: Iterable[Record]) -> list[Record]:
    return [r for r in of if r.get("captured")]


def _growing(of: Iterable[Record]) -> list[Record]:
    return [r for r in _captured(of) if r.get("free")]


def share(key: str, missing: bool = False) -> Column:
    """Networks with something to grow where this worked, of those that have an answer (or of all: `missing`).

    Never of those whose plain network cannot do it either, which are listed.
    """

    def column(of: Sequence[Record]) -> str:
        asked = [r for r in _growing(of) if key not in r.get("not_asked", {})]
        return _of([{key: r.get(key)} for r in asked] if missing else asked, key)

    return column


def _ratios(of: Sequence[Record]) -> str:
    known = [r for r in _captured(of) if r.get("symbolic_trace") is not None]
    ratios = sorted(r["seconds"] / (r["symbolic_trace"] + r["forward"]) for r in known)
    return f"{ratios[len(ratios) // 2]:.1f}, {ratios[-1]:.1f} of {len(ratios)}" if ratios else "·"


def _free(of: Sequence[Record]) -> str:
    free = sum(r.get("free", 0) for r in of)
    pinned = sum(sum(r.get("pinned", {}).values()) for r in of)
    return f"{free}/{free + pinned}"


def _parameters(count: Callable[[Record], int]) -> Column:
    """As a share of all parameters of captured networks."""
    return lambda of: f"{sum(map(count, _captured(of))) / max(1, sum(r['parameters'] for r in _captured(of))):.1%}"


COLUMNS: dict[str, Column] = {
    "captured": lambda of: f"{len(_captured(of))}/{len(of)}",
    "graph equals model": lambda of: _of(_captured(of), "faithful"),
    "exact at every free width": share("widened", missing=True),
    "other sizes": share("other_size"),
    "train step": share("train_step"),
    "into module": share("into_module"),
    "seconds (worst)": lambda of: f"{max((r['seconds'] for r in _captured(of)), default=0.0):.1f}",
    "× symbolic_trace + forward (median, worst)": _ratios,
    "widths free of all": _free,
    "parameters in layers with a free width": _parameters(lambda r: r.get("open", 0)),
    "behind opaque leaves": _parameters(lambda r: sum(r["opaque"].values())),
}


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
        for key, what in CHECKS.items():
            if r.get(key) is False:
                rows.append([name, what, r.get(f"{key}_error", "gradients are not finite")])
            elif key in r.get("not_asked", {}):
                rows.append([name, f"{what}: not asked", f"the network itself cannot: {r['not_asked'][key]}"])
    return _markdown("network | failed at | with", [[_cell(c) for c in row] for row in rows])


def _cell(text: str) -> str:
    return " ".join(str(text).replace("|", "/").split())[:400]


def _markdown(head: str, rows: Sequence[Sequence[str]]) -> list[str]:
    columns = [c.strip() for c in head.split("|")]
    lines = [columns, ["---"] * len(columns), *rows]
    return ["| " + " | ".join(line) + " |" for line in lines]


def _summary(records: Sequence[Record]) -> str:
    captured, growing = _captured(records), _growing(records)
    parameters = sum(r["parameters"] for r in captured)
    mean = sum(r.get("open", 0) / max(1, r["parameters"]) for r in captured) / max(1, len(captured))
    return (
        f"{len(captured)} of {len(records)} networks captured; {sum(bool(r.get('widened')) for r in growing)} of "
        f"{len(growing)} exact with every free width widened at once; "
        f"{sum(r.get('open', 0) for r in captured) / max(1, parameters):.1%} of all parameters in layers with a free "
        f"width ({mean:.1%} in the mean over networks)"
    )
