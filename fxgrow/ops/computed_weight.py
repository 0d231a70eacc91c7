"""Weights that the graph computes from parameters: `F.linear(h, w.t())`, `self.weight * self.scale`, masks, norms.

The axes of such a weight are known, so that the parameter can grow through them. What is left to find is which
dimension of the parameter each axis is, and what new entries of the parameter become in the weight: columns of a
consumer must start at zero, rows of a producer under a norm at zero or at the mean.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import fx, nn

from fxgrow.axes.axes import Axis, Dims, axes_in, length, variables
from fxgrow.axes.structure import Structure
from fxgrow.graph.graph import lookup, operator_name
from fxgrow.graph.purity import overwrites

#: what new entries along an axis keep on their way into the weight: means over units (and zeros), zeros only, nothing
MEAN, ZERO, NOTHING = "mean", "zero", "nothing"
KEPT = (NOTHING, ZERO, MEAN)
_MOVES = frozenset("t T mT transpose permute swapaxes swapdims movedim moveaxis".split())
_SAME = frozenset("contiguous detach clone to type type_as float double half bfloat16 data Identity".split())
_LINEAR = _MOVES | _SAME | frozenset(
    "view reshape view_as reshape_as flatten unflatten squeeze unsqueeze expand expand_as neg negative repeat "
    "view_as_complex view_as_real real imag getitem __getitem__ chunk split unbind select narrow "
    "flip roll sum mean".split()
)  # fmt: skip
_SUM = frozenset("add sub subtract __add__ __radd__ complex".split())
_JOINS = frozenset("stack cat concat concatenate in_mode".split())
_PRODUCT = frozenset("mul multiply __mul__ __rmul__".split())
_QUOTIENT = frozenset("div truediv divide true_divide".split())
#: elementwise functions that are zero at zero
_ODD = frozenset("relu relu_ tanh sin asin atan abs sign round square dropout Dropout hardtanh".split())
_PASSES = _LINEAR | _SUM | _PRODUCT | _QUOTIENT | _JOINS | _ODD | {"normalize", "pad"}


class Origin(NamedTuple):
    """A parameter from which a weight is computed."""

    name: str
    #: the parameter's dimensions that are the wanted ones of the weight, and what those keep
    dims: tuple[int, ...]
    keeps: tuple[str, ...]
    #: whether the weight has the parameter's entries
    same_entries: bool = True
    #: by what they are multiplied, where the weight is otherwise the parameter or its transpose
    scale: float | None = 1.0


class NotFollowed(Exception):
    """Why a weight cannot be followed to a parameter."""


def find_origins(structure: Structure, gm: fx.GraphModule, node: fx.Node, wanted: Sequence[int]) -> list[Origin]:
    """The parameters from which a weight is computed, with its dimensions `wanted`; raises `NotFollowed` for none.

    A vector, which is a bias, must come from one.
    """
    nodes = _before(node)
    layers = {p.node for p in structure.projections}
    if any(n in layers for n in nodes):
        raise NotFollowed("the weight is computed by other layers")
    if any(n in overwrites(user, gm) for n in nodes for user in n.users):
        raise NotFollowed("the weight is changed in place")
    names = {n: operator_name(gm, n) for n in nodes}
    leaves = [n for n in nodes if n.op == "get_attr" and isinstance(structure.outputs[n], Dims)]
    moves = any(name in _MOVES for name in names.values())
    dims = {leaf: _dimensions(structure.outputs[leaf], structure.outputs[node], wanted, moves) for leaf in leaves}
    known = {leaf: d for leaf, d in dims.items() if d and isinstance(lookup(gm, str(leaf.target)), nn.Parameter)}
    # of several those that are terms or factors; what shapes them, as a logarithm of a scale does, is no weight
    found = {leaf: d for leaf, d in known.items() if node in _reached(leaf, nodes, names)} or known
    if not found or len(found) > 1 == len(wanted):
        raise NotFollowed(f"the weight is computed from {', '.join(str(n.target) for n in leaves) or 'no parameter'}")
    kept = {d: _kept(structure, nodes, names, set(found), structure.outputs[node][d]) for d in wanted[1:]}
    scale = _scale(nodes, names, moves and len(structure.outputs[node]) > 2) if len(leaves) == 1 else None
    linear = all(names[n] in _LINEAR for n in nodes if n.op != "get_attr")
    structure.weight_nodes.update(nodes)
    for leaf in leaves:  # a mask's new units are masked as old ones are
        if not isinstance(lookup(gm, str(leaf.target)), nn.Parameter):
            structure.fills.setdefault(structure.outputs[leaf].parameter, "copy")
    origins = []
    for leaf, at in found.items():
        stored = structure.outputs[leaf]
        # of parameters beside each other, each has units of its own
        rows = _kept(structure, nodes, names, set(found), stored[at[0]])
        origins.append(Origin(stored.parameter, at, (rows, *kept.values()), linear, scale))
    return origins


def _scale(nodes: list[fx.Node], names: dict[fx.Node, str], moves: bool) -> float | None:
    """By what a parameter is multiplied, if by nothing but numbers."""
    scale = 1.0
    for n in nodes:
        numbers = [a.meta["val"] if isinstance(a, fx.Node) else a for a in n.args]
        number = next((a for a in numbers if isinstance(a, (int, float))), None)
        if names[n] in ("neg", "negative"):
            scale = -scale
        elif names[n] in _PRODUCT and number is not None:
            scale *= number
        elif names[n] in _QUOTIENT and number and isinstance(n.args[0], fx.Node) and number is numbers[1]:
            scale /= number
        elif n.op != "get_attr" and (names[n] not in _MOVES | _SAME or moves):
            return None
    return scale or None


def _before(node: fx.Node) -> list[fx.Node]:
    """The nodes from which `node` is computed, and itself, in the order of the graph."""
    found = {node: None}
    for n in (queue := [node]):
        queue += [m for m in n.all_input_nodes if m not in found]
        found |= dict.fromkeys(n.all_input_nodes)
    return sorted(found)


def _dimensions(stored: Dims, weight: Dims, wanted: Sequence[int], moves: bool) -> tuple[int, ...] | None:
    """Dimensions of a stored tensor that are these of a weight; None where one is missing or not known."""
    if stored.parameter is None:
        return None
    out: list[int] = []
    for d in wanted:
        axis, units = weight[d], set(variables(weight[d]))
        # a weight may be a part of the parameter, or the parameter of the weight
        found = [(i, set(variables(other))) for i, other in enumerate(stored) if i not in out]
        alike = [i for i, own in found if units & own and (units <= own or own <= units)]
        alike = alike if units else [i for i, _ in found if length(stored[i]) == length(axis)]
        exact = [i for i in alike if stored[i] is axis] or [i for i in alike if i == d and not moves]
        if not exact and len(alike) != 1:
            return None
        out.append((exact or alike)[0])
    return tuple(out)


def _reached(leaf: fx.Node, nodes: list[fx.Node], names: dict[fx.Node, str]) -> set[fx.Node]:
    """What a parameter reaches as a term or factor."""
    reached = {leaf}
    for n in nodes:
        inputs = n.args[:1] if names[n] in _QUOTIENT else n.all_input_nodes
        if names[n] in _PASSES and any(i in reached for i in inputs):
            reached.add(n)
    return reached


def _kept(
    structure: Structure, nodes: list[fx.Node], names: dict[fx.Node, str], leaves: set[fx.Node], axis: Axis
) -> str:
    """What new entries of the leaves along an axis keep on their way to the last node."""
    units = set(variables(axis))
    state: dict[fx.Node, str] = {}
    after = set(leaves)
    for n in nodes:
        after |= {n} if any(i in after for i in n.all_input_nodes) else set()
        if units & set(variables(*axes_in(structure.outputs[n]))):
            inputs = [i for i in n.all_input_nodes if i in state]
            # one with other values than zero must not depend on the new entries: it may be infinite where they are zero
            sound = all(state[i] != NOTHING or i not in after for i in inputs)
            if names[n] == "normalize":  # elsewhere new entries would be divided by a length of zero
                at = n.args[2] if len(n.args) > 2 else n.kwargs.get("dim", 1)
                sound = isinstance(at, int) and bool(units & set(variables(structure.outputs[n][at])))
            state[n] = MEAN if n in leaves else _step(n, names[n], [state[i] for i in inputs], inputs)
            if not sound:
                state[n] = NOTHING
    return state.get(nodes[-1], MEAN)


def _step(node: fx.Node, name: str, states: list[str], inputs: list[fx.Node]) -> str:
    if name in _LINEAR and len(states) == 1:
        return states[0]
    terms = [a for a in node.args if a is not None]
    if states and (name in _JOINS or (name in _SUM and len(node.all_input_nodes) == len(inputs) == len(terms))):
        return min(states, key=KEPT.index)
    if name in _PRODUCT and states:
        return states[0] if len(states) == 1 else ZERO if set(states) != {NOTHING} else NOTHING
    if name in _QUOTIENT and inputs[:1] == [node.args[0]]:
        return states[0] if len(states) == 1 else ZERO if states[0] != NOTHING else NOTHING
    zeros = name == "pad" and len(node.args) < 3 and not node.kwargs.get("value")
    return ZERO if (name in _ODD | {"normalize"} or zeros) and states and set(states) <= {MEAN, ZERO} else NOTHING
