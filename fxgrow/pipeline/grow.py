"""The pipeline on one screen: capture, profile, plan, line search, rewrite."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeVar, overload

import torch
from torch import fx, nn

from fxgrow.data.batches import Batch, Data, Fitting, check_device
from fxgrow.data.loss import LossFn
from fxgrow.data.random_state import random_state_kept
from fxgrow.distributed import SINGLE_PROCESS, ProcessGroup, process_group_of
from fxgrow.errors import PlanError
from fxgrow.graph.graph import copy_graph
from fxgrow.initialisers.registry import find_initialiser, lists_methods
from fxgrow.pipeline.growth_record import Growth, GrowthResult, Settings, keep_record
from fxgrow.pipeline.line_search import GammaLine, held_batches, mean_loss, search
from fxgrow.pipeline.plan import plan as make_plan
from fxgrow.pipeline.profile import profile as make_profile
from fxgrow.pipeline.profile_record import Profile
from fxgrow.rewriting.into_module import check_into, into_module
from fxgrow.rewriting.parametrizations import remove_parametrizations, restore_parametrizations
from fxgrow.rewriting.plan import Plan
from fxgrow.rewriting.replay import record
from fxgrow.rewriting.rewrite import rewrite
from fxgrow.rewriting.verify import check_function
from fxgrow.tracing.capture import capture
from fxgrow.transfer.optimizer_state import repoint

M = TypeVar("M", bound=nn.Module)
#: a step that lowers the held-back loss by less than this part of it lowers nothing
ROUNDING = 1e-6
log = logging.getLogger("fxgrow")


@overload
def grow(
    model: nn.Module,
    dataloader: Iterable[Any],
    *,
    loss_fn: LossFn | None = ...,
    example_inputs: tuple[Any, ...] | dict[str, Any] | None = ...,
    budget: str | float | None = ...,
    neurons: int | Mapping[str, int] | None = ...,
    method: str = ...,
    cost: str = ...,
    multiple: int = ...,
    samples: int | None = ...,
    memory_limit: int | None = ...,
    optimizer: torch.optim.Optimizer | None = ...,
    update_existing: bool = ...,
    progress: bool = ...,
    seed: int = ...,
    into: Literal["graph"] = ...,
    process_group: Any = ...,
) -> fx.GraphModule: ...


@overload
def grow(
    model: M,
    dataloader: Iterable[Any],
    *,
    loss_fn: LossFn | None = ...,
    example_inputs: tuple[Any, ...] | dict[str, Any] | None = ...,
    budget: str | float | None = ...,
    neurons: int | Mapping[str, int] | None = ...,
    method: str = ...,
    cost: str = ...,
    multiple: int = ...,
    samples: int | None = ...,
    memory_limit: int | None = ...,
    optimizer: torch.optim.Optimizer | None = ...,
    update_existing: bool = ...,
    progress: bool = ...,
    seed: int = ...,
    into: Literal["module"],
    process_group: Any = ...,
) -> M: ...


@lists_methods
def grow(
    model: nn.Module,
    dataloader: Iterable[Any],
    *,
    loss_fn: LossFn | None = None,
    example_inputs: tuple[Any, ...] | dict[str, Any] | None = None,
    budget: str | float | None = None,
    neurons: int | Mapping[str, int] | None = None,
    method: str = "default",
    cost: str = "parameters",
    multiple: int = 1,
    samples: int | None = None,
    memory_limit: int | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    update_existing: bool = True,
    progress: bool = True,
    seed: int = 0,
    into: Literal["graph", "module"] = "graph",
    process_group: Any = None,
) -> nn.Module:
    """Makes a network wider where the loss asks for what its weights cannot express.

    The model is captured as a graph, every hidden width is profiled on the data, units are chosen within the budget,
    scaled by a line search on held-back batches, and added to a copy. The model itself is left as it is.

    Args:
        model: any module that `fxgrow.capture` can read, or a grown graph.
        dataloader: batches; see `fxgrow.profile`.
        loss_fn: see `fxgrow.profile`.
        example_inputs: inputs to capture the model with; None for those of the first batch.
        budget: what to add, a number of `cost` or a share such as `"+10%"`; None for `"+25%"`.
        neurons: instead of a budget: units for every width, or per width, then only the named ones are profiled; see
            `fxgrow.plan`.
        method: the initialiser, one entered with `fxgrow.initialiser` or one of the library's:
            {methods}.
        cost: of the budget: `parameters`, `multiply-adds` or `latency`; see `fxgrow.plan`.
        multiple: sizes to prefer, such as 8; see `fxgrow.plan`.
        samples: how many samples to use at most; None for 8192.
        memory_limit: bytes that the profile's statistics may take, or None; see `fxgrow.profile`.
        optimizer: the optimiser that trains the model: re-pointed to the new parameters, its state kept.
        update_existing: also move the weights that exist (dW).
        progress: show a progress bar (if tqdm is installed).
        seed: of all random choices.
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
    done = run(
        model,
        dataloader,
        Settings(
            loss_fn, example_inputs, budget, neurons, method, cost, multiple, samples, memory_limit, update_existing,
            progress, seed, into,
        ),
        process_group_of(process_group),
    )  # fmt: skip
    if optimizer is not None:
        repoint(optimizer, model, done.model, done.index)
    keep_record(done.model, done.record)
    log.info("%s", done.record.declined or done.record.plan)
    return done.model


