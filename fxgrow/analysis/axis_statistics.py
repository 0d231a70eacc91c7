"""Statistics of a width (means, variances, lengths) with more units in it, and where their change is undone.

In the state in which new units start, every statistic of the old ones is multiplied by a known factor: a mean of
squares by d / d' where new units are zero, an unbiased variance by (d - 1) / (d' - 1) where they are the mean. Factors
are followed through roots, products and quotients. An epsilon that is added changes with what it is added to, and a
weight that multiplies the result takes the factor back, however the norm is written.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from typing import Any

from torch import fx
from torch.nn import functional as F

from fxgrow.axes.axes import Dims, dims_in, length
from fxgrow.axes.structure import Factor, Invariant, Path, Projection, Structure
from fxgrow.graph.graph import operator_name

MEAN, ZERO, SPLIT, COPY, ANY = "mean", "zero", "split", "copy", "any"
#: products of two splits, whose sum is that of the old units; a parameter whose new entries are not chosen yet
PARTS, PENDING = "parts", "pending"
#: a mean that is zero
BOTH = "both"
#: operators that move entries or mix positions linearly keep the state of a unit
LINEAR = frozenset(
    "view reshape permute transpose contiguous flatten unflatten squeeze unsqueeze expand expand_as cat concat "
    "concatenate stack chunk split split_with_sizes unbind getitem select narrow clone detach to type type_as float "
    "double half bfloat16 repeat repeat_interleave movedim moveaxis swapaxes swapdims t adjoint view_as reshape_as "
    "flip roll neg negative Identity Flatten Unflatten matmul bmm mm einsum mean sum scaled_dot_product_attention "
    "avg_pool1d avg_pool2d avg_pool3d AvgPool1d AvgPool2d AvgPool3d adaptive_avg_pool1d adaptive_avg_pool2d cumsum "
    "AdaptiveAvgPool1d AdaptiveAvgPool2d DropPath stochastic_depth StochasticDepth __getitem__ mT T interpolate "
    "upsample Upsample UpsamplingNearest2d UpsamplingBilinear2d grid_sample index_select gather take_along_dim "
    "index_add index_add_ index_copy index_copy_ scatter_add scatter_add_".split()
)
#: of these, the ones with several tensors
MIXING = frozenset("cat concat concatenate stack matmul bmm mm einsum sum scaled_dot_product_attention".split())
SUM = frozenset("add sub iadd isub subtract add_ sub_ __add__ __radd__ __sub__ rsub".split())
PRODUCT = frozenset("mul div truediv imul itruediv multiply divide mul_ div_ true_divide __mul__ __rmul__".split())
QUOTIENT = frozenset("div truediv itruediv divide div_ true_divide".split())
_CASTS = frozenset("to type type_as float double half bfloat16 contiguous clone detach Identity".split())
#: of these and views, the result has the same values
_SAME_VALUES = _CASTS | frozenset("view reshape unsqueeze expand expand_as getitem".split())
_DEGREES = {"sqrt": 0.5, "rsqrt": -0.5, "square": 2.0, "reciprocal": -1.0, "abs": 1.0, "relu": 1.0}
_LIMITS = frozenset("clamp clip clamp_min clamp_max clamp_ clamp_min_".split())


class Refused(Exception):
    """The function cannot be kept, for the reason in the message, at `node` where it is not the current one."""

    def __init__(self, message: str, node: fx.Node | None = None) -> None:
        super().__init__(message)
        self.node = node


def times(*factors: tuple[Factor, float]) -> Factor:
    """The product of factors, each with its exponent."""
    total: Counter[int] = Counter()
    for factor, exponent in factors:
        for correction, p in factor.items():
            total[correction] += p * exponent  # type: ignore[assignment]
    return {c: p for c, p in total.items() if p}


class AxisStatistics:
    """By what the values that depend on statistics of one variable are multiplied when it changes, node by node.

    Raises `Refused` where a factor is not taken back before something needs the old value.

    Args:
        gm, structure: the graph and its axes.
        invariants: the reductions over the variable.
        states: the state of the new units, of every node before the next one.
        projections: uses of weights by node and input.
    """

    def __init__(
        self,
        gm: fx.GraphModule,
        structure: Structure,
        invariants: Collection[Invariant],
        states: Mapping[fx.Node, str],
        projections: Mapping[tuple[fx.Node, fx.Node], Projection],
    ) -> None:
        self.gm, self.structure, self.states, self.projections = gm, structure, states, projections
        self.reductions = {i.node: i for i in invariants}
        self.factors: dict[fx.Node, Factor] = {}
        self.mean_of: dict[fx.Node, fx.Node] = {}
        #: whether a statistic meets the units again, as in a norm
        self.meets_units = False
        #: results: parameters with their factor and what is added to them, and numbers in arguments
        self.rescaled: dict[str, tuple[Factor, float]] = {}
        self.numbers: list[tuple[fx.Node, Path, Factor]] = []
        self._uses: dict[fx.Node, set[fx.Node]] = {}  # of parameters that are rescaled

    def is_mean_of(self, units: fx.Node, mean: Any) -> bool:
        """Whether a value is the mean over the units of a node."""
        return mean in self.mean_of and self.mean_of[mean] is _uncast(self.gm, units)

    def visit(self, node: fx.Node) -> None:
        """Finds the factor of a node's old entries; what it reads has been visited."""
        if node in self.reductions:
            if isinstance(self.structure.outputs[node], Dims):
                self._reduce(node, node, self._name(node))
            return
        parent = next(iter(node.all_input_nodes), node)
        if parent in self.reductions and not isinstance(self.structure.outputs[parent], Dims):
            self._reduce(node, parent, self._name(parent).split("_")[node.args[1]])  # type: ignore[index]
            return
        inputs = node.all_input_nodes
        name = self._name(node)
        if name in _SAME_VALUES and inputs and inputs[0] in self.mean_of:
            self.mean_of[node] = self.mean_of[inputs[0]]
        scaled = [n for n in inputs if self.factors.get(n)]
        if node in self.states and not all(n in self.states for n in inputs):
            self.meets_units |= any(n in self.factors for n in inputs if n not in self.states)
        if any(n in self.factors for n in inputs):
            self.factors.setdefault(node, {})
        if scaled and next(dims_in(self.structure.outputs[node]), None) is not None:
            self.factors[node] = self._factor(node, name, scaled)

    def finish(self) -> None:
        """Checks that a parameter that was rescaled is so for all of its uses."""
        for node, users in self._uses.items():
            if any(user not in users and isinstance(self.structure.outputs[user], Dims) for user in node.users):
                raise Refused(f"{node.target}, which would have to be rescaled, is used elsewhere too", node)

    def _name(self, node: Any) -> str:
        return operator_name(self.gm, node)

    def _reduce(self, node: fx.Node, reduction: fx.Node, name: str) -> None:
        invariant = self.reductions[reduction]
        source = invariant.source
        state, old = self.states.get(source, ANY), self.factors.get(source, {})
        is_zero, is_mean = state in (ZERO, BOTH), state in (MEAN, BOTH)
        whole = source.meta["val"].numel() == node.meta["val"].numel() * length(invariant.axis)
        new: Factor | None = None
        if name in ("mean", "sum") and (is_mean or is_zero or state == PARTS):
            new = {} if is_mean == (name == "mean") or state == BOTH else {0: 1.0 if name == "mean" else -1.0}
        elif name.endswith("norm") and (
            _order(reduction) == 2 if state == SPLIT else is_zero and _order(reduction) > 0
        ):
            new = {}
        elif name in ("var", "std") and is_mean and whole:
            new = {_correction(reduction): 1.0 if name == "var" else 0.5}
            old = times((old, 2.0)) if name == "var" else old
        if new is None:
            raise Refused("summed or compared over the whole axis")
        if name == "mean" and is_mean and whole:
            self.mean_of[node] = _uncast(self.gm, source)
        self.factors[node] = times((old, 1), (new, 1))

    def _factor(self, node: fx.Node, name: str, scaled: list[fx.Node]) -> Factor:
        first = self.factors[scaled[0]]
        if name in PRODUCT:
            signs = (1, -1 if name in QUOTIENT else 1)
            parts = [(self.factors.get(a, {}), s) for a, s in zip(node.args, signs, strict=False)]  # type: ignore[arg-type]
            factor = times(*parts)
            return {} if factor and self._takes_back(node, times((factor, -1))) else factor
        if name == "addcmul" and not node.kwargs:
            factor = times(*((self.factors.get(a, {}), 1) for a in node.args[1:3]))  # type: ignore[arg-type]
            factor = {} if factor and self._takes_back(node, times((factor, -1))) else factor
            if self.factors.get(node.args[0], {}) == factor:  # type: ignore[arg-type]
                return factor
        if name in _DEGREES or name in ("pow", "pow_"):
            degree = _DEGREES.get(name, node.args[1] if len(node.args) > 1 else node.kwargs.get("exponent"))
            if isinstance(degree, (int, float)) and scaled == [node.args[0]]:
                return times((first, float(degree)))
        if name in SUM or name in _LIMITS or name in ("maximum", "max"):
            return self._sum(node, first)
        if name in LINEAR - MIXING and scaled[0] is node.all_input_nodes[0]:
            return first
        if name in ("cat", "stack", "concat", "sum", "mean") and all(
            self.factors.get(n) == first for n in node.all_input_nodes
        ):
            return first
        if name in ("matmul", "bmm") and node not in {n for n, _ in self.projections}:
            return times(*((self.factors.get(n, {}), 1) for n in node.args[:2]))  # type: ignore[arg-type]
        p = self.projections.get((node, scaled[0]))
        if p is not None and len(scaled) == 1 and self._reads_only(p) and not p.computed:
            self.rescaled[p.weight] = times((first, -1)), 0.0
            return {}
        raise Refused("normalised over the whole axis without a weight that could be rescaled")

    def _reads_only(self, p: Projection) -> bool:
        return len([q for q in self.structure.projections if q.weight == p.weight]) == 1

    def _sum(self, node: fx.Node, factor: Factor) -> Factor:
        """Terms and limits have one factor; numbers get it."""
        for key, term in [*enumerate(node.args), *node.kwargs.items()]:
            if isinstance(term, fx.Node):
                if self.factors.get(term) == factor:
                    continue
                single = term.op == "get_attr" and term.meta["val"].numel() == 1
                if not single or not self._rescale(term, node, factor):
                    raise Refused("normalised over the whole axis without a weight that could be rescaled")
            elif isinstance(term, (int, float)) and key != "alpha":
                self.numbers.append((node, (key,), factor))
        return factor

    def _takes_back(self, node: fx.Node, factor: Factor) -> bool:
        """Whether a weight among the factors of a product can be multiplied by something in place of the product."""
        first, second = node.args[1:3] if self._name(node) == "addcmul" else node.args[:2]
        inverse = times((factor, -1)) if self._name(node) in QUOTIENT else factor
        operands = [(n, f) for n, f in ((first, factor), (second, inverse)) if isinstance(n, fx.Node)]
        return first is not second and any(self._search(n, node, f) for n, f in operands)

    def _search(self, node: fx.Node, user: fx.Node, factor: Factor) -> bool:
        name = self._name(node)
        if node.op == "get_attr":
            return self._rescale(node, user, factor)
        if len(node.users) != 1:
            return False
        if name in PRODUCT:
            return self._takes_back(node, factor)
        if name in LINEAR - MIXING and isinstance(node.args[0], fx.Node):
            return self._search(node.args[0], node, factor)
        numbers = [a for a in node.args if isinstance(a, (int, float))]
        if name != "add" or len(numbers) != 1 or node.kwargs:
            return False
        # `1 + weight`, with nothing but views between
        (inner,) = node.all_input_nodes
        while inner.op != "get_attr" and self._name(inner) in LINEAR - MIXING and len(inner.users) == 1:
            inner, node = inner.all_input_nodes[0], inner
        return inner.op == "get_attr" and self._rescale(inner, node, factor, float(numbers[0]))

    def _rescale(self, node: fx.Node, user: fx.Node, factor: Factor, offset: float = 0.0) -> bool:
        """Enters a parameter for a factor, which all of its uses must have."""
        dims = self.structure.outputs[node]
        if not isinstance(dims, Dims) or dims.parameter is None or not node.meta["val"].is_floating_point():
            return False
        self._uses.setdefault(node, set()).add(user)
        return self.rescaled.setdefault(dims.parameter, (factor, offset)) == (factor, offset)


