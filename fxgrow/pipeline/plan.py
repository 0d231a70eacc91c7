"""Deciding: how many units each width gets, within a budget.

requires: a profile.
ensures:  a `Plan` within its budget that `apply` can replay on the profiled graph, or on a fresh copy of it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from fxgrow.errors import PlanError, SmallBudgetError
from fxgrow.pipeline.cost import Cost, Parameters, cost_of
from fxgrow.pipeline.fill_plan import fill_plan
from fxgrow.pipeline.profile_record import Profile
from fxgrow.report.bottleneck import Bottleneck
from fxgrow.rewriting.plan import Plan

#: the budget when none is given
DEFAULT_BUDGET = "+25%"
#: how far its worth may tilt a width's share of the budget
SHARE_CLAMP = (0.5, 4.0)


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

    A budget is spread over the widths in proportion to their sizes, tilted towards widths of much worth for their
    size, and never spent on units that the held-back test did not accept.

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
    if not isinstance(multiple, int) or multiple < 1:
        raise PlanError(f"multiple={multiple!r}: give a positive number, 1 for any size.")
    count = Parameters(profile.analysed)
    if neurons is not None:
        asked = _as_asked(profile, neurons)
        # units that the method found itself are no more than lower the loss
        most = {n: profile[n].significant for n in asked if profile.proposals[n].splits is not None}
        units = {name: min(k, most.get(name, k)) for name, k in asked.items()}
    else:
        price = cost_of(cost, profile.analysed, [n for n, b in profile.items() if b.significant])
        limit = _parse(DEFAULT_BUDGET if budget is None else budget, price)
        units = asked = _allocate(profile, price, limit, multiple)
    if not any(units.values()):
        total = count.total({})
        return Plan({}, profile.method.name, parameters=(total, total), reason=profile.method.nothing)
    less = [f"{units[name]} of {k} units at {name}" for name, k in asked.items() if units[name] < k]
    units = {name: k for name, k in units.items() if k}
    found = fill_plan(profile, units, update_existing, (count.total({}), count.total(units)))
    return replace(found, reason=f"{', '.join(less)}: beyond them, {profile.method.nothing}") if less else found


def with_suggestion(profile: Profile) -> Profile:
    """The same profile, which now knows what `plan` adds by default, for its table."""
    count = Parameters(profile.analysed)
    try:
        units = _allocate(profile, count, _parse(DEFAULT_BUDGET, count), 1)
        units = {name: k for name, k in units.items() if k}
        for name in units:
            profile.method.check_width(profile.analysed, profile.analysed.widths[name])
    except PlanError:
        return profile
    parameters = count.total({}), count.total(units)
    reason = None if units else profile.method.nothing
    vars(profile)["suggested"] = Plan(units, profile.method.name, parameters=parameters, reason=reason)
    return profile


def _as_asked(profile: Profile, neurons: int | Mapping[str, int]) -> dict[str, int]:
    analysed = profile.analysed
    if isinstance(neurons, Mapping):
        wanted = {name: (k, analysed.free_width(name).step) for name, k in neurons.items()}
        missing = [name for name in wanted if name not in profile]
        if missing:
            raise PlanError(f"Width {missing[0]!r} was not profiled; profiled: {', '.join(profile)}.")
    else:
        steps = {name: b.width.step for name, b in profile.items()}
        wanted = {name: (math.ceil(neurons / step) * step, step) for name, step in steps.items()}
    for name, (k, step) in wanted.items():
        profile.method.check_width(analysed, analysed.widths[name])
        if k <= 0 or k % step:
            raise PlanError(f"{k} units for width {name!r}: give a positive multiple of its step {step}.")
        have = profile.proposed[name]
        if k > have:
            raise PlanError(
                f"{k} units are asked for at width {name!r}, but the profile proposed {have}: "
                f"call profile(..., units={k})."
            )
    return {name: k for name, (k, _) in wanted.items()}


def _parse(budget: str | float, price: Cost) -> float:
    total = price.total({})
    try:
        if isinstance(budget, str) and budget.strip().endswith("%"):
            limit = float(budget.strip().removeprefix("+").removesuffix("%")) / 100 * total
        else:
            limit = float(budget)
            if isinstance(budget, float) and price.unit != "seconds" and limit != int(limit):
                raise ValueError(budget)
        limit = limit if price.unit == "seconds" else math.floor(limit)
    except (ValueError, TypeError, OverflowError) as error:
        share = f"+{budget:.0%}" if isinstance(budget, float) and 0 < budget < 1 else "+10%"
        raise PlanError(f"budget={budget!r}: give a number of {price.unit}, or a share such as {share!r}.") from error
    if not limit > 0:
        raise PlanError(f"budget={budget!r} leaves {limit:g} {price.unit} to add: give a positive budget.")
    return limit


@dataclass(frozen=True)
class _Sizes:
    """Numbers of units that a width may get: none, `first`, and on by `step`."""

    first: int
    step: int
    most: int

    @classmethod
    def of(cls, b: Bottleneck, multiple: int) -> _Sizes:
        own, period = b.width.step, math.lcm(b.width.step, multiple)
        # a size is a multiple of its step, so that one of these fits
        first = next(k for k in range(own, period + own, own) if (b.width.size + k) % multiple == 0)
        return cls(first, period, b.significant)

    def nearest(self, wanted: float) -> int:
        if self.first > self.most or wanted < self.first / 2:
            return 0
        k = self.first + max(0, math.floor((wanted - self.first) / self.step + 0.5)) * self.step
        return min(k, self.first + (self.most - self.first) // self.step * self.step)

    def after(self, k: int) -> int:
        return k + self.step if k else self.first


def _allocate(profile: Profile, count: Cost, limit: float, multiple: int) -> dict[str, int]:
    sizes = {n: _Sizes.of(b, multiple) for n, b in profile.items()}
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
    tilt = _clamped_share(profile, free)

    def at(ratio: float) -> dict[str, int]:
        return {name: sizes[name].nearest(ratio * tilt[name] * b.width.size) for name, b in free.items()}

    def most(ratio: float) -> bool:
        return all(sizes[n].after(k) > sizes[n].most for n, k in at(ratio).items())

    low, high = 0.0, 1.0
    while count.total(at(high)) - base <= limit and not most(high):
        high *= 2
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if count.total(at(middle)) - base <= limit else (low, middle)
    units = at(high) if count.total(at(high)) - base <= limit else at(low)
    share = {n: high * tilt[n] * b.width.size for n, b in free.items()}
    return _use_up(units, {n: sizes[n] for n in free}, share, count, base + limit)


def _use_up(
    units: dict[str, int], free: Mapping[str, _Sizes], share: Mapping[str, float], count: Cost, most: float
) -> dict[str, int]:
    """Rounding leaves a rest: widths furthest below their share take it, step by step, up to twice the share."""
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


def _clamped_share(profile: Profile, free: Iterable[str]) -> dict[str, float]:
    """How a width's share of its size departs from the others'; 1 where nothing is predicted.

    Units go by worth, not by size, but no further than the root: what a profile sees of worth is noisy.
    """
    short = {n: profile[n].worth / profile[n].width.size for n in free}
    middle = sorted(short.values())[len(short) // 2]
    if middle <= 0:
        return dict.fromkeys(short, 1.0)
    return {n: min(max((s / middle) ** 0.5, SHARE_CLAMP[0]), SHARE_CLAMP[1]) for n, s in short.items()}