@random_state_kept()
def run(
    model: nn.Module, dataloader: Iterable[Any], settings: Settings, process_group: ProcessGroup = SINGLE_PROCESS
) -> GrowthResult:
    """The stages of `grow`, on a copy: the model and whatever trains it are as before.

    Every process of the group makes the same model.
    """
    with process_group.session(), process_group.sync_buffers(model):
        grown = _run(model, Data(dataloader, settings.samples, process_group), settings)
        process_group.check_equal(
            {**dict(grown.model.named_parameters()), **dict(grown.model.named_buffers())}, "after growth"
        )
        return grown


def _run(model: nn.Module, data: Data, s: Settings) -> GrowthResult:
    check_into(s.into, model)
    clock = _Clock()
    process_group = data.process_group
    first = data.first()
    check_device(first, model)
    inputs = first.inputs if s.example_inputs is None else s.example_inputs
    captured = capture(model, inputs)
    gm = remove_parametrizations(captured)
    clock.lap("capture")
    asked = _candidates(s.neurons)
    # widths that get no units need no figures
    named = list(asked) if isinstance(asked, Mapping) else None
    # what the line search measures no statistics have seen
    fitting = data.loader if find_initialiser(s.method).refit else Fitting(data)
    found = make_profile(
        gm,
        fitting,
        s.loss_fn,
        s.samples,
        s.method,
        memory_limit=s.memory_limit,
        widths=named,
        units=asked,
        progress=s.progress,
        seed=s.seed,
        process_group=process_group,
    )
    clock.lap("profile")
    decided = process_group.broadcast_from_rank0(
        lambda: make_plan(
            found, s.budget, s.neurons, cost=s.cost, multiple=s.multiple, update_existing=s.update_existing
        )
    )
    clock.lap("plan")
    held = held_batches(data)
    forced = s.neurons is not None
    grown, growth = _apply_best(gm, decided, found.record(), held, s.loss_fn, forced, s.update_existing, process_group)
    clock.lap("search")
    grown, index = restore_parametrizations(grown, growth.index)
    out = into_module(model, inputs, captured, grown) if s.into == "module" else grown
    record(out, captured, grown, growth.record.plan.units, s.method)
    return GrowthResult(
        out, index, replace(growth.record, seconds=clock.laps, decreases=_decreases(model, growth.record))
    )


@dataclass(frozen=True)
class _Outcome:
    record: Growth
    index: Mapping[str, tuple[torch.Tensor | None, ...]]


