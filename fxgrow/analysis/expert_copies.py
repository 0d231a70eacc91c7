"""Mixtures whose experts can be copied: of E experts k are chosen, of twice as many twice as many.

Copies of a router's rows give copies the logits of their originals, so that both are chosen or neither, and where the
weights of those chosen add up to what they did, each has half of it. Whether a network's routing does that is tried
out: what lies behind the logits runs on made-up numbers, once as it is and once with everything there twice, until
nothing differs any more. Experts stand in for themselves as any function of a row and of the expert's number.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from fxgrow.analysis.initial_state import COPY, InitialState
from fxgrow.axes.axes import Axis, Dims, UnitVar, axes_in, axis_of, multiplicity, resolve, variables
from fxgrow.axes.structure import Constant, Projection, Structure
from fxgrow.graph.arguments import replaced_argument
from fxgrow.graph.evaluate import TOLERANCE
from fxgrow.graph.graph import lookup
from fxgrow.graph.node_functions import guard
from fxgrow.graph.node_meta import OPAQUE
from fxgrow.graph.purity import overwrites
from fxgrow.ops.expert_routing import SORTED, routes

#: tensors of more entries are not made up, nor computed
MANY = 1 << 25


def copy_experts(gm: fx.GraphModule, structure: Structure) -> None:
    """Makes a width of every router whose experts can be copied, with one unit: all experts."""
    products = [n for n in gm.graph.nodes if n.target in SORTED]
    numbers = {r.experts for n in products if (r := routes(n)) is not None}
    for gate in [p for p in structure.projections if numbers and not p.experts]:
        var = _one(gate.output_axis)
        if var is None or var.pinned is None or var.size not in numbers:
            continue
        trial = _Trial(gm, structure, gate, var)
        if trial.succeeds():
            _enter(structure, trial)


def _enter(structure: Structure, trial: _Trial) -> None:
    every = UnitVar(1)
    for var in trial.own:
        var.bound = axis_of(every, var.size)
    for node in trial.changed:
        dims = structure.outputs[node]
        if isinstance(dims, Dims):
            old, new = (v.shape for v in trial.values[node])
            axes = (
                axis_of(every, n) if n != m and every not in multiplicity(a) else a
                for a, n, m in zip(dims, old, new, strict=True)
            )
            structure.outputs[node] = Dims(axes)
    for (node, path), (size, less) in trial.literals.items():
        structure.constants.append(Constant((node, path), axis_of(every, size), less))
    writers = {
        (name, d)
        for name, dims in structure.parameters.items()
        for d, axis in enumerate(dims)
        if every in multiplicity(axis)
    }
    structure.initial_states[every] = InitialState(COPY, writers=writers)


def _one(axis: Axis) -> UnitVar | None:
    """The variable whose units are an axis' entries, if that is all there is."""
    segments = resolve(axis)
    return segments[0].var if len(segments) == 1 and segments[0].inner == 1 else None


class _Differs(Exception):
    pass


