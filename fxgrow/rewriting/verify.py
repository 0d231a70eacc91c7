"""Proof after every rewrite: shapes are what the axes say, and a function-preserving growth preserves the function."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from fxgrow.errors import FxgrowError, RewriteError, first_lines
from fxgrow.graph.evaluate import Difference, WithoutDropout, difference, eval_outputs
from fxgrow.graph.graph import lookup
from fxgrow.graph.node_meta import OPAQUE, set_value
from fxgrow.tracing.fake_values import FakeRunner


def _value(gm: fx.GraphModule, node: fx.Node, runner: FakeRunner) -> Any:
    # an opaque node's code may look at data; whatever it touches is pinned, so that its output is what it was
    if node.op == "placeholder" or OPAQUE in node.meta:
        return pytree.tree_map_only(Tensor, runner.fake, node.meta["val"])
    if node.op == "get_attr":
        return runner.fake(lookup(gm, str(node.target)))
    if node.op == "output":
        return fx.node.map_arg(node.args[0], lambda result: result.meta["val"])
    return runner.call(node, gm)


def check_shapes(gm: fx.GraphModule, expected: Mapping[fx.Node, tuple[int, ...]]) -> None:
    """Runs `gm` on fake tensors, refreshes the nodes' metadata, and raises `RewriteError` where a shape differs."""
    runner = FakeRunner()
    try:
        with torch.no_grad():
            for node in gm.graph.nodes:
                set_value(node, _value(gm, node, runner))
    except Exception as error:
        raise RewriteError(f"The rewritten graph does not run: {first_lines(error)}. Nothing was changed.") from error
    for node, shape in expected.items():
        value = node.meta.get("val")
        if isinstance(value, Tensor) and tuple(value.shape) != shape:
            raise RewriteError(
                f"Node {node.name!r} ({node.target}) has shape {tuple(value.shape)} after the rewrite, expected "
                f"{shape}. Nothing was changed; please report the model."
            )


def check_function(old: fx.GraphModule, new: fx.GraphModule, inputs: tuple[Any, ...]) -> None:
    """Raises `RewriteError` where outputs in eval mode differ by more than rounding explains.

    Dropout in eval mode (Monte Carlo dropout) has other masks where it is wider: such networks are compared without it.
    """
    differs = _first_difference(old, new, inputs)
    if differs is not None:
        with WithoutDropout():
            differs = _first_difference(old, new, inputs)
    if differs is not None:
        raise RewriteError(
            f"The widened graph should compute the same function, but its output differs by {differs}. Nothing was "
            "changed; please report the model."
        )


def _first_difference(old: fx.GraphModule, new: fx.GraphModule, inputs: tuple[Any, ...]) -> Difference | None:
    """Returns the first difference that rounding does not explain."""
    try:
        outputs = eval_outputs(old, inputs)
    except FxgrowError:
        raise
    except Exception as error:
        raise RewriteError(f"The model fails on its example inputs in eval mode: {first_lines(error)}.") from error
    pairs = zip(outputs, eval_outputs(new, inputs), strict=True)
    found = (difference(output, expected) for expected, output in pairs if expected.is_floating_point())
    return next((differs for differs in found if not differs.is_rounding), None)
