"""The profile: where a network lacks expressivity, and which units would help, from one pass over the data.

requires: a captured graph, a loader and a loss.
ensures:  per free width a `Bottleneck`, also at `node.meta["fxgrow"]` of its first producer; the model, its mode and
          all random generators are as before.
"""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxgrow.analysis.analyse import AnalysedGraph, analyse
from fxgrow.analysis.widths import GrowableWidth
from fxgrow.axes.records import Width
from fxgrow.candidates.first_pass import FirstPass, Measurements
from fxgrow.candidates.isolated_refit import IsolatedRefit
from fxgrow.candidates.refit import Refit
from fxgrow.candidates.widened import Candidates, padded, within_bounds
from fxgrow.candidates.widened_refit import WidenedRefit
from fxgrow.data.argument_checks import checked_arguments, shown
from fxgrow.data.batches import BatchReader, Data, check_device, take
from fxgrow.data.loss import LossFn, known_loss
from fxgrow.data.random_state import random_state_kept
from fxgrow.data.settings import check_same_settings
from fxgrow.distributed import process_group_of
from fxgrow.errors import CaptureError, PlanError, ProfileError
from fxgrow.graph.evaluate import own_modes
from fxgrow.graph.kept_values import collections_kept
from fxgrow.graph.node_meta import RECORD, is_captured
from fxgrow.graph.unrolled_rnn import unroll_recurrent_layers
from fxgrow.initialisers.registry import Initialiser, InitialiserRequest, Proposal, find_initialiser, lists_methods
from fxgrow.pipeline.held_out import ROUNDING, check_same_loss
from fxgrow.pipeline.plan import PROPOSED, proposals, ratio_for, with_suggestion
from fxgrow.pipeline.profile_record import Profile, ProfileRequest
from fxgrow.pipeline.recalibration import recalibrated
from fxgrow.report.bottleneck import Bottleneck
from fxgrow.rewriting.batch_norm import has_batch_norm
from fxgrow.rewriting.memory import check_fit_memory, memory_errors
from fxgrow.rewriting.parametrizations import remove_parametrizations
from fxgrow.rewriting.size_change import SizeChange
from fxgrow.statistics.mergeable import Moments, check_parts, fingerprint
from fxgrow.tracing.capture import capture

log = logging.getLogger("fxgrow")
#: statistics of new BatchNorm channels come from at least so many samples
CALIBRATION = 256


