"""The plan: how many units each width gets, and their weights. Plain data, to JSON and back."""

from __future__ import annotations

import array
import base64
import json
import math
import sys
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor

from fxgrow.errors import PlanError
from fxgrow.rewriting.values import CopiedUnits, Values
from fxgrow.storage import schema
from fxgrow.storage.schema import SchemaError, checked

#: of the module `array`, per dtype
_CODES = {"float64": "d", "float32": "f"}
#: parameter, width and dimension
_PLACES = schema.array(schema.array(schema.name, schema.name, schema.integer(high=63)))


@dataclass(frozen=True)
class Plan:
    """What a growth will do.

    Attributes:
        units: units to add, per width.
        method: the initialiser that made them.
        scale: gamma; multiplies new outgoing weights and the update of existing ones.
        symmetric: whether new incoming weights share the scale (its square root on both sides).
        predicted: predicted decrease of the loss per width, where the method predicts one.
        slope: predicted decrease of the held-out loss per unit of gamma, all widths and updates together.
        curvature: second-order term, see `decrease`; after a line search the value that puts the optimum at its gamma.
        parameters: parameters of the model before and after.
        reason: why nothing, or less than requested, is added.
        values: new entries and updates of old ones, at scale 1.
        bounded: parameters whose new entries or update would have dwarfed their layer, and what they were scaled by.
    """

    units: dict[str, int] = checked(schema.mapping(schema.integer()))
    method: str = checked(schema.name, default="default")
    scale: float = checked(schema.real(0), default=1.0)
    symmetric: bool = checked(schema.boolean, default=False)
    predicted: dict[str, float] = checked(schema.mapping(schema.real()), default_factory=dict)
    slope: float = checked(schema.real(), default=0.0)
    curvature: float = checked(schema.real(), default=0.0)
    parameters: tuple[int, int] = checked(schema.array(schema.integer(), schema.integer()), default=(0, 0))
    reason: str | None = checked(schema.optional(schema.string()), default=None)
    values: Values = field(default_factory=Values, repr=False)
    #: parameters whose new entries along a dimension are outgoing (scaled), and incoming (scaled if symmetric)
    outgoing: tuple[tuple[str, str, int], ...] = checked(_PLACES, default=(), repr=False)
    incoming: tuple[tuple[str, str, int], ...] = checked(_PLACES, default=(), repr=False)
    bounded: dict[str, float] = checked(schema.mapping(schema.real()), required=False, default_factory=dict)

    def at(self, scale: float, update: bool = True) -> Values:
        """Returns the values at another gamma; `update=False` leaves the existing weights unchanged."""
        out, into = (scale**0.5, scale**0.5) if self.symmetric else (scale, 1.0)
        factors = dict.fromkeys(self.outgoing, out) | dict.fromkeys(self.incoming, into)
        new = {
            name: {(w, d): t * factors.get((name, w, d), 1.0) for (w, d), t in slices.items()}
            for name, slices in self.values.new.items()
        }
        delta = {name: t * scale for name, t in self.values.delta.items()} if update else {}
        return replace(self.values, new=new, delta=delta)

    def decrease(self, gamma: float) -> float:
        """Returns the predicted decrease of the loss at a gamma: slope * gamma - curvature * gamma^2 / 2."""
        return gamma * self.slope - 0.5 * gamma**2 * self.curvature

    @property
    def moves(self) -> bool:
        """Whether the function of the network depends on gamma; if not, it does not change."""
        return bool(self.outgoing or self.values.delta)

    def scaled(self, scale: float) -> Plan:
        """Returns the same plan at another gamma."""
        return replace(self, scale=scale)

    def __str__(self) -> str:
        if not self.units:
            return f"nothing to add: {self.reason}"
        before, after = self.parameters
        gamma = f"gamma {self.scale:.3g}" if self.moves else "function kept"
        what = ", ".join(f"{name} +{k}" for name, k in self.units.items())
        return f"{what}; {before:,} -> {after:,} parameters, {gamma}"

    def to_json(self) -> str:
        """Returns the plan as JSON text: readable decisions, weights as base64 of their little-endian bytes.

        Example:
            >>> from fxgrow import Plan
            >>> Plan.from_json(Plan({"0": 2}).to_json()).units
            {'0': 2}
        """
        return json.dumps(
            {
                "fxgrow": 1,
                **{f.name: getattr(self, f.name) for f in fields(self) if f.name != "values"},
                "corner": self.values.new_units_see_each_other,
                "new": [
                    [name, width, dim, _encode(t)]
                    for name, slices in self.values.new.items()
                    for (width, dim), t in slices.items()
                ],
                "delta": [[name, _encode(t)] for name, t in self.values.delta.items()],
                "copies": [[w, c.origin.tolist(), _encode(c.shares)] for w, c in self.values.copies.items()],
            }
        )

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """Reads what `to_json` wrote.

        Raises:
            PlanError: the text is no plan.
        """
        try:
            raw = schema.parse_json(text)
            found = schema.read_fields(cls, raw, "the plan", ("fxgrow", "corner", "new", "delta", "copies"))
            schema.integer(1, 1)(raw["fxgrow"], "the plan.fxgrow")
            return cls(**found, values=_values(raw))
        except (SchemaError, RuntimeError) as error:
            raise PlanError(f"This text is not a plan of fxgrow: {error}.") from None


