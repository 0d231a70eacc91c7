"""RMSNorm written out in a function, x * rsqrt(x.pow(2).mean(d, keepdim=True) + eps) * weight: found by its nodes.

A module that computes it stays one node (`own_norm`); in the middle of other code only the operators are there.
"""

from __future__ import annotations

import operator
from typing import NamedTuple

import torch
from torch import fx

_SQUARES = {"square", torch.square}
_POWERS = {"pow", torch.pow, operator.pow}
_SUMS = {"add", torch.add, operator.add}
_PRODUCTS = {"mul", torch.mul, operator.mul}
_QUOTIENTS = {"div", torch.div, operator.truediv}
#: what a weight may go through before it multiplies
_PASSES = {"reshape", "view", "unsqueeze", "to", "type_as", "float", operator.getitem}


class RMSNormMatch(NamedTuple):
    """x and the node that divides it; the node that adds eps, where in its arguments, and eps; the weight, if any."""

    source: fx.Node
    norm: fx.Node
    adds: fx.Node
    position: int
    eps: float
    weight: fx.Node | None


def written_rms(mean: fx.Node) -> RMSNormMatch | None:
    """The norm that a mean over one dimension is part of, if it is one and nothing else looks at its parts."""
    square = mean.args[0] if mean.args else None
    if not isinstance(square, fx.Node) or not square.args or not isinstance(square.args[0], fx.Node):
        return None
    source = square.args[0]
    squares = square.target in _SQUARES or (square.target in _POWERS and square.args[1:] == (2,))
    squares = squares or (square.target in _PRODUCTS and square.args == (source, source))
    adds = _only_user(mean)
    if not squares or _only_user(square) is not mean or adds is None or adds.target not in _SUMS or len(adds.args) != 2:
        return None
    position = 1 - adds.args.index(mean)
    eps, root = adds.args[position], _only_user(adds)
    norm = None if root is None else _only_user(root)
    if not isinstance(eps, (int, float)) or root is None or norm is None:
        return None
    if root.target in ("rsqrt", torch.rsqrt):
        divides = norm.target in _PRODUCTS and set(norm.args) == {source, root}
    else:
        divides = root.target in ("sqrt", torch.sqrt) and norm.target in _QUOTIENTS and norm.args == (source, root)
    return RMSNormMatch(source, norm, adds, position, float(eps), _weight(norm)) if divides else None


def _only_user(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _weight(norm: fx.Node) -> fx.Node | None:
    user = _only_user(norm)
    while user is not None and user.target in ("to", "type_as"):
        norm, user = user, _only_user(user)
    if user is None or user.target not in _PRODUCTS:
        return None
    other = next((a for a in user.args if isinstance(a, fx.Node) and a is not norm), None)
    while other is not None and other.op != "get_attr":
        other = other.all_input_nodes[0] if other.target in _PASSES and len(other.users) == 1 else None
    return other if other is not None and len(other.users) == 1 else None
