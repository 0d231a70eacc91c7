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

Rule = Callable[..., Any]
R = TypeVar("R", bound=Rule)
#: rules that make axes of their own from literal sizes: called also where no input has a width
MAKES_AXES: set[Rule] = set()
_RULES: dict[Any, Rule] = {}


def op(*targets: Any) -> Callable[[R], R]:
    """Enters a rule for module types, functions, method names (`"view"`) or dotted names of functions.

    Args:
        targets: what the rule describes; a dotted name (`"timm.layers.drop.DropPath"`) needs no import.

    Returns:
        A decorator that returns the rule unchanged.
    """

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
        # a subclass with the same forward has the rule of its parent
        cls: Any = type(module)
        rule = next((_RULES[c] for c in cls.__mro__ if c in _RULES and c.forward is cls.forward), None)
        return rule or _RULES.get(f"{cls.__module__}.{cls.__qualname__}")
    if node.op == "call_method" or isinstance(node.target, MethodDescriptorType):
        # `new_zeros` of a parameter that is no proxy is recorded as torch.Tensor.new_zeros
        return _RULES.get(getattr(node.target, "__name__", node.target))
    return _RULES.get(node.target) or _RULES.get(
        f"{getattr(node.target, '__module__', '')}.{getattr(node.target, '__name__', '')}"
    )
