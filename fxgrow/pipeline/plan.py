"""Deciding: how many units each width gets, within a budget.

requires: a profile.
ensures:  a `Plan` within its budget that `apply` can replay on the profiled graph, or on a fresh copy of it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from fxgrow.analysis.analyse import AnalysedGraph
from fxgrow.axes.records import Width
from fxgrow.data.argument_checks import an, checked_arguments
from fxgrow.errors import PlanError, SmallBudgetError
from fxgrow.pipeline.cost import Cost, Parameters, cost_of
from fxgrow.pipeline.fill_plan import fill_plan
from fxgrow.pipeline.profile_record import Profile
from fxgrow.report.bottleneck import Bottleneck
from fxgrow.report.table import few
from fxgrow.rewriting.plan import Plan

#: the budget when none is given
DEFAULT_BUDGET = "+25%"
#: new units that are proposed for a width, as a part of its size: at least, and at most for a large budget
PROPOSED, MOST_PROPOSED = 0.25, 4.0
#: bounds of the factor by which priority changes a width's share of the budget
SHARE_CLAMP = (0.5, 4.0)


@checked_arguments(PlanError, profile=an(Profile))
def plan(
    profile: Profile,
    budget: str | float | None = None,
    neurons: int | Mapping[str, int] | None = None,
    *,
    cost: str = "parameters",
    multiple: int = 1,
    update_existing: bool = True,
) -> Plan:
    """Decides how many units each width gets.

    A budget is spread over the widths in proportion to their sizes, tilted towards widths of high priority for their
    size, and never spent on units that the held-out test did not accept.

    Args:
        profile: from `fxgrow.profile`.
        budget: what to add: a number of `cost`, or a share such as `"+10%"`; None for `"+25%"`.
        cost: `parameters`; `multiply-adds` of one sample at the size of the example inputs; `latency`, measured seconds
            of the example batch on the model's device.
        multiple: sizes to prefer, such as 8 for tensor cores: a width that grows from a budget gets a size that is a
            multiple of it.
        neurons: instead of a budget: units for every width, or per width; added whether significant or not (methods
            that split units add no more than lower the loss).
        update_existing: also move the weights that exist (dW).

    Returns:
        A `Plan`; without units and with a reason where nothing is worth adding.

    Raises:
        PlanError: the budget is not positive or too small for one unit, a name or a cost is unknown, or more units are
            asked for than were proposed.

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
    count, left = Parameters(profile.analysed), None
    if neurons is not None:
        requested = _requested_units(profile, neurons)
        # a method that searches for units finds those that lower the loss, and no more
        most = {n: profile[n].significant for n in requested if profile.proposals[n].splits is not None}
        units = {name: min(k, most.get(name, k)) for name, k in requested.items()}
    else:
        costs = cost_of(cost, profile.analysed, [n for n, b in profile.items() if b.significant])
        limit = _limit(DEFAULT_BUDGET if budget is None else budget, costs)
        units = requested = _allocate(profile, costs, limit, multiple)
        left = None if budget is None else _left_of_budget(profile, units, costs, limit, multiple)
    if not any(units.values()):
        total = count.total({})
        return Plan({}, profile.method.name, parameters=(total, total), reason=profile.method.nothing)
    missing = [f"{units[name]} of {k} units at {name}" for name, k in requested.items() if units[name] < k]
    units = {name: k for name, k in units.items() if k}
    filled = fill_plan(profile, units, update_existing, (count.total({}), count.total(units)))
    return replace(filled, reason=f"{', '.join(missing)}: beyond them, {profile.method.nothing}" if missing else left)


def proposals(width: Width, ratio: float) -> int:
    """How many units to propose for a width, as a part of its size: at least four, in whole steps."""
    return math.ceil(max(4, math.ceil(width.size * ratio)) / width.step) * width.step


