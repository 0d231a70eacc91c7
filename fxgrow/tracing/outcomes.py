"""Decisions of the model's code on random numbers, as layer drop makes them: `if torch.rand(1) < p: continue`.

A trace takes one outcome for each; `train_eval` merges the traces with the others.
"""

from __future__ import annotations

import operator

import torch
from torch import fx

from fxgrow.errors import CaptureError
from fxgrow.graph.node_functions import draw, holds
from fxgrow.graph.node_meta import set_value

#: file and line
Place = tuple[str, int]
_MOST = 200
_RAND = torch.rand  # while it traces, another one has this name


class Outcomes:
    """The decisions of one trace."""

    def __init__(
        self, followed: bool = True, true_at: frozenset[Place] = frozenset(), other: int | None = None
    ) -> None:
        #: False lets the code fail there
        self.followed = followed
        #: the lines at which they are true, and the number of one that is taken the other way
        self._true_at, self._other = true_at, other
        self._of: dict[fx.Node, bool] = {}
        #: nodes that ask, in order, and where
        self.asked: list[fx.Node] = []
        self.places: list[Place] = []

    def again(self, true_at: frozenset[Place] = frozenset(), other: int | None = None) -> Outcomes:
        """Returns outcomes for another trace: the same, true at more lines, or one taken the other way."""
        return Outcomes(self.followed, self._true_at | true_at, self._other if other is None else other)

    def take(self, node: fx.Node, place: Place | None) -> bool:
        """Returns the outcome of a decision, and records the question."""
        if node not in self._of and not _never_holds(node):
            if len(self.asked) == _MOST:
                raise CaptureError(f"More than {_MOST} branches depend on random numbers. Choose with torch.where.")
            self.places.append(place or ("", 0))
            self._of[node] = (self.places[-1] in self._true_at) is not (len(self.asked) == self._other)
            self.asked.append(node.graph.call_function(holds, (node,)))
            self.asked[-1].meta = dict(node.meta)
            set_value(self.asked[-1], self._of[node])
        return self._of.get(node, False)


def _never_holds(node: fx.Node) -> bool:
    """Whether a number from [0, 1) is compared with a probability of 0: a layer drop that is switched off."""
    source, bound = (*node.args, None, None)[:2]
    if node.target is not operator.lt or bound not in (0, 0.0):
        return False
    while isinstance(source, fx.Node) and source.target in ("item", operator.getitem):
        source = source.args[0]
    if not isinstance(source, fx.Node):
        return False
    name = source.args[1] if source.target is draw else source.target
    return name in (_RAND, "rand", "random") or (name == "uniform_" and len(source.args) == 1 and not source.kwargs)
