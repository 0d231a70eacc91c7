"""The profile: where a network is short of expressivity, and which units would help, from one reading of the data.

requires: a captured graph, a loader and a loss.
ensures:  per free width a `Bottleneck`, also at `node.meta["fxgrow"]` of its first producer; the model, its mode and
          all random generators are as before.
"""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxgrow.analysis.analyse import AnalysedGraph, analyse
from fxgrow.analysis.widths import GrowableWidth
from fxgrow.axes.records import Width
from fxgrow.candidates.first_pass import Measured, Reader
from fxgrow.candidates.isolated_refit import IsolatedRefit
from fxgrow.candidates.refit import Refit, run_refit
from fxgrow.candidates.widened import Candidates, padded
from fxgrow.data.batches import Data, check_device
from fxgrow.data.loss import LossFn
from fxgrow.data.random_state import random_state_kept
from fxgrow.distributed import process_group_of
from fxgrow.errors import PlanError, ProfileError
from fxgrow.graph.unrolled_rnn import unroll_recurrent_layers
from fxgrow.initialisers.registry import Initialiser, Proposal, SearchRequest, find_initialiser, lists_methods
from fxgrow.pipeline.profile_record import Bottleneck, Profile
from fxgrow.rewriting.batch_norm import has_batch_norm
from fxgrow.rewriting.parametrizations import remove_parametrizations
from fxgrow.statistics.mergeable import Moments, fingerprint
from fxgrow.tracing.capture import capture

log = logging.getLogger("fxgrow")
#: norms of new channels are measured on at least so many samples
CALIBRATION = 256


@lists_methods
@random_state_kept()
def profile(
    gm: nn.Module,
    dataloader: Iterable[Any],
    loss_fn: LossFn | None = None,
    samples: int | None = None,
    method: str = "default",
    *,
    positions: str = "sampled",
    memory_limit: int | None = None,
    widths: Sequence[str] | None = None,
    units: int | Mapping[str, int] | None = None,
    progress: bool = True,
    seed: int = 0,
    process_group: Any = None,
    keep_moments: bool = False,
) -> Profile:
    """Measures the expressivity bottleneck of every free width and proposes units for it.

    Args:
        gm: a captured graph, or a model (captured on the first batch).
        dataloader: batches `(inputs, targets)`, where inputs may be a tuple or a dict, or dicts for models that return
            an object with `.loss`. Read one to three times, the same batches in the same order.
        loss_fn: takes (output, targets), returns the mean over the batch or one value per sample. None: cross-entropy
            for integer targets, mean squared error for floating ones, the model's own `.loss` where it has one.
        samples: how many samples to use at most; None for 8192.
        method: the initialiser, one entered with `fxgrow.initialiser` or one of the library's:
            {methods}.
        positions: `"sampled"` estimates second moments from sampled positions; `"all"` uses every one, and one more
            forward pass, for exact figures.
        memory_limit: bytes that moments and remembered activations may take at once, or None: widths that do not fit
            in together are measured in turns, with a reading of the data each. The fit of outgoing weights then keeps
            one second moment per layer that reads a width, whatever the limit. What new units are tried on is
            remembered if it takes at most 256 MB, or an eighth of the limit; else the data are read again.
        widths: names of the widths to profile; None for all that are free, but for those whose new units send nothing
            on at first, so that the data say nothing of them (streams under a norm, queries and keys), unless `units`
            names them.
        units: how many units to propose per width; None for a quarter of its size, at least 4.
        progress: show a progress bar (if tqdm is installed).
        seed: of the sampling.
        process_group: of torch.distributed, such as `torch.distributed.group.WORLD`: every process calls with the same
            model and its own part of the data, and gets the profile of all of it. `samples` and `memory_limit` are
            then of all processes, and of each.
        keep_moments: keep what was added up over the data as `.moments`, so that profiles of other parts of the data
            can be merged with this one (`fxgrow.Profile.merge`); it takes one more matrix per width and consumer.

    Returns:
        A `Profile`.

    Raises:
        ProfileError: no width is free, the loader is empty, a batch does not fit, a loss is not finite, a width needs
            more than `memory_limit`.
        PlanError: `widths` names one that does not exist or is pinned.
        FxgrowError: processes have different models, or one of them has failed.

    Example:
        >>> import torch, fxgrow
        >>> _ = torch.manual_seed(0)
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Tanh(), torch.nn.Linear(3, 2))
        >>> batches = [(torch.randn(32, 4), torch.randn(32, 2)) for _ in range(4)]
        >>> profile = fxgrow.profile(net, batches, method="tiny", progress=False)
        >>> 0 <= profile["0"].bottleneck <= profile["0"].desired
        True
    """
    initialiser = find_initialiser(method)
    if positions not in ("sampled", "all"):
        raise ProfileError(f"positions={positions!r}: choose 'sampled' or 'all'.")
    process_group = process_group_of(process_group)
    with process_group.session(), process_group.sync_buffers(gm):
        data = Data(dataloader, samples, process_group)
        return profiled(
            gm, data, loss_fn, initialiser, positions, memory_limit, widths, units, progress, seed, keep_moments
        )


