"""Proof after every rewrite: shapes are what the axes say, and a function-preserving growth preserves the function."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.passes.shape_prop import _extract_tensor_metadata
from torch.utils import _pytree as pytree

from fxgrow.errors import RewriteError
from fxgrow.graph.evaluate import TOLERANCE, outputs
from fxgrow.graph.node_meta import KEY
from fxgrow.tracing.meta_kernels import fake_tensor, run


class _ShapeProp(fx.Interpreter):
    """`torch.fx.passes.shape_prop.ShapeProp` on fake tensors, keeping `node.meta["val"]`."""

    def __init__(self, gm: fx.GraphModule, mode: FakeTensorMode) -> None:
        super().__init__(gm)
        self.mode = mode

    def run_node(self, n: fx.Node) -> Any:
        if KEY in n.meta:
            # its code may look at data; whatever it touches is pinned, so that its output is what it was
            n.meta["val"] = pytree.tree_map_only(Tensor, _like, n.meta["val"])
            return n.meta["val"]
        value = super().run_node(n)
        n.meta["val"] = value
        if isinstance(value, Tensor):
            n.meta["tensor_meta"] = _extract_tensor_metadata(value)
        return value

    def call_module(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        value = run(self.fetch_attr(target), args, kwargs, self.mode)
        with self.mode:
            return super().call_module(target, args, kwargs) if value is None else value

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        value = run(target, args, kwargs, self.mode)
        with self.mode:
            return super().call_function(target, args, kwargs) if value is None else value

    def call_method(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        value = run(target, args, kwargs, self.mode)
        with self.mode:
            return super().call_method(target, args, kwargs) if value is None else value


def _like(t: Tensor) -> Tensor:
    return torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=t.device)


def check_shapes(gm: fx.GraphModule, expected: Mapping[fx.Node, tuple[int, ...]]) -> None:
    """Runs `gm` on fake tensors, refreshes the nodes' metadata, and compares it with the expected shapes.

    Raises:
        RewriteError: the graph does not run any more, or a shape differs.
    """
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    inputs = [n.meta["val"] for n in gm.graph.nodes if n.op == "placeholder"]
    try:
        with torch.no_grad():
            fresh = pytree.tree_map_only(Tensor, lambda t: fake_tensor(t, mode), inputs)
            _ShapeProp(gm, mode).run(*fresh, enable_io_processing=False)
    except Exception as error:
        raise RewriteError(f"The rewritten graph does not run: {error}. Nothing was changed.") from error
    for node, shape in expected.items():
        value = node.meta.get("val")
        if isinstance(value, Tensor) and tuple(value.shape) != shape:
            raise RewriteError(
                f"Node {node.name!r} ({node.target}) has shape {tuple(value.shape)} after the rewrite, expected "
                f"{shape}. Nothing was changed; please report the model."
            )


def check_function(old: fx.GraphModule, new: fx.GraphModule, inputs: tuple[Any, ...]) -> None:
    """Compares two graphs on the example inputs, in eval mode.

    Raises:
        RewriteError: the outputs differ by more than rounding explains.
    """
    for a, b in zip(outputs(old, inputs), outputs(new, inputs), strict=True):
        if not a.is_floating_point():
            continue
        scale = float(a.abs().max()) if a.numel() else 0.0
        error = float((a - b).abs().max()) if a.numel() else 0.0
        if not error <= TOLERANCE.get(a.dtype, 1e-4) * max(scale, 1e-30):
            raise RewriteError(
                f"The widened graph should compute the same function, but its output differs by {error:.3g} "
                f"(largest output {scale:.3g}). Nothing was changed; please report the model."
            )
