"""The units of a plan: chosen candidates as slices for the rewrite, with their outgoing weights and updates."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fxgrow.graph.graph import lookup
from fxgrow.initialisers.registry import WriteRequest
from fxgrow.pipeline.profile_record import Profile
from fxgrow.rewriting.plan import Plan
from fxgrow.rewriting.values import Values
from fxgrow.statistics.consumer_moments import like_weight


def fill_plan(profile: Profile, units: dict[str, int], update_existing: bool, parameters: tuple[int, int]) -> Plan:
    written = _written_by_method(profile, units, parameters)
    return _from_candidates(profile, units, update_existing, parameters) if written is None else written


def _from_candidates(
    profile: Profile, units: dict[str, int], update_existing: bool, parameters: tuple[int, int]
) -> Plan:
    analysed = profile.analysed
    found, refit = profile.candidates(), profile.refit
    order = {
        name: refit.evidence[name].order[:k] if refit is not None and name in refit.evidence else torch.arange(k)
        for name, k in ((n, k // analysed.widths[n].step) for n, k in units.items())
    }
    values = Values(new_units_see_each_other=False)
    incoming: list[tuple[str, str, int]] = []
    outgoing: list[tuple[str, str, int]] = []
    produces = {(p.weight, p.out_dim) for p in analysed.structure.projections}
    produces |= {(p.bias, 0) for p in analysed.structure.projections if p.bias is not None}
    for name, slices in found.slices.items():
        for (width, dim), t in slices.items():
            if width in units:
                values.new.setdefault(name, {})[width, dim] = _pick(t, dim, order[width], found.unit_groups[width])
                if (name, dim) in produces:
                    incoming.append((name, width, dim))
    terms, scale = (0.0, 0.0), 1.0
    predicted: dict[str, float] = {}
    if refit is not None:
        terms, predicted = _from_refit(profile, order, update_existing, values, outgoing)
        slope, curvature = terms
        scale = profile.method.needs.share * slope / curvature if slope > 0 and curvature > 0 else 0.0
    else:
        _from_proposals(profile, units, update_existing, values, outgoing)
    followed = any(analysed.widths[name].width.followers for name in units)
    return Plan(
        units=units,
        method=profile.method.name,
        scale=scale,
        symmetric=profile.method.needs.symmetric and not followed,
        predicted=predicted,
        slope=terms[0],
        curvature=terms[1],
        parameters=parameters,
        values=values,
        outgoing=tuple(outgoing),
        incoming=tuple(incoming),
    )


def _written_by_method(profile: Profile, units: dict[str, int], parameters: tuple[int, int]) -> Plan | None:
    """The plan of a method that writes the entries of new units itself."""
    method, analysed = profile.method, profile.analysed
    generator = torch.Generator().manual_seed(profile.seed)
    values, outgoing = Values(new_units_see_each_other=False), []
    predicted: dict[str, float] = {}
    for name, width in analysed.widths.items():
        if name not in units:
            continue
        k = units[name] // width.step
        method.check_width(analysed, width)
        written = method.write(WriteRequest(analysed, width, k, profile.proposals[name], generator), values)
        if written is None:
            return None
        outgoing += written
        if profile[name].gains:
            predicted[name] = sum(profile[name].gains[:k])
    return Plan(units, method.name, predicted=predicted, parameters=parameters, values=values, outgoing=tuple(outgoing))


def _pick(t: Tensor, dim: int, chosen: Tensor, candidates: int) -> Tensor:
    """Slices of the chosen atoms, of so many candidates, along one dimension."""
    each = t.shape[dim] // candidates
    index = (chosen[:, None] * each + torch.arange(each)).flatten()
    return t.index_select(dim, index.to(t.device))


def _from_refit(
    profile: Profile,
    order: Mapping[str, Tensor],
    update_existing: bool,
    values: Values,
    outgoing: list[tuple[str, str, int]],
) -> tuple[tuple[float, float], dict[str, float]]:
    """Outgoing weights and updates, solved jointly for all chosen units that a consumer reads.

    Returns:
        Slope and curvature of the loss along gamma, and what each width's units are predicted to bring.
    """
    refit = profile.refit
    if refit is None:
        return (0.0, 0.0), {}
    terms = []
    # what reads a new unit that is zero at first needs columns that are not
    mute = {name for name, w in profile.analysed.widths.items() if w.starts_at_zero}
    for r in refit.readouts.values():
        name = r.weight
        chosen = {w: u for w, u in order.items() if w in r.new}
        if not chosen:
            continue
        moved, weights = r.solve(chosen, update_existing)
        slope, curvature = r.predict(chosen, update_existing)
        terms.append((slope, curvature * max(refit.evidence[w].coherence for w in chosen)))
        weight = lookup(profile.graph, name)
        at = 0
        for width, picked in chosen.items():
            n = r.new[width][picked].numel()
            if width in mute:
                at += n
                continue
            block = weights[:, at : at + n]
            into = r.use.in_dim
            found = values.new.setdefault(name, {})
            found[width, into] = _below(found.get((width, into)), like_weight(block, weight, r.use))
            if (name, width, into) not in outgoing:
                outgoing.append((name, width, into))
            at += n
        if update_existing:
            if r.bias is not None:
                values.delta[r.bias] = _below(values.delta.get(r.bias), moved[:, -1])
                moved = moved[:, :-1]
            values.delta[name] = _below(values.delta.get(name), like_weight(moved, weight, r.use))
    s, q = sum(t[0] for t in terms), sum(t[1] for t in terms)
    predicted = {w: refit.marginal(w, len(u)) for w, u in order.items() if refit.of(w)}
    return (s, q), predicted


def _below(above: Tensor | None, t: Tensor) -> Tensor:
    """The next group's rows below those of the groups before it."""
    return t if above is None else torch.cat([above, t])


def _from_proposals(
    profile: Profile,
    units: Mapping[str, int],
    update_existing: bool,
    values: Values,
    outgoing: list[tuple[str, str, int]],
) -> None:
    touched: set[str] = set()
    uses = {p.weight: p for p in profile.analysed.structure.projections}
    for width, k in units.items():
        for name, omega in profile.proposals[width].omega.items():
            weight = lookup(profile.graph, name)
            block = omega[:k].permute(2, 0, 1)  # [O, k, taps]
            block = torch.cat([block, block.new_zeros(block.shape[0], k - block.shape[1], block.shape[2])], 1)
            into = uses[name].in_dim
            values.new.setdefault(name, {})[width, into] = like_weight(block.flatten(1), weight, uses[name])
            outgoing.append((name, width, into))
            touched.add(name)
    if not update_existing:
        return
    for name in touched:
        update = profile.updates[name]
        bias = uses[name].bias
        # that of a transposed convolution is added once, not for each tap: it is no feature
        if bias is not None and not uses[name].transposed and lookup(profile.graph, bias).requires_grad:
            values.delta[bias] = update[:, -1]
            update = update[:, :-1]
        values.delta[name] = like_weight(update, lookup(profile.graph, name), uses[name])
