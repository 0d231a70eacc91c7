"""What can grow in a model, before any data is read.

requires: a model and example inputs.
ensures:  an `Explanation` of every hidden width: free ones with their size and step, pinned ones with the reason.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import fx, nn

from fxgrow.analysis.analyse import AnalysedGraph, analyse
from fxgrow.axes.axes import variables
from fxgrow.axes.records import Width
from fxgrow.data.argument_checks import checked_arguments
from fxgrow.errors import CaptureError
from fxgrow.graph.graph import lookup
from fxgrow.graph.node_meta import OPAQUE
from fxgrow.report.table import Column, count, few, number, table, text
from fxgrow.tracing.capture import capture


@dataclass(frozen=True, repr=False)
class Explanation:
    """Which widths of a model can grow and which cannot; prints as a table.

    Attributes:
        model: class of the model.
        widths: all hidden widths, in execution order.
        parameters: number of parameters of the model.
        reachable: how many of them are in weights that a free width would make larger.
        places: per pinned width, file and line of the model's code where it is pinned, as far as known.
        opaque: submodules that are one node of the graph because their code cannot be followed, and why.
    """

    model: str
    widths: tuple[Width, ...]
    parameters: int
    reachable: int
    places: dict[str, str]
    opaque: tuple[OpaqueModule, ...] = ()

    def __str__(self) -> str:
        free = [w for w in self.widths if w.pinned is None]
        share = self.reachable / self.parameters if self.parameters else 0.0
        lines = [
            f"{self.model}: {len(free)} of {count(len(self.widths), 'width')} can grow; {share:.1%} of "
            f"{self.parameters:,} parameters are in weights that would grow with them"
        ]
        if self.opaque:
            lines += ["", _opaque_table(self.opaque, self.parameters)]
        if free:
            lines += ["", _free_table(free)]
        if len(free) < len(self.widths):
            lines += ["", self._pinned_table()]
        return "\n".join(lines)

    __repr__ = __str__

    def _pinned_table(self) -> str:
        places = {name: f" ({place})" for name, place in self.places.items()}
        rows = [
            (w.name, str(w.size), f"{w.pinned.message}, at node {w.pinned.node}{places.get(w.name, '')}")
            for w in self.widths
            if w.pinned is not None
        ]
        return table([text("pinned width"), number("size"), Column("because", wrap=True)], rows)


@checked_arguments(CaptureError)
def explain(model: nn.Module, example_inputs: tuple[Any, ...] | dict[str, Any] | None = None) -> Explanation:
    """Lists the widths of a model: which can grow, in what steps, and why the others cannot. Needs no data.

    Args:
        model: any module that `fxgrow.capture` can read, or a captured graph.
        example_inputs: a tuple of positional or a dict of keyword inputs; not needed for a captured graph.

    Returns:
        An `Explanation`; print it.

    Raises:
        CaptureError: the model cannot be traced on these inputs.

    Example:
        >>> import torch, fxgrow
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> print(fxgrow.explain(net, (torch.zeros(1, 4),)))
        Sequential: 1 of 2 widths can grow; 96.6% of 58 parameters are in weights that would grow with them
        <BLANKLINE>
        free width  size  step  producers  → consumers  followers
        ─────────────────────────────────────────────────────────
        0              8     1  0          2
        <BLANKLINE>
        pinned width  size  because
        ─────────────────────────────────────────────────────────────────────
        2                2  a dimension of the model's output, at node output
    """
    gm = capture(model, () if example_inputs is None else example_inputs)
    analysed = analyse(gm)
    widths = tuple(w.width for w in analysed.widths.values())
    reasons = {str(node.target): node.meta[OPAQUE] for node in gm.graph.nodes if OPAQUE in node.meta}
    opaque = tuple(OpaqueModule(n, _count_parameters(gm.get_submodule(n)), why) for n, why in reasons.items())
    name = gm.meta.get("name") or type(model).__name__
    return Explanation(name, widths, _count_parameters(gm), _reachable(analysed), _places(gm, widths), opaque)


def _count_parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def _free_table(free: list[Width]) -> str:
    columns = [text("free width"), number("size"), number("step")]
    columns += map(text, ("producers", "→ consumers", "followers"))
    rows = [
        (w.name, str(w.size), str(w.step), few(w.producers, 1), few(w.consumers, 1), few(w.followers, 1)) for w in free
    ]
    return table(columns, rows)


def _opaque_table(modules: tuple[OpaqueModule, ...], total: int) -> str:
    columns = [text("opaque module"), number("parameters"), number("share"), Column("because", wrap=True)]
    rows = [(m.name, f"{m.parameters:,}", f"{m.parameters / total if total else 0:.1%}", m.reason) for m in modules]
    return table(columns, rows)


def _reachable(analysed: AnalysedGraph) -> int:
    """Parameters that have a free width among their axes."""
    free = {w.var for w in analysed.free_widths}
    growing = [n for n, dims in analysed.structure.parameters.items() if any(v in free for v in variables(*dims))]
    return sum(p.numel() for name in growing if isinstance(p := lookup(analysed.gm, name), nn.Parameter))


def _places(gm: fx.GraphModule, widths: tuple[Width, ...]) -> dict[str, str]:
    lines = {}
    for node in gm.graph.nodes:
        line = re.match(r'File "(.*)", line (\d+)', node.stack_trace or "")
        if line and node.op not in ("placeholder", "output"):
            lines[node.name] = f"{Path(line[1]).name}:{line[2]}"
    return {w.name: lines[w.pinned.node] for w in widths if w.pinned is not None and w.pinned.node in lines}


@dataclass(frozen=True)
class OpaqueModule:
    """A submodule that is one node of the graph because its code cannot be followed."""

    name: str
    parameters: int
    #: the line of the code and what is wrong with it
    reason: str
