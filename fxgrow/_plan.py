"""The plan: how many units each width gets and what they are. Plain data, to JSON and back.

requires: a profile.
ensures:  a `Plan` within its budget that `apply` can replay on the profiled graph, or on a fresh copy of it.
"""

from __future__ import annotations

import array
import base64
import json
import math
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxgrow._analyse import analyse
from fxgrow._axes import Var, length, multiplicity
from fxgrow._errors import PlanError
from fxgrow._profile import Profile
from fxgrow._refit import decrease
from fxgrow._rewrite import Values, lookup, require_free
from fxgrow._widths import hidden
from fxgrow.ops.registry import Structure

#: the budget when none is given
DEFAULT_BUDGET = "+25%"
#: how far the predicted gain per parameter may tilt a width's share of the budget
TILT = (0.5, 2.0)


@dataclass(frozen=True)
class Plan:
    """What a growth will do.

    Attributes:
        units: units to add, per width.
        method: the initialiser that made them.
        scale: gamma; new outgoing weights and the update of existing ones are multiplied by it.
        symmetric: new incoming weights share the scale (its root on both sides).
        predicted: predicted decrease of the loss per width, where the method predicts one.
        parameters: parameters of the model before and after.
        reason: why nothing is added, if nothing is.
        values: new entries and updates of old ones, at scale 1.
    """

    units: dict[str, int]
    method: str = "default"
    scale: float = 1.0
    symmetric: bool = False
    predicted: dict[str, float] = field(default_factory=dict)
    parameters: tuple[int, int] = (0, 0)
    reason: str | None = None
    values: Values = field(default_factory=Values, repr=False)
    #: parameters whose new entries along a dimension are outgoing (scaled), and incoming (scaled if symmetric)
    outgoing: tuple[tuple[str, str, int], ...] = field(default=(), repr=False)
    incoming: tuple[tuple[str, str, int], ...] = field(default=(), repr=False)

    def at(self, scale: float, update: bool = True) -> Values:
        """The values at another gamma; `update=False` leaves the existing weights alone."""
        out = scale**0.5 if self.symmetric else scale
        into = scale**0.5 if self.symmetric else 1.0
        factors = {key: out for key in self.outgoing} | {key: into for key in self.incoming}
        new = {
            name: {(w, d): t * factors.get((name, w, d), 1.0) for (w, d), t in slices.items()}
            for name, slices in self.values.new.items()
        }
        delta = {name: t * scale for name, t in self.values.delta.items()} if update else {}
        return Values(new, delta, corner=self.values.corner)

    def scaled(self, scale: float) -> Plan:
        """The same plan at another gamma."""
        return replace(self, scale=scale)

    def __str__(self) -> str:
        if not self.units:
            return f"nothing to add: {self.reason}"
        before, after = self.parameters
        what = ", ".join(f"{name} +{k}" for name, k in self.units.items())
        return f"{what}; {before:,} -> {after:,} parameters, gamma {self.scale:.3g}"

    # -- JSON

    def to_json(self) -> str:
        """The plan as JSON text: readable decisions, weights as base64 of their little-endian bytes.

        Example:
            >>> from fxgrow import Plan
            >>> Plan.from_json(Plan({"0": 2}).to_json()).units
            {'0': 2}
        """
        return json.dumps(
            {
                "fxgrow": 1,
                "units": self.units,
                "method": self.method,
                "scale": self.scale,
                "symmetric": self.symmetric,
                "predicted": self.predicted,
                "parameters": list(self.parameters),
                "reason": self.reason,
                "outgoing": [list(k) for k in self.outgoing],
                "incoming": [list(k) for k in self.incoming],
                "corner": self.values.corner,
                "new": [
                    [name, width, dim, _encode(t)]
                    for name, slices in self.values.new.items()
                    for (width, dim), t in slices.items()
                ],
                "delta": [[name, _encode(t)] for name, t in self.values.delta.items()],
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
                parameters=(raw["parameters"][0], raw["parameters"][1]),
                reason=raw["reason"],
                values=Values(new, {name: _decode(t) for name, t in raw["delta"]}, corner=raw["corner"]),
                outgoing=tuple((a, b, c) for a, b, c in raw["outgoing"]),
                incoming=tuple((a, b, c) for a, b, c in raw["incoming"]),
            )
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise PlanError(f"This text is not a plan of fxgrow: {error!r}.") from error


def _encode(t: Tensor) -> dict[str, Any]:
    double = t.dtype == torch.float64
    data = array.array("d" if double else "f", t.detach().cpu().double().flatten().tolist())
    if sys.byteorder == "big":
        data.byteswap()
    return {
        "shape": list(t.shape),
        "dtype": "float64" if double else "float32",
        "data": base64.b64encode(data.tobytes()).decode(),
    }


def _decode(raw: Mapping[str, Any]) -> Tensor:
    data = array.array({"float64": "d", "float32": "f"}[raw["dtype"]], base64.b64decode(raw["data"]))
    if sys.byteorder == "big":
        data.byteswap()
    return torch.tensor(data, dtype=getattr(torch, raw["dtype"])).reshape(raw["shape"])


# -- deciding


def plan(
    profile: Profile,
    budget: str | int | None = None,
    neurons: int | Mapping[str, int] | None = None,
    *,
    update_existing: bool = True,
) -> Plan:
    """Decides how many units each width gets.

    A budget is spread over the widths in proportion to their sizes, tilted by predicted gain per parameter, and never
    spent on units that the held-back test did not accept.

    Args:
        profile: from `fxgrow.profile`.
        budget: parameters to add: a number, or a share such as `"+10%"`; None for `"+25%"`.
        neurons: instead of a budget: units for every width, or per width; added whether significant or not.
        update_existing: also move the weights that exist (dW).

    Returns:
        A `Plan`; without units and with a reason where nothing is worth adding.

    Raises:
        PlanError: the budget is not positive or too small for one unit, a name is unknown, or more units are asked for
            than were proposed.

    Example:
        >>> import torch, fxgrow
        >>> _ = torch.manual_seed(0)
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.ReLU(), torch.nn.Linear(3, 2))
        >>> batches = [(torch.randn(32, 4), torch.randn(32, 2)) for _ in range(4)]
        >>> fxgrow.plan(fxgrow.profile(net, batches, progress=False), neurons=2).units
        {'0': 2}
    """
    if budget is not None and neurons is not None:
        raise PlanError("Give a budget or a number of neurons, not both.")
    if profile.gm is None or profile.found is None:
        raise PlanError("This profile is the record of a growth: profile the grown network again.")
    structure = analyse(profile.gm)
    count = _Count(profile.gm, structure)
    if neurons is not None:
        units = _as_asked(profile, neurons)
    else:
        limit = _parse(DEFAULT_BUDGET if budget is None else budget, count.total({}))
        units = _allocate(profile, count, limit)
    if not any(units.values()):
        reason = "no width has a unit that the held-back test accepts"
        total = count.total({})
        return Plan({}, profile.method.name, parameters=(total, total), reason=reason)
    units = {name: k for name, k in units.items() if k}
    return _fill(profile, structure, units, update_existing, (count.total({}), count.total(units)))


def _as_asked(profile: Profile, neurons: int | Mapping[str, int]) -> dict[str, int]:
    if isinstance(neurons, Mapping):
        every = {h.width.name: h for h in hidden(analyse(profile.gm))}
        wanted = {name: (k, require_free(every, name).width.step) for name, k in neurons.items()}
        missing = [name for name in wanted if name not in profile]
        if missing:
            raise PlanError(f"Width {missing[0]!r} was not profiled; profiled: {', '.join(profile)}.")
    else:
        steps = {name: b.width.step for name, b in profile.items()}
        wanted = {name: (math.ceil(neurons / step) * step, step) for name, step in steps.items()}
    for name, (k, step) in wanted.items():
        if k <= 0 or k % step:
            raise PlanError(f"{k} units for width {name!r}: give a positive multiple of its step {step}.")
        have = profile.found.units[name] if profile.found is not None else 0
        if k > have:
            raise PlanError(
                f"{k} units are asked for at width {name!r}, but the profile proposed {have}: "
                f"call profile(..., units={k})."
            )
    return {name: k for name, (k, _) in wanted.items()}


def _parse(budget: str | int, total: int) -> int:
    try:
        if isinstance(budget, str) and budget.strip().endswith("%"):
            limit = math.floor(float(budget.strip().removeprefix("+").removesuffix("%")) / 100 * total)
        else:
            limit = int(budget)
    except ValueError as error:
        raise PlanError(f"budget={budget!r}: give a number of parameters, or a share such as '+10%'.") from error
    if limit <= 0:
        raise PlanError(f"budget={budget!r} leaves {limit} parameters to add: give a positive budget.")
    return limit


class _Count:
    """Parameters of the grown model, exactly: every axis with its new length."""

    def __init__(self, gm: fx.GraphModule, structure: Structure) -> None:
        self.axes = [
            dims for name, dims in structure.parameters.items() if isinstance(lookup(gm, name), nn.Parameter)
        ]
        self.vars: dict[str, tuple[Var, int]] = {
            h.width.name: (h.var, h.width.step) for h in hidden(structure)
        }
        inside = sum(math.prod(length(a) for a in dims) for dims in self.axes)
        self.outside = sum(p.numel() for p in gm.parameters()) - inside

    def total(self, units: Mapping[str, int]) -> int:
        grow = {self.vars[n][0]: k // self.vars[n][1] for n, k in units.items()}
        return self.outside + sum(
            math.prod(length(a) + sum(grow.get(v, 0) * m for v, m in multiplicity(a).items()) for a in dims)
            for dims in self.axes
        )


def _allocate(profile: Profile, count: _Count, limit: int) -> dict[str, int]:
    free = {n: b for n, b in profile.items() if b.significant >= b.width.step}
    if not free:
        return {}
    base = count.total({})
    cheapest = min(count.total({n: b.width.step}) for n, b in free.items()) - base
    if cheapest > limit:
        raise PlanError(
            f"The budget of {limit:,} parameters is less than the smallest growth, {cheapest:,} parameters for "
            f"{min(free, key=lambda n: count.total({n: free[n].width.step}))!r}."
        )
    tilt = _tilt(profile, count, free)

    def at(ratio: float) -> dict[str, int]:
        units = {}
        for name, b in free.items():
            step = b.width.step
            k = math.floor(ratio * tilt[name] * b.width.size / step + 0.5) * step
            units[name] = min(k, b.significant)
        return units

    low, high = 0.0, 1.0
    while count.total(at(high)) - base <= limit and any(at(high)[n] < b.significant for n, b in free.items()):
        high *= 2
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if count.total(at(middle)) - base <= limit else (low, middle)
    units = at(high) if count.total(at(high)) - base <= limit else at(low)
    if not any(units.values()):
        best = max(
            (n for n, b in free.items() if count.total({n: b.width.step}) - base <= limit),
            key=lambda n: tilt[n],
        )
        units[best] = free[best].width.step
    return units


def _tilt(profile: Profile, count: _Count, free: Iterable[str]) -> dict[str, float]:
    """Predicted gain per parameter, relative to the median and within bounds; 1 where nothing is predicted."""
    refit = profile.refit
    if refit is None:
        return dict.fromkeys(free, 1.0)
    base = count.total({})
    score = {}
    for name in free:
        width = profile[name].width
        k = min(profile[name].significant, max(width.step, math.ceil(width.size / 8)))
        k = max(width.step, k // width.step * width.step)
        score[name] = refit.marginal(name, k) / (count.total({name: k}) - base)
    middle = sorted(score.values())[len(score) // 2] or 1.0
    return {n: min(max((s / middle) ** 0.5, TILT[0]), TILT[1]) for n, s in score.items()}


# -- filling in the weights


def _fill(
    profile: Profile, structure: Structure, units: dict[str, int], update_existing: bool, parameters: tuple[int, int]
) -> Plan:
    found, refit = profile.found, profile.refit
    if found is None:
        raise PlanError("This profile holds no candidates.")
    order = {
        name: refit.evidence[name].order[:k] if refit is not None else torch.arange(k) for name, k in units.items()
    }
    values = Values(corner=False)
    incoming, outgoing = [], []
    produces = {(p.weight, p.out_dim) for p in structure.projections}
    produces |= {(p.bias, 0) for p in structure.projections if p.bias is not None}
    for name, slices in found.values.items():
        for (width, dim), t in slices.items():
            if width in units:
                values.new.setdefault(name, {})[width, dim] = _pick(t, dim, order[width], found.units[width])
                if (name, dim) in produces:
                    incoming.append((name, width, dim))
    scale, predicted = 1.0, {}
    if refit is not None:
        scale, predicted = _from_refit(profile, structure, order, update_existing, values, outgoing)
    else:
        _from_proposals(profile, units, update_existing, values, outgoing)
    followed = any(h.width.followers for h in hidden(structure) if h.width.name in units)
    return Plan(
        units=units,
        method=profile.method.name,
        scale=scale,
        symmetric=profile.method.symmetric and not followed,
        predicted=predicted,
        parameters=parameters,
        values=values,
        outgoing=tuple(outgoing),
        incoming=tuple(incoming),
    )


def _pick(t: Tensor, dim: int, chosen: Tensor, candidates: int) -> Tensor:
    """Slices of the chosen units, of so many candidates, along one dimension."""
    each = t.shape[dim] // candidates
    index = (chosen[:, None] * each + torch.arange(each)).flatten()
    return t.index_select(dim, index.to(t.device))


def _from_refit(
    profile: Profile,
    structure: Structure,
    order: Mapping[str, Tensor],
    update_existing: bool,
    values: Values,
    outgoing: list[tuple[str, str, int]],
) -> tuple[float, dict[str, float]]:
    """Outgoing weights and updates, solved jointly for all chosen units that a consumer reads."""
    refit = profile.refit
    if refit is None:
        return 1.0, {}
    terms = []
    for name, r in refit.readouts.items():
        chosen = {w: u for w, u in order.items() if w in r.new}
        if not chosen:
            continue
        weights, columns = solution = r.solve(chosen, update_existing)
        slope, curvature = r.predict(solution)
        terms.append((slope, curvature * max(refit.evidence[w].coherence for w in chosen)))
        weight = lookup(profile.gm, name)
        at = len(r.old) if update_existing else 0
        for width, picked in chosen.items():
            n = r.new[width][picked].numel()
            block = weights[:, at : at + n]
            values.new.setdefault(name, {})[width, 1] = block.reshape(weight.shape[0], -1, *weight.shape[2:])
            outgoing.append((name, width, 1))
            at += n
        if update_existing:
            moved = weights[:, : len(r.old)]
            if r.bias is not None:
                values.delta[r.bias] = moved[:, -1]
                moved = moved[:, :-1]
            values.delta[name] = moved.reshape(weight.shape)
    s, q = sum(t[0] for t in terms), sum(t[1] for t in terms)
    predicted = {w: refit.marginal(w, len(u)) for w, u in order.items() if refit.of(w)}
    best = s / q if q > 0 and decrease(terms) > 0 else 0.0
    return profile.method.share * best, predicted


def _from_proposals(
    profile: Profile,
    units: Mapping[str, int],
    update_existing: bool,
    values: Values,
    outgoing: list[tuple[str, str, int]],
) -> None:
    touched: set[str] = set()
    for width, k in units.items():
        for name, omega in profile.proposals[width].omega.items():
            weight = lookup(profile.gm, name)
            block = omega[:k].permute(2, 0, 1)  # [O, k, taps]
            block = torch.cat([block, block.new_zeros(block.shape[0], k - block.shape[1], block.shape[2])], 1)
            values.new.setdefault(name, {})[width, 1] = block.reshape(weight.shape[0], -1, *weight.shape[2:])
            outgoing.append((name, width, 1))
            touched.add(name)
    if not update_existing:
        return
    biases = {p.weight: p.bias for p in analyse(profile.gm).projections}
    for name in touched:
        update = profile.updates[name]
        bias = biases[name]
        if bias is not None:
            values.delta[bias] = update[:, -1]
            update = update[:, :-1]
        values.delta[name] = update.reshape(lookup(profile.gm, name).shape)