def ratio_for(analysed: AnalysedGraph, widths: Mapping[str, Width], budget: str | float, cost: str) -> float:
    """The part of their sizes to propose for widths, so that a budget could be spent on them alike."""
    if cost == "latency":  # which only a clock tells
        return PROPOSED
    costs, ratio = cost_of(cost, analysed, []), PROPOSED
    most = costs.total({}) + _limit(budget, costs)
    while ratio < MOST_PROPOSED and costs.total({n: proposals(w, ratio) for n, w in widths.items()}) < most:
        ratio *= 1.25
    return min(ratio, MOST_PROPOSED)


def _left_of_budget(profile: Profile, units: Mapping[str, int], costs: Cost, limit: float, multiple: int) -> str | None:
    """What is left of a budget that would pay for more units of some width, and why; None where it would not."""
    most = costs.total({}) + limit
    known = {n: b for n, b in profile.items() if b.significant or costs.unit != "seconds"}
    counts = {n: _UnitCounts.of(b, multiple) for n, b in known.items()}
    more = {n: c.after(units.get(n, 0)) for n, c in counts.items()}
    affordable = [n for n, k in more.items() if costs.total({**units, n: k}) <= most]
    ended = [n for n in affordable if more[n] > counts[n].most]
    rejected = [n for n in ended if known[n].significant < profile.proposed[n]]
    spent = [n for n in ended if n not in rejected]
    reasons = {
        f"the held-out test accepts no more units at {few(rejected, 3)}": rejected,
        f"no more units were proposed at {few(spent, 3)} (profile with more units=, or grow again)": spent,
        "no width gets more than twice its share": [] if ended else affordable,
    }
    why = "; ".join(reason for reason, names in reasons.items() if names)
    left = most - costs.total(units)
    return f"{left:,.6g} of {limit:,.6g} {costs.unit} of the budget are left: {why}" if affordable else None


def with_suggestion(profile: Profile) -> Profile:
    """The same profile with what `plan` adds by default, for its table; without where that budget allows no unit."""
    count = Parameters(profile.analysed)
    try:
        units = _allocate(profile, count, _limit(DEFAULT_BUDGET, count), 1)
        units = {name: k for name, k in units.items() if k}
        for name in units:
            profile.method.check_width(profile.analysed, profile.analysed.widths[name])
    except PlanError:
        return profile
    parameters = count.total({}), count.total(units)
    reason = None if units else profile.method.nothing
    vars(profile)["suggested"] = Plan(units, profile.method.name, parameters=parameters, reason=reason)
    return profile


def _requested_units(profile: Profile, neurons: int | Mapping[str, int]) -> dict[str, int]:
    analysed = profile.analysed
    names = neurons if isinstance(neurons, Mapping) else profile
    steps = {name: analysed.free_width(name).step for name in names}
    missing = [name for name in names if name not in profile]
    if missing:
        raise PlanError(f"Width {missing[0]!r} was not profiled; profiled: {', '.join(profile)}.")
    if not isinstance(neurons, Mapping):
        neurons = {name: math.ceil(neurons / step) * step for name, step in steps.items()}
    for name, k in neurons.items():
        profile.method.check_width(analysed, analysed.widths[name])
        if k <= 0 or k % steps[name]:
            raise PlanError(f"{k} units for width {name!r}: give a positive multiple of its step {steps[name]}.")
        have = profile.proposed[name]
        if k > have:
            raise PlanError(
                f"{k} units are asked for at width {name!r}, but the profile proposed {have}: "
                f"call profile(..., units={k})."
            )
    return dict(neurons)


def _limit(budget: str | float, costs: Cost) -> float:
    """What may be added, in the unit of the cost."""
    total = costs.total({})
    try:
        if isinstance(budget, str) and budget.strip().endswith("%"):
            limit = float(budget.strip().removeprefix("+").removesuffix("%")) / 100 * total
        else:
            limit = float(budget)
            if isinstance(budget, float) and costs.unit != "seconds" and limit != int(limit):
                raise ValueError(budget)
        limit = limit if costs.unit == "seconds" else math.floor(limit)
    except (ValueError, TypeError, OverflowError) as error:
        share = f"+{budget:.0%}" if isinstance(budget, float) and 0 < budget < 1 else "+10%"
        raise PlanError(f"budget={budget!r}: give a number of {costs.unit}, or a share such as {share!r}.") from error
    if not limit > 0:
        raise PlanError(f"budget={budget!r} leaves {limit:g} {costs.unit} to add: give a positive budget.")
    return limit


