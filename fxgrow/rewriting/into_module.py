"""Back into the user's class: the grown graph's parameters in a copy of the model itself.

requires: the model, the graph captured from it, and the grown copy of that graph.
ensures:  a module of the model's own class whose code, captured again, is the grown graph, node by node, and whose
          outputs on the example inputs are the graph's; else `PlanError`, and nothing is returned.

A graph may hold what the model's code cannot know: a size written out in `forward`, a node that growth inserted. Sizes
that the code reads from an attribute of its own module (`self.heads`) are found by trying: an attribute is believed
only if the code then traces to the grown graph.
"""

from __future__ import annotations

import itertools
import operator
import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from fxgrow.errors import CaptureError, PlanError
from fxgrow.graph.evaluate import difference, eval_outputs
from fxgrow.graph.graph import caller, copy_module, named_tensors
from fxgrow.rewriting.transplant import transplant
from fxgrow.tracing.capture import capture

#: more ways than this to explain the changed sizes by attributes are not tried
TRIES = 16
_FAILS = "with the widened layers its code fails"
_ADVICE = 'Take the graph (into="graph")'


class _Literal(NamedTuple):
    """A number in the graph that growth has changed."""

    node: fx.Node
    old: int
    new: int


class _Attribute(NamedTuple):
    """An attribute of one of the user's modules, and what to set it to."""

    module: str
    name: str
    value: int


def check_into(into: str, model: nn.Module) -> None:
    """Refuses what cannot be honoured before any time is spent.

    Raises:
        PlanError: `into` is unknown, or there is no user's class to go back to.
    """
    if into not in ("graph", "module"):
        raise PlanError(f'into={into!r}: take "graph" for a GraphModule or "module" for a copy of the model.')
    if into == "module" and isinstance(model, fx.GraphModule) and "example_inputs" in model.meta:
        raise PlanError(
            'into="module" needs the model itself, but this is a captured graph, which does not know the class it '
            "came from. Pass the model."
        )


def into_module(
    model: nn.Module,
    example_inputs: tuple[Any, ...] | dict[str, Any] | Tensor,
    gm: fx.GraphModule,
    grown: fx.GraphModule,
) -> nn.Module:
    """A copy of the model that holds the parameters of the grown graph, the very same objects.

    Args:
        model: the model that was captured; it is left as it is.
        example_inputs: what it was captured with.
        gm: the captured graph.
        grown: its wider copy.

    Returns:
        A module of the model's class. Its `meta` is empty, or the user's own attribute of that name.

    Raises:
        PlanError: the model's code does not compute what the grown graph computes.
    """
    model = getattr(model, "_orig_mod", model)  # what torch.compile wrapped, as `capture` has it
    literals = list(_changed_literals(gm, grown))
    module = _filled_copy(model, gm, grown)
    problem, tried = "", ""
    for attributes in _explanations(module, literals):
        for a in attributes:
            setattr(module.get_submodule(a.module), a.name, a.value)
        found = _difference(module, example_inputs, grown)
        if found is None:
            _check_outputs(module, example_inputs, grown)
            return module
        if attributes and not tried and not found.startswith(_FAILS):
            tried = f"with {attributes[0].name} = {attributes[0].value} instead, {found}"
        problem = problem or found  # that of the model's code with nothing set
        for a in attributes:
            setattr(module.get_submodule(a.module), a.name, _attribute_of(model, a))
    raise PlanError(_refusal(literals, problem, tried))


def _filled_copy(model: nn.Module, gm: fx.GraphModule, grown: fx.GraphModule) -> nn.Module:
    """Copies the model with the grown graph's tensors and the attributes of its modules."""
    new = named_tensors(grown)
    try:
        out = copy_module(model, {id(tensor): new[name] for name, tensor in named_tensors(gm).items() if name in new})
    except Exception as error:
        raise PlanError(f"{type(model).__name__} cannot be copied: {error}. {_ADVICE}.") from error
    transplant(out, grown, gm)
    if not hasattr(out, "meta"):
        out.meta = {}  # type: ignore[assignment]
    return out


def _changed_literals(gm: fx.GraphModule, grown: fx.GraphModule) -> Iterator[_Literal]:
    """Sizes given to nodes that are not what they were."""
    node_map = {node.name: node for node in grown.graph.nodes}
    for node in gm.graph.nodes:
        twin = node_map.get(node.name)
        if twin is None:
            continue
        for at, (before, after) in enumerate(zip(_leaves(node), _leaves(twin), strict=False)):
            old = before.meta.get("val") if isinstance(before, fx.Node) else before
            if type(old) is not int or type(after) is not int:
                continue
            # growth writes -1 for a size that code computed from another one
            new = twin.meta["val"].shape[at - 1] if after == -1 and _is_view(node) else after
            if old != -1 and old != new:
                yield _Literal(node, old, new)


def _leaves(node: fx.Node) -> list[Any]:
    return pytree.tree_leaves(fx.map_arg((node.args, node.kwargs), lambda n: n))


def _is_view(node: fx.Node) -> bool:
    return node.op == "call_method" and node.target in ("view", "reshape")


def _explanations(module: nn.Module, literals: list[_Literal]) -> Iterator[tuple[_Attribute, ...]]:
    """Nothing first; then the ways to have the changed sizes from attributes of the modules whose code uses them.

    A size that is no attribute's may be computed from one that is. Blocks of one class have the same answer.
    """
    yield ()
    choices: dict[tuple[Any, ...], dict[str, list[_Attribute]]] = {}
    for literal in literals:
        path = caller(literal.node)
        owner = module.get_submodule(path)
        for name, value in vars(owner).items():
            if type(value) is int and value == literal.old and not name.startswith("_"):
                group = choices.setdefault((type(owner), literal.old), {})
                group.setdefault(name, []).append(_Attribute(path, name, literal.new))
    every = []
    for group in choices.values():
        one = list(group.values())
        # several attributes of one value: any of them may be the one that grows, or all
        every.append([*one, [a for part in one for a in part]] if len(one) > 1 else one)
    if choices:
        for combination in itertools.islice(itertools.product(*every), TRIES):
            yield tuple(itertools.chain.from_iterable(combination))