def profiled(
    gm: nn.Module,
    data: Data,
    loss_fn: LossFn | None,
    initialiser: Initialiser,
    positions: str,
    memory_limit: int | None,
    widths: Sequence[str] | None,
    units: int | Mapping[str, int] | None,
    progress: bool,
    seed: int,
    keep_moments: bool = False,
    parts: Sequence[Moments] = (),
) -> Profile:
    """The stages of `profile`; moments of parts take the place of the first reading, and data may be None then."""
    process_group = data.process_group
    initialiser.check_profile(process_group.size, keep_moments)
    if keep_moments and process_group.size > 1:
        raise ProfileError(
            "keep_moments=True keeps the moments of one process: leave out process_group= and merge them later."
        )
    if not (isinstance(gm, fx.GraphModule) and "example_inputs" in gm.meta):
        first = data.first()
        check_device(first, gm)
        gm = capture(gm, first.inputs)
    asked, original = gm, analyse(remove_parametrizations(gm))
    chosen = _chosen(original, widths, units if isinstance(units, Mapping) else {})
    first_producers = {h.name: h.producers[0].node.name for h in chosen}
    gm = unroll_recurrent_layers(original.gm)
    analysed = original if gm is original.gm else analyse(gm)
    chosen = [analysed.widths[h.name] for h in chosen]
    exact = positions == "all"
    generator = torch.Generator().manual_seed(seed)
    additions = {h.name: _how_many(h.width, units) for h in chosen}
    show = progress and process_group.rank == 0
    reader = Reader(
        analysed, initialiser, data, loss_fn, exact, generator, show, memory_limit, keep_moments or bool(parts)
    )
    measured = reader.merge(parts, chosen, additions) if parts else reader.measure(chosen, additions)
    proposals, samples, loss = measured.proposals, measured.samples, measured.loss
    wanted = [h for h in chosen if not isinstance(units, Mapping) or h.name in units]
    steps = {h.name: additions[h.name] // h.step for h in wanted}
    searched = initialiser.search(SearchRequest(analysed, wanted, steps, data, loss_fn, generator))
    if searched is not None:
        proposals |= searched
        additions = {name: k if name in searched else 0 for name, k in additions.items()}
    calibration = _calibration(gm, data, initialiser.needs.refit)
    found = refit = None
    if initialiser.needs.refit:
        refit, rest = Refit(), [name for name in additions if name not in measured.ways]
        if measured.stats is not None and measured.ways:
            own = [h for h in chosen if h.name in measured.ways]
            atoms = {h.name: additions[h.name] // h.step for h in own}
            for h in own:
                name = h.name
                proposals[name] = padded(gm, h, proposals[name], additions[name], generator)
            refit = IsolatedRefit(measured.ways, proposals, atoms, measured.stats, measured.held, data, loss_fn).run()
        if rest:
            found = Candidates(analysed, proposals, additions, calibration, generator)
            refit.join(run_refit(found, data, loss_fn, generator, rest))
    if refit is not None and data.batches != 1:
        samples, loss = samples + refit.samples, loss + refit.loss
    bottlenecks = {
        h.name: _bottleneck(h, measured, proposals[h.name], refit, additions[h.name], samples) for h in chosen
    }
    node_map = {n.name: n for n in asked.graph.nodes}
    for h in chosen:
        node_map[first_producers[h.name]].meta["fxgrow"] = bottlenecks[h.name]
    made = Profile(
        gm=original.gm,
        widths=tuple(w.width for w in original.widths.values()),
        bottlenecks=bottlenecks,
        method=initialiser,
        loss=loss / max(1, samples),
        samples=samples,
        updates=measured.updates,
        proposals=proposals,
        proposed=additions,
        calibration=calibration,
        seed=seed,
        found=found,
        refit=refit,
        moments=_kept(asked, measured, initialiser, positions, chosen) if keep_moments else None,
    )
    vars(made)["analysed"] = original  # what its cached property would find again
    return made


def _kept(
    gm: nn.Module, measured: Measured, method: Initialiser, positions: str, chosen: Sequence[GrowableWidth]
) -> Moments:
    names = tuple(h.name for h in chosen)
    # the first reading's: a refit adds the samples that it was tested on
    return Moments(measured.samples, measured.loss, method.name, positions, names, fingerprint(gm), measured.kept)


def _chosen(analysed: AnalysedGraph, names: Sequence[str] | None, wanted: Mapping[str, int]) -> list[GrowableWidth]:
    asked = {*(names or ()), *wanted}
    for h in analysed.widths.values():
        if h.name in asked and h.grows_by_copies:
            raise PlanError(
                f"Width {h.name!r} grows by copies of all experts, of which the data say nothing: call "
                f"fxgrow.widen with {{{h.name!r}: {h.step}}} first, and grow its result."
            )
    if names is not None:
        return [analysed.free_width(n) for n in names]
    free = [h for h in analysed.free_widths if h.name in wanted or not h.starts_at_zero]
    if not free:
        some = itertools.islice(analysed.widths.values(), 6)
        pinned = "; ".join(f"{h.name}: {h.width.pinned}" for h in some) or "there are no hidden layers"
        raise ProfileError(
            f"No width of this model can grow ({pinned}). A width needs a layer that writes it and one that reads it, "
            "both trainable, with only described operators between."
        )
    return free


def _how_many(width: Width, units: int | Mapping[str, int] | None) -> int:
    wanted = units.get(width.name) if isinstance(units, Mapping) else units
    if wanted is None:
        wanted = max(4, math.ceil(width.size / 4))
    return math.ceil(wanted / width.step) * width.step


def _calibration(gm: fx.GraphModule, data: Data, hold: bool) -> list[Any]:
    """Inputs of one large batch of fitting data (batches joined where they are plain tensors), if any norm needs it.

    Of all processes, or the first one's where they are no plain tensors.
    """
    if not has_batch_norm(gm):
        return []
    taken: list[list[Any]] = []
    size = 0
    for batch in data.fitting(hold):
        taken.append(batch.arguments(gm))
        size += batch.size
        if size * data.process_group.size >= CALIBRATION:
            break
    same = all(
        isinstance(t, Tensor) and t.dim() > 0 and t.shape[1:] == f.shape[1:]
        for a in taken
        for t, f in zip(a, taken[0], strict=True)
    )
    if data.process_group.sum_numbers(not same)[0]:
        return data.process_group.broadcast_from_rank0(lambda: taken[0])
    return [data.process_group.all_gather_rows(torch.cat(parts)) for parts in zip(*taken, strict=True)]


def _bottleneck(
    h: GrowableWidth, measured: Measured, proposal: Proposal, refit: Refit | None, k: int, samples: int
) -> Bottleneck:
    name = h.name
    psi, desired = measured.asked[name]
    values = tuple(float(v) for v in proposal.values)
    gains, significant = tuple(v * v for v in values[:k]), min(k, len(values)) if proposal.alpha else k
    worth = 0.0
    if proposal.splits is not None:
        gains = tuple(proposal.splits.gains.tolist())
        significant = min(k, len(gains) * h.step)
    elif refit is not None and refit.of(name):
        evidence = refit.evidence[name]
        total = refit.marginal(name, k // h.step)
        shares = evidence.shares.clamp_min(0)
        gains = tuple(float(g) for g in (total * shares / shares.sum().clamp_min(1e-30)).sort(descending=True).values)
        significant = evidence.significant * h.step
        # of an eighth of the width
        worth = refit.joint(name, max(1, math.ceil(h.width.size / 8) // h.step)) * psi**0.5
    elif refit is not None:
        gains, significant = (), 0
    return Bottleneck(
        width=h.width,
        bottleneck=psi,
        desired=desired,
        gains=gains,
        singular_values=values,
        significant=significant // h.step * h.step,
        samples=samples,
        positions=measured.positions[name],
        worth=worth,
    )