def _correction(node: fx.Node) -> int:
    """What is subtracted from the number of entries in a variance."""
    given = node.args[2] if len(node.args) > 2 else node.kwargs.get("unbiased", node.kwargs.get("correction", 1))
    return 1 if given is None else int(given)  # type: ignore[arg-type]


def _order(node: fx.Node) -> float:
    """The p of a p-norm."""
    p = node.args[1] if len(node.args) > 1 else node.kwargs.get("p", node.kwargs.get("ord", 2))
    return p if isinstance(p, (int, float)) else 2


def number_filled_in(node: fx.Node, name: str, carriers: Collection[fx.Node]) -> float | None:
    """The number that takes the place of entries, with all units of a position alike; 0 for other paddings."""
    if node.target is F.pad:
        mode, value = (*node.args[2:], *(None,) * 4)[:2]
        constant = node.kwargs.get("mode", mode) in (None, "constant")
        return (node.kwargs.get("value", value) or 0) if constant else 0  # type: ignore[return-value]
    if name[:-2] in ("ZeroPad", "ReflectionPad", "ReplicationPad", "CircularPad"):
        return 0
    if name not in ("masked_fill", "masked_fill_", "where") or node.kwargs:
        return None
    mask = node.args[0 if name == "where" else 1]
    values = [a for a in node.args if not isinstance(a, fx.Node)]
    return None if mask in carriers or len(values) != 1 else values[0]  # type: ignore[return-value]


def parameter_behind(node: fx.Node) -> fx.Node:
    """The parameter of which a node is a view; another node without inputs where it is not one."""
    while node.op != "get_attr" and node.all_input_nodes:
        node = node.all_input_nodes[0]
    return node


def _uncast(gm: fx.GraphModule, node: fx.Node) -> fx.Node:
    while operator_name(gm, node) in _CASTS and node.all_input_nodes:
        node = node.all_input_nodes[0]
    return node