def _attribute_of(model: nn.Module, attribute: _Attribute) -> Any:
    return getattr(model.get_submodule(attribute.module), attribute.name)


def _difference(module: nn.Module, example_inputs: Any, grown: fx.GraphModule) -> str | None:
    """Captures the module and compares; what differs first, or None."""
    try:
        again = capture(module, example_inputs)
    except CaptureError as error:
        return f"{_FAILS}: {str(error).removesuffix('.')}"
    pairs: dict[fx.Node, fx.Node] = {}
    stale: set[fx.Node] = set()  # shapes in the graph with a length that nobody reads any more
    for mine, yours in itertools.zip_longest(grown.graph.nodes, again.graph.nodes):
        if mine is None or yours is None or not _same(mine, yours, pairs, stale):
            node = mine or yours
            return (
                f"node {node.name!r}{_place(node)} is {_text(mine)} in the grown graph and {_text(yours)} in its code"
            )
        pairs[yours] = mine
    return None


def _same(mine: fx.Node, yours: fx.Node, pairs: Mapping[fx.Node, fx.Node], stale: set[fx.Node]) -> bool:
    if mine.op != yours.op or _identity(mine.target) != _identity(yours.target):
        return False
    # mapped both, so that both are of the same immutable containers
    ours = fx.map_arg((mine.args, mine.kwargs), lambda n: n)
    theirs = fx.map_arg((yours.args, yours.kwargs), lambda n: pairs[n])
    a, b = pytree.tree_flatten(ours), pytree.tree_flatten(theirs)
    if a[1] != b[1]:
        return False
    # what -1 stands for follows from the other sizes; the code may compute a size that growth wrote as a number
    free = _is_view(mine) and a[0].count(-1) == 1
    computed = [type(n) is fx.Node and n.meta.get("val") for n in _leaves(yours)]
    equal = [
        _equal(x, y) or (free and x == -1) or (type(x) is int and type(n) is int and x == n)
        for x, y, n in zip(a[0], b[0], computed, strict=True)
    ]
    if not stale.isdisjoint(mine.all_input_nodes):
        if mine.target is not operator.getitem or not all(equal):
            return False
        if mine.meta["val"] != yours.meta["val"]:
            stale.add(mine)
        return True
    if not all(equal) and mine.target is operator.add and isinstance(mine.meta.get("val"), tuple):
        # `x.size()[:-1] + (n,)`, where growth has put -1 for n into the view that read it
        stale.add(mine)
        return all(e or type(x) is type(y) is int for e, x, y in zip(equal, a[0], b[0], strict=True))
    return all(equal)


def _equal(x: Any, y: Any) -> bool:
    if isinstance(x, slice) and isinstance(y, slice):
        return (x.start, x.stop, x.step) == (y.start, y.stop, y.step)
    return x is y or (type(x) is type(y) and (_identity(x) == _identity(y) or bool(x != x and y != y)))


def _identity(target: Any) -> Any:
    """Functions made anew by each call of forward are the same if they have one name."""
    if callable(target) and hasattr(target, "__qualname__"):
        return getattr(target, "__module__", None), target.__qualname__
    return target


def _text(node: fx.Node | None) -> str:
    return "missing" if node is None else f"`{node.format_node()}`"


def _refusal(literals: list[_Literal], problem: str, tried: str) -> str:
    if not literals:
        return f'into="module" is not possible: {problem}. {_ADVICE}.'
    node, old, new = literals[0]
    more = f" (and {len(literals) - 1} more sizes)" if len(literals) > 1 else ""
    path = caller(node)
    owner = f"module {path!r}" if path else "the model"
    why = tried or f"{owner} has no attribute that its code reads it from"
    return (
        f'into="module" is not possible: node {node.name!r}{_place(node)} takes the size {old}, which growth makes '
        f"{new}{more}; {why}. {_ADVICE}, or write the size as what it measures (x.shape[1], self.layer.out_features)."
    )


def _place(node: fx.Node) -> str:
    found = re.match(r'File "(.*)", line (\d+), in .*\n\s*(.*)', node.stack_trace or "")
    return f" at {found[1]}:{found[2]}: `{found[3]}`" if found else ""


def _check_outputs(module: nn.Module, example_inputs: Any, grown: fx.GraphModule) -> None:
    """Compares the outputs of module and graph on the example inputs, in eval mode.

    Raises:
        PlanError: they differ by more than rounding explains.
    """
    expected = eval_outputs(grown, grown.meta["example_inputs"])
    outputs = eval_outputs(module, example_inputs)
    for a, b in itertools.zip_longest(expected, outputs):
        if a is None or b is None or a.shape != b.shape:
            shapes = ["nothing" if t is None else str(tuple(t.shape)) for t in (a, b)]
            raise PlanError(
                f'into="module" is not possible: an output of the grown graph is {shapes[0]}, that of its code '
                f"{shapes[1]}. {_ADVICE}."
            )
        found = difference(b, a)
        if not found.is_rounding:
            raise PlanError(
                f'into="module" is not possible: the outputs of the grown {type(module).__name__} differ from the '
                f"graph's by {found}. {_ADVICE}, and please report the model."
            )
