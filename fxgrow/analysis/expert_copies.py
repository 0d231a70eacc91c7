"""Mixtures whose experts can be copied: from k of E experts to 2k of 2E.

Copies of a router's rows have equal logits: both are chosen or neither, each with half the weight where these keep
their sum. Whether a routing does that is tested on random numbers: what follows the logits runs once as it is and once
with every expert twice, until nothing differs. In place of an expert stands a function of a row and its number.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from fxgrow.analysis.axis_statistics import COPY
from fxgrow.analysis.initial_state import InitialState
from fxgrow.axes.axes import Axis, Dims, UnitVar, axes_in, axis_of, multiplicity, single_variable, variables
from fxgrow.axes.structure import Constant, Projection, Structure
from fxgrow.graph.arguments import replaced_argument
from fxgrow.graph.evaluate import TOLERANCE
from fxgrow.graph.graph import lookup
from fxgrow.graph.node_functions import guard
from fxgrow.graph.node_meta import OPAQUE
from fxgrow.graph.purity import overwrites
from fxgrow.ops.expert_routing import SORTED, routes

#: tensors of more entries are neither drawn nor computed
MAX_ENTRIES = 1 << 25


def copy_experts(gm: fx.GraphModule, structure: Structure) -> None:
    """Makes a width of every router whose experts can be copied; its one unit is all experts."""
    products = [n for n in gm.graph.nodes if n.target in SORTED]
    numbers = {r.experts for n in products if (r := routes(n)) is not None}
    for gate in [p for p in structure.projections if numbers and not p.experts]:
        var = single_variable(gate.output_axis)
        if var is None or var.pinned is None or var.size not in numbers:
            continue
        test = _CopyTest(gm, structure, gate, var)
        if test.succeeds():
            _enter_width(structure, test)


def _enter_width(structure: Structure, test: _CopyTest) -> None:
    every = UnitVar(1)
    for var in test.per_expert:
        var.bound = axis_of(every, var.size)
    for node in test.changed:
        dims = structure.outputs[node]
        if isinstance(dims, Dims):
            entries = zip(dims, *(v.shape for v in test.values[node]), strict=True)
            structure.outputs[node] = Dims(
                axis_of(every, n) if n != m and every not in multiplicity(a) else a for a, n, m in entries
            )
    for (node, path), (size, less) in test.literals.items():
        structure.constants.append(Constant((node, path), axis_of(every, size), less))
    axes = ((name, d, axis) for name, dims in structure.parameters.items() for d, axis in enumerate(dims))
    writers = {(name, d) for name, d, axis in axes if every in multiplicity(axis)}
    structure.initial_states[every] = InitialState(COPY, writers=writers)


class _NotCopyable(Exception):
    pass


class _CopyTest:
    """Everything computed from one router's logits, with these once and twice."""

    def __init__(self, gm: fx.GraphModule, structure: Structure, gate: Projection, var: UnitVar) -> None:
        self.gm, self.structure, self.gate, self.var = gm, structure, gate, var
        # kernels differ in which dtypes they take
        device = lookup(gm, gate.weight).device
        self.device = torch.device("cpu") if device.type == "meta" else device
        self.generator = torch.Generator().manual_seed(0)
        #: both values of what was computed or drawn
        self.values: dict[fx.Node, tuple[Any, Any]] = {}
        #: nodes whose values differ
        self.changed: dict[fx.Node, None] = {}
        #: variables of parameters that have one entry per expert
        self.per_expert = {var}
        #: literals that grow with the experts: the length that they stand for, and how much less than it they are
        self.literals: dict[tuple[fx.Node, tuple[Any, ...]], tuple[int, int]] = {}
        self.projections = {p.node: p for p in structure.projections}
        self.downstream = {gate.node}
        for node in gm.graph.nodes:
            if not self.downstream.isdisjoint(node.all_input_nodes):
                self.downstream.add(node)

    def succeeds(self) -> bool:
        """Whether the difference ends before the output, and experts were among it."""
        try:
            with torch.no_grad(), torch.random.fork_rng(devices=[]):
                self._run()
        except _NotCopyable:
            return False
        names = [n for n, dims in self.structure.parameters.items() if self.per_expert.intersection(variables(*dims))]
        trained = all(p.requires_grad for n in names if isinstance(p := lookup(self.gm, n), nn.Parameter))
        return trained and any(n.target in SORTED for n in self.changed) and self._reads_all()

    def _reads_all(self) -> bool:
        """Whether nothing else reads the weights that have an entry per expert."""
        outputs = self.structure.outputs.items()
        carriers = {n for n, value in outputs if self.per_expert.intersection(variables(*axes_in(value)))}
        known = carriers | self.changed.keys()
        users = [u for n in carriers - self.changed.keys() for u in n.users if u not in known]
        return all(u.target is getattr and u.args[1] in ("device", "dtype") for u in users)

    def _run(self) -> None:
        self._change(self.gate.node, *self._random_values(self.gate.node, self.structure.outputs[self.gate.node]))
        for node in self.gm.graph.nodes:
            if node is not self.gate.node and not self.changed.keys().isdisjoint(node.all_input_nodes):
                self._evaluate(node)
        for node in self.values.keys() - self.changed.keys():
            if any(node in overwrites(user, self.gm) for user in node.users):
                raise _NotCopyable("changed in place")

    def _change(self, node: fx.Node, once: Any, twice: Any) -> None:
        self.values[node] = once, twice
        self.changed[node] = None
        for a, b in zip(pytree.tree_leaves(once), pytree.tree_leaves(twice), strict=True):
            if isinstance(a, Tensor) and any(m not in (n, 2 * n) for n, m in zip(a.shape, b.shape, strict=True)):
                raise _NotCopyable("a size that does not double")

    def _evaluate(self, node: fx.Node) -> None:
        weighted = node.op == "call_module" and any(True for _ in self.gm.get_submodule(str(node.target)).parameters())
        weighted = weighted or (node in self.projections and node.target not in SORTED)
        if node.op == "output" or node.target is guard or OPAQUE in node.meta or weighted:
            raise _NotCopyable("read by an operator that cannot be tested")
        if node.target is operator.getitem:
            rows, index = node.args
            if isinstance(rows, fx.Node) and rows.op == "get_attr" and isinstance(index, fx.Node):
                # a parameter that is indexed by the expert's number
                dims = self.structure.outputs[rows]
                self._per_expert(dims[0])
                value, _ = self._random_values(rows, dims)
                self.values[rows] = value, torch.cat([value, value])
        once, twice = self._call(node, 0), self._call(node, 1)
        if _equal(once, twice):
            self.values[node] = once, once
        else:
            self._change(node, once, twice)

    def _per_expert(self, axis: Axis) -> None:
        var = single_variable(axis)
        if var is None or var.size != self.var.size:
            raise _NotCopyable("not an entry per expert")
        self.per_expert.add(var)

    def _value(self, node: fx.Node, which: int) -> Any:
        if node not in self.values:
            computed = node in self.downstream
            dims = self.structure.outputs[node]
            self.values[node] = (self._call(node, 0),) * 2 if computed else self._random_values(node, dims)
        return self.values[node][which]

    def _random_values(self, node: fx.Node, dims: Any) -> tuple[Any, Any]:
        """Random values, the same for all features, once and with copies along what has an entry per expert."""
        value = node.meta["val"]
        if isinstance(value, torch.device):
            return self.device, self.device
        if not isinstance(value, Tensor):
            return value, value
        if not value.is_floating_point() or value.numel() > MAX_ENTRIES:
            raise _NotCopyable("no random values of this kind")
        per_expert = [d for d, axis in enumerate(dims) if self.var in multiplicity(axis)]
        shape = [1 if d == value.dim() - 1 and d not in per_expert else n for d, n in enumerate(value.shape)]
        once = torch.randn(shape, generator=self.generator).to(self.device, value.dtype).expand(value.shape).clone()
        twice = once.clone()
        for d in per_expert:
            twice = torch.cat([twice, twice], d)
        return once, twice

    def _call(self, node: fx.Node, which: int) -> Any:
        value = node.meta.get("val")
        if isinstance(value, Tensor) and value.numel() > MAX_ENTRIES:
            raise _NotCopyable("too large to compute")
        if node.target in SORTED:
            return self._experts(node, which)
        args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: self._value(n, which))
        if which:
            for path, value in self._literals(node, args, kwargs):
                args, kwargs = replaced_argument(args, kwargs, path, value)
        run: Any = self.gm.get_submodule(str(node.target)) if node.op == "call_module" else node.target
        if node.op == "call_method":
            run, args = getattr(args[0], str(node.target)), args[1:]
        try:
            return run(*args, **kwargs)
        except Exception as error:  # code may do anything at sizes that it was not written for
            raise _NotCopyable(str(error)) from error

    def _literals(self, node: fx.Node, args: Any, kwargs: Any) -> list[tuple[tuple[Any, ...], int]]:
        """Numbers in the graph that grow with the experts."""
        sizes: dict[tuple[Any, ...], tuple[int, int]] = {}
        name = getattr(node.target, "__name__", node.target)
        x = self._value(node.all_input_nodes[0], 0) if name == "topk" else None
        if x is not None and x.shape != args[0].shape:
            path: tuple[Any, ...] = ("k",) if "k" in node.kwargs else (1,)
            size = node.kwargs.get("k", (*node.args, None)[1])
            if isinstance(size, int):
                sizes[path] = size, 0
        if name == "histc" and {"bins", "min", "max"} <= node.kwargs.keys():
            bins, low, high = (node.kwargs[key] for key in ("bins", "min", "max"))
            if isinstance(bins, int) and low == 0 and high == bins - 1 == self.var.size - 1:
                sizes = {("bins",): (bins, 0), ("max",): (bins, 1)}
        self.literals |= {(node, path): size for path, size in sizes.items()}
        numbers = [(path, 2 * size - less) for path, (size, less) in sizes.items()]
        counts = [(c.where[1], multiplicity(c.axis)[self.var]) for c in self.structure.constants if c.where[0] is node]
        return numbers + [(path, self.var.size * count * 2) for path, count in counts if count]

    def _experts(self, node: fx.Node, which: int) -> Tensor:
        """A function of a row and of its expert's number."""
        routing = routes(node)
        if routing is None or routing.ends is None or routing.experts != self.var.size or node not in self.projections:
            raise _NotCopyable("another mixture")
        p = self.projections[node]
        self._per_expert(self.structure.parameters[p.weight][0])
        x, ends = self._value(node.args[0], which), self._value(routing.ends, which)  # type: ignore[arg-type]
        rows = torch.arange(len(x), dtype=ends.dtype, device=ends.device)
        expert = torch.searchsorted(ends, rows, right=True) % routing.experts
        number = expert[:, None].to(x.dtype) + 1
        out: Tensor = (x.mean(-1, keepdim=True) * number.sin() + number.cos()).repeat(1, node.meta["val"].shape[1])
        return out


def _equal(a: Any, b: Any) -> bool:
    left, right = pytree.tree_leaves(a), pytree.tree_leaves(b)
    return len(left) == len(right) and all(_same(x, y) for x, y in zip(left, right, strict=True))


def _same(a: Any, b: Any) -> bool:
    if not isinstance(a, Tensor):
        return bool(a == b)
    if a.shape != b.shape or not a.is_floating_point():
        return torch.equal(a, b)
    tolerance = max(TOLERANCE[torch.float32], TOLERANCE.get(a.dtype, 0.0))  # routers compute in float32
    return torch.allclose(a, b, rtol=tolerance, atol=tolerance * float(a.abs().amax()) if a.numel() else 0.0)
