"""Widths whose new units must start in a known state for the function to stay, and the proof that they do.

A norm keeps its statistics when every new unit is the mean of the old ones (LayerNorm) or zero (RMSNorm). Its output is
then zero, or with one weight for all units the mean again, as the next norm of a post-norm stream needs it. A product
summed over a width (queries and keys) stays when one side is zero, or, where both are divided by their lengths, when a
unit of both is rotated into a plane. States are propagated from writers to invariants; a width that fails is pinned.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import fx, nn
from torch.nn import functional as F

from fxgrow.axes.axes import Dims, UnitVar, axes_in, resolve, single_variable, variables
from fxgrow.axes.records import Reason
from fxgrow.axes.structure import Invariant, Structure
from fxgrow.graph.graph import lookup, operator_name

MEAN, ZERO, SPLIT, COPY, ANY = "mean", "zero", "split", "copy", "any"
#: a mean that is zero
_BOTH = "both"
#: operators that move entries or mix positions linearly keep the state of a unit
_LINEAR = frozenset(
    "view reshape permute transpose contiguous flatten unflatten squeeze unsqueeze expand expand_as cat concat "
    "concatenate stack chunk split split_with_sizes unbind getitem select narrow clone detach to type type_as float "
    "double half bfloat16 repeat repeat_interleave movedim moveaxis swapaxes swapdims t adjoint view_as reshape_as "
    "flip roll neg negative Identity Flatten Unflatten matmul bmm mm einsum mean sum scaled_dot_product_attention "
    "avg_pool1d avg_pool2d avg_pool3d AvgPool1d AvgPool2d AvgPool3d adaptive_avg_pool1d adaptive_avg_pool2d "
    "AdaptiveAvgPool1d AdaptiveAvgPool2d DropPath stochastic_depth StochasticDepth __getitem__ mT T".split()
)
#: of these, the ones with several tensors
_MIXING = frozenset("cat concat concatenate stack matmul bmm mm einsum sum scaled_dot_product_attention".split())
_SUM = frozenset("add sub iadd isub subtract add_ sub_ __add__ __radd__".split())
_PRODUCT = frozenset("mul div truediv imul itruediv multiply divide mul_ div_ __mul__ __rmul__".split())
_QUOTIENT = frozenset("div truediv itruediv divide div_".split())
#: elementwise functions that are zero at zero
_ODD = frozenset(
    "relu relu_ relu6 gelu silu tanh sin asin atan elu celu selu leaky_relu hardswish hardtanh mish softsign erf abs "
    "sign round ReLU ReLU6 GELU SiLU Tanh ELU CELU SELU LeakyReLU Hardswish Hardtanh Mish Softsign PReLU prelu "
    "dropout Dropout square nan_to_num".split()
)
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
    #: weights that read a norm without weights, and are rescaled in its place
    scaled: set[str] = field(default_factory=set)


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


def _joint(states: set[str]) -> str:
    """The state of a sum or concatenation."""
    strict = states - {_BOTH}
    return ANY if len(strict) > 1 else strict.pop() if strict else _BOTH


class _Refused(Exception):
    pass


class _StatePropagation:
    """Propagates the state of one variable's new units through the nodes that carry it."""

    def __init__(
        self, gm: fx.GraphModule, structure: Structure, var: UnitVar, invariants: list[Invariant], nodes: list[fx.Node]
    ) -> None:
        self.gm, self.structure, self.var, self.invariants = gm, structure, var, invariants
        self.carriers = dict.fromkeys(nodes)
        self.norms = {i.node: i for i in invariants if i.kind != "product"}
        self.products = [i for i in invariants if i.kind == "product"]
        kinds = {i.kind for i in invariants}
        self.kind = MEAN if "layer" in kinds else SPLIT if "length" in kinds else ZERO
        self.mixed = len(kinds) > 1 and kinds != {"length", "product"}
        self.mean_after_norm = False  # of norms with one weight for all units
        self.result = InitialState(self.kind, norms=list(self.norms.values()), products=self.products)
        self.writers = {p.node: p for p in structure.projections if var in variables(p.out)}
        self.projections = {p.node for p in structure.projections}
        self.state: dict[fx.Node, str] = {}
        self.written: dict[fx.Node, list[tuple[str, int]]] = {}

    def run(self) -> InitialState | Reason:
        """The initial state in which every invariant holds, or why there is none."""
        first = self.invariants[0].node.name
        if self.mixed:
            return Reason("norm", first, "one width is normalised in different ways, or also summed over")
        settable = self._before_products() if self.products and self.kind == ZERO else self.carriers
        for node in self.carriers:
            try:
                self.state[node] = self._evaluate(node, node in settable)
            except _Refused as refusal:
                if not self.mean_after_norm and any(self._is_uniform(n) for n in self.norms.values()):
                    self.mean_after_norm = True
                    self.result = InitialState(self.kind, norms=self.result.norms)
                    return self.run()
                return Reason("norm", node.name, str(refusal))
        for product in self.products:
            operands = [product.source] if self.kind == ZERO else self._inputs(product.node)
            if any(self.state.get(n) != self.kind for n in operands):
                return Reason("reduce", product.node.name, "summed over in a product, and neither side can stay zero")
        if self.products and self.kind == ZERO:
            self.result.writers = self._zero_writers()
        return self._with_readers(first)

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
        bias = self.writers[node].bias_node if node in self.writers else None
        return [] if bias is None else [bias]

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
            if self._name(node) in _PRODUCT:
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
        if node.op == "call_module" and isinstance(self.gm.get_submodule(str(node.target)), nn.RNNBase):
            return ANY  # several weights write it, through gates
        if node in self.writers:
            p = self.writers[node]
            parameters = [(p.weight, p.out_dim), *([] if p.bias is None else [(p.bias, 0)])]
            kept = p.keeps == "mean" or (p.keeps == "zero" and self.kind == ZERO)
            kept &= all(self.state.get(n) in (self.kind, _BOTH) for n in self._bias(node))
            return self._written(node, parameters) if settable and kept else ANY
        if node.op == "get_attr":
            return self._parameter(node) if settable else ANY
        inputs = self._inputs(node)
        states = {self.state[n] for n in inputs}
        if node in self.norms:
            return self._normalised(self.norms[node])
        name = self._name(node)
        if name in _LINEAR or self._is_identity_dropout(node):
            return _joint(states)
        if name in _SUM:
            terms = (*node.args, node.kwargs.get("other"))
            only_units = inputs == node.all_input_nodes and not any(isinstance(a, (int, float)) for a in terms)
            return _joint(states) if only_units or states == {MEAN} else ANY
        if name in _PRODUCT:
            return self._product(node, inputs, states)
        keeps_zero = name in _ODD or name in _DEPTHWISE or self._pads_with_zeros(node)
        return ZERO if keeps_zero and states <= {ZERO, _BOTH} else ANY

    def _pads_with_zeros(self, node: fx.Node) -> bool:
        if node.target is not F.pad:
            return False
        mode, value = (*node.args[2:], *(None,) * 4)[:2]
        return not node.kwargs.get("value", value) and node.kwargs.get("mode", mode) in (None, "constant")

    def _parameter(self, node: fx.Node) -> str:
        """A parameter that is added to the stream, such as positions."""
        value = self.structure.outputs[node]
        if not isinstance(value, Dims) or value.parameter is None:
            return ANY
        weights = self.projections | self.structure.weight_nodes
        if all(u in self.norms or u in weights or self._name(u) in _PRODUCT for u in node.users):
            return ANY  # a weight or a scale per unit
        dims = [d for d, axis in enumerate(value) if self.var in variables(axis)]
        return self._written(node, [(value.parameter, dims[0])]) if len(dims) == 1 else ANY

    def _written(self, node: fx.Node, parameters: list[tuple[str, int]]) -> str:
        axes = [self.structure.parameters[name][dim] for name, dim in parameters]
        # a mean over a dimension must be the mean over the units, and over nothing else
        if self.kind == MEAN and any(single_variable(axis) is None for axis in axes):
            return ANY
        self.written[node] = parameters
        self.result.writers.update(parameters)
        return self.kind

    def _normalised(self, norm: Invariant) -> str:
        if self.state[norm.source] not in (self.kind, _BOTH):
            raise _Refused(
                "normalised over the whole axis: new units would change the statistics of the old ones, and what flows "
                "in cannot be kept at " + {MEAN: "their mean", ZERO: "zero", SPLIT: "its length"}[self.kind]
            )
        if self.kind == SPLIT:
            return SPLIT
        if norm.weight is None:
            self._rescale_readers(norm)
        if self.mean_after_norm and self._is_uniform(norm):
            self.result.writers |= {(name, 0) for name in (norm.weight, norm.bias) if name is not None}
            return MEAN if norm.bias is not None and bool(lookup(self.gm, norm.bias).any()) else _BOTH
        return ZERO

    def _rescale_readers(self, norm: Invariant) -> None:
        """Without a weight, the consumers' columns are rescaled for the new size: every reader must be a weight."""
        readers = {(p.node, p.source): p for p in self.structure.projections}
        queue = [norm.node]
        for node in queue:
            for user in node.users:
                p = readers.get((user, node))
                keeps_scale = self._name(user) in _LINEAR - _MIXING or self._is_identity_dropout(user)
                if p is not None and self._reads_only(p.weight, node):
                    self.result.scaled.add(p.weight)
                elif p is None and user in self.carriers and keeps_scale:
                    queue.append(user)
                elif p is not None or isinstance(self.structure.outputs[user], Dims):
                    raise _Refused("normalised over the whole axis without a weight that could be rescaled")

    def _reads_only(self, weight: str, source: fx.Node) -> bool:
        uses = [p for p in self.structure.projections if p.weight == weight]
        return len(uses) == 1 and uses[0].source is source and (weight, uses[0].out_dim) not in self.result.writers

    def _product(self, node: fx.Node, inputs: list[fx.Node], states: set[str]) -> str:
        if self._name(node) in _QUOTIENT and inputs != [node.args[0]]:
            return ANY  # divided by the units
        if ZERO in states:
            return ZERO
        if len(inputs) == 1:
            return states.pop()
        # layer scale: one weight per unit between a single writer and the width
        scale = next((n for n in inputs if n.op == "get_attr"), None)
        others = [n for n in inputs if n is not scale]
        if self.kind != MEAN or scale is None or len(others) != 1 or self.state[others[0]] != MEAN:
            return ANY
        writer, dims = self._single_writer(others[0]), self.structure.outputs[scale]
        if writer is None or not isinstance(dims, Dims) or dims.parameter is None or len(scale.users) > 1:
            return ANY
        self.structure.fills[dims.parameter] = 1.0
        p = self.writers[writer]
        self.result.scales |= {name: dims.parameter for name in (p.weight, p.bias) if name is not None}
        return MEAN

    def _single_writer(self, node: fx.Node) -> fx.Node | None:
        """The projection whose output alone becomes `node`, and nothing else."""
        while node not in self.writers:
            inputs = self._inputs(node)
            passes = self._name(node) in _LINEAR or self._is_identity_dropout(node)
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
        if not self.products:  # a packed layer writes zeros for the keys, not for the values
            self.result.free = {key for key, found in states.items() if found <= {ZERO, _BOTH}}
        tied = next((key for key in states.keys() & self.result.writers if key not in self.result.free), None)
        return self.result if tied is None else Reason("norm", first, f"{tied[0]} is tied, and reads it unnormalised")
