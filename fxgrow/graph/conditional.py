"""Nodes that run only under a condition, and parts of a graph that the backward pass computes again.

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

What activation checkpointing ran in the model carries the number of its part. The nodes stay in the one graph, where
every pass sees them; in the generated code they are a function of its own, which `torch.utils.checkpoint` calls.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from itertools import count
from keyword import iskeyword
from typing import Any

import torch
from torch import fx, nn
from torch.fx.graph import CodeGen, _format_target
from torch.utils.checkpoint import checkpoint

from fxgrow.graph.node_meta import CHECKPOINT, CONDITIONS

_STATEMENT = re.compile(r"(?:^|;  )(\w+)(?: ?:[^=]+)? = ")
_COUNTER = re.compile(r"# COUNTER: (\d+)\n")
#: numbers of checkpointed parts; those of two traces must differ where their graphs are merged
part_numbers = count(1)


class ConditionalCodeGen(CodeGen):
    """Generates `if condition:` before conditional nodes, functions for checkpointed parts, and names like `in`."""

    def _gen_python_code(self, nodes: Any, root_module: str, namespace: Any, **kwargs: Any) -> Any:
        caller = namespace.create_name(run_checkpointed.__name__, run_checkpointed)
        names = {node.name: repr(node) for node in nodes}
        conditions = {node.name: node.meta[CONDITIONS] for node in nodes if node.meta.get(CONDITIONS)}
        tests = {
            names[node]: " and ".join(names[name] if outcome else f"not {names[name]}" for name, outcome in of)
            for node, of in conditions.items()
        }
        asked = {names[name] for of in conditions.values() for name, _ in of}
        before = self._body_transformer

        unreadable = {
            str(n.target) for n in nodes if n.op in ("call_module", "get_attr") and not is_code(str(n.target))
        }

        def transform(body: list[str]) -> list[str]:
            body = before(body) if before is not None else body
            for target in sorted(unreadable, key=len, reverse=True):
                written = re.escape(_format_target(root_module, target)) + r"(?!\w)"
                code = root_module
                for name in target.split("."):
                    code = f"getattr({code}, {name!r})"
                body = [re.sub(written, code.replace("\\", r"\\"), part) for part in body]
            body = [_free(part, asked) if part.startswith(";") else _conditional(part, tests) for part in body]
            return _write_parts(body, list(nodes), lambda name: namespace.create_name(name, None), caller)

        self._body_transformer = transform
        try:
            code = super()._gen_python_code(nodes, root_module, namespace, **kwargs)
            code.globals[caller] = run_checkpointed
            return code
        finally:
            self._body_transformer = before


def is_code(target: str) -> bool:
    """Whether torch.fx writes valid code for a target."""
    return not any(iskeyword(name) or '"' in name or "\\" in name for name in target.split("."))


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


def run_checkpointed(function: Callable[..., Any], *inputs: Any) -> Any:
    """Calls a part of a graph, and keeps its inputs alone for the backward pass.

    Without gradients, and in an export, the call is a plain one. Another tracer of torch.fx gets the nodes of the part.
    """
    proxy = next((value for value in inputs if isinstance(value, fx.Proxy)), None)
    if proxy is not None:
        graph: fx.Graph = proxy.tracer.graph
        before, number = set(graph.nodes), next(part_numbers)
        outputs = function(*inputs)
        for node in graph.nodes:
            if node not in before:
                node.meta.setdefault(CHECKPOINT, number)
        graph.set_codegen(ConditionalCodeGen())
        return outputs
    exporting = getattr(torch.compiler, "is_exporting", torch.compiler.is_compiling)  # PyTorch 2.6 has the latter alone
    if not torch.is_grad_enabled() or exporting():
        return function(*inputs)
    return checkpoint(function, *inputs, use_reentrant=False)


def _write_parts(body: list[str], nodes: Sequence[fx.Node], new_name: Callable[[str], str], caller: str) -> list[str]:
    """Returns the parts of a generated function with each checkpointed run of nodes as a nested function.

    Args:
        body: the code, with the counter of torch.fx in front of the statements of each node.
        nodes: of the graph.
        new_name: makes a name that is free in the code.
        caller: the name of `run_checkpointed` there.
    """
    runs = _runs(nodes)
    if not runs:
        return body
    places = {match[1]: at for at, part in enumerate(body) if (match := _COUNTER.fullmatch(part))}
    index = {node: i for i, node in enumerate(nodes)}
    by_name = {node.name: node for node in nodes}
    sources = {n: [*n.all_input_nodes, *(by_name[name] for name, _ in n.meta.get(CONDITIONS, ()))] for n in nodes}
    out: list[str] = []
    done = 0
    for run in runs:
        inside = set(run)
        start, stop = places[str(index[run[0]])], places[str(index[run[-1]] + 1)]
        inputs = dict.fromkeys(repr(s) for node in run for s in sources[node] if s not in inside)
        used = {s for node in nodes if node not in inside for s in sources[node]}
        outputs = "".join(f"{node!r}, " for node in run if node in used)
        later = {repr(s) for node in nodes[index[run[-1]] + 1 :] for s in sources[node]}
        name = new_name("checkpointed")
        out += body[done:start]
        out.append(f"def {name}({', '.join(inputs)}):\n")
        out += [f"    {line}\n" for line in "".join(body[start:stop]).splitlines()]
        out.append(f"    return ({outputs})\n")
        out.append(f"{f'{outputs}= ' if outputs else ''}{caller}({', '.join([name, *inputs])})")
        out.append("".join(f";  {i} = None" for i in inputs if i not in later) + "\n")
        done = stop
    return out + body[done:]


def _runs(nodes: Sequence[fx.Node]) -> list[list[fx.Node]]:
    """The parts in order, each with what a pass has put between its nodes."""
    runs: list[tuple[int, list[fx.Node]]] = []
    between: list[fx.Node] = []
    for node in nodes:
        number = node.meta.get(CHECKPOINT)
        if number is None or node.op in ("placeholder", "output"):
            between.append(node)
            continue
        if runs and runs[-1][0] == number:
            runs[-1][1].extend([*between, node])
        else:
            runs.append((number, [node]))
        between = []
    return [run for _, run in runs]


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

    def __init__(self, module: nn.Module, garbage_collect_values: bool = True) -> None:
        super().__init__(module, garbage_collect_values)
        asked = {name for node in self.graph.nodes for name, _ in node.meta.get(CONDITIONS, ())}
        for freed in self.user_to_last_uses.values() if garbage_collect_values else ():
            freed[:] = [node for node in freed if node.name not in asked]

    def run_node(self, n: fx.Node) -> Any:
        conditions = n.meta.get(CONDITIONS, ())
        values = {node.name: value for node, value in self.env.items()} if conditions else {}
        runs = all(bool(values[name]) is outcome for name, outcome in conditions)
        return super().run_node(n) if runs else None
