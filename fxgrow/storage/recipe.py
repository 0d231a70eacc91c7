"""The recipe: the growths that a model has been through, in order. Plain data without weights, to JSON and back.

A step records what a growth changed in the captured graph: sizes of parameters and buffers, attributes of modules,
numbers in calls. Replay decides nothing again: whether a width may grow can depend on values of weights and on which of
them are frozen, and a newly built model has others.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from torch import fx, nn

from fxgrow.data.argument_checks import MODULE, read_argument
from fxgrow.errors import FileError
from fxgrow.graph.node_meta import RECIPE, is_captured
from fxgrow.storage import schema
from fxgrow.storage.example_inputs import Example
from fxgrow.storage.plain_tree import decoded, encoded
from fxgrow.storage.schema import SchemaError, checked

VERSION = 1
#: a dimension, and its size before and after a growth
_DIMENSION = schema.array(schema.integer(high=63), schema.integer(), schema.integer(1))
_number = schema.real()


def _numbers(value: Any, where: str) -> Any:
    """Reads a number, or a tuple, list or `torch.Size` of them."""
    tree = decoded(value, {}) if type(value) in (dict, list) else value
    for item in tree if isinstance(tree, (tuple, list)) else (tree,):
        _number(item, where)
    return tree


@dataclass(frozen=True)
class CallSite:
    """A node of a graph: the nth call (from 0) of a function, method or module in the code of `module`."""

    module: str = checked(schema.name)
    target: str = checked(schema.name)
    nth: int = checked(schema.integer())

    def __str__(self) -> str:
        where = f" of module {self.module!r}" if self.module else ""
        return f"call {self.nth + 1} of {self.target}{where}"


@dataclass(frozen=True)
class ChangedArgument:
    """A number among the arguments of a call: its path, the number before (None: computed) and after."""

    place: CallSite = checked(schema.read_as(CallSite))
    path: tuple[int | str, ...] = checked(
        schema.array(schema.either(schema.integer(high=1_000_000), schema.identifier), longest=16)
    )
    before: Any = checked(schema.optional(_number))
    after: Any = checked(_number)

    def __post_init__(self) -> None:
        if not self.path:
            raise SchemaError(f"the change of {self.place} has no path to an argument")


@dataclass(frozen=True)
class ChangedAttribute:
    """An attribute of a module, before and after."""

    module: str = checked(schema.name)
    name: str = checked(schema.identifier)
    before: Any = checked(schema.optional(_numbers))
    after: Any = checked(_numbers)


@dataclass(frozen=True)
class GrowthStep:
    """One growth.

    Attributes:
        units: units added, per width.
        method: the initialiser, or `widen`.
        sizes: per parameter or buffer, the dimensions that grew: (dimension, size before, size after).
        attributes: of modules.
        numbers: in the graph.
        erased: nodes without users after the growth.
    """

    units: Mapping[str, int] = checked(schema.mapping(schema.integer(1)))
    method: str = checked(schema.name)
    sizes: Mapping[str, tuple[tuple[int, int, int], ...]] = checked(
        schema.mapping(schema.array(_DIMENSION)), repr=False
    )
    attributes: tuple[ChangedAttribute, ...] = checked(
        schema.array(schema.read_as(ChangedAttribute)), default=(), repr=False
    )
    numbers: tuple[ChangedArgument, ...] = checked(
        schema.array(schema.read_as(ChangedArgument)), default=(), repr=False
    )
    erased: tuple[CallSite, ...] = checked(schema.array(schema.read_as(CallSite)), default=(), repr=False)

    def __str__(self) -> str:
        return f"{self.method}: {', '.join(f'{name} +{k}' for name, k in self.units.items())}"


@dataclass(frozen=True)
class Recipe:
    """The growths that a model has been through; prints as a line for each.

    `fxgrow.resize(fresh_model, recipe)` replays it.

    Attributes:
        steps: the growths, in order.
        example: the example inputs of the capture, or None if the model was never captured.
        into: the kind of the grown model, `graph` or `module`; see `fxgrow.grow`.
        code: what the model's code computed before the first growth, a line for each call; None where unknown.

    Example:
        >>> import torch, fxgrow
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.ReLU(), torch.nn.Linear(3, 2))
        >>> wide = fxgrow.widen(fxgrow.widen(net, (torch.zeros(1, 4),), {"0": 8}), (), {"0": 1})
        >>> print(fxgrow.Recipe.of(wide))
        widen: 0 +8
        widen: 0 +1
    """

    steps: tuple[GrowthStep, ...] = checked(schema.array(schema.read_as(GrowthStep)), default=())
    example: Example | None = checked(schema.optional(schema.read_as(Example)), default=None, repr=False)
    into: str = checked(schema.string(choices=("graph", "module")), default="module")
    code: tuple[str, ...] | None = checked(
        schema.optional(schema.array(schema.string(300))), required=False, default=None, repr=False, compare=False
    )

    @classmethod
    def of(cls, model: nn.Module) -> Recipe:
        """Returns the recipe of a grown model; one without steps for any other."""
        read_argument("model", model, MODULE)
        recipe = (model.meta if isinstance(model, fx.GraphModule) else vars(model)).get(RECIPE)
        if isinstance(recipe, Recipe):
            return recipe
        return cls((), Example.of(model), "graph") if is_captured(model) else cls()

    def __deepcopy__(self, memo: Any) -> Recipe:
        return self

    def __str__(self) -> str:
        return "\n".join(map(str, self.steps)) or "never grown"

    # -- JSON

    def to_json(self) -> str:
        """Returns the recipe as JSON text.

        Example:
            >>> from fxgrow import Recipe
            >>> Recipe.from_json(Recipe().to_json()) == Recipe()
            True
        """
        steps = [_step_data(step) for step in self.steps]
        example = None if self.example is None else asdict(self.example)
        return json.dumps({RECIPE: VERSION, "steps": steps, "example": example, "into": self.into, "code": self.code})

    @classmethod
    def from_json(cls, text: str) -> Recipe:
        """Reads what `to_json` wrote.

        Raises:
            FileError: the text is not a recipe, or of a newer version.
        """
        try:
            return read_recipe(schema.parse_json(text), "the recipe")
        except SchemaError as error:
            raise FileError(f"This text is not a recipe of fxgrow: {error}.") from None


def read_recipe(raw: Any, where: str) -> Recipe:
    """Reads the data of a recipe."""
    version = raw.get(RECIPE) if isinstance(raw, dict) else None
    if type(version) is int and version > VERSION:
        raise FileError(
            f"This recipe has version {version}, this fxgrow reads {VERSION}: it was written by a newer fxgrow. "
            "Update fxgrow."
        )
    if version != VERSION or type(version) is not int:
        raise SchemaError(f"{where} has the version {schema.quoted(version)}")
    return Recipe(**schema.read_fields(Recipe, raw, where, (RECIPE,)))


def keep_recipe(out: nn.Module, recipe: Recipe) -> None:
    """Stores a recipe where `Recipe.of` finds it."""
    if isinstance(out, fx.GraphModule):
        out.meta[RECIPE] = recipe
    else:
        setattr(out, RECIPE, recipe)


def grown_inside(model: nn.Module) -> Iterator[str]:
    """Yields the names of submodules that have grown separately."""
    return (name for name, m in model.named_modules() if name and m is not model and Recipe.of(m).steps)


def _step_data(step: GrowthStep) -> dict[str, Any]:
    raw = asdict(step)
    for part in (*raw["attributes"], *raw["numbers"]):
        part["before"], part["after"] = encoded(part["before"], {}), encoded(part["after"], {})
    return raw
