"""RMSNorm in the middle of other code: `x * rsqrt(x.pow(2).mean(d, keepdim=True) + eps) * weight`, found by its nodes.

A module that computes nothing else is one node (`ops/custom_norm_modules.py`).
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
#: operators that may stand between a weight and the product
_VIEWS = {"reshape", "view", "unsqueeze", "to", "type_as", "float", operator.getitem}


class RMSNormMatch(NamedTuple):
    """The nodes of a norm."""

    source: fx.Node  # x
    norm: fx.Node  # divides x by its root mean square
    eps_at: tuple[fx.Node, int]  # adds eps, and the position of that argument
    eps: float
    weight: fx.Node | None


def match_rms_norm(mean: fx.Node) -> RMSNormMatch | None:
    """The norm that contains this mean over one dimension; None where it is none, or something else reads its parts."""
    square = mean.args[0] if mean.args else None
    if not isinstance(square, fx.Node) or not square.args or not isinstance(square.args[0], fx.Node):
        return None
    source = square.args[0]
    is_square = square.target in _SQUARES or (square.target in _POWERS and square.args[1:] == (2,))
    is_square = is_square or (square.target in _PRODUCTS and square.args == (source, source))
    add = _only_user(mean)
    if not is_square or _only_user(square) is not mean or add is None or add.target not in _SUMS or len(add.args) != 2:
        return None
    position = 1 - add.args.index(mean)
    eps, root = add.args[position], _only_user(add)
    norm = None if root is None else _only_user(root)
    if not isinstance(eps, (int, float)) or root is None or norm is None:
        return None
    if root.target in ("rsqrt", torch.rsqrt):
        divides = norm.target in _PRODUCTS and set(norm.args) == {source, root}
    else:
        divides = root.target in ("sqrt", torch.sqrt) and norm.target in _QUOTIENTS and norm.args == (source, root)
    return RMSNormMatch(source, norm, (add, position), float(eps), _weight(norm)) if divides else None


def _only_user(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _weight(norm: fx.Node) -> fx.Node | None:
    user = _only_user(norm)
    while user is not None and user.target in ("to", "type_as"):
        norm, user = user, _only_user(user)
    if user is None or user.target not in _PRODUCTS:
        return None
    weight = next((a for a in user.args if isinstance(a, fx.Node) and a is not norm), None)
    while weight is not None and weight.op != "get_attr":
        weight = weight.all_input_nodes[0] if weight.target in _VIEWS and len(weight.users) == 1 else None
    return weight if weight is not None and len(weight.users) == 1 else None