@dataclass(frozen=True)
class _UnitCounts:
    """How many units a width may get: none, `first`, and on by `step` up to `most`."""

    first: int
    step: int
    most: int

    @classmethod
    def of(cls, b: Bottleneck, multiple: int) -> _UnitCounts:
        period = math.lcm(b.width.step, multiple)
        # a size is a multiple of its step
        return cls(period - b.width.size % period, period, b.significant)

    def nearest(self, wanted: float) -> int:
        if self.first > self.most or wanted < self.first / 2:
            return 0
        k = self.first + max(0, math.floor((wanted - self.first) / self.step + 0.5)) * self.step
        return min(k, self.first + (self.most - self.first) // self.step * self.step)

    def after(self, k: int) -> int:
        return k + self.step if k else self.first


def _allocate(profile: Profile, count: Cost, limit: float, multiple: int) -> dict[str, int]:
    sizes = {n: _UnitCounts.of(b, multiple) for n, b in profile.items()}
    free = {n: b for n, b in profile.items() if b.significant >= sizes[n].first}
    if not free:
        return {}
    base = count.total({})
    cheapest = {n: count.total({n: sizes[n].first}) - base for n in free}
    if min(cheapest.values()) > limit:
        name = min(cheapest, key=lambda n: cheapest[n])
        raise SmallBudgetError(
            f"The budget of {limit:,.6g} {count.unit} is less than the smallest growth, {cheapest[name]:,.6g} "
            f"{count.unit} for {name!r}."
        )
    weights = {n: tilt * free[n].width.size for n, tilt in _tilts(profile, free).items()}

    def at(ratio: float) -> dict[str, int]:
        return {name: sizes[name].nearest(ratio * weight) for name, weight in weights.items()}

    def fits(ratio: float) -> bool:
        return count.total(at(ratio)) - base <= limit

    low, high = 0.0, 1.0
    while fits(high) and any(sizes[n].after(k) <= sizes[n].most for n, k in at(high).items()):
        high *= 2
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    share = {n: high * weight for n, weight in weights.items()}
    return _spend_rest(at(high if fits(high) else low), {n: sizes[n] for n in free}, share, count, base + limit)


def _spend_rest(
    units: dict[str, int], free: Mapping[str, _UnitCounts], share: Mapping[str, float], count: Cost, most: float
) -> dict[str, int]:
    """What rounding leaves goes to the widths furthest below their share, step by step, up to twice the share."""
    units = dict(units)
    while True:
        more = {n: s.after(units[n]) for n, s in free.items()}
        fits = [
            n
            for n, s in free.items()
            if more[n] <= min(s.most, 2 * math.ceil(share[n] / s.step) * s.step)
            and count.total({**units, n: more[n]}) <= most
        ]
        if not fits:
            return units
        best = max(fits, key=lambda n: share[n] / more[n])
        units[best] = more[best]


def _tilts(profile: Profile, free: Iterable[str]) -> dict[str, float]:
    """Factors of the widths' shares, from their priority for the size relative to the median; 1 without predictions.

    The root of it, within bounds, because a profile's priorities are noisy.
    """
    priority = {n: profile[n].worth / profile[n].width.size for n in free}
    median = sorted(priority.values())[len(priority) // 2]
    if median <= 0:
        return dict.fromkeys(priority, 1.0)
    return {n: min(max((p / median) ** 0.5, SHARE_CLAMP[0]), SHARE_CLAMP[1]) for n, p in priority.items()}
