"""What running a graph on axes finds: which weights produce and consume which axis, and which sizes are constants."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import fx

from fxgrow.axes.axes import Axis, Dims, UnitVar
from fxgrow.axes.records import Reason
from fxgrow.axes.size_expressions import SizeExpr

#: a path to an argument of a node: a position in args or a name in kwargs, then indices into it; or the name of an
#: attribute of a module, then indices
Path = tuple[Any, ...]


@dataclass(frozen=True)
class Projection:
    """One use of a weight that consumes one axis and produces another: a linear layer, a convolution, an embedding.

    Attributes:
        node: the node that multiplies by the weight.
        source: the node of its input.
        weight: qualified name of the parameter.
        bias: that of the bias, or None.
        out_dim: dimension of the weight that is the output (0 for `nn.Linear`, 1 for `nn.ConvTranspose2d`).
        in_dim: dimension that is the input.
        output_axis: the weight's axis `out_dim`.
        input_axis: the weight's axis `in_dim`.
        out: the axis of the node's output: `output_axis`, repeated once per group of a transposed convolution; for the
            gates of a recurrent layer the axis of its state.
        kernel: size per spatial dimension; empty for a linear layer, as are `stride`, `dilation` and `padding`.
        stride: per spatial dimension.
        dilation: per spatial dimension.
        padding: per spatial dimension.
        plain: whether statistics can treat it as one matrix; not so for embeddings, groups, experts and transposed
            convolutions.
        groups: number of matrices side by side (groups of a convolution, experts); 0 where statistics cannot separate
            them.
        experts: whether these are the first dimension of the weight, each with its own rows (`ops/expert_routing.py`).
        transposed: a transposed convolution: a linear layer at every input position, with overlapping outputs summed.
    """

    node: fx.Node
    source: fx.Node
    weight: str
    bias: str | None
    out_dim: int
    in_dim: int
    output_axis: Axis
    input_axis: Axis
    out: Axis
    kernel: tuple[int, ...] = ()
    stride: tuple[int, ...] = ()
    dilation: tuple[int, ...] = ()
    padding: tuple[int, ...] = ()
    plain: bool = True
    groups: int = 1
    experts: bool = False
    transposed: bool = False


@dataclass
class Constant:
    """A number in a module (by name) or in a node's arguments, at a path: the length of `axis`, minus `less`."""

    where: tuple[str, Path] | tuple[fx.Node, Path]
    axis: Axis
    less: int = 0


@dataclass(frozen=True)
class SizeCheck:
    """A computed size that must be the length of `axis` at every number of units, else the axis is pinned.

    Attributes:
        size: the size.
        axis: the axis for which it is used.
        why: the reason if the axis is pinned.
        where: the argument that may be replaced instead, if any.
        infer: whether it may be replaced by -1, which a view infers.
    """

    size: SizeExpr
    axis: Axis
    why: Reason
    where: tuple[fx.Node, Path] | None = None
    infer: bool = False


class SizeReplacement(NamedTuple):
    """A computed size that becomes the length of `axis` (None: -1) when one of `axes` grows."""

    node: fx.Node
    path: Path
    axes: tuple[Axis, ...]
    axis: Axis | None


class KeptNumber(NamedTuple):
    """A number computed from sizes (`1 / sqrt(d)`) that keeps its value when one of `axes` grows.

    It is the node's result, or its argument `keyword`.
    """

    node: fx.Node
    keyword: str | None
    value: float
    axes: tuple[Axis, ...]


@dataclass(frozen=True)
class Invariant:
    """A function-preserving constraint: the node keeps its function only if new units of an axis start in some state.

    Attributes:
        node: the norm, division or product.
        source: the node that brings in the units.
        axis: the axis that may grow.
        kind: "layer" or "rms" for a norm over the axis, "response" for global response normalisation, "length" for
            division by the L2 norm, "product" for a product summed over the axis.
        weight: name of the norm's weight, if it has one.
        bias: name of its bias.
        eps: what the norm adds to the variance.
        eps_name: the module's attribute that holds it.
        offset: the norm multiplies by `weight + offset`.
        eps_at: for a norm made of several nodes, the node that adds eps and the position of that argument.
    """

    node: fx.Node
    source: fx.Node
    axis: Axis
    kind: str
    weight: str | None = None
    bias: str | None = None
    eps: float = 0.0
    eps_name: str = "eps"
    offset: float = 0.0
    eps_at: tuple[fx.Node, int] | None = None


@dataclass
class Structure:
    """Everything that running a graph on axes finds.

    For a linear layer, an activation and another linear layer:

    >>> import torch, fxgrow
    >>> from fxgrow.analysis.axis_propagation import propagate_axes
    >>> from fxgrow.axes.axes import length, resolve
    >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
    >>> structure = propagate_axes(fxgrow.capture(net, (torch.zeros(1, 4),)))
    >>> {name: [length(axis) for axis in dims] for name, dims in structure.parameters.items()}
    {'0.weight': [8, 4], '0.bias': [8], '2.weight': [2, 8], '2.bias': [2]}
    >>> first, second = structure.projections
    >>> resolve(first.output_axis) == resolve(second.input_axis)  # the 8 hidden units are one variable
    True
    >>> [c.where for c in structure.constants if resolve(c.axis) == resolve(first.output_axis)]
    [('0', ('out_features',)), ('2', ('in_features',))]

    Attributes:
        parameters: axes of every parameter and buffer in use, one per dimension, by qualified name.
        projections: every use of a weight that produces and consumes an axis, in the order of the graph.
        fills: by name, how new entries of a parameter start: a number or "random"; any other starts at the mean.
        constants: numbers in modules and arguments that are the length of an axis.
        outputs: axes of every node's output: a `Dims` for a tensor, nested containers as the node returns them.
        checks: computed sizes that must follow an axis.
        size_replacements: those that do not follow it by themselves.
        aliases: by the id of a tensor, its first name: tied parameters have one entry in `parameters`.
        invariants: norms and products that need new units in a certain state.
        initial_states: for each variable under an invariant, how its new units start (`analysis/initial_state.py`).
        kept_numbers: numbers that do not follow a growing size.
    """

    parameters: dict[str, Dims] = field(default_factory=dict)
    projections: list[Projection] = field(default_factory=list)
    fills: dict[str, float | str] = field(default_factory=dict)
    constants: list[Constant] = field(default_factory=list)
    outputs: dict[fx.Node, Any] = field(default_factory=dict)
    checks: list[SizeCheck] = field(default_factory=list)
    size_replacements: list[SizeReplacement] = field(default_factory=list)
    aliases: dict[int, str] = field(default_factory=dict)
    invariants: list[Invariant] = field(default_factory=list)
    initial_states: dict[UnitVar, Any] = field(default_factory=dict)
    kept_numbers: list[KeptNumber] = field(default_factory=list)
