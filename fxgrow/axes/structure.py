"""What an analysis of axes finds: who writes and reads which axis, and which sizes are constants."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import fx

from fxgrow.axes.axes import Axis, Dims, UnitVar
from fxgrow.axes.records import Reason
from fxgrow.axes.size_expressions import SizeExpr


@dataclass(frozen=True)
class Projection:
    """One use of a weight that writes one axis and reads another: a linear layer or a convolution.

    `kernel`, `stride`, `dilation` and `padding` have one entry per spatial dimension (none for a linear layer).
    """

    node: fx.Node
    source: fx.Node
    weight: str
    bias: str | None
    out_dim: int
    in_dim: int
    output_axis: Axis
    input_axis: Axis
    #: the axis of the node's output: `output_axis`, or as many copies of it as a transposed convolution has groups; of
    #: gates that of the state they make, which has one entry for each unit
    out: Axis
    kernel: tuple[int, ...] = ()
    stride: tuple[int, ...] = ()
    dilation: tuple[int, ...] = ()
    padding: tuple[int, ...] = ()
    #: False for embeddings and experts, whose statistics are not those of one matrix, and for the two below
    plain: bool = True
    #: a convolution with so many groups, or so many experts: as many matrices side by side; 0: not to be told apart
    groups: int = 1
    #: the matrices are the first dimension of the weight, and each reads rows of its own (`fxgrow.ops.expert_routing`)
    experts: bool = False
    #: a transposed convolution: a dense layer at every position of its input, whose outputs are laid over each other
    transposed: bool = False


@dataclass
class Constant:
    """A size written into the graph or a module, and the axis it is the length of (or so much less than that)."""

    where: tuple[str, tuple[Any, ...]] | tuple[fx.Node, tuple[Any, ...]]
    axis: Axis
    less: int = 0


@dataclass(frozen=True)
class SizeCheck:
    """A computed size must follow the axis it is used for; where it does not, the argument `where` may be changed.

    `infer`: it may become -1, which a view infers.
    """

    size: SizeExpr
    axis: Axis
    why: Reason
    where: tuple[fx.Node, tuple[Any, ...]] | None = None
    infer: bool = False


@dataclass(frozen=True)
class Invariant:
    """A node that keeps its function only if the new units of an axis arrive in a known state.

    `kind`: "layer" or "rms" for a norm over the axis, "length" for division by its length, "product" for a product
    summed over it. `source` brings the units in. A norm multiplies by `weight + offset` and adds `eps`, of a module its
    attribute `eps_name`, to the variance.
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
    #: where a norm that is written out has its eps: a node and which of its arguments
    eps_at: tuple[fx.Node, int] | None = None


@dataclass
class Structure:
    """What running a graph on axes finds out."""

    parameters: dict[str, Dims] = field(default_factory=dict)
    projections: list[Projection] = field(default_factory=list)
    fills: dict[str, float | str] = field(default_factory=dict)
    constants: list[Constant] = field(default_factory=list)
    outputs: dict[fx.Node, Any] = field(default_factory=dict)
    checks: list[SizeCheck] = field(default_factory=list)
    #: size arguments that are to be replaced when one of these axes grows: by the length of an axis, or inferred (-1)
    replaced: list[tuple[fx.Node, tuple[Any, ...], tuple[Axis, ...], Axis | None]] = field(default_factory=list)
    aliases: dict[int, str] = field(default_factory=dict)
    invariants: list[Invariant] = field(default_factory=list)
    #: per variable with a demand, how its new units start (`fxgrow.analysis.initial_state`)
    initial_states: dict[UnitVar, Any] = field(default_factory=dict)
    #: numbers computed from sizes, and the arguments that hold them, which stay as they are when an axis grows
    kept: list[tuple[fx.Node, str | None, float, tuple[Axis, ...]]] = field(default_factory=list)