def _values(raw: dict[str, Any]) -> Values:
    """Reads the weights, each of which is taken out of the data before the next is made."""
    placed = schema.array(_NEW)(raw.pop("new"), "the plan.new")
    updated = schema.array(_DELTA)(raw.pop("delta"), "the plan.delta")
    copied = schema.array(_COPIES)(raw.pop("copies"), "the plan.copies")
    new: dict[str, dict[tuple[str, int], Tensor]] = {}
    for name, width, dim, t in placed:
        new.setdefault(name, {})[width, dim] = t
    delta = dict(updated)
    copies = {w: CopiedUnits(torch.tensor(origin, dtype=torch.long), shares) for w, origin, shares in copied}
    if (sum(map(len, new.values())), len(delta), len(copies)) != (len(placed), len(updated), len(copied)):
        raise SchemaError("the plan has weights twice")
    return Values(new, delta, schema.boolean(raw["corner"], "the plan.corner"), copies)


def _encode(t: Tensor) -> dict[str, Any]:
    if t.is_complex():
        return {"complex": _encode(torch.view_as_real(t.detach()))}
    dtype = "float64" if t.dtype == torch.float64 else "float32"
    data = array.array(_CODES[dtype], t.detach().cpu().double().flatten().tolist())
    if sys.byteorder == "big":
        data.byteswap()
    return {"shape": list(t.shape), "dtype": dtype, "data": base64.b64encode(data.tobytes()).decode()}


@dataclass(frozen=True)
class _Weights:
    """A tensor in the text of a plan."""

    shape: tuple[int, ...] = checked(schema.array(schema.integer(), longest=64))
    dtype: str = checked(schema.string(choices=_CODES))
    data: bytes = checked(schema.encoded_bytes)

    def tensor(self, where: str) -> Tensor:
        size = 8 if self.dtype == "float64" else 4
        if len(self.data) != math.prod(self.shape) * size:
            raise SchemaError(f"{where} has the shape {list(self.shape)} and {len(self.data)} bytes")
        data = array.array(_CODES[self.dtype], self.data)
        if sys.byteorder == "big":
            data.byteswap()
        if not data:
            return torch.zeros(self.shape, dtype=getattr(torch, self.dtype))
        t = torch.frombuffer(data, dtype=getattr(torch, self.dtype)).reshape(self.shape)
        if not bool(t.isfinite().all()):
            raise SchemaError(f"{where} has infinities or NaN")
        return t


def _tensor(raw: Any, where: str) -> Tensor:
    if type(raw) is dict and raw.keys() == {"complex"}:
        t = _tensor(raw["complex"], where)
        if t.shape[-1:] != (2,):
            raise SchemaError(f"{where} is no tensor of complex numbers")
        return torch.view_as_complex(t)
    out = schema.read_as(_Weights)(raw, where).tensor(where)
    raw.clear()
    return out


#: entries of the lists `new`, `delta` and `copies`
_NEW = schema.array(schema.name, schema.name, schema.integer(high=63), _tensor)
_DELTA = schema.array(schema.name, _tensor)
_COPIES = schema.array(schema.name, schema.array(schema.integer()), _tensor)
