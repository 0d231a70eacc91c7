"""Widths whose new units must start in a known state for the function to stay, and the proof that they do.

A norm keeps its statistics when every new unit is the mean of the old ones (LayerNorm) or zero (RMSNorm). Its output is
then zero, or with one weight for all units the mean again, as the next norm of a post-norm stream needs it. A product
summed over a width (queries and keys) stays when one side is zero, or, where both are divided by their lengths, when a
unit of both is rotated into a plane. States are propagated from writers to invariants; a width that fails is pinned.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional as F

from fxgrow.analysis.axis_statistics import (
    ANY,
    BOTH,
    LINEAR,
    MEAN,
    MIXING,
    PARTS,
    PENDING,
    PRODUCT,
    QUOTIENT,
    SPLIT,
    SUM,
    ZERO,
    AxisStatistics,
    Refused,
    number_filled_in,
    parameter_behind,
)
from fxgrow.axes.axes import Dims, UnitVar, axes_in, resolve, single_variable, variables
from fxgrow.axes.records import Reason
from fxgrow.axes.structure import Factor, Invariant, Path, Projection, Structure
from fxgrow.graph.graph import lookup, operator_name

#: elementwise functions that are zero at zero
_ODD = frozenset(
    "relu relu_ relu6 gelu silu tanh sin asin atan elu celu selu leaky_relu hardswish hardtanh mish softsign erf abs "
    "sign round ReLU ReLU6 GELU SiLU Tanh ELU CELU SELU LeakyReLU Hardswish Hardtanh Mish Softsign PReLU prelu "
    "dropout Dropout square nan_to_num norm var max_pool1d max_pool2d max_pool3d MaxPool1d MaxPool2d MaxPool3d "
    "adaptive_max_pool1d adaptive_max_pool2d AdaptiveMaxPool1d AdaptiveMaxPool2d amax amin".split()
)
_ZEROS = frozenset(("zeros", "new_zeros", "zeros_like"))
#: on a width these are depthwise, and the bias of a new channel is zero
_DEPTHWISE = frozenset("Conv1d Conv2d Conv3d conv1d conv2d conv3d".split())


@dataclass
class InitialState:
    """How the new units of one width start."""

    #: new entries of writers: mean of the old units, zero, each a part of an old one, or copies (of experts)
    kind: str
    #: parameters, and their dimension, with such entries; for a product those of its second operand
    writers: set[tuple[str, int]] = field(default_factory=set)
    #: per writer, the parameter that multiplies it unit by unit before the width
    scales: dict[str, str] = field(default_factory=dict)
    #: weights, and their dimension, that read new units which are zero: any columns are allowed
    free: set[tuple[str, int]] = field(default_factory=set)
    norms: list[Invariant] = field(default_factory=list)
    products: list[Invariant] = field(default_factory=list)
    #: parameters, and numbers in arguments, that a factor multiplies; with what is added to a parameter before
    rescaled: dict[str, tuple[Factor, float]] = field(default_factory=dict)
    #: how new entries of other parameters start
    fills: dict[str, float] = field(default_factory=dict)
    numbers: list[tuple[fx.Node, Path, Factor]] = field(default_factory=list)


def find_initial_states(gm: fx.GraphModule, structure: Structure) -> None:
    """Fills `structure.initial_states` for every variable with an invariant; pins those that cannot meet theirs."""
    invariants: dict[UnitVar, list[Invariant]] = {}
    for invariant in structure.invariants:
        axis = invariant.axis
        alone = len(variables(axis)) == 1 and all(s.var is not None for s in resolve(axis))
        if invariant.kind == "layer":
            alone = single_variable(axis) is not None
        for var in variables(axis):
            if invariant.kind != "product" and not alone:
                var.pinned = var.pinned or Reason("norm", invariant.node.name, "normalised together with other units")
            invariants.setdefault(var, []).append(invariant)
    carriers: dict[UnitVar, list[fx.Node]] = {var: [] for var in invariants}
    for node, value in structure.outputs.items():
        for var in carriers.keys() & variables(*axes_in(value)):
            carriers[var].append(node)
    for var, constraints in invariants.items():
        if var.pinned is None:
            state = _StatePropagation(gm, structure, var, constraints, carriers[var]).run()
            if isinstance(state, Reason):
                var.pinned = state
            else:
                structure.initial_states[var] = state
                structure.fills |= state.fills


def _joint(states: set[str]) -> str:
    """The state of a sum or concatenation."""
    strict = states - {BOTH}
    return ANY if len(strict) > 1 else strict.pop() if strict else BOTH


class _StatePropagation:
    """Propagates the state of one variable's new units through the nodes that carry it."""

    def __init__(
        self, gm: fx.GraphModule, structure: Structure, var: UnitVar, invariants: list[Invariant], nodes: list[fx.Node]
    ) -> None:
        self.gm, self.structure, self.var, self.invariants = gm, structure, var, invariants
        self.carriers = dict.fromkeys(nodes)
        self.norms = {i.node: i for i in invariants if i.kind != "product"}
        self.products = [i for i in invariants if i.kind == "product"]
        self.writers: dict[fx.Node, list[Projection]] = {}
        for p in structure.projections:
            if var in variables(p.out) and var in variables(p.output_axis):
                self.writers.setdefault(p.node, []).append(p)
        self.projections = {(p.node, p.source): p for p in structure.projections}
        self.weighted = {p.node for p in structure.projections}
        #: statistics of weights, over columns that start at zero
        self.of_weights = [i for i in invariants if i.source in structure.weight_nodes]
        reductions = [i for i in invariants if i.kind == "statistic"]
        # a norm without a weight, or of several nodes, changes what is computed from it
        self.follows_factors = bool(reductions) or any(i.weight is None for i in self.norms.values())

    def run(self) -> InitialState | Reason:
        """The initial state in which every invariant holds, or why there is none."""
        reason = Reason("norm", self.invariants[0].node.name, "one width is normalised in different ways")
        refusals = []
        for kind in self._kinds():
            for mean_after_norm in (False, True):  # of norms with one weight for all units
                if mean_after_norm and not any(map(self._is_uniform, self.norms.values())):
                    continue
                self.kind, self.mean_after_norm = kind, mean_after_norm
                state = self._attempt()
                if isinstance(state, InitialState):
                    return state
                refusals.append(state)
        return refusals[0] if refusals else reason

    def _kinds(self) -> list[str]:
        """The states to try, best first."""
        kinds = {i.kind for i in self.invariants}
        if "layer" in kinds:
            return [MEAN] if kinds <= {"layer", "statistic"} else []
        if "rms" in kinds or kinds == {"product"}:
            return [ZERO]
        if "product" in kinds:
            return [SPLIT, ZERO]
        return [ZERO] if "length" in kinds else [MEAN, ZERO]

    def _attempt(self) -> InitialState | Reason:
        self.state: dict[fx.Node, str] = {}
        self.written: dict[fx.Node, list[tuple[str, int]]] = {}
        # where all writers are zero, both operands of products are
        products = [] if self.kind == ZERO and self.norms else self.products
        norms = [i for i in self.norms.values() if i not in self.of_weights]
        self.result = InitialState(self.kind, norms=norms, products=products)
        reductions = [i for i in self.norms.values() if i.kind == "statistic"]
        self.statistics = AxisStatistics(self.gm, self.structure, reductions, self.state, self.projections)
        settable = self._before_products() if products and self.kind == ZERO else self.carriers
        if len(self.of_weights) == len(self.invariants):
            settable = set()
        try:
            for node in self.gm.graph.nodes if self.follows_factors else self.carriers:
                if node in self.carriers:
                    self.state[node] = self._evaluate(node, node in settable)
                if self.follows_factors:
                    self.statistics.visit(node)
            self.statistics.finish()
        except Refused as refusal:
            node = refusal.node or node
            return Reason("reduce" if node in self.statistics.reductions else "norm", node.name, str(refusal))
        if len(reductions) == len(self.invariants) and not self.statistics.meets_units:
            return Reason("reduce", reductions[0].node.name, "summed or compared over the whole axis")
        for product in self.products:
            one_sided = products and self.kind == ZERO
            operands = [product.source] if one_sided else self._inputs(product.node)
            if any(self._settled(n, self.kind) not in (self.kind, PARTS) for n in operands):
                return Reason("reduce", product.node.name, "summed over in a product, and neither side can stay zero")
        readers = [p for p in self.structure.projections if self.var in variables(p.input_axis)]
        if self.products and not products and not readers:
            node = self.products[0].node
            return Reason("reduce", node.name, "summed over in a product of norms: new units that are zero never learn")
        if products and self.kind == ZERO:
            self.result.writers = self._zero_writers()
        self.result.rescaled |= self.statistics.rescaled
        self.result.numbers = self.statistics.numbers
        return self._with_readers(self.invariants[0].node.name)

    def _inputs(self, node: fx.Node) -> list[fx.Node]:
        return [n for n in node.all_input_nodes if n in self.carriers]

    def _name(self, node: fx.Node) -> str:
        return operator_name(self.gm, node)

    def _before_products(self) -> set[fx.Node]:
        """The nodes that the second operands of products are computed from."""
        queue = [product.source for product in self.products]
        for node in queue:
            inputs = self._bias(node) if node in self.writers else self._inputs(node)
            queue += [n for n in inputs if n not in queue]
        return set(queue)

    def _bias(self, node: fx.Node) -> list[fx.Node]:
        """A bias that is computed from several parameters."""
        return [p.bias_node for p in self.writers.get(node, ())[:1] if p.bias_node is not None]

    def _zero_writers(self) -> set[tuple[str, int]]:
        """What must be zero so that the second operands are: of a product one factor, of a sum all terms."""
        queue = [product.source for product in self.products]
        parameters: set[tuple[str, int]] = set()
        for node in queue:
            if node in self.written:
                parameters.update(self.written[node])
                queue += self._bias(node)
                continue
            inputs = self._inputs(node)
            if self._name(node) in PRODUCT:
                inputs = [n for n in inputs if self.state[n] == ZERO][:1]
            queue += [n for n in inputs if n not in queue]
        return parameters

    def _is_uniform(self, norm: Invariant) -> bool:
        """Whether one weight for all units keeps the mean of the units a constant."""
        if norm.kind != "layer" or norm.weight is None:
            return False
        weight = lookup(self.gm, norm.weight).detach()
        rounding = 8 * torch.finfo(weight.dtype).eps
        return weight.device.type != "meta" and bool(weight.max() - weight.min() <= rounding * weight.abs().max())

    def _evaluate(self, node: fx.Node, settable: bool) -> str:
        module = self.gm.get_submodule(str(node.target)) if node.op == "call_module" else None
        if isinstance(module, (nn.RNNBase, nn.RNNCellBase)):
            return ANY  # several weights write it, through gates
        if node in self.writers:
            uses = self.writers[node]
            parameters = [(p.weight, p.out_dim) for p in uses] + [(p.bias, 0) for p in uses if p.bias is not None]
            kept = all(p.keeps == "mean" or (p.keeps == "zero" and self.kind == ZERO) for p in uses)
            kept &= all(self._settled(n, self.kind) in (self.kind, BOTH) for n in self._bias(node))
            return self._written(node, parameters) if settable and kept else ANY
        if node.op == "get_attr":
            return self._parameter(node) if settable or self.of_weights else ANY
        if self._name(node) in _ZEROS:
            # what is written into it later has another state
            kept = all(self._name(u) in MIXING | SUM | PRODUCT for u in node.users)
            return BOTH if kept or len(node.users) == 1 else ANY
        inputs = self._inputs(node)
        name = self._name(node)
        if name in PRODUCT:
            return self._product(list(node.args), name in QUOTIENT)
        if name == "addcmul" and not node.kwargs:
            product = self._product(list(node.args[1:]), False)
            return _joint({product, self._settled(node.args[0], ZERO if product == ZERO else self.kind)})
        linear = name in LINEAR or self._is_identity_dropout(node)
        if linear and len(inputs) == 1:
            return self.state[inputs[0]]
        if name in SUM and len(inputs) == 1 and self.state[inputs[0]] == PENDING:
            return ANY  # `1 + weight`
        others = {self.state[n] for n in inputs} - {PENDING}
        states = {self._settled(n, ZERO if others == {ZERO} and name in SUM else self.kind) for n in inputs}
        if node in self.norms:
            return self._normalised(self.norms[node])
        if linear:
            return _joint(states)
        if name in SUM:
            return self._sum(node, inputs, states)
        if (filled := number_filled_in(node, name, self.carriers)) is not None:
            return _joint(states) if filled == 0 else MEAN if states <= {MEAN, BOTH} else ANY
        if states == {SPLIT} and (name == "square" or (name == "pow" and node.args[1:] == (2,))):
            return PARTS
        # a power below one has no gradient at zero
        power = node.args[1] if name == "pow" and len(node.args) > 1 else 0
        keeps_zero = name in _ODD or name in _DEPTHWISE or (isinstance(power, (int, float)) and power >= 1)
        return ZERO if keeps_zero and states <= {ZERO, BOTH} else ANY

    def _sum(self, node: fx.Node, inputs: list[fx.Node], states: set[str]) -> str:
        terms = [a for a in (*node.args, node.kwargs.get("other")) if isinstance(a, (int, float, fx.Node))]
        others = [a for a in terms if a not in inputs]
        if not others:
            return _joint(states)
        subtracts = len(inputs) == 1 and "sub" in self._name(node) and not node.kwargs
        if states == {MEAN} and subtracts and self.statistics.is_mean_of(inputs[0], others[0]):
            return BOTH
        return MEAN if states <= {MEAN, BOTH} else ANY

    def _parameter(self, node: fx.Node) -> str:
        """A parameter that is added to the stream, such as positions, or to what comes out of a norm."""
        value = self.structure.outputs[node]
        known = isinstance(value, Dims) and value.parameter is not None
        weights = self.weighted | self.structure.weight_nodes
        if self.of_weights and known and all(u in weights for u in node.users):
            at = [(value.parameter, d) for d, axis in enumerate(value) if self.var in variables(axis)]
            columns = {(p.weight, p.in_dim) for p in self.structure.projections}
            return ZERO if len(at) == 1 and at[0] in columns else ANY
        only_weight = all(u in self.norms or u in weights for u in node.users)
        return PENDING if known and not only_weight else ANY

    def _settled(self, node: Any, state: str) -> str:
        """The state of a node; new entries of a parameter are chosen for what it is added to."""
        if self.state.get(node) != PENDING:
            return self.state.get(node, ANY)
        parameter = parameter_behind(node)
        dims = self.structure.outputs[parameter]
        known = isinstance(dims, Dims) and dims.parameter is not None
        at = [d for d, axis in enumerate(dims) if known and self.var in variables(axis)]
        if len(at) == 1 and state == self.kind and dims.parameter not in self.result.fills:
            return self._written(parameter, [(dims.parameter, at[0])])
        if len(at) != 1 or state == self.kind or parameter in self.written:
            return ANY
        self.result.fills[dims.parameter] = 0.0
        return ZERO

    def _written(self, node: fx.Node, parameters: list[tuple[str, int]]) -> str:
        axes = [self.structure.parameters[name][dim] for name, dim in parameters]
        # a mean over a dimension must be the mean over the units, and over nothing else
        if self.kind == MEAN and any(single_variable(axis) is None for axis in axes):
            return ANY
        self.written[node] = parameters
        self.result.writers.update(parameters)
        return self.kind

    def _normalised(self, norm: Invariant) -> str:
        if self.state[norm.source] not in (self.kind, BOTH):
            raise Refused(
                "normalised over the whole axis: new units would change the statistics of the old ones, and what flows "
                "in cannot be kept at " + {MEAN: "their mean", ZERO: "zero", SPLIT: "its length"}[self.kind]
            )
        if self.kind == SPLIT:
            return SPLIT
        if norm.weight is not None:
            self.result.rescaled[norm.weight] = {0: 0.5}, 0.0
        elif norm.kind != "length":
            self.statistics.factors[norm.node] = {0: -0.5}
        if self.mean_after_norm and self._is_uniform(norm):
            self.result.writers |= {(name, 0) for name in (norm.weight, norm.bias) if name is not None}
            return MEAN if norm.bias is not None and bool(lookup(self.gm, norm.bias).any()) else BOTH
        return ZERO

    def _product(self, factors: list[Any], quotient: bool) -> str:
        inputs = list(dict.fromkeys(n for n in factors if n in self.carriers))
        states = {self.state[n] for n in inputs}
        if quotient and inputs != [factors[0]]:
            return ANY  # divided by the units
        squares = factors[0] is factors[1]
        if ZERO in states or (BOTH in states and (squares or len(inputs) > 1)):
            return ZERO
        if states == {SPLIT} and (squares or len(inputs) > 1):
            return PARTS
        if len(inputs) == 1:
            return ANY if squares or states == {PENDING} else states.pop()
        # layer scale: one weight per unit between a single writer and the width
        scale = next((n for n in inputs if self.state[n] == PENDING), None)
        others = [n for n in inputs if n is not scale]
        if self.kind != MEAN or scale is None or len(others) != 1 or self.state[others[0]] != MEAN:
            return ANY
        scale = parameter_behind(scale)
        writer, dims = self._single_writer(others[0]), self.structure.outputs[scale]
        if writer is None or not isinstance(dims, Dims) or dims.parameter is None or len(scale.users) > 1:
            return ANY
        self.result.fills[dims.parameter] = 1.0
        names = {name for p in self.writers[writer] for name in (p.weight, p.bias) if name is not None}
        self.result.scales |= dict.fromkeys(names, dims.parameter)
        return MEAN

    def _single_writer(self, node: fx.Node) -> fx.Node | None:
        """The projection whose output alone becomes `node`, and nothing else."""
        while node not in self.writers:
            inputs = self._inputs(node)
            passes = self._name(node) in LINEAR or self._is_identity_dropout(node)
            if len(inputs) != 1 or not passes or len(node.users) != 1:
                return None
            node = inputs[0]
        return node if len([n for n in node.users if n in self.carriers]) == 1 else None

    def _is_identity_dropout(self, node: fx.Node) -> bool:
        if node.op == "call_module":
            module = self.gm.get_submodule(str(node.target))
            return isinstance(module, nn.Dropout) and module.p == 0
        p = node.args[1] if len(node.args) > 1 else node.kwargs.get("p")
        return node.target is F.dropout and isinstance(p, (int, float)) and p == 0

    def _with_readers(self, first: str) -> InitialState | Reason:
        """Weights that only ever read zeros may have any columns; one that also writes the width must."""
        states: dict[tuple[str, int], set[str]] = {}
        for p in self.structure.projections:
            if self.var in variables(p.input_axis):
                states.setdefault((p.weight, p.in_dim), set()).add(self.state.get(p.source, ANY))
        if self.kind == SPLIT and states:
            return Reason("norm", first, "divided by its length, and read by other weights too")
        if (
            not self.result.products and not self.of_weights
        ):  # a packed layer writes zeros for the keys, not for the values
            self.result.free = {key for key, found in states.items() if found <= {ZERO, BOTH}}
        tied = next((key for key in states.keys() & self.result.writers if key not in self.result.free), None)
        return self.result if tied is None else Reason("norm", first, f"{tied[0]} is tied, and reads it unnormalised")
