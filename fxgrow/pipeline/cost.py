"""What a growth costs: parameters, multiply-adds of one sample, or measured seconds of the example batch."""

from __future__ import annotations

import math
import operator
import statistics
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.nn.modules.conv import _ConvNd
from torch.utils import _pytree as pytree

from fxgrow.analysis.analyse import AnalysedGraph
from fxgrow.axes.axes import Axis, Dims, length, multiplicity
from fxgrow.axes.structure import Projection, Structure
from fxgrow.errors import PlanError
from fxgrow.graph.evaluate import eval_mode
from fxgrow.graph.graph import lookup
from fxgrow.graph.node_meta import EXAMPLE_INPUTS
from fxgrow.rewriting.size_change import SizeChange
from fxgrow.rewriting.widened_graph import WidenedGraph

#: a latency is the median of so many runs, and a width is measured when it is larger by this part
RUNS, PROBE = 9, 0.5
#: least part of the time that its multiply-adds would take that a width is charged, whatever the clock says
LEAST = 0.25
_PRODUCTS = {torch.matmul, torch.bmm, operator.matmul, "matmul", "bmm", "__matmul__"}


class _AxisProducts:
    """A constant and a sum of products of axis lengths (and how often), as a function of the units that are added."""

    def __init__(
        self, analysed: AnalysedGraph, products: Iterable[tuple[Sequence[Axis], float]], constant: int = 0
    ) -> None:
        self.constant, self.widths = constant, analysed.widths
        #: per product: how often; per axis its length now, and by how much a unit of each variable makes it longer
        self.products = [(times, [(length(a), multiplicity(a)) for a in axes]) for axes, times in products]

    def total(self, units: Mapping[str, int]) -> float:
        added = {self.widths[name].var: k // self.widths[name].step for name, k in units.items()}
        return self.constant + sum(
            times * math.prod(n + sum(added.get(var, 0) * m for var, m in longer.items()) for n, longer in axes)
            for times, axes in self.products
        )


class Parameters(_AxisProducts):
    """Parameters of the grown model, exactly: every axis with its new length."""

    unit = "parameters"

    def __init__(self, analysed: AnalysedGraph) -> None:
        axes = analysed.structure.parameters
        weights = {name: p for name in axes if isinstance(p := lookup(analysed.gm, name), nn.Parameter)}
        without_axes = sum(p.numel() for p in analysed.gm.parameters()) - sum(p.numel() for p in weights.values())
        super().__init__(analysed, [(axes[name], 1) for name in weights], without_axes)

    def total(self, units: Mapping[str, int]) -> int:
        return int(super().total(units))


class MultiplyAdds(_AxisProducts):
    """Multiply-adds of one sample in layers and products of activations, at the size of the example inputs."""

    unit = "multiply-adds"

    def __init__(self, analysed: AnalysedGraph) -> None:
        super().__init__(analysed, _multiplied(analysed.gm, analysed.structure))


def _multiplied(gm: fx.GraphModule, structure: Structure) -> Iterator[tuple[Sequence[Axis], float]]:
    """Axes that are multiplied in layers and products, and how often for one sample."""
    inputs = (n.meta["val"] for n in gm.graph.find_nodes(op="placeholder"))
    batch = next((v.shape[0] for v in inputs if isinstance(v, Tensor) and v.dim()), 1)
    uses: dict[fx.Node, list[Projection]] = {}
    for p in structure.projections:
        if p.node.target is not F.embedding:
            uses.setdefault(p.node, []).append(p)
    for node in gm.graph.nodes:
        module = gm.get_submodule(str(node.target)) if node.op == "call_module" else None
        if isinstance(module, nn.Embedding):
            continue
        if node in uses:
            # a recurrent layer has several weights, each of which multiplies every step
            for p in uses[node]:
                yield structure.parameters[p.weight], _positions(p) / batch
        elif isinstance(module, _ConvNd):  # depthwise
            name = f"{node.target}.weight"
            at: Tensor = (node.all_input_nodes[0] if module.transposed else node).meta["val"]
            dims = structure.parameters[structure.aliases.get(id(lookup(gm, name)), name)]
            yield dims, at.shape[:1].numel() * at.shape[2:].numel() / batch
        elif node.target in _PRODUCTS:
            a, b = (structure.outputs.get(n) for n in node.all_input_nodes[:2])
            if isinstance(a, Dims) and isinstance(b, Dims) and min(len(a), len(b)) > 1:
                yield (*a, b[-1]), 1 / batch
        elif node.target is F.scaled_dot_product_attention:
            q, k, v = (structure.outputs.get(n) for n in node.all_input_nodes[:3])
            if isinstance(q, Dims) and isinstance(k, Dims) and isinstance(v, Dims):
                yield (*q, k[-2]), 1 / batch
                yield (*q[:-1], k[-2], v[-1]), 1 / batch


def _positions(p: Projection) -> float:
    """How many rows or positions of a batch a weight multiplies."""
    at: Tensor = (p.source if p.transposed else p.node).meta["val"]
    while not isinstance(at, Tensor):
        at = at[0]
    if p.kernel or p.transposed:
        return at.shape[:1].numel() * at.shape[2:].numel()
    # each row goes to one of the experts
    return at.shape[:-1].numel() / (at.shape[0] if p.experts and at.dim() == 3 else max(1, p.groups * p.experts))


class Latency:
    """Seconds of a forward pass of the example batch in eval mode, as if widths added up.

    Measured once per width, larger by a half; a width is charged at least a quarter of what its multiply-adds would
    take, because a clock is noisy and the cost of a unit is not below zero.
    """

    unit = "seconds"

    def __init__(self, analysed: AnalysedGraph, names: Sequence[str]) -> None:
        gm, sums = analysed.gm, MultiplyAdds(analysed)
        inputs = pytree.tree_map_only(Tensor, torch.clone, gm.meta[EXAMPLE_INPUTS])  # the model may write into them
        self.base = _seconds(gm, inputs)
        self.slopes: dict[str, float] = {}
        for name in names:
            w = analysed.widths[name].width
            k = max(1, round(PROBE * w.size / w.step)) * w.step
            wide = WidenedGraph(SizeChange(analysed, {name: k}), generator=torch.Generator().manual_seed(0)).check()
            before, after = _seconds(gm, inputs), _seconds(wide.gm, inputs)
            expected = self.base * (sums.total({name: k}) / max(1.0, sums.total({})) - 1)
            self.slopes[name] = max(after - before, LEAST * expected, 1e-12) / k

    def total(self, units: Mapping[str, int]) -> float:
        return self.base + sum(self.slopes.get(name, 0.0) * k for name, k in units.items())


#: `total` is that of the whole network with so many more units per width
Cost = Parameters | MultiplyAdds | Latency


def cost_of(kind: str, analysed: AnalysedGraph, names: Sequence[str]) -> Cost:
    """The cost of that name."""
    if kind == "latency":
        return Latency(analysed, names)
    for cost in (Parameters, MultiplyAdds):
        if kind == cost.unit:
            return cost(analysed)
    raise PlanError(f"cost={kind!r}: choose 'parameters', 'multiply-adds' or 'latency'.")


@torch.no_grad()
def _seconds(gm: fx.GraphModule, inputs: Sequence[object]) -> float:
    on_gpu = any(p.is_cuda for p in gm.parameters())
    times = []
    with eval_mode(gm):
        for _ in range(RUNS + 2):
            start = time.perf_counter()
            gm(*inputs)
            if on_gpu:
                torch.cuda.synchronize()
            times.append(time.perf_counter() - start)
    return statistics.median(times[2:])  # the first ones warm up
