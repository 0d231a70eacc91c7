"""Records the nodes of a trace, each with its value: the half of the tracer that knows nothing of modules."""

from __future__ import annotations

import enum
import itertools
import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch import fx, nn
from torch._subclasses.fake_tensor import DynamicOutputShapeException, FakeTensor
from torch.nn.utils.rnn import PackedSequence, PackedSequence_

from fxgrow.errors import CaptureError
from fxgrow.graph.graph import submodule
from fxgrow.graph.node_functions import guard, set_grad_enabled
from fxgrow.graph.node_meta import CHECKPOINT, OPAQUE, set_value
from fxgrow.tracing.dependence import Dependence
from fxgrow.tracing.fake_values import FakeRunner, arithmetic_key
from fxgrow.tracing.objects import made_object
from fxgrow.tracing.opaque import opaque_value
from fxgrow.tracing.proxy import ValueProxy
from fxgrow.tracing.scopes import Scopes
from fxgrow.tracing.source_location import stack_trace, user_frame

#: values that the model's code gets themselves, without a proxy
PLAIN = (type(None), str, torch.dtype, torch.layout, torch.memory_format, type, enum.Enum)
_AS_IS = {type(None), bool, int, float, str}


class NodeRecorder(fx.Tracer):
    """Records nodes on fake values."""

    def __init__(
        self,
        inputs: dict[str, Any],  # name and example value of each placeholder, in order
        flipped: frozenset[str],  # paths of `training` flags that are read as their opposite
        opaque: Mapping[nn.Module, str],  # modules that become one node as their code cannot be traced, and why
    ) -> None:
        super().__init__()
        self.inputs, self.flipped, self.opaque = inputs, flipped, opaque
        self.runner, self.dependence = FakeRunner(), Dependence()
        self.constants: dict[str, torch.Tensor] = {}
        self._names: dict[int, str] = {}  # id of parameter, buffer or tensor attribute -> qualified name
        self._attributes: dict[str, ValueProxy] = {}
        self._arithmetic: dict[tuple[Any, ...], Any] = {}
        self._scopes = Scopes()

    def create_proxy(
        self, kind: str, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any], *_: Any, **__: Any
    ) -> Any:
        """Records a node; returns a proxy of its value, or plain Python where that is static."""
        node_args, node_kwargs = self.create_arg(args), self.create_arg(kwargs)
        key = arithmetic_key(kind, target, node_args, node_kwargs)
        if key is not None and key in self._arithmetic:
            return self._arithmetic[key]
        node = self.create_node(kind, target, node_args, node_kwargs)
        result = self._present(node, node.meta["val"], unpack=kind not in ("call_function", "call_method"))
        if key is not None:
            self._arithmetic[key] = result
        return result

    def create_node(
        self,
        kind: str,
        target: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        name: str | None = None,
        type_expr: Any = None,
    ) -> fx.Node:
        """Records a node with its value in ``meta["val"]``, ``meta["tensor_meta"]`` and the user's line."""
        node = super().create_node(kind, target, args, kwargs, name, type_expr)
        try:
            with torch._C.DisableTorchFunction():
                value = self._run(node)
        except BaseException as error:
            of_data = isinstance(error, Exception) and not self.dependence.data.isdisjoint(node.all_input_nodes)
            self.graph.erase_node(node)
            if of_data:  # it fails on a size that was guessed
                raise DynamicOutputShapeException(torch.ops.aten.nonzero.default) from error
            raise
        set_value(node, value)
        frame = user_frame(sys._getframe(1))
        if frame is not None and kind != "placeholder":
            node.stack_trace = stack_trace(frame)
        if self._scopes.checkpoint and kind != "get_attr":
            node.meta[CHECKPOINT] = self._scopes.checkpoint
        self.dependence.add(node, value, self.runner.guessed)
        return node

    def _run(self, node: fx.Node) -> Any:
        self.runner.guessed = False
        if node.op == "placeholder":
            return self.runner.fake(self.inputs[str(node.target)])
        if node.op == "get_attr":
            return self._attribute(str(node.target))
        if node.op == "output":
            return fx.node.map_arg(node.args[0], lambda result: result.meta["val"])
        if node.target is guard or node.target is set_grad_enabled:
            return None
        if node.op == "call_module" and (why := self.opaque.get(submodule(self.root, str(node.target)))):
            node.meta[OPAQUE] = why
            return opaque_value(node, self.root, self.runner, self.inputs)
        return self.runner.call(node, self.root)

    def _attribute(self, name: str) -> Any:
        if name in self.constants:
            return self.runner.fake(self.constants[name])
        path, _, attribute = name.rpartition(".")
        with self.runner.quiet():
            value = getattr(self.root.get_submodule(path), attribute)
        if name in self.flipped:
            return not value
        return value.carried if type(value) is ValueProxy else self.runner.fake(value)

    def _present(self, node: fx.Node, value: Any, unpack: bool) -> Any:
        """Returns what the model's code gets: of a container its items, so that `type(x) is tuple` and `**x` work."""
        if isinstance(value, PLAIN):
            return value
        proxy = self._proxy(node, PackedSequence(*value) if type(value) is PackedSequence_ else value)
        if not unpack:
            return proxy
        if type(value) is dict:
            return {name: proxy[name] for name in value}  # type: ignore[index]
        if isinstance(value, (tuple, list)) and not isinstance(value, (torch.Size, PackedSequence_)):
            items = [proxy[i] for i in range(len(value))]  # type: ignore[index]
            if node.op == "placeholder" or node.op == "call_module":
                items = [self._present(i.node, i.carried, True) if type(i) is ValueProxy else i for i in items]
            return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
        return proxy

    def _proxy(self, node: fx.Node, value: Any) -> ValueProxy:
        tracer: Any = self
        return ValueProxy(node, tracer, value)

    def create_arg(self, a: Any) -> Any:
        """Returns nodes for proxies, tensors and the containers that fx would flatten into another type."""
        if type(a) in _AS_IS:
            return a
        if type(a) is tuple or type(a) is list:
            return type(a)(map(self.create_arg, a))
        if isinstance(a, fx.Proxy):
            if a.tracer is not self:
                raise CaptureError(f"The model has kept {a!r} from an earlier trace. Set that attribute anew.")
            return a.node
        if isinstance(a, (torch.Tensor, torch.Generator)):
            return self._tensor(a).node
        if type(a).__module__ == "numpy" and getattr(a, "shape", None) == ():
            return a.item()
        if type(a) is torch.Size:
            return tuple(self.create_arg(item) for item in a)
        if type(a) is not dict and (made := made_object(a)):
            return self.create_node("call_function", made.function, *map(self.create_arg, made[1:]))
        return super().create_arg(a)

    def _tensor(self, tensor: Any) -> ValueProxy:
        """Returns the one ``get_attr`` node of a parameter, a buffer, a generator, or a constant of the graph."""
        name: str | None = self._names.get(id(tensor))
        if name is None:
            if isinstance(tensor, FakeTensor):
                raise CaptureError("A tensor made during capture reached the graph without being recorded.")
            names = (f"_constant{i}" for i in itertools.count(len(self.constants)))
            name = self._names[id(tensor)] = next(n for n in names if not hasattr(self.root, n))
            self.constants[name] = tensor
        if name not in self._attributes:
            node = self.create_node("get_attr", name, (), {})
            self._attributes[name] = self._proxy(node, node.meta["val"])
        return self._attributes[name]
