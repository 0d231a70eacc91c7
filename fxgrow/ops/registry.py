"""The one place that knows operators: a table from targets to rules, and what a rule may say.

A rule is called with a `Context` and the node's arguments, tensors replaced by their `Dims`, sizes by `SizeExpr`. It
returns the `Dims` of the output and says, through the context, which axes must agree, which weights write or read a
width, and which constants of the graph hold a size. That is all that widths, statistics and surgery know of an
operator. What a rule does not say pins: a size it was given and did not follow, a weight computed in the graph.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from torch import fx, nn

Rule = Callable[..., Any]
R = TypeVar("R", bound=Rule)
_RULES: dict[Any, Rule] = {}
_RECOGNISED: list[tuple[Callable[[nn.Module], bool], Rule]] = []


def op(*targets: Any) -> Callable[[R], R]:
    """Enters a rule for module types, functions, method names (`"view"`) or dotted names of functions.

    Args:
        targets: what the rule describes. A dotted name (`"timm.layers.drop.DropPath"`) avoids an import.

    Returns:
        A decorator that leaves the rule unchanged.
    """

    def enter(rule: R) -> R:
        for target in targets:
            _RULES[target] = rule
        return rule

    return enter


def recogniser(test: Callable[[nn.Module], bool]) -> Callable[[R], R]:
    """Enters a rule for modules that `test` recognises, of whatever class; such a module stays one node."""

    def enter(rule: R) -> R:
        _RECOGNISED.append((test, rule))
        return rule

    return enter


def recognised(module: nn.Module) -> Rule | None:
    """The rule of a module that is known by what it does."""
    return next((rule for test, rule in _RECOGNISED if test(module)), None)


def is_described(target: Any) -> bool:
    """Whether `target` itself has a rule: a user's own layer, entered with `@op`, stays one node."""
    return target in _RULES


def find_rule(node: fx.Node, module: nn.Module | None) -> Rule | None:
    if module is not None:
        # a subclass that computes the same follows its parent's rule
        kinds = type(module).__mro__
        rule = next((_RULES[k] for k in kinds if k in _RULES and k.forward is kinds[0].forward), None)  # type: ignore[attr-defined]
        return rule or _RULES.get(f"{kinds[0].__module__}.{kinds[0].__qualname__}") or recognised(module)
    if node.op == "call_method":
        return _RULES.get(node.target)
    return _RULES.get(node.target) or _RULES.get(
        f"{getattr(node.target, '__module__', '')}.{getattr(node.target, '__name__', '')}"
    )
