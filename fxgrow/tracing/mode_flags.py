"""The `training` flags of modules that the code has branched on, as nodes of a trace."""

from __future__ import annotations

from torch import fx

from fxgrow.graph.node_meta import set_value
from fxgrow.tracing.tracer import ValueTracer


def flag_of(tracer: ValueTracer, node: fx.Node) -> str:
    """Returns the flag of the nearest module around a node that branched."""
    return next(iter([*branching(tracer, node), *tracer.branches]))


def branching(tracer: ValueTracer, node: fx.Node) -> list[str]:
    """Returns the flags of the modules around a node that branched, innermost first."""
    names = [f"{path}.training" for path, _ in reversed(node.meta.get("nn_module_stack", {}).values())]
    return [name for name in [*names, "training"] if name in tracer.branches]


def flag_node(tracer: ValueTracer, flag: str) -> fx.Node:
    """Returns the ``get_attr`` node of a flag, moved to the top of the graph, before all its users."""
    nodes: list[fx.Node] = list(tracer.graph.find_nodes(op="get_attr", target=flag))
    if not nodes:
        # not Graph.get_attr, which warns about attributes that are neither modules nor tensors
        nodes.append(tracer.graph.create_node("get_attr", flag))
        set_value(nodes[0], tracer.branches[flag][1])
    inputs = list(tracer.graph.find_nodes(op="placeholder"))
    (inputs[-1].append if inputs else next(iter(tracer.graph.nodes)).prepend)(nodes[0])
    return nodes[0]
