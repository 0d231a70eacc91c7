"""The pipeline on one screen: capture, profile, plan, line search, rewrite."""

from __future__ import annotations

import logging
import operator
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, TypeVar, overload

import torch
from torch import fx, nn

from fxgrow.data.argument_checks import checked_arguments
from fxgrow.data.batches import BatchReader, Data, Fitting, check_device
from fxgrow.data.loss import Loss, known_loss
from fxgrow.data.random_state import random_state_kept
from fxgrow.data.settings import check_same_settings
from fxgrow.distributed import SINGLE_PROCESS, ProcessGroup, process_group_of
from fxgrow.errors import CaptureError
from fxgrow.graph.evaluate import own_modes
from fxgrow.graph.graph import copy_graph, named_tensors
from fxgrow.graph.kept_values import collections_kept
from fxgrow.graph.node_meta import EXAMPLE_INPUTS, RECORD
from fxgrow.initialisers.registry import find_initialiser, lists_methods
from fxgrow.pipeline.growth_record import Growth, GrowthResult, Index, keep_record
from fxgrow.pipeline.held_out import ROUNDING, HeldOut, Losses
from fxgrow.pipeline.line_search import GammaLine, Search, search
from fxgrow.pipeline.options import CopyOptions, GrowOptions, takes_options, with_defaults
from fxgrow.pipeline.plan import plan as make_plan
from fxgrow.pipeline.profile import profiled
from fxgrow.pipeline.profile_record import Profile, ProfileRequest
from fxgrow.rewriting.batch_norm import RunningStatistics
from fxgrow.rewriting.bounds import LIMIT, bounded
from fxgrow.rewriting.into_module import check_into, into_module
from fxgrow.rewriting.memory import memory_errors
from fxgrow.rewriting.parametrizations import remove_parametrizations, restore_parametrizations
from fxgrow.rewriting.plan import Plan
from fxgrow.rewriting.replay import record
from fxgrow.rewriting.size_change import SizeChange
from fxgrow.rewriting.verify import check_function
from fxgrow.rewriting.widened_graph import WidenedGraph
from fxgrow.tracing.capture import capture
from fxgrow.transfer.optimizer_state import check_owner, repoint
from fxgrow.transfer.stale_model import watch

if TYPE_CHECKING:
    from typing_extensions import Unpack

M = TypeVar("M", bound=nn.Module)
#: losses in train and in eval mode
Pair = tuple[Losses, Losses]
#: growth is not for a decrease of the held-out loss that is less than so many of its standard errors
ERRORS = 2.0
STAGES = ("capture", "profile", "plan", "search")
log = logging.getLogger("fxgrow")


@overload
def grow(
    model: nn.Module, dataloader: Iterable[Any], *, into: Literal["graph"] = ..., **options: Unpack[CopyOptions]
) -> fx.GraphModule: ...


@overload
def grow(model: M, dataloader: Iterable[Any], *, into: Literal["module"], **options: Unpack[CopyOptions]) -> M: ...


