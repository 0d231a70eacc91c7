"""Which nodes change something: they must not be left out, nor run for nothing."""

from __future__ import annotations

from typing import Any

from torch import fx, nn

from fxgrow.graph.node_functions import in_mode

_PURE_MODULES = ("torch", "_operator", "math", "builtins", "operator")
_STATEFUL = ("batch_norm", "instance_norm", "dropout", "rrelu", "rand", "bernoulli", "normal", "multinomial")
_MUTATING = {"append", "extend", "insert", "pop", "update", "setdefault", "clear", "remove"}
_OPERATORS_WITH_I = {"is_", "is_not", "invert", "inv", "index", "indexOf", "itemgetter"}


def is_pure(node: fx.Node) -> bool:
    """Whether a node only computes its value: no random numbers, no state, nothing in place."""
    if node.op == "get_attr":
        return True
    if node.op == "call_module" or node.is_impure() or "out" in node.kwargs or is_in_place(node):
        return False
    if node.op not in ("call_function", "call_method"):
        return False
    name, home = _name(node)
    if any(word in name for word in _STATEFUL):
        return False
    return home in _PURE_MODULES or node.target is in_mode


def overwrites(node: fx.Node, root: nn.Module) -> list[fx.Node]:
    """Returns the inputs that a node writes into: in-place operators, `inplace=True`, `out=`."""
    written: list[Any] = [node.kwargs.get("out")]
    module = root.get_submodule(str(node.target)) if node.op == "call_module" else None
    if getattr(module, "inplace", False) or is_in_place(node):
        written.append(node.args[0] if node.args else node.kwargs.get("input"))
    return [n for n in node.all_input_nodes if any(n is w or (isinstance(w, tuple) and n in w) for w in written)]


def written_parameters(gm: fx.GraphModule) -> list[nn.Parameter]:
    """Returns the parameters that a graph may write into, `self.codebook.data.copy_(mean)` say; perhaps others too."""
    views = {node: node for node in gm.graph.find_nodes(op="get_attr")}  # what may be a view, and of what
    written = []
    for node in gm.graph.nodes:
        if node.op in ("call_function", "call_method") and node.args and node.args[0] in views:
            views[node] = views[node.args[0]]
        written += [str(views[source].target) for source in overwrites(node, gm) if source in views]
    parameters = dict(gm.named_parameters(remove_duplicate=False))
    return [parameters[name] for name in dict.fromkeys(written) if name in parameters]


def is_in_place(node: fx.Node) -> bool:
    """Whether a node calls a function or a method that writes into its first argument."""
    if node.op not in ("call_function", "call_method"):
        return False
    name, home = _name(node)
    if home == "_operator":
        return name == "setitem" or (name.startswith("i") and name not in _OPERATORS_WITH_I)
    underscore = name.endswith("_") and not name.endswith("__")
    return underscore or name in _MUTATING or bool(node.kwargs.get("inplace"))


def _name(node: fx.Node) -> tuple[str, str]:
    """Returns the name of what a node calls, and the package that it is from."""
    if node.op == "call_method":
        return str(node.target), "torch"
    home = getattr(node.target, "__module__", "") or "torch"
    return getattr(node.target, "__name__", ""), home.split(".")[0]
