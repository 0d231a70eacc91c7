"""The one place that knows operators: a table from targets to rules, and what a rule may say.

A rule is called with a `Context` and the node's arguments, tensors replaced by their `Dims`, sizes by `Size`. It
returns the `Dims` of the output and says, through the context, which axes must agree, which weights write or read a
width, and which constants of the graph hold a size. That is all that widths, statistics and surgery know of an
operator. What a rule does not say pins: a size it was given and did not follow, a weight computed in the graph.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any, TypeVar

import torch
from torch import fx, nn

from fxgrow._axes import Axis, Dims, Var, axis_of, length, pin, unify
from fxgrow._parametrized import computed_by, norm_of
from fxgrow._records import Reason
from fxgrow._sizes import Size

Rule = Callable[..., Any]
R = TypeVar("R", bound=Rule)
_RULES: dict[Any, Rule] = {}
_RECOGNISED: list[tuple[Callable[[nn.Module], bool], Rule]] = []


class Unsupported(Exception):
    """A rule's refusal: what flows in is pinned with this code and message, and stays as it is."""

    def __init__(self, message: str, code: str = "operator") -> None:
        """`code` is one of those of `Reason`."""
        super().__init__(message)
        self.code = code


def op(*targets: Any) -> Callable[[R], R]:
    """Enters a rule for module types, functions, method names (`"view"`) or dotted names of functions.

    Args:
        targets: what the rule describes. A dotted name (`"timm.layers.drop.DropPath"`) avoids an import.

    Returns:
        A decorator that leaves the rule unchanged.
    """

    def enter(rule: R) -> R:
        for target in targets:
            _RULES[target] = rule
        return rule

    return enter


def recogniser(test: Callable[[nn.Module], bool]) -> Callable[[R], R]:
    """Enters a rule for modules that `test` recognises, of whatever class; such a module stays one node."""

    def enter(rule: R) -> R:
        _RECOGNISED.append((test, rule))
        return rule

    return enter


def recognised(module: nn.Module) -> Rule | None:
    """The rule of a module that is known by what it does."""
    return next((rule for test, rule in _RECOGNISED if test(module)), None)


def is_described(target: Any) -> bool:
    """Whether `target` itself has a rule: a user's own layer, entered with `@op`, stays one node."""
    return target in _RULES


def find_rule(node: fx.Node, module: nn.Module | None) -> Rule | None:
    if module is not None:
        # a subclass that computes the same follows its parent's rule
        kinds = type(module).__mro__
        rule = next((_RULES[k] for k in kinds if k in _RULES and k.forward is kinds[0].forward), None)  # type: ignore[attr-defined]
        return rule or _RULES.get(f"{kinds[0].__module__}.{kinds[0].__qualname__}") or recognised(module)
    if node.op == "call_method":
        return _RULES.get(node.target)
    return _RULES.get(node.target) or _RULES.get(
        f"{getattr(node.target, '__module__', '')}.{getattr(node.target, '__name__', '')}"
    )


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
    writes: Axis
    reads: Axis
    #: the axis of the node's output: `writes`, or as many copies of it as a transposed convolution has groups; of gates
    #: that of the state they make, which has one entry for each unit
    out: Axis
    kernel: tuple[int, ...] = ()
    stride: tuple[int, ...] = ()
    dilation: tuple[int, ...] = ()
    padding: tuple[int, ...] = ()
    #: False for embeddings and experts, whose statistics are not those of one matrix, and for the two below
    plain: bool = True
    #: a convolution with so many groups, or so many experts: as many matrices side by side; 0: not to be told apart
    groups: int = 1
    #: the matrices are the first dimension of the weight, and each reads rows of its own (`fxgrow._experts`)
    experts: bool = False
    #: a transposed convolution: a dense layer at every position of its input, whose outputs are laid over each other
    turned: bool = False


@dataclass
class Constant:
    """A size written into the graph or a module, and the axis it is the length of (or so much less than that)."""

    where: tuple[str, tuple[Any, ...]] | tuple[fx.Node, tuple[Any, ...]]
    axis: Axis
    less: int = 0


