"""Over every network of torchvision, timm and Hugging Face: what fxgrow reads, what can grow, whether it stays exact.

    python -m benchmarks.coverage [--family torchvision timm hf] [--limit N] [--resume FILE] [--time-limit S]
                                  [--match TEXT] [--peer] [--onnx] [--memory GB]

One process per network, with a time limit; what each stage found is appended to a file of JSON lines at once, so that a
run can be stopped and resumed with the same file. `--tables` prints the tables of a file and runs nothing. Needs timm
and transformers; `--peer` needs torch-pruning.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

from benchmarks._command_line import parse
from benchmarks.coverage.process import SECONDS_LEFT, Findings, options_of, records_of
from benchmarks.coverage.subjects import FAMILIES, build, names
from benchmarks.coverage.tables import tables
from fxgrow.integrations._torchvision import import_torchvision

#: seconds for the peer, which on some networks never ends
PEER_LIMIT = 90.0


def steps(family: str, name: str, options: Mapping[str, Any]) -> Iterator[Findings]:
    """What is measured of one network, in its own process."""
    from benchmarks.coverage.measure import measure

    yield {"stage": "build"}
    yield from measure(build(family, name), options)
    if options["peer"] and family in ("torchvision", "timm"):
        from benchmarks.coverage.peer import prune

        yield {"peer_builds": False, "peer_runs": False, "peer_narrower": 0.0, "peer_error": "no answer",
               SECONDS_LEFT: PEER_LIMIT}  # fmt: skip
        for findings in prune(build(family, name)):
            yield {f"peer_{key}": value for key, value in findings.items()}


def main() -> None:
    parser = options_of(__doc__, "coverage.jsonl", time_limit=300, memory=14)
    parser.add_argument("--family", nargs="+", choices=FAMILIES, default=list(FAMILIES))
    parser.add_argument("--limit", type=int, help="at most so many networks of a family")
    parser.add_argument("--peer", action="store_true", help="also prune torchvision and timm with Torch-Pruning")
    options = parse(parser)
    import_torchvision()
    todo = (
        (family, name, partial(steps, family, name, vars(options)))
        for family in options.family
        for name in [n for n in names(family) if options.match in n][: options.limit]
    )
    print(tables(records_of(todo, options, summary)))


def summary(record: Mapping[str, Any]) -> str:
    if "crash" in record:
        return record["crash"]
    if not record.get("captured"):
        return f"not captured: {record.get('capture_error', '')}"
    share = record["open"] / max(1, record["parameters"])
    state = "exact" if record.get("widened") else f"NOT EXACT {record.get('blame') or record.get('error', '')}"
    if not record["free"]:
        state = "nothing to grow"
    return (
        f"{record['nodes']} nodes, {record['seconds']:.1f} s, {record['free']} free, {share:.0%} of parameters, {state}"
    )


if __name__ == "__main__":
    main()
