"""The module class of captured graphs: pickled as data, with what fxgrow keeps in the graph.

Other graph modules are pickled as their code, and traced again where they are loaded. That loses the recipe, the
example inputs and the values of nodes, and a graph with conditional nodes has no code that could be traced.
"""

from __future__ import annotations

import enum
import functools
import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils import _pytree as pytree

from fxgrow.graph.conditional import ConditionalCodeGen
from fxgrow.graph.node_functions import function_call
from fxgrow.graph.node_meta import OTHER_MODE, RECORD, set_value


class CapturedGraph(fx.GraphModule):
    """A graph module that is pickled as a list of its nodes."""

    def train(self, mode: bool = True) -> CapturedGraph:
        """Sets the modes as the model's own `train` does, which may leave its norms in eval mode."""
        super().train(mode)
        for name in self.meta.get(OTHER_MODE, {}).get(mode, ()):
            self.get_submodule(name).training = not mode
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        state = {name: value for name, value in vars(self).items() if name not in ("_graph", "_code", "_lineno_map")}
        state["meta"] = {key: value for key, value in self.meta.items() if key != RECORD}
        nodes = [_node_data(node) for node in self.graph.nodes]
        return _load, (type(self).__name__, state, nodes, isinstance(self.graph._codegen, ConditionalCodeGen))


@dataclass(frozen=True)
class _Reference:
    """A node among the arguments of another one."""

    name: str


@dataclass(frozen=True)
class _Fake:
    """A fake tensor."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    requires_grad: bool

    @classmethod
    def of(cls, x: FakeTensor) -> _Fake:
        # a layout that no strides describe is that of a tensor of this shape
        stride = x.stride() if x.layout is torch.strided else torch.empty(x.shape, device="meta").stride()
        return cls(tuple(x.shape), stride, x.dtype, x.device, x.requires_grad)

    def tensor(self, mode: FakeTensorMode) -> torch.Tensor:
        meta = torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device="meta")
        return FakeTensor(mode, meta, self.device).requires_grad_(self.requires_grad)


def _target(target: Any) -> Any:
    """What makes a function again that has no name of its own: the call of an autograd function, one of torch.ops."""
    if isinstance(target, (torch._ops.OpOverload, torch._ops.OpOverloadPacket)):
        return functools.partial(_operator, str(target))
    cls = getattr(target, "autograd_function", None)
    return target if cls is None else functools.partial(function_call, cls)


def _operator(name: str) -> Any:
    return operator.attrgetter(name)(torch.ops)


def _node_data(node: fx.Node) -> dict[str, Any]:
    def reference(source: Any) -> Any:
        return _Reference(source.name)

    args, kwargs = fx.node.map_arg((node.args, node.kwargs), reference)
    meta = {key: kept for key, kept in node.meta.items() if key not in ("val", "type", "tensor_meta", RECORD)}
    fields = {"op": node.op, "target": _target(node.target), "args": args, "kwargs": kwargs, "name": node.name}
    value = pytree.tree_map(_value_data, node.meta.get("val"))
    return fields | {"type_expr": node.type, "meta": meta, "value": value, "known": "val" in node.meta}


def _value_data(leaf: Any) -> Any:
    if isinstance(leaf, FakeTensor):
        return _Fake.of(leaf)
    # an object of tensors, which are the values of other nodes
    return None if hasattr(leaf, "__dict__") and not isinstance(leaf, (type, enum.Enum)) else leaf


def _load(name: str, state: dict[str, Any], data: list[dict[str, Any]], conditional: bool) -> CapturedGraph:
    graph, mode, nodes = fx.Graph(), FakeTensorMode(allow_non_fake_inputs=True), dict[str, fx.Node]()

    def real(value: Any) -> Any:
        return nodes[value.name] if isinstance(value, _Reference) else value

    for fields in data:
        meta, value, known = (fields.pop(key) for key in ("meta", "value", "known"))
        target = fields.pop("target")
        args, kwargs = (fx.node.map_aggregate(fields.pop(key), real) for key in ("args", "kwargs"))
        target = target() if isinstance(target, functools.partial) else target
        node = graph.create_node(target=target, args=args, kwargs=kwargs, **fields)
        nodes[fields["name"]] = node
        node.meta = meta
        if known:
            set_value(node, pytree.tree_map_only(_Fake, lambda fake: fake.tensor(mode), value))
    if conditional:
        graph.set_codegen(ConditionalCodeGen())
    gm = CapturedGraph(nn.Module(), fx.Graph(), class_name=name)
    vars(gm).update(state)
    gm.graph = graph
    return gm