def _apply_best(
    gm: fx.GraphModule,
    decided: Plan,
    found: Profile,
    held: list[Batch],
    loss_fn: LossFn | None,
    forced: bool,
    update_existing: bool,
    process_group: ProcessGroup,
) -> tuple[fx.GraphModule, _Outcome]:
    """Searches gamma and rewrites; a decline returns an unchanged copy."""
    pinned = {w.name: w.pinned for w in found.widths if w.pinned is not None}
    before = _losses(gm, held, loss_fn, process_group)
    if not decided.units:
        same = {mode: (loss, loss) for mode, loss in before.items()}
        return copy_graph(gm), _Outcome(Growth(decided, found, None, same, pinned, {}, decided.reason), {})
    if not decided.moves:
        grown, index = rewrite(gm, decided.units, decided.at(decided.scale), torch.Generator().manual_seed(0))
        check_function(gm, grown, gm.meta["example_inputs"])
        after = _losses(grown, held, loss_fn, process_group)
        losses = {mode: (before[mode], after[mode]) for mode in before}
        return grown, _Outcome(Growth(decided, found, None, losses, pinned, {}), index)
    line = GammaLine(gm, decided, held, process_group)
    check_function(gm, line.move(0.0), gm.meta["example_inputs"])
    result = search(line, loss_fn, found.method.share, follow=update_existing)
    gamma = result.applied
    # halves of a split unit that do not come apart would stay alike for ever
    nothing = result.gain < ROUNDING
    if nothing and (decided.values.copies or (decided.outgoing and not forced)):
        declined = "no step along the proposed units lowers the held-back loss (gamma = 0 wins)"
        plan = replace(decided, units={}, scale=0.0, reason=declined)
        same = {mode: (loss, loss) for mode, loss in before.items()}
        return copy_graph(gm), _Outcome(Growth(plan, found, result, same, pinned, {}, declined), {})
    if gamma:
        decided = line.plan_here(gamma)
    after = _losses(line.graph, held, loss_fn, process_group)
    losses = {mode: (before[mode], after[mode]) for mode in before}
    # what the profile says of the slope holds; of the curvature the line search has seen more
    curvature = decided.slope / result.best if result.best else decided.curvature
    record = Growth(replace(decided.scaled(gamma), curvature=curvature), found, result, losses, pinned, {})
    return line.graph, _Outcome(record, line.index)


def _decreases(model: nn.Module, growth: Growth) -> tuple[tuple[float, float], ...]:
    """Predicted and realised, after those of the growth that made the model."""
    meta = getattr(model, "meta", None)
    before = meta.get("fxgrow") if isinstance(meta, dict) else None
    earlier = before.decreases if isinstance(before, Growth) else ()
    predicted, (old, new) = growth.plan.decrease(growth.plan.scale), growth.losses["eval"]
    return (*earlier, (predicted, old - new)) if growth.plan.units and predicted else earlier


def _losses(
    gm: fx.GraphModule, held: list[Batch], loss_fn: LossFn | None, process_group: ProcessGroup
) -> dict[str, float]:
    """Held-back loss in eval and in train mode (on a copy: BatchNorm's statistics move)."""
    copy = copy_graph(gm)
    out = {"eval": mean_loss(copy.eval(), held, loss_fn, process_group)}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        out["train"] = mean_loss(copy.train(), held, loss_fn, process_group)
    return out


def _candidates(neurons: int | Mapping[str, int] | None) -> int | Mapping[str, int] | None:
    wanted = neurons.values() if isinstance(neurons, Mapping) else [neurons] if neurons is not None else []
    if any(not isinstance(k, int) or k <= 0 for k in wanted):
        raise PlanError(f"neurons={neurons!r}: give a positive number of units.")
    return neurons


class _Clock:
    def __init__(self) -> None:
        self.laps: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.laps[name] = now - self._last
        self._last = now
