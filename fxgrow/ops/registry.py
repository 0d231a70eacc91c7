"""The table of operators: from modules, functions and methods to rules.

A rule is called with a `Context` and the node's arguments, tensors replaced by their `Dims` and sizes by `SizeExpr`. It
returns the `Dims` of the output and says, through the context, which axes must agree, which weights produce or consume
a width, and which constants of the graph hold a size. Nothing else in the library asks for an operator's type. Whatever
a rule does not mention is pinned: a size that it does not follow, a weight computed in the graph.
"""

from __future__ import annotations

from collections.abc import Callable
from types import FunctionType, MethodDescriptorType
from typing import Any, TypeVar

from torch import fx, nn

from fxgrow.errors import FxgrowError

Rule = Callable[..., Any]
R = TypeVar("R", bound=Rule)
#: rules that make axes of their own from literal sizes: called also where no input has a width
MAKES_AXES: set[Rule] = set()
#: attributes of layers that a growth changes: lengths of axes, and the epsilon of a norm
SIZE_ATTRIBUTES = frozenset({
    "in_features", "out_features", "in1_features", "in2_features", "in_channels", "out_channels", "groups",
    "num_features", "num_channels", "num_groups", "num_parameters", "normalized_shape", "embedding_dim", "input_size",
    "hidden_size", "nf", "nx", "eps",
})  # fmt: skip
_RULES: dict[Any, Rule] = {}


def op(*targets: Any) -> Callable[[R], R]:
    """Enters a rule for module types, functions, method names (`"view"`) or dotted names of functions.

    Args:
        targets: what the rule describes; a dotted name (`"timm.layers.drop.DropPath"`) needs no import.

    Returns:
        A decorator that returns the rule unchanged.

    Raises:
        FxgrowError: a target is neither.
    """
    wrong = [type(t).__name__ for t in targets if not callable(t) and not isinstance(t, str)]
    if wrong or not targets:
        what = f"a {wrong[0]}" if wrong else "nothing"
        raise FxgrowError(f"op(...) is given {what}: give module types, functions, or names of methods or functions.")

    def enter(rule: R) -> R:
        _RULES.update(dict.fromkeys(targets, rule))
        return rule

    return enter


def is_described(target: Any) -> bool:
    """Whether `target` itself has a rule; a layer class entered with `@op` is one node of the graph."""
    return target in _RULES


def described_functions() -> list[Callable[..., Any]]:
    """Python functions outside of torch that have a rule: each is one node, wherever it is imported."""
    return [t for t in _RULES if isinstance(t, FunctionType) and not t.__module__.startswith("torch.")]


def find_rule(node: fx.Node, module: nn.Module | None) -> Rule | None:
    """The rule of a node; `module` is what a `call_module` node calls."""
    if module is not None:
        return _rule_of(module)
    if node.op == "call_method" or isinstance(node.target, MethodDescriptorType):
        # `new_zeros` of a parameter that is no proxy is recorded as torch.Tensor.new_zeros
        return _RULES.get(getattr(node.target, "__name__", node.target))
    return _RULES.get(node.target) or _RULES.get(
        f"{getattr(node.target, '__module__', '')}.{getattr(node.target, '__name__', '')}"
    )


def _rule_of(module: nn.Module) -> Rule | None:
    # a subclass with the same forward has the rule of its parent
    cls: Any = type(module)
    rule = next((_RULES[c] for c in cls.__mro__ if c in _RULES and c.forward is cls.forward), None)
    return rule or _RULES.get(f"{cls.__module__}.{cls.__qualname__}")


def may_change(module: nn.Module, name: str) -> bool:
    """Whether a growth may write an attribute; a layer with somebody's own rule has names of its own for its sizes."""
    if name not in vars(module) or name.startswith("_") or name in vars(nn.Module()):
        return False
    return name in SIZE_ATTRIBUTES or not getattr(_rule_of(module), "__module__", "fxgrow.").startswith("fxgrow.")
