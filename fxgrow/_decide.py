"""Deciding: how many units each width gets, within a budget.

requires: a profile.
ensures:  a `Plan` within its budget that `apply` can replay on the profiled graph, or on a fresh copy of it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

from torch import fx, nn

from fxgrow._analyse import analyse
from fxgrow._axes import Var, length, multiplicity
from fxgrow._bottleneck import Bottleneck, Profile
from fxgrow._errors import PlanError
from fxgrow._graph import lookup
from fxgrow._plan import Plan
from fxgrow._rewrite import require_free
from fxgrow._units import fill_plan
from fxgrow._widths import hidden
from fxgrow.ops.registry import Structure

#: the budget when none is given
DEFAULT_BUDGET = "+25%"
#: how far the predicted gain per parameter may tilt a width's share of the budget
TILT = (0.5, 2.0)


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
    structure = analyse(profile.graph)
    count = _Count(profile.graph, structure)
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
    return fill_plan(profile, structure, units, update_existing, (count.total({}), count.total(units)))


def _as_asked(profile: Profile, neurons: int | Mapping[str, int]) -> dict[str, int]:
    if isinstance(neurons, Mapping):
        every = {h.width.name: h for h in hidden(analyse(profile.graph))}
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
        have = profile.proposed[name]
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
            if isinstance(budget, float) and limit != budget:
                raise ValueError(budget)
    except (ValueError, TypeError, OverflowError) as error:
        share = f"+{budget:.0%}" if isinstance(budget, float) and 0 < budget < 1 else "+10%"
        raise PlanError(f"budget={budget!r}: give a number of parameters, or a share such as {share!r}.") from error
    if limit <= 0:
        raise PlanError(f"budget={budget!r} leaves {limit} parameters to add: give a positive budget.")
    return limit


class _Count:
    """Parameters of the grown model, exactly: every axis with its new length."""

    def __init__(self, gm: fx.GraphModule, structure: Structure) -> None:
        self.axes = [dims for name, dims in structure.parameters.items() if isinstance(lookup(gm, name), nn.Parameter)]
        self.vars: dict[str, tuple[Var, int]] = {h.width.name: (h.var, h.width.step) for h in hidden(structure)}
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
    return _use_up(units, free, {n: high * tilt[n] * b.width.size for n, b in free.items()}, count, base + limit)


def _use_up(
    units: dict[str, int], free: Mapping[str, Bottleneck], share: Mapping[str, float], count: _Count, most: int
) -> dict[str, int]:
    """Rounding leaves a rest: widths furthest below their share take it, step by step, up to twice the share."""
    units = dict(units)
    while True:
        more = {n: units[n] + b.width.step for n, b in free.items()}
        fits = [
            n
            for n, b in free.items()
            if more[n] <= min(b.significant, 2 * math.ceil(share[n] / b.width.step) * b.width.step)
            and count.total({**units, n: more[n]}) <= most
        ]
        if not fits:
            return units
        best = max(fits, key=lambda n: share[n] / more[n])
        units[best] = more[best]


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
        score[name] = refit.marginal(name, k // width.step) / (count.total({name: k}) - base)
    middle = sorted(score.values())[len(score) // 2] or 1.0
    return {n: min(max((s / middle) ** 0.5, TILT[0]), TILT[1]) for n, s in score.items()}
