"""Widths whose new units must start in a known state for the function to stay, and the proof that they do.

A norm over a width keeps its statistics when every new unit is the mean of the old ones (LayerNorm) or zero
(RMSNorm), with weight and eps rescaled for the new size; its output at the new units is then zero, so whoever reads it
may have any new columns. With one weight for all units, as nets start, that output can be the mean again, which the
next norm of a post-norm stream asks for. A product of two activations summed over a width (queries and keys) stays when
one side is zero, or, where both are divided by their lengths, when a unit of both is turned into a plane. Rules enter
such an `Invariant`; here the units' state is followed from the layers that write them to where it is demanded. What
arrives in another state pins the width.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import fx, nn
from torch.nn import functional as F

from fxgrow.axes.axes import Axis, Dims, UnitVar, axes_in, multiplicity, resolve, variables
from fxgrow.axes.records import Reason
from fxgrow.axes.structure import Invariant, Structure
from fxgrow.graph.graph import lookup

MEAN, ZERO, SPLIT, COPY, ANY = "mean", "zero", "split", "copy", "any"
#: a mean that is zero
_BOTH = "both"
#: what moves entries about, or mixes positions linearly, leaves a unit's state as it is
_LINEAR = frozenset(
    "view reshape permute transpose contiguous flatten unflatten squeeze unsqueeze expand expand_as cat concat "
    "concatenate stack chunk split split_with_sizes unbind getitem select narrow clone detach to type type_as float "
    "double half bfloat16 repeat repeat_interleave movedim moveaxis swapaxes swapdims t adjoint view_as reshape_as "
    "flip roll neg negative Identity Flatten Unflatten matmul bmm mm einsum mean sum scaled_dot_product_attention "
    "avg_pool1d avg_pool2d avg_pool3d AvgPool1d AvgPool2d AvgPool3d adaptive_avg_pool1d adaptive_avg_pool2d "
    "AdaptiveAvgPool1d AdaptiveAvgPool2d DropPath stochastic_depth StochasticDepth __getitem__ mT T".split()
)
#: of these, what also takes another tensor, or makes one of several
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
#: where these carry a width they do so channel by channel, and the bias of a new channel is zero
_DEPTHWISE = frozenset("Conv1d Conv2d Conv3d conv1d conv2d conv3d".split())


@dataclass
class InitialState:
    """How the new units of one width start.

    Attributes:
        kind: what the writers' new entries are: the mean over the old units, zero, each a part of an old one, or copies
            (`fxgrow.analysis.expert_copies`).
        writers: parameters, and their dimension, whose new entries are set so.
        scales: per writer, the parameter that multiplies it unit by unit on the way into the width.
        free: weights, and their dimension, that read new units which are zero: any columns will do.
        norms: norms over the width.
        products: products summed over the width, of whose second operand the writers are set.
        scaled: weights that read a norm without weights, and stand in for them.
    """

    kind: str
    writers: set[tuple[str, int]] = field(default_factory=set)
    scales: dict[str, str] = field(default_factory=dict)
    free: set[tuple[str, int]] = field(default_factory=set)
    norms: list[Invariant] = field(default_factory=list)
    products: list[Invariant] = field(default_factory=list)
    scaled: set[str] = field(default_factory=set)


def find_initial_states(gm: fx.GraphModule, structure: Structure) -> None:
    """Fills `structure.initial_states` for every variable with an invariant; pins those that cannot meet theirs."""
    invariants: dict[UnitVar, list[Invariant]] = {}
    for d in structure.invariants:
        counts = multiplicity(d.axis)
        whole = len(counts) == 1 and all(s.var is not None for s in resolve(d.axis))
        if d.kind == "layer":
            whole = _single(d.axis)
        for var in counts:
            if d.kind != "product" and not whole:
                var.pinned = var.pinned or Reason("norm", d.node.name, "normalised together with other units")
            invariants.setdefault(var, []).append(d)
    carriers = _carriers(structure, invariants)
    for var, own in invariants.items():
        if var.pinned is None:
            outcome = _StatePropagation(gm, structure, var, own, carriers[var]).run()
            if isinstance(outcome, Reason):
                var.pinned = outcome
            else:
                structure.initial_states[var] = outcome


def _single(axis: Axis) -> bool:
    """Whether an axis is one entry for each unit of one variable."""
    segments = resolve(axis)
    return len(segments) == 1 and segments[0].var is not None and segments[0].inner == 1


def _carriers(structure: Structure, wanted: Mapping[UnitVar, object]) -> dict[UnitVar, list[fx.Node]]:
    """The nodes whose output has each variable, in order."""
    found: dict[UnitVar, list[fx.Node]] = {var: [] for var in wanted}
    for node, value in structure.outputs.items():
        for var in variables(*axes_in(value)):
            if var in found:
                found[var].append(node)
    return found


def _joint(states: set[str]) -> str:
    """The state of a sum, or of what two are put together."""
    strict = states - {_BOTH}
    return ANY if len(strict) > 1 else strict.pop() if strict else _BOTH


class _Refused(Exception):
    pass


class _StatePropagation:
    """Follows the state of one variable's new units through the graph."""

    def __init__(
        self,
        gm: fx.GraphModule,
        structure: Structure,
        var: UnitVar,
        invariants: list[Invariant],
        carriers: list[fx.Node],
    ) -> None:
        self.gm, self.structure, self.var, self.invariants = gm, structure, var, invariants
        self.nodes = carriers
        self.inside = set(carriers)
        self.norms = {d.node: d for d in invariants if d.kind != "product"}
        self.products = [d for d in invariants if d.kind == "product"]
        kinds = {d.kind for d in invariants}
        self.kind = MEAN if "layer" in kinds else SPLIT if "length" in kinds else ZERO
        self.mixed = len(kinds) > 1 and kinds != {"length", "product"}
        self.post = False  # whether norms with one weight for all units hand the mean on
        self.result = InitialState(self.kind, norms=list(self.norms.values()), products=self.products)
        self.writes = {p.node: p for p in structure.projections if var in variables(p.out)}
        self.projections = {p.node for p in structure.projections}
        self.state: dict[fx.Node, str] = {}
        self.written: dict[fx.Node, list[tuple[str, int]]] = {}

    def run(self) -> InitialState | Reason:
        if self.mixed:
            d = self.invariants[0]
            return Reason("norm", d.node.name, "one width is normalised in different ways, or also summed over")
        silent = self._ancestors() if self.products and self.kind == ZERO else self.inside
        for node in self.nodes:
            try:
                self.state[node] = self._evaluate(node, node in silent)
            except _Refused as refusal:
                if not self.post and any(self._is_uniform(d) for d in self.norms.values()):
                    self.post = True
                    self.result = InitialState(self.kind, norms=self.result.norms)
                    return self.run()
                return Reason("norm", node.name, str(refusal))
        for d in self.products:
            operands = [d.source] if self.kind == ZERO else [n for n in d.node.all_input_nodes if n in self.inside]
            if any(self.state.get(n) != self.kind for n in operands):
                return Reason("reduce", d.node.name, "summed over in a product, and neither side can be kept silent")
        if self.products and self.kind == ZERO:
            self.result.writers = self._silencing()
        return self._readers()

    def _silencing(self) -> set[tuple[str, int]]:
        """What must be zero for the second operands to be: of a product one factor, of a sum all terms."""
        queue = [d.source for d in self.products]
        found: set[tuple[str, int]] = set()
        for node in queue:
            if node in self.written:
                found.update(self.written[node])
                continue
            inputs = [n for n in node.all_input_nodes if n in self.inside]
            if self._name(node) in _PRODUCT:
                inputs = [n for n in inputs if self.state[n] == ZERO][:1]
            queue += [n for n in inputs if n not in queue]
        return found

    def _is_uniform(self, d: Invariant) -> bool:
        """Whether one weight for all units keeps the mean of the units a constant."""
        if d.kind != "layer" or d.weight is None:
            return False
        weight = lookup(self.gm, d.weight).detach()
        rounding = 8 * torch.finfo(weight.dtype).eps
        return weight.device.type != "meta" and bool(weight.max() - weight.min() <= rounding * weight.abs().max())

    def _ancestors(self) -> set[fx.Node]:
        """What flows into the second operand of a product."""
        queue = [d.source for d in self.products]
        found = set(queue)
        for node in queue:
            for n in node.all_input_nodes:
                if n in self.inside and n not in found and node not in self.writes:
                    found.add(n)
                    queue.append(n)
        return found

    def _evaluate(self, node: fx.Node, silent: bool) -> str:
        if node.op == "call_module" and isinstance(self.gm.get_submodule(str(node.target)), nn.RNNBase):
            return ANY  # several weights write it, through gates
        if node in self.writes:
            p = self.writes[node]
            return self._written(node, [(p.weight, p.out_dim), *([] if p.bias is None else [(p.bias, 0)])], silent)
        value = self.structure.outputs[node]
        if node.op == "get_attr":
            if not isinstance(value, Dims) or value.parameter is None:
                return ANY
            if all(u in self.norms or u in self.projections or self._name(u) in _PRODUCT for u in node.users):
                return ANY  # a weight or a scale per unit, not a value
            dims = [i for i, a in enumerate(value) if self.var in variables(a)]
            return self._written(node, [(value.parameter, dims[0])], silent) if len(dims) == 1 else ANY
        inputs = [n for n in node.all_input_nodes if n in self.inside]
        states = {self.state[n] for n in inputs}
        if node in self.norms:
            return self._normalised(self.norms[node])
        name = self._name(node)
        if name in _LINEAR:
            return _joint(states)
        if name in _SUM:
            whole = all(n in self.inside for n in node.all_input_nodes) and not self._numbers(node)
            return _joint(states) if whole or states == {MEAN} else ANY
        if name in _PRODUCT:
            return self._product(node, inputs, states)
        if self._no_dropout(node):
            return _joint(states)
        zero = name in _ODD or name in _DEPTHWISE or self._pads_with_zeros(node)
        return ZERO if zero and states <= {ZERO, _BOTH} else ANY

    def _pads_with_zeros(self, node: fx.Node) -> bool:
        if node.target is not F.pad:
            return False
        mode, value = (*node.args[2:], *(None,) * 4)[:2]
        return not node.kwargs.get("value", value) and node.kwargs.get("mode", mode) in (None, "constant")

    def _written(self, node: fx.Node, parameters: list[tuple[str, int]], silent: bool) -> str:
        if not silent or not all(self._alone(name, dim) for name, dim in parameters):
            return ANY
        self.written[node] = parameters
        self.result.writers.update(parameters)
        return self.kind

    def _alone(self, name: str, dim: int) -> bool:
        """Whether a mean over a parameter's dimension is the mean over the units, and over nothing else."""
        return self.kind != MEAN or _single(self.structure.parameters[name][dim])

    def _normalised(self, d: Invariant) -> str:
        if self.state[d.source] not in (self.kind, _BOTH):
            raise _Refused(
                "normalised over the whole axis: new units would change the statistics of the old ones, and what flows "
                "in cannot be kept at " + {MEAN: "their mean", ZERO: "zero", SPLIT: "its length"}[self.kind]
            )
        if self.kind == SPLIT:
            return SPLIT
        if d.weight is None:
            self._scale_readers(d)
        if self.post and self._is_uniform(d):
            self.result.writers |= {(name, 0) for name in (d.weight, d.bias) if name is not None}
            if d.bias is None:
                return _BOTH
            return MEAN if bool(lookup(self.gm, d.bias).any()) else _BOTH
        return ZERO

    def _scale_readers(self, d: Invariant) -> None:
        """Without weights it is the readers' columns that make up for the new size: all that reads must be weights."""
        readers = {(p.node, p.source): p for p in self.structure.projections}
        queue = [d.node]
        for node in queue:
            for user in node.users:
                p = readers.get((user, node))
                if p is not None and self._reads_only(p.weight, node):
                    self.result.scaled.add(p.weight)
                elif p is None and user in self.inside and self._keeps_scale(user):
                    queue.append(user)
                elif p is not None or isinstance(self.structure.outputs[user], Dims):
                    raise _Refused(
                        "normalised over the whole axis without a weight that could make up for the new size"
                    )

    def _keeps_scale(self, node: fx.Node) -> bool:
        return self._name(node) in _LINEAR - _MIXING or self._no_dropout(node)

    def _reads_only(self, weight: str, source: fx.Node) -> bool:
        uses = [p for p in self.structure.projections if p.weight == weight]
        return len(uses) == 1 and uses[0].source is source and (weight, uses[0].out_dim) not in self.result.writers

    def _product(self, node: fx.Node, inputs: list[fx.Node], states: set[str]) -> str:
        divides = self._name(node) in _QUOTIENT
        if divides and inputs != [node.args[0]]:
            return ANY  # units are divided by
        if ZERO in states:
            return ZERO
        if len(inputs) == 1:
            return states.pop()
        # layer scale: one weight per unit on the way from a single writer into the width
        scale = next((n for n in inputs if n.op == "get_attr"), None)
        others = [n for n in inputs if n is not scale]
        if self.kind != MEAN or scale is None or len(others) != 1 or self.state[others[0]] != MEAN:
            return ANY
        writer = self._single_writer(others[0])
        own = self.structure.outputs[scale]
        if writer is None or not isinstance(own, Dims) or own.parameter is None or len(scale.users) > 1:
            return ANY
        self.structure.fills[own.parameter] = 1.0
        p = self.writes[writer]
        for name in (p.weight, p.bias):
            if name is not None:
                self.result.scales[name] = own.parameter
        return MEAN

    def _single_writer(self, node: fx.Node) -> fx.Node | None:
        """The projection that alone flows into `node`, and nowhere else."""
        while node not in self.writes:
            inputs = [n for n in node.all_input_nodes if n in self.inside]
            passes = self._name(node) in _LINEAR or self._no_dropout(node)
            if len(inputs) != 1 or not passes or len(node.users) != 1:
                return None
            node = inputs[0]
        return node if len([n for n in node.users if n in self.inside]) == 1 else None

    def _no_dropout(self, node: fx.Node) -> bool:
        if node.op == "call_module":
            module = self.gm.get_submodule(str(node.target))
            return isinstance(module, nn.Dropout) and module.p == 0
        p = node.args[1] if len(node.args) > 1 else node.kwargs.get("p")
        return node.target is F.dropout and isinstance(p, (int, float)) and p == 0

    def _numbers(self, node: fx.Node) -> bool:
        """Whether a plain number is added."""
        return any(isinstance(a, (int, float)) for a in (*node.args, node.kwargs.get("other")))

    def _name(self, node: fx.Node) -> str:
        if node.op == "call_module":
            return type(self.gm.get_submodule(str(node.target))).__name__
        if node.target is getattr:  # x.mT
            return str(node.args[1])
        return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "?")

    def _readers(self) -> InitialState | Reason:
        """Weights that only ever read zeros may have any columns; one that also writes the width must."""
        seen: dict[tuple[str, int], set[str]] = {}
        for p in self.structure.projections:
            if self.var in variables(p.input_axis):
                seen.setdefault((p.weight, p.in_dim), set()).add(self.state.get(p.source, ANY))
        if self.kind == SPLIT and seen:
            return Reason("norm", self.invariants[0].node.name, "divided by its length, and read by other weights too")
        if not self.products:  # a packed layer writes zeros for the keys, not for who reads the values
            self.result.free = {key for key, states in seen.items() if states <= {ZERO, _BOTH}}
        for key in seen.keys() & self.result.writers:
            if key not in self.result.free:
                return Reason(
                    "norm", self.invariants[0].node.name, f"{key[0]} is tied, and reads the width unnormalised"
                )
        return self.result
