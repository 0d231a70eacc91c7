"""The context in which a rule is called: what it can ask about its node and what it can say."""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from fxgrow.axes.axes import Axis, Dims, UnitVar, axis_of, fixed, length, pin, unify
from fxgrow.axes.records import Reason
from fxgrow.axes.size_expressions import SizeExpr
from fxgrow.axes.structure import Constant, Invariant, KeptNumber, Path, Projection, SizeCheck, Structure
from fxgrow.graph.arguments import get_argument
from fxgrow.graph.parametrizations import computed_by, norm_of
from fxgrow.ops.computed_weight import KEPT, MEAN, NOTHING, NotFollowed, Origin, find_origins

#: what reads a shape and nothing else of it
TAKES_SHAPE = {
    "view",
    "reshape",
    "expand",
    "new_zeros",
    "new_ones",
    "new_empty",
    torch.reshape,
    torch.zeros,
    torch.ones,
}


class Unsupported(Exception):
    """Raised by a rule that does not cover a call: everything that flows in is pinned with this code and message."""

    def __init__(self, message: str, code: str = "operator") -> None:
        """`code` is one of the codes of `Reason`."""
        super().__init__(message)
        self.code = code


class Context:
    """A node, as its rule sees it."""

    def __init__(self, structure: Structure, gm: fx.GraphModule, node: fx.Node) -> None:
        """Everything said about `node` is entered in `structure`."""
        self.structure, self.gm, self.node = structure, gm, node
        self.module: Any = gm.get_submodule(str(node.target)) if node.op == "call_module" else None
        self.value: Any = node.meta.get("val")
        #: sizes that the rule assigned to an axis; any other size pins the axes that it measures
        self.followed: list[SizeExpr] = []

    @property
    def shape(self) -> tuple[int, ...]:
        """The output's shape at the example inputs."""
        return tuple(self.value.shape)

    def argument(self, position: int, *names: str) -> Any:
        """The node's argument at a position, or by one of these names."""
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
        # a parametrized tensor is computed at each access, so it is known by its name
        dims = self._new_parameter(full, tensor)
        norm = norm_of(self.module)
        if hasattr(norm, "_u") and len(norm._u) + 1 >= len(norm._v):
            self.pin(dims[norm.dim], "norm", "spectral_norm: no direction orthogonal to the existing rows is left")
        elif norm is None:
            by = computed_by(self.module, name)
            for axis in dims:
                self.pin(axis, "operator", f"{name} is computed from other parameters" + (f" ({by})" if by else ""))
        return dims

    def dims_of(self, name: str, tensor: torch.Tensor) -> Dims:
        """The axes of a stored tensor; tied and shared parameters share them."""
        return self._new_parameter(self.structure.aliases.setdefault(id(tensor), name), tensor)

    def _new_parameter(self, name: str, tensor: torch.Tensor) -> Dims:
        dims = Dims.of((axis_of(UnitVar(n)) for n in tensor.shape), name)
        return self.structure.parameters.setdefault(name, dims)

    def same(self, a: Axis, b: Axis, message: str = "must keep the same number of entries") -> None:
        """Says that two axes always have the same units."""
        if length(a) != length(b):
            raise Unsupported(f"expected {length(b)} entries, found {length(a)}")
        unify(a, b, self.reason("size", message))

    def pin(self, axis: Axis, code: str, message: str) -> None:
        """Says that an axis cannot change here."""
        pin(axis, self.reason(code, message))

    def fix(self, axes: Sequence[Axis], message: str = "is a fixed size") -> None:
        """Says that axes cannot change here, because a size is fixed."""
        for axis in axes:
            self.pin(axis, "size", message)

    def fill(self, parameter: Dims | None, value: float | str) -> None:
        """Sets how new entries of a parameter start: a number, "random", or (the default) "mean" of the old entries."""
        if parameter is not None and parameter.parameter is not None:
            self.structure.fills[parameter.parameter] = value

    def require_state(self, kind: str, source: fx.Node, axis: Axis, **norm: Any) -> None:
        """Says that new units of `axis` must come from `source` in the state that this node needs; see `Invariant`."""
        self.structure.invariants.append(Invariant(self.node, source, axis, kind, **norm))

    def keep(self, value: float, axes: Sequence[Axis], *path: Any) -> None:
        """Keeps a number computed from the sizes of `axes`: this node's result, or its argument at `path`."""
        self.structure.kept_numbers.append(KeptNumber(self.node, path, value, tuple(axes)))

    def project(
        self, weight: Dims, bias: Dims | None, out: Axis, *, out_dim: int = 0, in_dim: int = 1, **fields: Any
    ) -> None:
        """Says that this node's weight produces axis `out` (dimension `out_dim`) and consumes its dimension `in_dim`.

        `fields`: of `Projection`, and `units`: the axis of the units, where `out` has several entries for each (gates).
        """
        if bias is not None:
            self.same(bias[0], out)
        if not isinstance(fields.setdefault("source", self.node.all_input_nodes[0]), fx.Node):
            raise Unsupported("a product whose first factor is not computed in the graph")
        origins = self._origins(weight, out_dim, in_dim)
        biases = [] if bias is None else self._bias_origin(bias, fields)
        # statistics are of parameters as they are stored, up to a number, of samples, and of real numbers
        scale = origins[0].scale if all(o.scale == 1.0 for o in (*origins[1:], *biases)) else None
        made = getattr(self.structure.outputs.get(fields["source"]), "is_weight", False) is not False
        if made or (isinstance(self.value, torch.Tensor) and self.value.is_complex()):
            scale = None
        fields |= {"scale": scale} if scale else {"scale": None, "plain": False}
        fields["computed"] = not all(o.same_entries for o in (*origins, *biases))
        fields.setdefault("node", self.node)
        fields.update(bias=biases[0].name or None if biases else None, out=fields.pop("units", out))
        for origin in origins:
            (out_dim, in_dim), dims = origin.dims, self.structure.parameters[origin.name]
            keeps = min((o.keeps[0] for o in (origin, *biases)), key=KEPT.index)
            fields.update(weight=origin.name, out_dim=out_dim, in_dim=in_dim, keeps=keeps)
            fields.update(output_axis=dims[out_dim], input_axis=dims[in_dim])
            self.structure.projections.append(Projection(**fields))

    def _input(self, tensor: Dims) -> fx.Node:
        """The node that gives a tensor to this one."""
        return next(n for n in self.node.all_input_nodes if self.structure.outputs[n] is tensor)

    def _bias_origin(self, bias: Dims, fields: dict[str, Any]) -> list[Origin]:
        """The parameter of a bias; one that is computed from several is a term of the output."""
        if bias.parameter is None:
            with contextlib.suppress(NotFollowed):
                return find_origins(self.structure, self.gm, self._input(bias), (0,))
            fields["bias_node"] = self._input(bias)
            return [Origin("", (), (MEAN,), scale=None)]
        return [Origin(bias.parameter, (0,), (MEAN,))]

    def _origins(self, weight: Dims, *dims: int) -> list[Origin]:
        """The parameters from which a weight is computed, mostly itself, by these of its dimensions."""
        if weight.parameter is not None:
            return [Origin(weight.parameter, dims, (MEAN, MEAN))]
        try:
            origins = find_origins(self.structure, self.gm, self._input(weight), dims)
        except NotFollowed as why:
            raise Unsupported(str(why)) from None
        if origins[0].keeps[1] == NOTHING:
            self.pin(weight[dims[1]], "operator", "new columns of the weight, as it is computed, would not be zero")
        return origins

    def attribute(self, name: str, axis: Axis, *index: int) -> None:
        """Says that an attribute of the module (`in_features`), or an item of one, is the length of `axis`."""
        value = getattr(self.module, name, None)
        for i in index:
            value = value[i] if isinstance(value, (tuple, list)) else None
        if isinstance(value, int):
            self.structure.constants.append(Constant((str(self.node.target), (name, *index)), axis))

    def size_argument(self, value: Any, axis: Axis, *path: Any, infer: bool = False, part: bool = False) -> None:
        """Says that an argument (at `path` in the node's args or kwargs) is the length of `axis`.

        A literal is rewritten when the axis grows. A computed size is checked to follow by itself; otherwise it becomes
        a literal, or, with `infer`, -1. `part`: the axis is what was cut off at this size.
        """
        why = self.reason("size", "a computed size does not follow the width")
        where = self._place(path)
        if isinstance(value, SizeExpr):
            self.followed.append(value)
            self.structure.checks.append(SizeCheck(value, axis, why, where, infer, part))
        elif isinstance(value, int) and not isinstance(value, bool) and value >= 0:
            if where is None or isinstance(get_argument(*where), fx.Node):
                # a computed size that measures no width: the axis may not change
                if int(value) == length(axis):
                    self.structure.checks.append(SizeCheck(SizeExpr(value), axis, why, where, infer))
                return
            if where[0] is not self.node:  # a shape that several views take
                for constant in self.structure.constants:
                    if constant.where == where:
                        self.same(axis, constant.axis)
            self.structure.constants.append(Constant(where, axis))

    def new_axis(self, size: Any, n: int, *path: Any) -> Axis:
        """The axis that a new tensor has where its size, an argument at `path`, is given.

        It is the one that the size measures. A literal's axis is one of its own, which becomes that of what it meets.
        """
        if isinstance(size, SizeExpr):
            axis = size.axes[0] if length(size.axes[0]) == n else axis_of(UnitVar(n))
            self.size_argument(size, axis)
            return axis
        where = self._place(path)
        if n < 2 or where is None or isinstance(get_argument(*where), fx.Node):
            return fixed(n)
        axis = axis_of(UnitVar(n, literal=True))
        self.size_argument(size, axis, *path)
        return axis

    def _place(self, path: Path) -> tuple[fx.Node, Path] | None:
        """The node and path where an argument of this node can be replaced: of `h.shape[:-1] + (8,)`, the 8."""
        node, user = self.node, self.node
        if not path:
            return None
        while isinstance(shape := get_argument(node, path[:-1]), fx.Node):
            if shape.target is not operator.add or not all(u is user or u.target in TAKES_SHAPE for u in shape.users):
                return None
            first = shape.args[0]
            n = len(first.meta["val"] if isinstance(first, fx.Node) else first)  # type: ignore[arg-type]
            side = int(path[-1] >= n)
            node, user, path = shape, shape, (side, path[-1] - n * side)
        return node, path
