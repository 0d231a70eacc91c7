"""Values of the example itself, as far as they follow from its inputs without parameters.

Code that looks at data makes its sizes from them: a mask from lengths fits the sequences only if they are real.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from fxgrow.graph.purity import is_pure


def example_arguments(node: fx.Node, inputs: Mapping[str, Any]) -> Any:
    """Returns the arguments of a node: those that follow from the inputs real, the others fake.

    Torch functions are called: the caller sees to it that they are not recorded.
    """
    known: dict[fx.Node, Any] = {}

    def value(source: fx.Node) -> Any:
        if source not in known:
            if source.op == "placeholder":
                given = inputs[str(source.target)]
                known[source] = pytree.tree_map_only(torch.Tensor, lambda t: t.detach().clone(), given)
            elif source.op in ("call_function", "call_method") and is_pure(source):
                args, kwargs = fx.map_arg((source.args, source.kwargs), value)
                run: Any = getattr(args[0], str(source.target)) if source.op == "call_method" else source.target
                known[source] = run(*args[source.op == "call_method" :], **kwargs)
            else:
                raise LookupError(f"{source.name} depends on more than the inputs")
        return known[source]

    def argument(source: fx.Node) -> Any:
        try:
            return value(source)
        except Exception:  # it may look at the values of a fake one
            return source.meta["val"]

    return fx.map_arg((node.args, node.kwargs), argument)