@dataclass(frozen=True)
class Check:
    """A computed size must follow the axis it is used for; where it does not, the argument `where` may be changed.

    `infer`: it may become -1, which a view infers.
    """

    size: Size
    axis: Axis
    why: Reason
    where: tuple[fx.Node, tuple[Any, ...]] | None = None
    infer: bool = False


@dataclass(frozen=True)
class Demand:
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
    checks: list[Check] = field(default_factory=list)
    #: size arguments that are to be replaced when one of these axes grows: by the length of an axis, or inferred (-1)
    replaced: list[tuple[fx.Node, tuple[Any, ...], tuple[Axis, ...], Axis | None]] = field(default_factory=list)
    aliases: dict[int, str] = field(default_factory=dict)
    demands: list[Demand] = field(default_factory=list)
    #: per variable with a demand, how its new units start (`fxgrow._compensate`)
    compensations: dict[Var, Any] = field(default_factory=dict)
    #: numbers computed from sizes, and the arguments that hold them, which stay as they are when an axis grows
    kept: list[tuple[fx.Node, str | None, float, tuple[Axis, ...]]] = field(default_factory=list)


class Context:
    """What a rule may ask and say about the node it describes."""

    def __init__(self, structure: Structure, gm: fx.GraphModule, node: fx.Node) -> None:
        """What is said about `node` is entered in `structure`."""
        self.structure = structure
        self.gm = gm
        self.node = node
        self.module: Any = gm.get_submodule(str(node.target)) if node.op == "call_module" else None
        self.value: Any = node.meta.get("val")
        #: sizes that the rule said what they are the length of; any other pins what it measures
        self.followed: list[Size] = []

    # -- asking

    @property
    def shape(self) -> tuple[int, ...]:
        """The output's shape at the example inputs."""
        return tuple(self.value.shape)

    @property
    def values(self) -> list[torch.Tensor]:
        """The output's tensors, where there are several."""
        return list(self.value)

    def argument(self, position: int, *names: str) -> Any:
        """The raw argument of the node at a position, or under one of these names."""
        args, kwargs = self.node.args, self.node.kwargs
        return args[position] if len(args) > position else next(kwargs[n] for n in names if n in kwargs)

    def reason(self, code: str, message: str) -> Reason:
        """A reason that names this node."""
        return Reason(code, self.node.name, message)

    def parameter(self, name: str) -> Dims | None:
        """The axes of a parameter or buffer of this node's module; None where the module has none."""
        tensor = getattr(self.module, name, None)
        if not isinstance(tensor, torch.Tensor):
            return None
        full = f"{self.node.target}.{name}"
        if name in self.module._parameters or name in self.module._buffers:
            return self.dims_of(full, tensor)
        # computed anew each time: no object to know it by
        new = Dims.of((axis_of(Var(n)) for n in tensor.shape), full)
        dims = self.structure.parameters.setdefault(full, new)
        norm = norm_of(self.module)
        if hasattr(norm, "_u") and len(norm._u) + 1 >= len(norm._v):
            self.pin(dims[norm.dim], "norm", "spectral_norm: the rows leave no direction for new ones")
        elif norm is None:
            by = computed_by(self.module, name)
            for axis in dims:
                self.pin(axis, "operator", f"{name} is computed from other parameters" + (f" ({by})" if by else ""))
        return dims

    def dims_of(self, name: str, tensor: torch.Tensor) -> Dims:
        """One `Dims` per stored tensor, so that tied and shared parameters share their axes."""
        name = self.structure.aliases.setdefault(id(tensor), name)
        if name not in self.structure.parameters:
            self.structure.parameters[name] = Dims.of((axis_of(Var(n)) for n in tensor.shape), name)
        return self.structure.parameters[name]

    # -- saying

    def same(self, a: Axis, b: Axis, message: str = "must keep the same number of entries") -> None:
        """Two axes that always have the same units."""
        if length(a) != length(b):
            raise Unsupported(f"expected {length(b)} entries, found {length(a)}")
        unify(a, b, self.reason("size", message))

    def pin(self, axis: Axis, code: str, message: str) -> Axis:
        """An axis that cannot change here; returns it."""
        pin(axis, self.reason(code, message))
        return axis

    def fix(self, axes: Sequence[Axis], message: str = "is a fixed size") -> None:
        """Axes that cannot change here, because a size is fixed."""
        for axis in axes:
            self.pin(axis, "size", message)

    def fill(self, parameter: Dims | None, value: float | str) -> None:
        """New entries of a follower's parameter: a number, "random", or (where nothing is said) "mean" of the old."""
        if parameter is not None and parameter.parameter is not None:
            self.structure.fills[parameter.parameter] = value

    def demand(self, kind: str, source: fx.Node, axis: Axis, **norm: Any) -> None:
        """New units of `axis` must arrive from `source` in the state that this node needs; see `Demand`."""
        self.structure.demands.append(Demand(self.node, source, axis, kind, **norm))

    def keep(self, value: float, axes: Sequence[Axis], keyword: str | None = None) -> None:
        """A number that the sizes of `axes` gave: this node's result, or one of its keyword arguments."""
        self.structure.kept.append((self.node, keyword, value, tuple(axes)))

    def project(
        self,
        weight: Dims,
        bias: Dims | None,
        out: Axis,
        *,
        out_dim: int = 0,
        in_dim: int = 1,
        units: Axis | None = None,
        **window: Any,
    ) -> None:
        """This node's weight writes axis `out` (its `out_dim`) and reads its `in_dim`.

        `units`: what `out` is made of, where it has several entries for each unit (gates).
        """
        if bias is not None:
            self.same(bias[0], out)
        name = weight.parameter
        if name is None and out_dim == 0:
            name = weight.part_of
        if any(p is not None and p.parameter is None and p.part_of is not None for p in (weight, bias)):
            window["plain"] = False  # statistics are those of whole parameters
        if name is None:
            raise Unsupported("the weight is computed in the graph, not a parameter")
        self.structure.projections.append(
            Projection(
                node=self.node,
                source=self.node.all_input_nodes[0],
                weight=name,
                bias=None if bias is None else bias.parameter or bias.part_of,
                out_dim=out_dim,
                in_dim=in_dim,
                writes=self.structure.parameters[name][out_dim],
                reads=weight[in_dim],
                out=out if units is None else units,
                **window,
            )
        )

    def attribute(self, name: str, axis: Axis) -> None:
        """An attribute of the module that is the length of `axis` (`in_features`, `groups`)."""
        if isinstance(getattr(self.module, name, None), int):
            self.structure.constants.append(Constant((str(self.node.target), (name,)), axis))

    def size_argument(self, value: Any, axis: Axis, *path: Any, infer: bool = False) -> None:
        """An argument (at `path` in the node's args or kwargs) that must be the length of `axis`.

        A literal is rewritten when the axis grows; a computed size is checked to follow by itself, or becomes a
        literal, or, with `infer`, the -1 that a view infers.
        """
        why = self.reason("size", "a computed size does not follow the width")
        # a shape that is computed as a whole, or by a rule that does not say where, has no place for either
        where = None if not path or isinstance(_at(self.node, path[:-1]), fx.Node) else (self.node, path)
        if isinstance(value, Size):
            self.followed.append(value)
            self.structure.checks.append(Check(value, axis, why, where, infer))
        elif isinstance(value, int) and not isinstance(value, bool) and value >= 0:
            if isinstance(_at(self.node, path), fx.Node):
                # a computed size that measures no width: the axis may not change
                if int(value) == length(axis):
                    self.structure.checks.append(Check(_constant(value), axis, why, where, infer))
            else:
                self.structure.constants.append(Constant((self.node, path), axis))


def _constant(value: int) -> Size:
    size = Size(value)
    size.const, size.terms, size.opaque, size.whole = Fraction(int(value)), (), False, ()
    return size


def _at(node: fx.Node, path: tuple[Any, ...]) -> Any:
    """The raw argument of `node` at `path`: an index into args or a name in kwargs, then indices into it."""
    if not path:
        return None
    first, *rest = path
    value: Any = node.kwargs.get(first) if isinstance(first, str) else node.args[first]
    for i in rest:
        if isinstance(value, fx.Node):
            return value
        value = value[i]
    return value
