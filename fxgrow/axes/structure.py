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
#: what a change from d to d' units multiplies something by: for each c: p the p-th power of (d - c) / (d' - c)
Factor = dict[int, float]


@dataclass(frozen=True)
class Projection:
    """One use of a weight that consumes one axis and produces another: a linear layer, a convolution, an embedding."""

    node: fx.Node  # multiplies by the weight
    source: fx.Node  # its input
    weight: str  # qualified name
    bias: str | None
    out_dim: int  # dimension of the weight that is the output: 0 for `nn.Linear`, 1 for `nn.ConvTranspose2d`
    in_dim: int
    output_axis: Axis  # the weight's axis `out_dim`
    input_axis: Axis  # the weight's axis `in_dim`
    #: axis of the node's output: `output_axis`, repeated once per group of a transposed convolution; for the gates of a
    #: recurrent layer the axis of its state
    out: Axis
    kernel: tuple[int, ...] = ()  # size per spatial dimension; empty for a linear layer, as are the next three
    stride: tuple[int, ...] = ()
    dilation: tuple[int, ...] = ()
    padding: tuple[int, ...] = ()
    #: whether statistics can treat it as one matrix, unlike embeddings, groups, experts and transposed convolutions
    plain: bool = True
    groups: int = 1  # matrices side by side (groups, experts); 0 where statistics cannot separate them
    experts: bool = False  # the first dimension of the weight, each with its own rows (`ops/expert_routing.py`)
    transposed: bool = False  # a linear layer at every input position, with overlapping outputs summed
    bias_node: fx.Node | None = None  # a bias that several parameters make
    #: by what the entries of the parameter are multiplied; None where no statistics are of them
    scale: float | None = 1.0
    computed: bool = False  # whether entries of the weight are not those of the parameter, but computed from them
    #: what new rows of the parameter and the bias keep in the weight that is computed from them: the "mean" of old
    #: rows and zero, "zero" or "nothing"
    keeps: str = "mean"


@dataclass
class Constant:
    """A number in a module (by name) or in a node's arguments, at a path: the length of `axis`, minus `less`."""

    where: tuple[str, Path] | tuple[fx.Node, Path]
    axis: Axis
    less: int = 0


@dataclass(frozen=True)
class SizeCheck:
    """A computed size that must be the length of `axis` at every number of units, else the axis is pinned."""

    size: SizeExpr
    axis: Axis
    why: Reason
    where: tuple[fx.Node, Path] | None = None  # the argument that may be replaced instead
    infer: bool = False  # whether it may be replaced by -1, which a view infers
    part: bool = False  # whether the axis was cut at this size, and would be at another if an input changed it


class SizeReplacement(NamedTuple):
    """A computed size that becomes the length of `axis` (None: -1) when one of `axes` grows."""

    node: fx.Node
    path: Path
    axes: tuple[Axis, ...]
    axis: Axis | None


class KeptNumber(NamedTuple):
    """A number computed from sizes (`1 / sqrt(d)`), a node's result or its argument at `path`, that keeps its value."""

    node: fx.Node
    path: Path
    value: float
    axes: tuple[Axis, ...]


@dataclass(frozen=True)
class Invariant:
    """A function-preserving constraint: the node keeps its function only if new units of an axis start in some state.

    `kind` is "layer" or "rms" for a norm over the axis, "length" for
    division by the L2 norm, "product" for a product summed over the axis, "statistic" for a mean, variance or length
    over it, from which code may make a norm of its own.
    """

    node: fx.Node
    source: fx.Node  # brings in the units
    axis: Axis
    kind: str
    weight: str | None = None  # names of the norm's parameters
    bias: str | None = None
    eps: float = 0.0


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
    """

    parameters: dict[str, Dims] = field(default_factory=dict)  # every parameter and buffer in use, by qualified name
    projections: list[Projection] = field(default_factory=list)  # in the order of the graph
    #: by name, how new entries of a parameter start: a number or "random"; any other starts at the mean
    fills: dict[str, float | str] = field(default_factory=dict)
    constants: list[Constant] = field(default_factory=list)
    outputs: dict[fx.Node, Any] = field(default_factory=dict)  # `Dims` for tensors, in the node's nested containers
    checks: list[SizeCheck] = field(default_factory=list)
    size_replacements: list[SizeReplacement] = field(default_factory=list)
    aliases: dict[int, str] = field(default_factory=dict)  # first name by id of a tensor: tied ones have one entry
    weight_nodes: set[fx.Node] = field(default_factory=set)  # which compute weights from parameters
    invariants: list[Invariant] = field(default_factory=list)
    initial_states: dict[UnitVar, Any] = field(default_factory=dict)  # of each variable under an invariant
    kept_numbers: list[KeptNumber] = field(default_factory=list)