@lists_methods
@checked_arguments(CaptureError)
@takes_options()
@own_modes()
def grow(model: nn.Module, dataloader: Iterable[Any], **options: Unpack[GrowOptions]) -> nn.Module:
    """Makes a network wider where the loss asks for what its weights cannot express.

    The model is captured as a graph, every hidden width is profiled on the data, units are chosen within the budget,
    scaled by a line search on held-out batches, and added to a copy. The model itself is left as it is.

    Args:
        model: any module that `fxgrow.capture` can read, or a grown graph.
        dataloader: batches; see `fxgrow.profile`.
        loss_fn: see `fxgrow.profile`, as are `batch`, `samples`, `memory_limit`, `progress` and `seed`.
        example_inputs: inputs to capture the model with; None for those of the first batch.
        budget: see `fxgrow.plan`, as are `neurons` (of which a mapping has only the named widths profiled), `cost`,
            `multiple` and `update_existing`.
        method: the initialiser, one entered with `fxgrow.initialiser` or one of the library's:
            {methods}.
        optimizer: the optimiser that trains the model: re-pointed to the new parameters, its state kept.
        into: `graph` for a GraphModule; `module` for a copy of the model itself, with its class, methods and
            attributes, where its code computes what the grown graph does.
        process_group: of torch.distributed: every process calls with the same model and its own part of the data, and
            gets the same grown model; see `fxgrow.profile`. A model in DistributedDataParallel or FSDP2 grows in a
            `Grower`.

    Returns:
        A GraphModule with the model's parameter names, wider. `.meta["fxgrow"]` is its `Growth`: where nothing is worth
        adding the function is unchanged and `.declined` says why.

    Raises:
        CaptureError: the model cannot be traced.
        ProfileError: the data or the loss do not allow a profile, or no width is free.
        PlanError: the budget or the neurons cannot be met, or the model's code does not allow `into="module"`.

    Example:
        >>> import torch, fxgrow
        >>> _ = torch.manual_seed(0)
        >>> x = torch.randn(256, 6)
        >>> batches = [(x[i : i + 64], x[i : i + 64].prod(1, keepdim=True)) for i in range(0, 256, 64)]
        >>> net = torch.nn.Sequential(torch.nn.Linear(6, 3), torch.nn.ReLU(), torch.nn.Linear(3, 1))
        >>> grown = fxgrow.grow(net, batches, neurons=2, progress=False)
        >>> grown.state_dict()["0.weight"].shape
        torch.Size([5, 6])
    """
    process_group = process_group_of(options.get("process_group"))
    model = getattr(model, "_orig_mod", model)  # without torch.compile
    with process_group.session():
        settings = with_defaults(options)
        if settings["optimizer"] is not None:
            check_owner(settings["optimizer"], model)
        done = grown_copy(model, dataloader, settings, process_group)
        if settings["optimizer"] is not None:
            repoint(settings["optimizer"], model, done.model, done.index)
    keep_record(done.model, done.record)
    watch(model, done.model, done.record, moved=settings["optimizer"] is not None)
    log.info("%s; loss: %s", done.record.declined or done.record.plan, done.record.profile.loss_name)
    return done.model


@own_modes()
@random_state_kept()
@memory_errors()
def grown_copy(
    model: nn.Module, dataloader: Iterable[Any], settings: GrowOptions, process_group: ProcessGroup = SINGLE_PROCESS
) -> GrowthResult[nn.Module]:
    """The stages of `grow`, on a copy, which is the same in every process: the model is as before."""
    with process_group.session():
        check_same_settings(process_group, {**settings, "the model": model})
        with process_group.sync_buffers(model), collections_kept(model):
            reader = BatchReader.of(model, settings["batch"])
            grown = _run(model, Data(dataloader, settings["samples"], process_group, reader), settings)
            process_group.check_equal(named_tensors(grown.model), "after growth")
            return grown


def _run(model: nn.Module, data: Data, options: GrowOptions) -> GrowthResult[nn.Module]:
    check_into(options["into"], model)
    times = [time.perf_counter()]
    first = data.first()
    check_device(first, model)
    inputs = first.inputs if options["example_inputs"] is None else options["example_inputs"]
    captured = capture(model, inputs)
    gm = remove_parametrizations(captured)
    data.leave_out_refused(gm, first)
    times.append(time.perf_counter())
    loss = known_loss(options["loss_fn"])
    profile = _profile(gm, data, loss, options)
    times.append(time.perf_counter())
    update, neurons = options["update_existing"], options["neurons"]
    decide = partial(make_plan, profile, options["budget"], neurons, update_existing=update)
    decided = data.process_group.broadcast_from_rank0(
        lambda: decide(cost=options["cost"], multiple=options["multiple"])
    )
    times.append(time.perf_counter())
    held_out = HeldOut.of(data, loss)
    result = apply_best(decided, profile, held_out, neurons is not None, update)
    times.append(time.perf_counter())
    seconds = dict(zip(STAGES, map(operator.sub, times[1:], times), strict=True))
    # running statistics that were measured again are for what has grown
    chosen = copy_graph(gm) if result.record.declined else result.model
    grown, index = restore_parametrizations(chosen, result.index)
    out = into_module(model, inputs, captured, grown) if options["into"] == "module" else grown
    record(out, captured, grown, result.record.plan.units, options["method"])
    decreases = _decreases(model, result.record)
    return GrowthResult(out, index, replace(result.record, seconds=seconds, decreases=decreases))


