"""Nodes that run only under a condition: in one mode, or when a random number says so.

A graph of torch.fx has no branches. Here a node may carry conditions, the names of nodes with a truth value; the
generated code runs it only where they hold: elsewhere it draws no random number and moves no buffer. Its value is read
by other conditional nodes, or chosen by `fxgrow.graph.node_functions.in_mode`.

>>> import torch
>>> graph = torch.fx.Graph()
>>> x, flag = graph.placeholder("x"), graph.placeholder("flag")
>>> noise = graph.call_function(torch.rand_like, (x,))
>>> _ = graph.output(noise)
>>> run_only_if(noise, flag, True)
>>> gm = torch.fx.GraphModule(torch.nn.Module(), graph)
>>> gm(torch.zeros(2), False) is None, gm(torch.zeros(2), True).shape
(True, torch.Size([2]))
"""

from __future__ import annotations

import re
from typing import Any

from torch import fx
from torch.fx.graph import CodeGen

from fxgrow.graph.node_meta import CONDITIONS

_STATEMENT = re.compile(r"(?:^|;  )(\w+)(?: ?:[^=]+)? = ")


class ConditionalCodeGen(CodeGen):
    """Generates `if condition:` in front of the statements of conditional nodes."""

    def _gen_python_code(self, nodes: Any, *args: Any, **kwargs: Any) -> Any:
        names = {node.name: repr(node) for node in nodes}
        conditions = {node.name: node.meta[CONDITIONS] for node in nodes if node.meta.get(CONDITIONS)}
        tests = {
            names[node]: " and ".join(names[name] if outcome else f"not {names[name]}" for name, outcome in of)
            for node, of in conditions.items()
        }
        asked = {names[name] for of in conditions.values() for name, _ in of}
        before = self._body_transformer

        def transform(body: list[str]) -> list[str]:
            body = before(body) if before is not None else body
            return [_free(part, asked) if part.startswith(";") else _conditional(part, tests) for part in body]

        self._body_transformer = transform if tests else before
        try:
            return super()._gen_python_code(nodes, *args, **kwargs)
        finally:
            self._body_transformer = before


def _free(part: str, asked: set[str]) -> str:
    """The end of a line, which frees variables, without those that are still asked for."""
    freed = [name for name in re.findall(r"\w+", part) if name != "None" and name not in asked]
    return f";  {' = '.join(freed)} = None\n" if freed else "\n"


def _conditional(part: str, tests: dict[str, str]) -> str:
    """A statement, behind a test where it is a conditional one."""
    match = _STATEMENT.search(part)
    return f"{match[1]} = None\nif {tests[match[1]]}: {part}" if match and match[1] in tests else part


def run_only_if(node: fx.Node, condition: fx.Node, outcome: bool) -> None:
    """Lets a node run only where another one, before it, has that truth value."""
    node.meta[CONDITIONS] = (*node.meta.get(CONDITIONS, ()), (condition.name, outcome))
    node.graph.set_codegen(ConditionalCodeGen())


def graph_like(graph: fx.Graph) -> tuple[fx.Graph, dict[fx.Node, fx.Node]]:
    """A copy of a graph that runs the same nodes under the same conditions, and its node for each of the original."""
    copy = fx.Graph()
    node_map: dict[fx.Node, fx.Node] = {}
    copy.output(copy.graph_copy(graph, node_map))
    if isinstance(graph._codegen, ConditionalCodeGen):
        copy.set_codegen(ConditionalCodeGen())
    return copy, node_map


def runs_in_eval_mode(node: fx.Node) -> bool:
    """Whether a node runs when all `training` flags are off."""
    if not node.meta.get(CONDITIONS):
        return True
    flags = {n.name for n in node.graph.find_nodes(op="get_attr") if str(n.target).rpartition(".")[2] == "training"}
    return not any(name in flags and outcome for name, outcome in node.meta[CONDITIONS])


class ConditionalInterpreter(fx.Interpreter):
    """An interpreter that leaves out the nodes whose conditions do not hold; their value is None."""

    def run_node(self, n: fx.Node) -> Any:
        conditions = n.meta.get(CONDITIONS, ())
        values = {node.name: value for node, value in self.env.items()} if conditions else {}
        runs = all(bool(values[name]) is outcome for name, outcome in conditions)
        return super().run_node(n) if runs else None
