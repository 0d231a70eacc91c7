"""The plan: how many units each width gets, and their weights. Plain data, to JSON and back."""

from __future__ import annotations

import array
import base64
import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor

from fxgrow.errors import PlanError
from fxgrow.rewriting.values import CopiedUnits, Values

#: of the module `array`, per dtype
_CODES = {"float64": "d", "float32": "f"}


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

    units: dict[str, int]
    method: str = "default"
    scale: float = 1.0
    symmetric: bool = False
    predicted: dict[str, float] = field(default_factory=dict)
    slope: float = 0.0
    curvature: float = 0.0
    parameters: tuple[int, int] = (0, 0)
    reason: str | None = None
    values: Values = field(default_factory=Values, repr=False)
    #: parameters whose new entries along a dimension are outgoing (scaled), and incoming (scaled if symmetric)
    outgoing: tuple[tuple[str, str, int], ...] = field(default=(), repr=False)
    incoming: tuple[tuple[str, str, int], ...] = field(default=(), repr=False)
    bounded: dict[str, float] = field(default_factory=dict)

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
            raw = json.loads(text)
            new: dict[str, dict[tuple[str, int], Tensor]] = {}
            for name, width, dim, t in raw["new"]:
                new.setdefault(name, {})[width, dim] = _decode(t)
            return cls(
                units={str(k): int(v) for k, v in raw["units"].items()},
                method=raw["method"],
                scale=float(raw["scale"]),
                symmetric=bool(raw["symmetric"]),
                predicted=dict(raw["predicted"]),
                slope=float(raw.get("slope", 0.0)),
                curvature=float(raw.get("curvature", 0.0)),
                parameters=(raw["parameters"][0], raw["parameters"][1]),
                reason=raw["reason"],
                bounded=dict(raw.get("bounded", {})),
                values=Values(
                    new=new,
                    delta={name: _decode(t) for name, t in raw["delta"]},
                    new_units_see_each_other=raw["corner"],
                    copies={w: CopiedUnits(torch.tensor(o), _decode(t)) for w, o, t in raw.get("copies", [])},
                ),
                outgoing=tuple((a, b, c) for a, b, c in raw["outgoing"]),
                incoming=tuple((a, b, c) for a, b, c in raw["incoming"]),
            )
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise PlanError(f"This text is not a plan of fxgrow: {error!r}.") from error


def _encode(t: Tensor) -> dict[str, Any]:
    if t.is_complex():
        return {"complex": _encode(torch.view_as_real(t.detach()))}
    dtype = "float64" if t.dtype == torch.float64 else "float32"
    data = array.array(_CODES[dtype], t.detach().cpu().double().flatten().tolist())
    if sys.byteorder == "big":
        data.byteswap()
    return {"shape": list(t.shape), "dtype": dtype, "data": base64.b64encode(data.tobytes()).decode()}


def _decode(raw: Mapping[str, Any]) -> Tensor:
    if "complex" in raw:
        return torch.view_as_complex(_decode(raw["complex"]))
    data = array.array(_CODES[raw["dtype"]], base64.b64decode(raw["data"]))
    if sys.byteorder == "big":
        data.byteswap()
    return torch.tensor(data, dtype=getattr(torch, raw["dtype"])).reshape(raw["shape"])
