"""The units of a plan: chosen candidates as slices for the rewrite, with their outgoing weights and updates."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional as F

from fxgrow.axes.structure import Projection
from fxgrow.candidates.refit import Refit
from fxgrow.graph.graph import lookup
from fxgrow.initialisers.registry import InitialiserRequest
from fxgrow.pipeline.profile_record import Profile
from fxgrow.rewriting.plan import Plan
from fxgrow.rewriting.values import Values
from fxgrow.statistics.consumer_moments import like_weight


def fill_plan(profile: Profile, units: dict[str, int], update_existing: bool, parameters: tuple[int, int]) -> Plan:
    """The plan that adds so many of the best units per width, with the weights of the method or of the refit.

    `parameters` are those of the model before and after; `update_existing` also moves the weights that exist.
    """
    written = _written_by_method(profile, units, parameters)
    if written is not None:
        return written
    analysed, needs = profile.analysed, profile.method.needs
    candidates, refit = profile.candidates(), profile.refit
    chosen = {name: torch.arange(k // analysed.widths[name].step) for name, k in units.items()}
    if refit is not None:
        chosen = {n: refit.tests[n].order[: len(u)] if n in refit.tests else u for n, u in chosen.items()}
    entries = _PlanEntries(profile)
    incoming: list[tuple[str, str, int]] = []
    produces = {(p.weight, p.out_dim) for p in analysed.structure.projections}
    produces |= {(p.bias, 0) for p in analysed.structure.projections if p.bias is not None}
    for name, slices in candidates.slices.items():
        for (width, dim), t in slices.items():
            if width in units:
                each = t.shape[dim] // candidates.unit_groups[width]
                index = (chosen[width][:, None] * each + torch.arange(each)).flatten()
                entries.values.new.setdefault(name, {})[width, dim] = t.index_select(dim, index.to(t.device))
                if (name, dim) in produces:
                    incoming.append((name, width, dim))
    symmetric = needs.symmetric and not any(analysed.widths[name].width.followers for name in units)
    plan = Plan(units, profile.method.name, symmetric=symmetric, parameters=parameters, incoming=tuple(incoming))
    if refit is None:
        entries.proposed(units, update_existing)
    else:
        slope, curvature = entries.refitted(refit, chosen, update_existing)
        scale = needs.share * slope / curvature if slope > 0 and curvature > 0 else 0.0
        predicted = {name: refit.marginal(name, len(groups)) for name, groups in chosen.items() if refit.of(name)}
        plan = replace(plan, scale=scale, predicted=predicted, slope=slope, curvature=curvature)
    return replace(plan, values=entries.values, outgoing=tuple(entries.outgoing))


def _written_by_method(profile: Profile, units: dict[str, int], parameters: tuple[int, int]) -> Plan | None:
    """The plan of a method that writes the entries of new units itself."""
    method, analysed = profile.method, profile.analysed
    generator = torch.Generator().manual_seed(profile.seed)
    values, outgoing = Values(new_units_see_each_other=False), []
    widths = [w for w in analysed.widths.values() if w.name in units]
    steps = {w.name: units[w.name] // w.step for w in widths}
    request = InitialiserRequest(analysed, widths, steps, generator)
    for width in widths:
        method.check_width(analysed, width)
        written = method.write(request, width, profile.proposals[width.name], values)
        if written is None:
            return None
        outgoing += written
    predicted = {name: sum(profile[name].gains[:k]) for name, k in steps.items() if profile[name].gains}
    return Plan(units, method.name, predicted=predicted, parameters=parameters, values=values, outgoing=tuple(outgoing))


class _PlanEntries:
    """Outgoing weights of the new units and updates of old ones, entered one weight after the other."""

    def __init__(self, profile: Profile) -> None:
        self.profile = profile
        self.values = Values(new_units_see_each_other=False)
        self.outgoing: dict[tuple[str, str, int], None] = {}

    def add_outgoing(self, use: Projection, width: str, block: Tensor) -> None:
        """Outgoing weights `[O, units * taps]`; the next group's rows stand below those of the groups before it."""
        new, key = self.values.new.setdefault(use.weight, {}), (width, use.in_dim)
        rows = like_weight(block, lookup(self.profile.graph, use.weight), use)
        new[key] = torch.cat([new[key], rows]) if key in new else rows
        self.outgoing[use.weight, width, use.in_dim] = None

    def add_update(self, use: Projection, bias: str | None, update: Tensor) -> None:
        """An update of existing weights, with the bias in its last column if there is one."""
        old, delta = lookup(self.profile.graph, use.weight), self.values.delta
        parts = {use.weight: like_weight(update if bias is None else update[:, :-1], old, use)}
        parts |= {} if bias is None else {bias: update[:, -1]}
        for name, t in parts.items():
            delta[name] = torch.cat([delta[name], t]) if name in delta else t

    def refitted(self, refit: Refit, chosen: Mapping[str, Tensor], update_existing: bool) -> tuple[float, float]:
        """Solved jointly for all chosen units that a consumer reads; returns slope and curvature along gamma."""
        terms = []
        for fit in refit.fits.values():
            groups = {width: g for width, g in chosen.items() if width in fit.new}
            if not groups:
                continue
            update, weights = fit.solve(groups, update_existing)
            slope, curvature = fit.predict(groups, update_existing)
            terms.append((slope, curvature * max(refit.tests[w].coherence for w in groups)))
            columns = [fit.new[width][picked].numel() for width, picked in groups.items()]
            for width, block in zip(groups, weights.split(columns, 1), strict=True):
                # the columns of units that are zero at first stay random: these units learn through them
                if not self.profile.analysed.widths[width].starts_at_zero:
                    self.add_outgoing(fit.use, width, block)
            if update_existing:
                self.add_update(fit.use, fit.bias, update)
        return sum(t[0] for t in terms), sum(t[1] for t in terms)

    def proposed(self, units: Mapping[str, int], update_existing: bool) -> None:
        """Outgoing weights of the proposals, and the update of each weight that has some."""
        uses = {p.weight: p for p in self.profile.analysed.structure.projections}
        for width, k in units.items():
            for name, omega in self.profile.proposals[width].omega.items():
                block = F.pad(omega[:k].permute(2, 0, 1), (0, 0, 0, k - len(omega[:k])))  # [O, k, taps]
                self.add_outgoing(uses[name], width, block.flatten(1) / (uses[name].scale or 1.0))
        for name in dict.fromkeys(name for name, _, _ in self.outgoing) if update_existing else ():
            bias, update = uses[name].bias, self.profile.updates[name]
            # that of a transposed convolution is added once, not for each tap: it is no feature
            is_feature = bias is not None and not uses[name].transposed
            trained = is_feature and lookup(self.profile.graph, str(bias)).requires_grad
            self.add_update(uses[name], bias if trained else None, update)
