"""Layers under weight normalisation grow as the plain layers they are.

requires: `torch.nn.utils.parametrizations.weight_norm` on a weight, and nothing else on that layer.
ensures:  `folded` gives a copy whose weights are parameters; `unfolded` splits them into length and direction again
          (Salimans and Kingma 2016, eq. 2), under the names they had. The direction then is the weight itself.

Any weight at all has a length and a direction, so nothing between the two needs to know of them.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, fx, nn
from torch.nn.utils.parametrizations import weight_norm

from fxgrow._graph import copy_graph, lookup
from fxgrow._parametrized import normed_dimension

#: per folded layer, the dimension that has one length each
_KEY = "fxgrow.weight_norm"
Index = dict[str, tuple[Tensor | None, ...]]


def folded(gm: fx.GraphModule) -> fx.GraphModule:
    """The graph itself, or a copy without weight normalisation where it has some."""
    found = {name: d for name, m in gm.named_modules() if (d := normed_dimension(m)) is not None}
    if not found:
        return gm
    out = copy_graph(gm)
    for name in found:
        layer = out.get_submodule(name)
        trained = any(p.requires_grad for n, p in layer.named_parameters() if n.startswith("parametrizations"))
        weight = lookup(layer, "weight").detach().clone()
        # by hand: `remove_parametrizations` takes the property off a class that the original shares
        layer.__class__ = type(layer).__bases__[0]
        del layer._modules["parametrizations"]
        layer.register_parameter("weight", nn.Parameter(weight, trained))
    out.meta[_KEY] = found
    return out


def unfolded(grown: fx.GraphModule, index: Mapping[str, tuple[Tensor | None, ...]]) -> tuple[fx.GraphModule, Index]:
    """The graph with weight normalisation where its original had it, and the index by the names there are then."""
    index = dict(index)
    for name, dim in grown.meta.pop(_KEY, {}).items():
        layer = grown.get_submodule(name)
        trained = lookup(layer, "weight").requires_grad
        weight_norm(layer, "weight", dim)
        parts = layer.get_submodule("parametrizations.weight").requires_grad_(trained)
        length, direction = lookup(parts, "original0"), lookup(parts, "original1")
        # columns that start at zero need some direction
        direction.data.masked_fill_(length.detach() == 0, 1.0)
        moved = index.pop(f"{name}.weight", None)
        if moved is not None:
            where = f"{name}.parametrizations.weight.original"
            index[f"{where}1"] = moved
            if dim >= 0 and moved[dim] is not None:
                index[f"{where}0"] = tuple(at if d == dim else None for d, at in enumerate(moved))
    return grown, index