def _profile(gm: fx.GraphModule, data: Data, loss: Loss, options: GrowOptions) -> Profile:
    method, units = options["method"], options["neurons"]
    # without a refit, which holds batches out itself, no statistics may have seen what the line search measures
    fitting = Data(Fitting(data), options["samples"], data.process_group)
    source = data if find_initialiser(method).needs.refit else fitting
    # widths that get no units need no figures
    widths = list(units) if isinstance(units, Mapping) else None
    request = ProfileRequest(
        loss, method, widths=widths, units=units, progress=options["progress"], memory_limit=options["memory_limit"],
        seed=options["seed"], budget=options["budget"], cost=options["cost"],
    )  # fmt: skip
    return profiled(gm, source, request)


def apply_best(
    plan: Plan, profile: Profile, held_out: HeldOut, forced: bool, follow: bool
) -> GrowthResult[fx.GraphModule]:
    """Searches gamma and rewrites; an unchanged copy where nothing is worth adding, and the record says why.

    Units that were asked for by number (`forced`) are added although no gamma lowers the loss: with a gamma of 0 they
    change nothing. Running statistics `follow` batch statistics.
    """
    trial = _Trial(profile, held_out, forced, follow)
    if not plan.units:
        return trial.declined(plan, str(plan.reason))
    return trial.along_gamma(plan) if plan.moves else trial.unscaled(plan)


@dataclass(frozen=True)
class _Trial:
    """A plan, tried on the held-out batches in both modes."""

    profile: Profile
    held_out: HeldOut
    forced: bool
    follow: bool

    def losses(self, graph: fx.GraphModule) -> Pair:
        """In train and in eval mode."""
        norms = RunningStatistics(graph, self.held_out.batches, self.held_out.process_group)
        return self.held_out.in_train_mode(graph, norms)[0], self.held_out.in_eval_mode(graph)

    def declined(
        self, plan: Plan, reason: str, search: Search | None = None, before: Pair | None = None
    ) -> GrowthResult[fx.GraphModule]:
        graph = self.profile.graph
        before = before or self.losses(graph)
        plan = replace(plan, units={}, scale=0.0, reason=f"{reason}. {_next_steps(self.profile, self.forced)}")
        return self.result(copy_graph(graph), {}, plan, search, (before, before))

    def unscaled(self, plan: Plan) -> GrowthResult[fx.GraphModule]:
        """Units that change nothing, whatever gamma is; with dropout they may in train mode."""
        gm, analysed = self.profile.graph, self.profile.analysed
        plan = bounded(plan, gm, analysed.structure)
        change, generator = SizeChange(analysed, plan.units), torch.Generator().manual_seed(0)
        widened = WidenedGraph(change, plan.at(plan.scale), generator).check()
        check_function(gm, widened.gm, gm.meta[EXAMPLE_INPUTS])
        before, after = self.losses(gm), self.losses(widened.gm)
        rise, notes = self.held_out.difference(after[0], before[0]), []
        if not rise.mean <= max(ERRORS * rise.error, ROUNDING * abs(self.held_out.mean(before[0]))):
            what = f"the loss in train mode rises by {rise.mean:.2g} ± {rise.error:.2g}: units cancel in eval mode only"
            if not self.forced:
                return self.declined(plan, what, before=before)
            notes = [what]
        return self.result(widened.gm, widened.index, plan, None, (before, after), notes)

    def along_gamma(self, plan: Plan) -> GrowthResult[fx.GraphModule]:
        """Units with the gamma of the line search, within bounds, where neither mode is worse than before."""
        gm = self.profile.graph
        line = GammaLine(self.profile.analysed, plan, self.held_out, self.follow)
        check_function(gm, line.move(0.0), gm.meta[EXAMPLE_INPUTS])
        found = search(line, self.profile.method.needs.share)
        before, notes = line.seen[0.0], []
        if found.applied and found.applied < found.best * self.profile.method.needs.share:
            notes = [f"gamma is {found.applied:.3g} and not {found.best:.3g}, where eval mode is worse than before"]
        # two halves of a split unit that do not move would stay the same for ever
        if not self.forced or (not found.applied and plan.values.copies):
            reason = _why_not(found)
            if reason is not None and (plan.outgoing or plan.values.copies):
                return self.declined(plan, reason, found, before)
        if found.applied:
            plan = line.plan_here(found.applied)
        elif plan.symmetric:  # units with no weights on either side would never learn
            plan = replace(plan, symmetric=False)
            line = GammaLine(self.profile.analysed, plan, self.held_out, self.follow)
            line.see(0.0)
        # the slope is the profile's; the curvature is set so that the optimum is where the line search found it
        curvature = plan.slope / found.best if found.best else plan.curvature
        plan = replace(plan.scaled(found.applied), curvature=curvature)
        return self.result(line.graph, line.index, plan, found, (before, line.seen[found.applied]), notes)

    def result(
        self,
        grown: fx.GraphModule,
        index: Index,
        plan: Plan,
        search: Search | None,
        losses: tuple[Pair, Pair],
        notes: Sequence[str] = (),
    ) -> GrowthResult[fx.GraphModule]:
        """With the record."""
        profile, mean = self.profile, self.held_out.mean
        pinned = {w.name: w.pinned for w in profile.widths if w.pinned is not None}
        train, held = ((mean(before), mean(after)) for before, after in zip(*losses, strict=True))
        notes = [*([profile.recalibrated] if profile.recalibrated else []), *notes, *_bounds_of(plan)]
        declined = None if plan.units else plan.reason
        record = Growth(plan, profile.record(), search, {"eval": held, "train": train}, pinned, {}, declined)
        return GrowthResult(grown, index, replace(record, notes=tuple(notes)))


