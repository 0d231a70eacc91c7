"""The pipeline on one screen: capture, profile, plan, line search, rewrite."""

from __future__ import annotations

import logging
import operator
import time
from collections.abc import Iterable, Mapping
from dataclasses import replace
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
from fxgrow.pipeline.line_search import GammaLine, HeldOut, Search, search
from fxgrow.pipeline.options import CopyOptions, GrowOptions, takes_options, with_defaults
from fxgrow.pipeline.plan import plan as make_plan
from fxgrow.pipeline.profile import profiled
from fxgrow.pipeline.profile_record import Profile, ProfileRequest
from fxgrow.rewriting.into_module import check_into, into_module
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
#: a step that lowers the held-out loss by less than this part of it is no improvement
ROUNDING = 1e-6
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
    log.info("%s", done.record.declined or done.record.plan)
    return done.model


@own_modes()
@random_state_kept()
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
    log.info("profiled by %s, loss: %s", options["method"], loss.name)
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
    grown, index = restore_parametrizations(result.model, result.index)
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
    request = ProfileRequest(loss, method, widths=widths, units=units, progress=options["progress"])
    request = replace(request, memory_limit=options["memory_limit"], seed=options["seed"])
    return profiled(gm, source, request)


def apply_best(
    plan: Plan, profile: Profile, held_out: HeldOut, forced: bool, follow: bool
) -> GrowthResult[fx.GraphModule]:
    """Searches gamma and rewrites; an unchanged copy where nothing is worth adding, and the record says why.

    Units that were asked for by number (`forced`) are added although no gamma lowers the loss. Running statistics
    `follow` batch statistics.
    """
    gm = profile.graph
    pinned = {w.name: w.pinned for w in profile.widths if w.pinned is not None}
    before = held_out.losses(gm)

    def result(grown: fx.GraphModule, index: Index, plan: Plan, search: Search | None) -> GrowthResult[fx.GraphModule]:
        after = held_out.losses(grown) if plan.units else before
        losses = {mode: (loss, after[mode]) for mode, loss in before.items()}
        declined = None if plan.units else plan.reason
        return GrowthResult(grown, index, Growth(plan, profile.record(), search, losses, pinned, {}, declined))

    if not plan.units:
        return result(copy_graph(gm), {}, plan, None)
    if not plan.moves:
        change, generator = SizeChange(profile.analysed, plan.units), torch.Generator().manual_seed(0)
        widened = WidenedGraph(change, plan.at(plan.scale), generator).check()
        check_function(gm, widened.gm, gm.meta[EXAMPLE_INPUTS])
        return result(widened.gm, widened.index, plan, None)
    line = GammaLine(profile.analysed, plan, held_out)
    check_function(gm, line.move(0.0), gm.meta[EXAMPLE_INPUTS])
    found = search(line, profile.method.needs.share, follow)
    # two halves of a split unit that do not move would stay the same for ever
    if found.gain < ROUNDING and (plan.values.copies or (plan.outgoing and not forced)):
        reason = "no step along the proposed units lowers the held-out loss (gamma = 0 wins)"
        return result(copy_graph(gm), {}, replace(plan, units={}, scale=0.0, reason=reason), found)
    if found.applied:
        plan = line.plan_here(found.applied)
    # the slope is the profile's; the curvature is set so that the optimum is where the line search found it
    curvature = plan.slope / found.best if found.best else plan.curvature
    return result(line.graph, line.index, replace(plan.scaled(found.applied), curvature=curvature), found)


def _decreases(model: nn.Module, growth: Growth) -> tuple[tuple[float, float], ...]:
    """Predicted and realised, after those of the growth that made the model."""
    meta = getattr(model, "meta", None)
    before = meta.get(RECORD) if isinstance(meta, dict) else None
    earlier = before.decreases if isinstance(before, Growth) else ()
    predicted, (old, new) = growth.plan.decrease(growth.plan.scale), growth.losses["eval"]
    return (*earlier, (predicted, old - new)) if growth.plan.units and predicted else earlier
