"""The recipe: the growths that a model has been through, in order. Plain data without weights, to JSON and back.

A step records what a growth changed in the captured graph: sizes of parameters and buffers, attributes of modules,
numbers in calls. Replay decides nothing again: whether a width may grow can depend on values of weights and on which of
them are frozen, and a newly built model has others.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import fx, nn

from fxgrow.errors import FileError
from fxgrow.graph.node_meta import RECIPE, is_captured
from fxgrow.storage.example_inputs import Example
from fxgrow.storage.plain_tree import decoded, encoded

VERSION = 1


@dataclass(frozen=True)
class CallSite:
    """A node of a graph: the nth call (from 0) of a function, method or module in the code of `module`."""

    module: str
    target: str
    nth: int

    def __str__(self) -> str:
        where = f" of module {self.module!r}" if self.module else ""
        return f"call {self.nth + 1} of {self.target}{where}"


@dataclass(frozen=True)
class ChangedArgument:
    """A number among the arguments of a call: its path, the number before (None: computed) and after."""

    place: CallSite
    path: tuple[int | str, ...]
    before: Any
    after: Any


@dataclass(frozen=True)
class ChangedAttribute:
    """An attribute of a module, before and after."""

    module: str
    name: str
    before: Any
    after: Any


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

    units: Mapping[str, int]
    method: str
    sizes: Mapping[str, tuple[tuple[int, int, int], ...]] = field(repr=False)
    attributes: tuple[ChangedAttribute, ...] = field(default=(), repr=False)
    numbers: tuple[ChangedArgument, ...] = field(default=(), repr=False)
    erased: tuple[CallSite, ...] = field(default=(), repr=False)

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

    Example:
        >>> import torch, fxgrow
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.ReLU(), torch.nn.Linear(3, 2))
        >>> wide = fxgrow.widen(fxgrow.widen(net, (torch.zeros(1, 4),), {"0": 8}), (), {"0": 1})
        >>> print(fxgrow.Recipe.of(wide))
        widen: 0 +8
        widen: 0 +1
    """

    steps: tuple[GrowthStep, ...] = ()
    example: Example | None = field(default=None, repr=False)
    into: str = "module"

    @classmethod
    def of(cls, model: nn.Module) -> Recipe:
        """Returns the recipe of a grown model; one without steps for any other."""
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
        example = None if self.example is None else self.example.data
        return json.dumps({RECIPE: VERSION, "steps": steps, "example": example, "into": self.into})

    @classmethod
    def from_json(cls, text: str) -> Recipe:
        """Reads what `to_json` wrote.

        Raises:
            FileError: the text is not a recipe, or of a newer version.
        """
        try:
            raw = json.loads(text)
            version = raw[RECIPE]
            if version != VERSION:
                raise FileError(
                    f"This recipe has version {version!r}, this fxgrow reads {VERSION}: it was written by a newer "
                    "fxgrow. Update fxgrow."
                )
            steps = tuple(_step(step) for step in raw["steps"])
            example = None if raw["example"] is None else Example.from_data(raw["example"])
            if raw["into"] not in ("graph", "module"):
                raise ValueError(raw["into"])
            return cls(steps, example, raw["into"])
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise FileError(f"This text is not a recipe of fxgrow: {error!r}.") from error


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


def _step(raw: Mapping[str, Any]) -> GrowthStep:
    def values(part: Mapping[str, Any]) -> dict[str, Any]:
        return {key: decoded(part[key], {}) for key in ("before", "after")}

    return GrowthStep(
        units={str(name): int(k) for name, k in raw["units"].items()},
        method=str(raw["method"]),
        sizes={name: tuple((int(d), int(a), int(b)) for d, a, b in dims) for name, dims in raw["sizes"].items()},
        attributes=tuple(ChangedAttribute(p["module"], p["name"], **values(p)) for p in raw["attributes"]),
        numbers=tuple(ChangedArgument(CallSite(**p["place"]), tuple(p["path"]), **values(p)) for p in raw["numbers"]),
        erased=tuple(CallSite(**p) for p in raw["erased"]),
    )
