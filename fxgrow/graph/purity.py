"""Which nodes only compute a value, so that they may be left out, or run for nothing."""

from __future__ import annotations

from torch import fx

from fxgrow.graph.node_functions import in_mode

_PURE_MODULES = ("torch", "_operator", "math", "builtins", "operator")
_STATEFUL = ("batch_norm", "instance_norm", "dropout", "rrelu", "rand", "bernoulli", "normal", "multinomial")
_MUTATING = {"append", "extend", "insert", "pop", "update", "setdefault", "clear", "remove"}
_OPERATORS_WITH_I = {"is_", "is_not", "invert", "inv", "index", "indexOf", "itemgetter"}


def is_pure(node: fx.Node) -> bool:
    """Whether a node only computes its value: no random numbers, no state, nothing in place."""
    if node.op == "get_attr":
        return True
    if node.op == "call_method":
        name, home = str(node.target), "torch"
    elif node.op == "call_function" and not node.is_impure():
        name, home = getattr(node.target, "__name__", ""), getattr(node.target, "__module__", "") or "torch"
        if home == "_operator" and (name == "setitem" or (name.startswith("i") and name not in _OPERATORS_WITH_I)):
            return False
    else:
        return False
    changes = name.rstrip("_") != name and not name.endswith("__") and name not in ("and_", "or_")
    changes = changes or name in _MUTATING or "out" in node.kwargs or bool(node.kwargs.get("inplace"))
    if changes or any(word in name for word in _STATEFUL):
        return False
    return home.split(".")[0] in _PURE_MODULES or node.target is in_mode
