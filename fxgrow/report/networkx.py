"""A captured graph as a networkx graph, for people who want to look or search."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor, fx
from torch.utils import _pytree as pytree

from fxgrow.analysis.analyse import analyse
from fxgrow.axes.axes import Axis, Dims, variables
from fxgrow.graph.node_meta import check_captured

if TYPE_CHECKING:
    import networkx as nx


def to_networkx(gm: fx.GraphModule) -> nx.DiGraph:
    """The data flow of a captured graph with its widths.

    Args:
        gm: a graph from `fxgrow.capture`, or a grown one.

    Returns:
        A `networkx.DiGraph` with one node per fx node, named alike, in execution order, and an edge from each node to
        those that use its value. Node attributes:

        - `op`: as in torch.fx (`call_module`, `call_function`, ...);
        - `target`: qualified name of the module, attribute or method, or the name of the function;
        - `module`: class of the module, or None;
        - `shape`, `dtype`: of the value on the example inputs (None where it is not one tensor);
        - `widths`: names of the widths that its output carries;
        - `produces`, `consumes`: names of the widths that its weights write and read.

        The attribute `widths` of the graph itself maps names to `Width`.

    Example:
        Everything that reads the hidden width of a small network, and the way from its producer to there:

        >>> import networkx, torch, fxgrow
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> graph = fxgrow.to_networkx(fxgrow.capture(net, (torch.zeros(1, 4),)))
        >>> [node for node, read in graph.nodes(data="consumes") if "0" in read]
        ['_2']
        >>> networkx.shortest_path(graph, "_0", "_2")
        ['_0', '_1', '_2']
        >>> graph.nodes["_1"]["widths"], graph.nodes["_1"]["shape"], graph.graph["widths"]["0"].size
        (('0',), (1, 8), 8)
    """
    import networkx as nx

    check_captured(gm)
    analysed = analyse(gm)
    structure, widths = analysed.structure, analysed.widths
    names = {w.var: name for name, w in widths.items()}

    def carried(*axes: Axis) -> tuple[str, ...]:
        return tuple(names[v] for v in variables(*axes) if v in names)

    produces = {p.node: carried(p.output_axis) for p in structure.projections}
    consumes = {p.node: carried(p.input_axis) for p in structure.projections}
    graph: nx.DiGraph = nx.DiGraph(widths={name: w.width for name, w in widths.items()})
    for node in gm.graph.nodes:
        value, target = node.meta.get("val"), node.target
        dims = [d for d in pytree.tree_leaves(structure.outputs.get(node)) if isinstance(d, Dims)]
        graph.add_node(
            node.name,
            op=node.op,
            target=target if isinstance(target, str) else getattr(target, "__name__", str(target)),
            module=type(gm.get_submodule(str(node.target))).__name__ if node.op == "call_module" else None,
            shape=tuple(value.shape) if isinstance(value, Tensor) else None,
            dtype=value.dtype if isinstance(value, Tensor) else None,
            widths=carried(*(axis for d in dims for axis in d)),
            produces=produces.get(node, ()),
            consumes=consumes.get(node, ()),
        )
    graph.add_edges_from((source.name, node.name) for node in gm.graph.nodes for source in node.all_input_nodes)
    return graph