@lists_methods
@checked_arguments(CaptureError)
@own_modes()
@random_state_kept()
@memory_errors()
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
    batch: Callable[[Any], Any] | None = None,
    keep_moments: bool = False,
) -> Profile:
    """Measures the expressivity bottleneck of every free width and proposes units for it.

    Args:
        gm: a captured graph, or a model (captured on the first batch).
        dataloader: batches `(inputs, targets)`, where inputs may be a tuple or a dict, or dicts for models that return
            an object with `.loss`. Read one to three times, the same batches in the same order. NumPy arrays become
            tensors: those of float64, which NumPy makes where nothing is said, of the model's dtype, others of theirs.
        loss_fn: takes (output, targets), returns the mean over the batch, the sum (which is divided by the number of
            samples) or one value per sample. None: cross-entropy for integer targets, mean squared error for floating
            ones, the model's own `.loss` where it has one; a `LossWarning`, or an error, where outputs and targets look
            like those of another loss (targets that are probabilities or between 0 and 1, outputs of a softmax).
        samples: how many samples to use at most; None for 8192.
        method: the initialiser, one entered with `fxgrow.initialiser` or one of the library's:
            {methods}.
        positions: `"sampled"` estimates second moments from sampled positions; `"all"` uses every one, and one more
            forward pass, for exact figures.
        memory_limit: bytes that moments and cached activations may take at once, or None. Widths that do not fit
            together are measured in several passes over the data. The fit of outgoing weights keeps one second moment
            per layer that reads a width, whatever the limit. Activations that new units are tried on are cached if
            they take at most 256 MB, or an eighth of the limit; else the data are read again.
        widths: names of the widths to profile; None for all that are free and those that `units` names. New units that
            have no effect at first (streams under a norm, queries and keys) are profiled if they are named, or if no
            other width is free.
        units: how many units to propose, for all widths or per width; None for a quarter of the size, at least 4.
        progress: show a progress bar (if tqdm is installed).
        seed: of the sampling.
        process_group: of torch.distributed, such as `torch.distributed.group.WORLD`: every process calls with the same
            model and its own part of the data, and gets the profile of all of it. `samples` and `memory_limit` are
            then of all processes, and of each.
        batch: a function from an item of the dataloader to `(inputs, targets)`, where the items are something else,
            such as `lambda item: item[:2]` for `(inputs, targets, index)`.
        keep_moments: keep the sums over the data as `.moments`, so that profiles of other parts of the data can be
            merged with this one (`fxgrow.Profile.merge`); it takes one more matrix per width and consumer.

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
    loss = known_loss(loss_fn)
    request = ProfileRequest(loss, method, positions, memory_limit, widths, units, progress, seed, keep_moments)
    process_group = process_group_of(process_group)
    with process_group.session():
        if positions not in ("sampled", "all"):
            raise ProfileError(f"positions={positions!r}: choose 'sampled' or 'all'.")
        settings = {"loss_fn": loss_fn, "samples": samples, "batch": batch, "the model": gm}
        check_same_settings(process_group, vars(request) | settings)
        with process_group.sync_buffers(gm), collections_kept(gm):
            data = Data(dataloader, samples, process_group, BatchReader.of(gm, batch))
            return with_suggestion(profiled(gm, data, request))


@own_modes()
@random_state_kept()
def merge(
    parts: Sequence[Profile | Moments],
    gm: fx.GraphModule | None,
    dataloader: Iterable[Any] | None,
    samples: int | None,
    request: ProfileRequest,
) -> Profile:
    """See `fxgrow.Profile.merge`."""
    if not isinstance(parts, (list, tuple)):
        raise ProfileError(f"parts={shown(parts)}: give a list of profiles or their moments.")
    graph = gm if gm is not None else next((p.gm for p in parts if isinstance(p, Profile) and p.gm is not None), None)
    if not is_captured(graph):
        raise ProfileError("Moments alone hold no network: give gm=, a graph that fxgrow.capture returned.")
    moments = [_moments(part, i) for i, part in enumerate(parts)]
    check_parts(moments, graph)
    first = moments[0]
    method = find_initialiser(first.method)
    if dataloader is None and (method.needs.refit or has_batch_norm(graph)):
        needs = f"method={method.name!r} fits" if method.needs.refit else "a BatchNorm of new channels is set to"
        raise ProfileError(f"{needs} the activations of new units, which no moments hold: give dataloader=.")
    data = Data(() if dataloader is None else dataloader, samples, reader=BatchReader.of(graph))
    request = replace(request, method=method.name, positions=first.positions, widths=first.widths, parts=moments)
    return with_suggestion(profiled(graph, data, request))


Profile._merge = merge


def _moments(part: Profile | Moments, i: int) -> Moments:
    moments = part.moments if isinstance(part, Profile) else part
    if not isinstance(moments, Moments):
        raise ProfileError(f"Part {i} has no moments: make it with fxgrow.profile(..., keep_moments=True).")
    return moments


def profiled(gm: nn.Module, data: Data, request: ProfileRequest) -> Profile:
    """The stages of `profile`; with moments of parts in the request, only a refit reads the data."""
    method = find_initialiser(request.method)
    method.check_profile(data.process_group.size, request.keep_moments)
    if request.keep_moments and data.process_group.size > 1:
        raise ProfileError(
            "keep_moments=True keeps the moments of one process: leave out process_group= and merge them later."
        )
    if not is_captured(gm):
        first = data.first()
        check_device(first, gm)
        gm = capture(gm, first.inputs)
    check_same_settings(data.process_group, {"the model's graph": gm.graph})
    if not request.parts:
        check_same_loss(data, gm, request.loss_fn)
        data.leave_out_refused(gm)
    return _Profiler(gm, data, request, method).run()


class _Profiler:
    """One profile on its way."""

    def __init__(self, gm: fx.GraphModule, data: Data, request: ProfileRequest, method: Initialiser) -> None:
        self.data, self.request, self.method = data, request, method
        plain, self.recalibrated = remove_parametrizations(gm), None
        if not request.parts:
            plain, self.recalibrated = recalibrated(plain, data, request.loss_fn)
        # the graph that was given, and without parametrizations
        self.captured, self.original = gm, analyse(plain)
        chosen = _chosen(self.original, request)
        self.first_producers = {w.name: w.producers[0].node.name for w in chosen}
        # with recurrent layers unrolled: this is what runs
        unrolled = unroll_recurrent_layers(self.original.gm)
        self.analysed = self.original if unrolled is self.original.gm else analyse(unrolled)
        self.chosen = [self.analysed.widths[w.name] for w in chosen]
        ratio = PROPOSED
        if request.budget is not None and request.units is None:
            sizes = {w.name: w.width for w in chosen}
            ratio = ratio_for(self.original, sizes, request.budget, request.cost)
        self.additions = {w.name: _how_many(w.width, request.units, ratio) for w in chosen}
        self.generator = torch.Generator().manual_seed(request.seed)
        SizeChange(self.analysed, self.additions)  # fails where the memory is too small for it
        if method.needs.refit:
            check_fit_memory(self.analysed, self.additions)

    def run(self) -> Profile:
        """Reads the data and makes the record."""
        measured = self._first_pass()
        random = {w.name: self._random_units(measured.proposals[w.name], self.additions[w.name]) for w in self.chosen}
        self._search(measured.proposals)
        if self.method.needs.refit:  # outgoing weights are fitted to what will be written
            for w in self.chosen:
                if w.name in measured.proposals:
                    proposal = measured.proposals[w.name]
                    measured.proposals[w.name] = within_bounds(self.analysed.gm, w, proposal)
        calibration = _calibration(self.analysed.gm, self.data, self.method.needs.refit)
        candidates, refit = self._refit(measured, calibration) if self.method.needs.refit else (None, None)
        samples, loss = measured.samples, measured.loss
        if refit is not None and self.data.batches != 1:
            samples, loss = samples + refit.samples, loss + refit.loss
        loss /= max(1, samples)
        bottlenecks = {}
        for w in self.chosen:
            b = _bottleneck(w, measured, refit, self.additions[w.name], samples)
            share = sum(b.gains[: b.significant // w.step]) / max(abs(loss), 1e-30) if b.tested else 0.0
            bottlenecks[w.name] = replace(b, share=share, random=random[w.name], proposed=self.additions[w.name])
        nodes = {node.name: node for node in self.captured.graph.nodes}
        for name, b in bottlenecks.items():
            nodes[self.first_producers[name]].meta[RECORD] = b
        profile = Profile(
            gm=self.original.gm,
            widths=tuple(w.width for w in self.original.widths.values()),
            bottlenecks=bottlenecks,
            method=self.method,
            loss=loss,
            samples=samples,
            loss_name=self.request.loss_fn.name,
            updates=measured.delta_w,
            proposals=measured.proposals,
            proposed=self.additions,
            calibration=calibration,
            seed=self.request.seed,
            found=candidates,
            refit=refit,
            moments=self._kept(measured) if self.request.keep_moments else None,
            recalibrated=self.recalibrated,
        )
        vars(profile)["analysed"] = self.original  # what its cached property would compute again
        return profile

    def _first_pass(self) -> Measurements:
        request, exact = self.request, self.request.positions == "all"
        show, limit = request.progress and self.data.process_group.rank == 0, request.memory_limit
        keep = request.keep_moments or bool(request.parts)
        first_pass = FirstPass(
            self.analysed, self.method, self.data, request.loss_fn, exact, self.generator, show, limit, keep
        )
        if request.parts:
            return first_pass.merge(request.parts, self.chosen, self.additions)
        return first_pass.measure(self.chosen, self.additions)

    def _random_units(self, proposal: Proposal, k: int) -> int:
        """How many of the units of a method that has incoming weights will have random ones."""
        if not self.method.needs.moments or proposal.splits is not None:
            return 0
        return k - min([k, *map(len, proposal.alpha.values())] if proposal.alpha else [0])

    def _search(self, proposals: dict[str, Proposal]) -> None:
        """Units of methods that search the data themselves."""
        units = self.request.units
        wanted = [w for w in self.chosen if not isinstance(units, Mapping) or w.name in units]
        steps = {w.name: self.additions[w.name] // w.step for w in wanted}
        found = self.method.search(
            InitialiserRequest(self.analysed, wanted, steps, self.generator, self.data, self.request.loss_fn)
        )
        if found is not None:
            proposals |= found
            self.additions = {name: k if name in found else 0 for name, k in self.additions.items()}

    def _refit(self, measured: Measurements, calibration: Sequence[Any]) -> tuple[Candidates | None, Refit]:
        """Fits outgoing weights: of isolated units where that is possible, of the others in the widened network."""
        refit, loss_fn, paths = Refit(), self.request.loss_fn, measured.paths
        if measured.stats is not None and paths:
            isolated = [w for w in self.chosen if w.name in paths]
            for w in isolated:
                proposal, k = measured.proposals[w.name], self.additions[w.name]
                measured.proposals[w.name] = padded(self.analysed.gm, w, proposal, k, self.generator)
            unit_groups = {w.name: self.additions[w.name] // w.step for w in isolated}
            refit = IsolatedRefit(
                paths, measured.proposals, unit_groups, measured.stats, measured.held_out, self.data, loss_fn
            ).run()
        rest = [name for name in self.additions if name not in paths]
        if not rest:
            return None, refit
        widened = Candidates(self.analysed, measured.proposals, self.additions, calibration, self.generator)
        refit.join(WidenedRefit(widened, self.data, loss_fn, self.generator, rest).run())
        return widened, refit

    def _kept(self, measured: Measurements) -> Moments:
        """Moments of the first pass: a refit adds the samples that it was tested on."""
        names, method, positions = tuple(w.name for w in self.chosen), self.method.name, self.request.positions
        weights = fingerprint(self.captured)
        return Moments(measured.samples, measured.loss, method, positions, names, weights, measured.mergeable)


def _chosen(analysed: AnalysedGraph, request: ProfileRequest) -> list[GrowableWidth]:
    wanted = request.units if isinstance(request.units, Mapping) else {}
    for w in analysed.widths.values():
        if w.grows_by_copies and (w.name in wanted or w.name in (request.widths or ())):
            raise PlanError(
                f"Width {w.name!r} grows by copies of all experts, of which the data say nothing: call "
                f"fxgrow.widen with {{{w.name!r}: {w.step}}} first, and grow its result."
            )
    if request.widths is not None:
        return [analysed.free_width(n) for n in request.widths]
    able = [w for w in analysed.free_widths if not w.grows_by_copies]
    free = [w for w in able if w.name in wanted or not w.starts_at_zero] or able
    if not free:
        some = itertools.islice(analysed.widths.values(), 6)
        copies = "grows by copies of all experts, with fxgrow.widen only"
        pinned = "; ".join(f"{w.name}: {w.width.pinned or copies}" for w in some) or "there are no hidden layers"
        raise ProfileError(
            f"No width of this model can grow ({pinned}). A width needs a layer that writes it and one that reads it, "
            "both trainable, with only described operators between."
        )
    return free


def _how_many(width: Width, units: int | Mapping[str, int] | None, ratio: float) -> int:
    wanted = units.get(width.name) if isinstance(units, Mapping) else units
    return proposals(width, ratio) if wanted is None else math.ceil(wanted / width.step) * width.step


def _calibration(gm: fx.GraphModule, data: Data, hold: bool) -> list[Any]:
    """Inputs of one large fitting batch of all processes, if any norm needs it; of the first where it is no tensor."""
    if not has_batch_norm(gm):
        return []
    group = data.process_group
    batches = list(take(data.fitting(hold), math.ceil(CALIBRATION / group.size)))
    inputs = [batch.arguments(gm) for batch in batches]
    can_be_joined = data.any_size is not False and all(
        isinstance(t, Tensor) and t.dim() > 0 and len(t) == batch.size and t.shape[1:] == first.shape[1:]
        for batch, arguments in zip(batches, inputs, strict=True)
        for t, first in zip(arguments, inputs[0], strict=True)
    )
    if group.sum_numbers(not can_be_joined)[0]:
        return group.broadcast_from_rank0(lambda: inputs[0])
    return [group.all_gather_rows(torch.cat(parts)) for parts in zip(*inputs, strict=True)]


def _bottleneck(w: GrowableWidth, measured: Measurements, refit: Refit | None, k: int, samples: int) -> Bottleneck:
    proposal = measured.proposals[w.name]
    psi, desired = measured.bottlenecks[w.name]
    values = tuple(float(v) for v in proposal.values)
    gains, significant = tuple(v * v for v in values[:k]), min(k, len(values)) if proposal.alpha else k
    worth, tested = 0.0, refit is not None and bool(refit.of(w.name))
    if proposal.splits is not None:
        gains = tuple(proposal.splits.gains.tolist())
        significant = min(k, len(gains) * w.step)
    elif refit is not None and tested:
        test = refit.tests[w.name]
        total = refit.marginal(w.name, k // w.step)
        shares = test.shares.clamp_min(0)
        gains = tuple(float(g) for g in (total * shares / shares.sum().clamp_min(1e-30)).sort(descending=True).values)
        # less than the rounding of the loss is no signal, however often it is found
        significant = test.significant * w.step * (total > ROUNDING * abs(measured.loss / max(1, measured.samples)))
        # of an eighth of the width
        worth = refit.joint(w.name, max(1, math.ceil(w.width.size / 8) // w.step)) * psi**0.5
    elif refit is not None:
        gains, significant = (), 0
    significant = significant // w.step * w.step
    positions = measured.positions[w.name]
    return Bottleneck(w.width, psi, desired, gains, values, significant, samples, positions, worth, tested=tested)