def _why_not(found: Search) -> str | None:
    """Why the step that was found is no growth, or None."""
    if found.gain < ROUNDING:
        return "no step along the proposed units lowers the held-out loss (gamma = 0 wins)"
    if not found.applied:
        return "wherever the proposed units lower the loss in train mode, eval mode is worse than before"
    if not found.decrease > ERRORS * found.error:
        return f"the decrease of the held-out loss is no more than its noise ({found.decrease:.2g} ± {found.error:.2g})"
    return None


def _bounds_of(plan: Plan) -> list[str]:
    """What was scaled down so that it does not dwarf its layer."""
    if not plan.units or not plan.bounded:
        return []
    name = min(plan.bounded, key=plan.bounded.__getitem__)
    return [
        f"new weights or updates of {len(plan.bounded)} parameters were scaled down to {LIMIT:g} times what is there, "
        f"most at {name} (by {1 / max(plan.bounded[name], 1e-30):.3g})"
    ]


def _next_steps(profile: Profile, forced: bool) -> str:
    """What to try after a decline, whatever its reason."""
    steps = [f"more samples (samples=; {profile.samples:,} were read)"]
    steps += ['method="random-refit"'] if profile.method.name != "random-refit" else []
    steps += [] if forced else ["neurons= for units that no test has to accept"]
    return f"Try {', '.join(steps[:-1])} or {steps[-1]}."


def _decreases(model: nn.Module, growth: Growth) -> tuple[tuple[float, float], ...]:
    """Predicted and realised, after those of the growth that made the model."""
    meta = getattr(model, "meta", None)
    before = meta.get(RECORD) if isinstance(meta, dict) else None
    earlier = before.decreases if isinstance(before, Growth) else ()
    predicted, (old, new) = growth.plan.decrease(growth.plan.scale), growth.losses["eval"]
    return (*earlier, (predicted, old - new)) if growth.plan.units and predicted else earlier