class _Trial:
    """What lies behind one router, with its logits once and twice."""

    def __init__(self, gm: fx.GraphModule, structure: Structure, gate: Projection, var: UnitVar) -> None:
        self.gm, self.structure, self.gate, self.var = gm, structure, gate, var
        # kernels differ in which dtypes they take
        device = lookup(gm, gate.weight).device
        self.device = torch.device("cpu") if device.type == "meta" else device
        self.generator = torch.Generator().manual_seed(0)
        #: both values of what was computed or made up
        self.values: dict[fx.Node, tuple[Any, Any]] = {}
        #: nodes whose values differ
        self.changed: dict[fx.Node, None] = {}
        #: axes of parameters that hold one entry per expert
        self.own = {var}
        #: literals that must grow: what they are the length of, and how much less than that they are
        self.literals: dict[tuple[fx.Node, tuple[Any, ...]], tuple[int, int]] = {}
        self.projections = {p.node: p for p in structure.projections}
        self.behind = {gate.node}
        for node in gm.graph.nodes:
            if not self.behind.isdisjoint(node.all_input_nodes):
                self.behind.add(node)

    def succeeds(self) -> bool:
        """Whether all that differs is used up, and experts were among it."""
        try:
            with torch.no_grad(), torch.random.fork_rng(devices=[]):
                self._run()
        except _Differs:
            return False
        names = [n for n, dims in self.structure.parameters.items() if self.own.intersection(variables(*dims))]
        trained = all(p.requires_grad for n in names if isinstance(p := lookup(self.gm, n), nn.Parameter))
        return trained and any(n.target in SORTED for n in self.changed) and self._is_all()

    def _is_all(self) -> bool:
        """Whether nothing else sees the weights that hold an entry per expert."""
        carry = {n for n, value in self.structure.outputs.items() if self.own.intersection(variables(*axes_in(value)))}
        known = carry | self.changed.keys()
        users = [u for n in carry - self.changed.keys() for u in n.users if u not in known]
        return all(u.target is getattr and u.args[1] in ("device", "dtype") for u in users)

    def _run(self) -> None:
        self._change(self.gate.node, *self._made_up(self.gate.node, self.structure.outputs[self.gate.node]))
        for node in self.gm.graph.nodes:
            if node is not self.gate.node and not self.changed.keys().isdisjoint(node.all_input_nodes):
                self._evaluate(node)
        for node in self.values.keys() - self.changed.keys():
            if any(node in overwrites(user, self.gm) for user in node.users):
                raise _Differs("changed in place")

    def _change(self, node: fx.Node, once: Any, twice: Any) -> None:
        self.values[node] = once, twice
        self.changed[node] = None
        for a, b in zip(pytree.tree_leaves(once), pytree.tree_leaves(twice), strict=True):
            if isinstance(a, Tensor) and any(m not in (n, 2 * n) for n, m in zip(a.shape, b.shape, strict=True)):
                raise _Differs("a size that does not double")

    def _evaluate(self, node: fx.Node) -> None:
        owns = node.op == "call_module" and any(True for _ in self.gm.get_submodule(str(node.target)).parameters())
        owns = owns or (node in self.projections and node.target not in SORTED)
        if node.op == "output" or node.target is guard or OPAQUE in node.meta or owns:
            raise _Differs("seen by what cannot be tried")
        if node.target is operator.getitem:
            rows, index = node.args
            if isinstance(rows, fx.Node) and rows.op == "get_attr" and isinstance(index, fx.Node):
                self._copy_rows(rows)
        once, twice = self._call(node, 0), self._call(node, 1)
        if _equal(once, twice):
            self.values[node] = once, once
        else:
            self._change(node, once, twice)

    def _per_expert(self, axis: Axis) -> None:
        var = _one(axis)
        if var is None or var.size != self.var.size:
            raise _Differs("not an entry per expert")
        self.own.add(var)

    def _copy_rows(self, node: fx.Node) -> None:
        """A parameter of which each row takes the one of its expert."""
        dims = self.structure.outputs[node]
        self._per_expert(dims[0])
        value, _ = self._made_up(node, dims)
        self.values[node] = value, torch.cat([value, value])

    def _value(self, node: fx.Node, which: int) -> Any:
        if node not in self.values:
            if node in self.behind:
                value = self._call(node, 0)
                self.values[node] = value, value
            else:
                self.values[node] = self._made_up(node, self.structure.outputs[node])
        return self.values[node][which]

    def _made_up(self, node: fx.Node, dims: Any) -> tuple[Any, Any]:
        """Random values, the same for all features; copies along what holds an entry per expert."""
        value = node.meta["val"]
        if isinstance(value, torch.device):
            return self.device, self.device
        if not isinstance(value, Tensor):
            return value, value
        if not value.is_floating_point() or value.numel() > MANY:
            raise _Differs("not to be made up")
        own = [d for d, axis in enumerate(dims) if self.var in multiplicity(axis)]
        shape = [1 if d == value.dim() - 1 and d not in own else n for d, n in enumerate(value.shape)]
        made = torch.randn(shape, generator=self.generator).to(self.device, value.dtype).expand(value.shape).clone()
        twice = made.clone()
        for d in own:
            twice = torch.cat([twice, twice], d)
        return made, twice

    def _call(self, node: fx.Node, which: int) -> Any:
        value = node.meta.get("val")
        if isinstance(value, Tensor) and value.numel() > MANY:
            raise _Differs("too much to try")
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
        except Exception as error:  # whatever code does with sizes that it was not written for
            raise _Differs(str(error)) from error

    def _literals(self, node: fx.Node, args: Any, kwargs: Any) -> list[tuple[tuple[Any, ...], int]]:
        """Numbers in the graph that grow with the experts."""
        found: dict[tuple[Any, ...], tuple[int, int]] = {}
        name = getattr(node.target, "__name__", node.target)
        x = self._value(node.all_input_nodes[0], 0) if name == "topk" else None
        if x is not None and x.shape != args[0].shape:
            path: tuple[Any, ...] = ("k",) if "k" in node.kwargs else (1,)
            size = node.kwargs.get("k", (*node.args, None)[1])
            if isinstance(size, int):
                found[path] = size, 0
        if name == "histc" and {"bins", "min", "max"} <= node.kwargs.keys():
            bins, low, high = (node.kwargs[key] for key in ("bins", "min", "max"))
            if isinstance(bins, int) and low == 0 and high == bins - 1 == self.var.size - 1:
                found = {("bins",): (bins, 0), ("max",): (bins, 1)}
        self.literals |= {(node, path): own for path, own in found.items()}
        numbers = [(path, 2 * size - less) for path, (size, less) in found.items()]
        for c in self.structure.constants:
            count = multiplicity(c.axis)[self.var] if c.where[0] is node else 0
            if count:
                numbers.append((c.where[1], self.var.size * count * 2))
        return numbers

    def _experts(self, node: fx.Node, which: int) -> Tensor:
        found = routes(node)
        if found is None or found.ends is None or found.experts != self.var.size or node not in self.projections:
            raise _Differs("another mixture")
        p = self.projections[node]
        self._per_expert(self.structure.parameters[p.weight][0])
        x, ends = self._value(node.args[0], which), self._value(found.ends, which)  # type: ignore[arg-type]
        rows = torch.arange(len(x), dtype=ends.dtype, device=ends.device)
        expert = torch.searchsorted(ends, rows, right=True) % found.experts
        number = expert[:, None].to(x.dtype) + 1
        wide: Tensor = (x.mean(-1, keepdim=True) * number.sin() + number.cos()).repeat(1, node.meta["val"].shape[1])
        return wide


def _equal(a: Any, b: Any) -> bool:
    left, right = pytree.tree_leaves(a), pytree.tree_leaves(b)
    return len(left) == len(right) and all(_same(x, y) for x, y in zip(left, right, strict=True))


def _same(a: Any, b: Any) -> bool:
    if not isinstance(a, Tensor):
        return bool(a == b)
    if a.shape != b.shape or not a.is_floating_point():
        return torch.equal(a, b)
    share = max(TOLERANCE[torch.float32], TOLERANCE.get(a.dtype, 0.0))  # routers compute in float32
    return torch.allclose(a, b, rtol=share, atol=share * float(a.abs().amax()) if a.numel() else 0.0)
