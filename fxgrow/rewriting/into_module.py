"""Puts the grown graph's parameters into a copy of the model itself, of the user's class.

ensures: the module's code, captured again, is the grown graph, node by node, with its outputs; else `PlanError`.
Sizes that the code reads from attributes (`self.heads`) are found by trying: an attribute is set only if the code then
traces to the grown graph.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

from torch import Tensor, fx, nn

from fxgrow.errors import CaptureError, PlanError
from fxgrow.graph.evaluate import difference, eval_outputs
from fxgrow.graph.graph import caller, copy_module, named_tensors
from fxgrow.graph.node_meta import EXAMPLE_INPUTS, is_captured
from fxgrow.rewriting.same_graph import argument_list, first_difference, is_view, location
from fxgrow.rewriting.transplant import transplant
from fxgrow.tracing.capture import capture

#: at most so many combinations of attributes are tried
TRIES = 16
_FAILS = "with the widened layers its code fails"
_ADVICE = 'Take the graph (into="graph")'


class _Literal(NamedTuple):
    #: a number in the graph that growth has changed
    node: fx.Node
    old: float
    new: float


class _Attribute(NamedTuple):
    module: str
    name: str
    value: float


def check_into(into: str, model: nn.Module) -> None:
    """Raises `PlanError` where `into` is unknown, or "module" is wanted of a captured graph."""
    if into not in ("graph", "module"):
        raise PlanError(f'into={into!r}: take "graph" for a GraphModule or "module" for a copy of the model.')
    if into == "module" and is_captured(model):
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
    """Returns a copy of the model with the parameters of the grown graph, the very same objects.

    Its `meta` is empty, or the user's own attribute of that name. Raises `PlanError` where the model's code does not
    compute what the grown graph computes.
    """
    model = getattr(model, "_orig_mod", model)  # without torch.compile, as in `capture`
    literals = list(_changed_literals(gm, grown))
    module = _filled_copy(model, gm, grown)
    problem, tried = "", ""
    for attributes in _attribute_choices(module, literals):
        for a in attributes:
            setattr(module.get_submodule(a.module), a.name, a.value)
        try:
            mismatch = first_difference(grown, capture(module, example_inputs))
        except CaptureError as error:
            mismatch = f"{_FAILS}: {str(error).removesuffix('.')}"
        if mismatch is None:
            _check_outputs(module, example_inputs, grown)
            return module
        if attributes and not tried and not mismatch.startswith(_FAILS):
            tried = f"with {attributes[0].name} = {attributes[0].value} instead, {mismatch}"
        problem = problem or mismatch  # that of the model's code with no attribute set
        for a in attributes:
            setattr(module.get_submodule(a.module), a.name, getattr(model.get_submodule(a.module), a.name))
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
    """Yields the sizes, and epsilons of norms, among arguments that growth changed."""
    grown_nodes = {node.name: node for node in grown.graph.nodes}
    for node in gm.graph.nodes:
        wider = grown_nodes.get(node.name)
        if wider is None:
            continue
        for i, (before, after) in enumerate(zip(argument_list(node), argument_list(wider), strict=False)):
            old: Any = before.meta.get("val") if isinstance(before, fx.Node) else before
            if not isinstance(after, (int, float)) or type(after) is not type(old):
                continue
            # growth writes -1 for a size that code computed from another one
            new = wider.meta["val"].shape[i - 1] if after == -1 and is_view(node) else after
            if old != -1 and old != new:
                yield _Literal(node, old, new)


def _attribute_choices(module: nn.Module, literals: list[_Literal]) -> Iterator[tuple[_Attribute, ...]]:
    """Yields no attributes first, then combinations of those of the modules whose code uses the changed sizes.

    Modules of one class have the same attributes set.
    """
    yield ()
    choices: dict[tuple[Any, ...], dict[str, list[_Attribute]]] = {}
    for literal in literals:
        path = caller(literal.node)
        owner = module.get_submodule(path)
        for name, value in vars(owner).items():
            if type(value) is type(literal.old) and value == literal.old and not name.startswith("_"):
                by_name = choices.setdefault((type(owner), literal.old), {})
                by_name.setdefault(name, []).append(_Attribute(path, name, literal.new))
    options = []
    for by_name in choices.values():
        single = list(by_name.values())
        # several attributes of one value: any of them may be the one that grows, or all
        options.append([*single, list(itertools.chain(*single))] if len(single) > 1 else single)
    if choices:
        for combination in itertools.islice(itertools.product(*options), TRIES):
            yield tuple(itertools.chain(*combination))


def _refusal(literals: list[_Literal], problem: str, tried: str) -> str:
    if not literals:
        return f'into="module" is not possible: {problem}. {_ADVICE}.'
    node, old, new = literals[0]
    more = f" (and {len(literals) - 1} more numbers)" if len(literals) > 1 else ""
    number = "size" if isinstance(old, int) else "number"
    path = caller(node)
    owner = f"module {path!r}" if path else "the model"
    why = tried or f"{owner} has no attribute that its code reads it from"
    return (
        f'into="module" is not possible: node {node.name!r}{location(node)} takes the {number} {old}, which growth '
        f"makes {new}{more}; {why}. {_ADVICE}, or write a size as what it measures (x.shape[1], "
        "self.layer.out_features)."
    )


def _check_outputs(module: nn.Module, example_inputs: Any, grown: fx.GraphModule) -> None:
    """Raises `PlanError` where the outputs of module and graph in eval mode differ by more than rounding explains."""
    expected = eval_outputs(grown, grown.meta[EXAMPLE_INPUTS])
    for a, b in itertools.zip_longest(expected, eval_outputs(module, example_inputs)):
        if a is None or b is None or a.shape != b.shape:
            shapes = ["nothing" if t is None else str(tuple(t.shape)) for t in (a, b)]
            raise PlanError(
                f'into="module" is not possible: an output of the grown graph is {shapes[0]}, that of its code '
                f"{shapes[1]}. {_ADVICE}."
            )
        error = difference(b, a)
        if not error.is_rounding:
            raise PlanError(
                f'into="module" is not possible: the outputs of the grown {type(module).__name__} differ from the '
                f"graph's by {error}. {_ADVICE}, and please report the model."
            )
