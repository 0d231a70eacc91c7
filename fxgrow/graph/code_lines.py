"""What a graph computes as lines of text, to tell whether two captures are of the same code.

A line is a call with its literal arguments, after a digest of it and of all that its inputs come from. So lines are the
same in whatever order calls that do not depend on each other were traced. Sizes are those of the capture; dtypes and
devices are left out, which follow the model.
"""

from __future__ import annotations

import enum
import functools
import hashlib
import re
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import Tensor, fx

from fxgrow.graph.graph import caller, lookup
from fxgrow.graph.node_meta import CONDITIONS, NON_PERSISTENT

#: the text of a dtype or device, which follow the model
ANY = "_"
_DIGEST = 12
#: longest text of a value
_LONGEST = 160
_PLACES = re.compile(r"(cpu|cuda|mps|xpu|hpu|meta)(:\d+)?")


def code_lines(gm: fx.GraphModule) -> tuple[str, ...]:
    """Returns the lines of a graph, in its order."""
    digests: dict[str, str] = {}
    lines = []
    for number, node in enumerate(gm.graph.nodes):
        target = _target(gm, node, number)
        conditions = [f"{digests[name]} is {outcome}" for name, outcome in node.meta.get(CONDITIONS, ())]
        data = "\n".join([node.op, caller(node), target, _arguments(node, lambda n: digests[n.name]), *conditions])
        digests[node.name] = hashlib.sha256(data.encode()).hexdigest()[:_DIGEST]
        where = caller(node) if node.op != "call_module" else ""
        text = f"{where}{': ' if where else ''}{target}({_arguments(node, lambda _: '%')})"
        lines.append(f"{digests[node.name]} {text[:_LONGEST]}")
    return tuple(lines)


def code_difference(saved: Collection[str], found: Collection[str]) -> tuple[str, str] | None:
    """Returns the first line of each side that the other does not have, "nothing" where there is none."""
    count, other = (Counter(line[:_DIGEST] for line in lines) for lines in (saved, found))
    if count == other:
        return None
    first = [
        next((line[_DIGEST + 1 :] for line in lines if a[line[:_DIGEST]] > b[line[:_DIGEST]]), "nothing")
        for lines, a, b in ((saved, count, other), (found, other, count))
    ]
    return first[0], first[1]


def value_text(value: Any, node_text: Callable[[fx.Node], str] = str) -> str:
    """Returns a value as text that is the same on every device, in every dtype and version of Python."""
    again = functools.partial(value_text, node_text=node_text)
    if isinstance(value, fx.Node):
        return node_text(value)
    if isinstance(value, (torch.dtype, torch.device)) or (isinstance(value, str) and _PLACES.fullmatch(value)):
        return ANY
    if isinstance(value, enum.Enum):
        return value.name
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return repr(int(value)) if value == value and abs(value) < 2**53 and value == int(value) else repr(float(value))
    if isinstance(value, (tuple, list)):
        return f"({', '.join(map(again, value))})"
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{key}: {again(item)}' for key, item in value.items())}}}"
    if isinstance(value, slice):
        return ":".join(map(again, (value.start, value.stop, value.step)))
    if isinstance(value, functools.partial):
        return f"{again(value.func)}({again(value.args)}, {again(value.keywords)})"
    if isinstance(value, Tensor):
        return f"tensor{list(value.shape)}"
    if callable(value):
        name, code = str(getattr(value, "__name__", type(value).__name__)), getattr(value, "__code__", None)
        if name != "<lambda>" or code is None:
            return name
        return f"lambda: {', '.join([*code.co_names, *(repr(c) for c in code.co_consts if isinstance(c, float))])}"
    known = value is None or isinstance(value, (bool, str, complex, torch.layout, torch.memory_format))
    return repr(value)[:_LONGEST] if known else type(value).__name__


def _arguments(node: fx.Node, node_text: Callable[[fx.Node], str]) -> str:
    parts = [value_text(value, node_text) for value in node.args]
    named = sorted((key, value) for key, value in node.kwargs.items() if key != "inplace")  # memory only
    return ", ".join(parts + [f"{key}={value_text(value, node_text)}" for key, value in named])


def _target(gm: fx.GraphModule, node: fx.Node, number: int) -> str:
    if node.op == "placeholder":
        return f"input {number}"
    if node.op == "get_attr" and node.target in gm.meta.get(NON_PERSISTENT, ()):
        return value_text(lookup(gm, str(node.target)))  # its name may be one that the trace has made
    return value_text(node.target) if callable(node.target) else str(node.target)
