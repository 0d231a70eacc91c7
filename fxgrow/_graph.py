"""What every pass does with a graph: copy it, compile it, and look up its tensors."""

from __future__ import annotations

import copy
import linecache
import warnings
import weakref
from collections.abc import Mapping
from typing import Any

from torch import Tensor, fx, nn

#: key in `node.meta`: the module that a node stands for a part of, where it is no call of that module
OWNER = "fxgrow.owner"


def submodule(root: nn.Module, path: str) -> nn.Module:
    """`root.get_submodule(path)` without its checks, which are most of the time."""
    module = root
    for name in path.split("."):
        module = module._modules[name]  # type: ignore[assignment]
    return module


def lookup(gm: nn.Module, name: str) -> Tensor:
    """The parameter or buffer of that qualified name."""
    module, _, leaf = name.rpartition(".")
    tensor: Tensor = getattr(gm.get_submodule(module), leaf)
    return tensor


def caller(node: fx.Node) -> str:
    """Path of the innermost module whose code made the node."""
    stack = [path for path, _ in node.meta.get("nn_module_stack", {}).values()]
    return stack[-1] if stack else ""


def copy_graph(gm: fx.GraphModule, replaced: Mapping[int, Tensor] | None = None) -> fx.GraphModule:
    """A deep copy without gradients and without the record of earlier growth.

    Args:
        gm: the original.
        replaced: by the id of a tensor of `gm`, what stands in its place, wherever it stands: tied stays tied.
    """
    memo: dict[int, Any] = dict(replaced or {})
    record = gm.meta.pop("fxgrow", None)
    try:
        out = copy.deepcopy(gm, memo)
    finally:
        if record is not None:
            gm.meta["fxgrow"] = record
    # a GraphModule copies only what its graph calls, in that order
    for ours, theirs in ((out._modules, gm._modules), (out._parameters, gm._parameters), (out._buffers, gm._buffers)):
        ours.clear()
        ours.update({name: memo.get(id(value), value) for name, value in theirs.items()})
    out._non_persistent_buffers_set = set(gm._non_persistent_buffers_set)
    for p in out.parameters():
        p.grad = None
    lend_source(out)
    return out


def compile_graph(gm: fx.GraphModule) -> None:
    """Checks an edited graph and makes it the code of its module."""
    lint(gm)
    gm.recompile()
    lend_source(gm)


def lint(gm: fx.GraphModule) -> None:
    """`gm.graph.lint()`, which would have `training` flags be tensors or modules."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*does not reference an nn.Module.*")
        gm.graph.lint()


def lend_source(gm: fx.GraphModule) -> None:
    """Lets the text of a graph's code go with the code.

    torch.fx keeps the text of whatever it has ever compiled, for tracebacks: a run that grows without end would only
    ever add to it.
    """
    code = type(gm).forward.__code__
    weakref.finalize(code, _forget, code.co_filename).atexit = False


def _forget(name: str) -> None:
    linecache.cache.pop(name, None)
    # private; where it is another one the text stays
    loader = getattr(fx.graph_module, "_loader", None)
    getattr(loader, "eval_cache", {}).pop(name, None)
