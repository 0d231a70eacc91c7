"""Growth in a training loop: the object that asks the schedule, grows the model and keeps the history."""

from __future__ import annotations

import contextlib
import copy
import logging
import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from fxgrow.data.argument_checks import MODULE, checked_arguments, read_argument, read_arguments, shown
from fxgrow.data.settings import check_same_settings
from fxgrow.distributed import SINGLE_PROCESS, ProcessGroup, process_group_of
from fxgrow.errors import CaptureError, FxgrowError, PlanError, ScheduleError, SmallBudgetError
from fxgrow.pipeline.growth_record import Growth
from fxgrow.pipeline.options import DEFAULTS, GrowOptions, Options, takes_options, with_defaults
from fxgrow.rewriting.into_module import check_into
from fxgrow.storage import schema
from fxgrow.storage.schema import SchemaError
from fxgrow.training.data_source import Source, check_source
from fxgrow.training.grow_with_state import grow_with_state
from fxgrow.training.history import History, make_event
from fxgrow.training.schedule import GrowerState, Schedule, ScheduleState, TrainingStatus, read_memory
from fxgrow.training.schedule_inputs import ModelMetrics
from fxgrow.transfer.device_mesh import sharded_modules
from fxgrow.transfer.fsdp import UnshardedModel
from fxgrow.transfer.transfer import TrainingState, lists_of, optimizers_of
from fxgrow.transfer.wrappers import check_compiled_in_place, group_of, unwrapped

if TYPE_CHECKING:
    from typing_extensions import Unpack

log = logging.getLogger("fxgrow")
#: called after a growth with the model before, the model after, and the new positions of old entries
Callback = Callable[[nn.Module, nn.Module, Mapping[str, tuple[Tensor | None, ...]]], object]
#: at most so many losses are kept until the schedule is asked again
MAX_LOSSES = 10_000


class Grower:
    """Grows a model while it trains.

    `step()` after each optimiser step grows when the schedule says so; the loop goes on with `grower.model`. The
    optimiser stays the same object, with the state of old entries, so that whatever holds it (learning rate schedulers,
    `GradScaler`) needs no care. Gradients that are being accumulated, averages of weights, lists of parameters, hooks
    and `torch.compile` go with the model. A growth that fails leaves all of it as it was.

    Args:
        model: any module that `fxgrow.capture` can read, also one that `torch.compile` wrapped: its module grows,
            and is compiled again with the same options, once per growth.
        optimizer: one of `torch.optim` or another by the shapes of its state; or several.
        schedule: when to grow: `Every`, `OnPlateau`, `OnBottleneck`, `LayerByLayer`, made into one with `|` and ended
            with `.until(...)`.
        dataloader: batches for growth, read anew each time (see `fxgrow.profile`): a DataLoader, a list, or a function
            that returns one. The training loop's loader may be used: its running iterator, order and random numbers
            stay as they are.
        into: see `fxgrow.grow`.
        lr_scheduler: checked to belong to the optimiser; one, or several.
        ema: an average of the weights that grows along: `torch.optim.swa_utils.AveragedModel`, which stays the same
            object, or a plain copy of the model, which the loop must then read as `grower.ema`.
        parameters: lists of parameters that the loop holds (to clip gradients, say), changed in place.
            `grower.parameters()` needs no list.
        on_error: `raise`, or `skip` to log an error of fxgrow and train on.
        process_group: the processes that train copies of the model, each with its own part of the data; None for those
            of DistributedDataParallel or FSDP2 (`fully_shard`) where the model is in one. Every process makes the same
            calls, this one too; growth then uses the data of all of them and is the same on each.
        options: see `fxgrow.grow`: `loss_fn`, `example_inputs`, `budget`, `neurons`, `method`, `cost`, `multiple`,
            `samples`, `batch`, `memory_limit`, `update_existing`, `progress` and `seed` (growth number n uses
            `seed + n`).

    Attributes:
        model: the model to train now, wrapped as the one that was given.
        optimizer: as given.
        steps: optimiser steps so far.
        epochs: calls of `epoch_end` so far.
        history: what happened; prints as a table.
        growth: the full record of the last growth, or None.

    Raises:
        FxgrowError: the optimiser, a scheduler or the average belongs to another model; the data cannot be read twice;
            an option is unknown.

    Example:
        >>> import torch, fxgrow
        >>> _ = torch.manual_seed(0)
        >>> x = torch.randn(256, 6)
        >>> batches = list(zip(x.split(64), x.prod(1, keepdim=True).split(64)))
        >>> model = torch.nn.Sequential(torch.nn.Linear(6, 3), torch.nn.ReLU(), torch.nn.Linear(3, 1))
        >>> optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
        >>> schedule = fxgrow.Every(steps=8).until(growths=2)
        >>> grower = fxgrow.Grower(model, optimizer, schedule, dataloader=batches, neurons=2)
        >>> for epoch in range(8):
        ...     for inputs, targets in batches:
        ...         optimizer.zero_grad()
        ...         torch.nn.functional.mse_loss(grower.model(inputs), targets).backward()
        ...         optimizer.step()
        ...         _ = grower.step()
        >>> [(e.step, dict(e.units)) for e in grower.history]
        [(8, {'0': 2}), (16, {'0': 2})]
    """

    @takes_options(progress=False)
    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer | Sequence[Optimizer],
        schedule: Schedule,
        *,
        dataloader: Source,
        into: Literal["graph", "module"] = "graph",
        lr_scheduler: Any = None,
        ema: nn.Module | None = None,
        parameters: Sequence[list[Tensor]] | list[Tensor] = (),
        on_error: Literal["raise", "skip"] = "raise",
        process_group: Any = None,
        **options: Unpack[Options],
    ) -> None:
        self.model, self.optimizer, self.schedule = model, optimizer, schedule
        self.steps = self.epochs = 0
        self.history = History()
        self.growth: Growth | None = None
        self._on_error = on_error
        self._callbacks: list[Callback] = []
        self._schedule_state: ScheduleState = {}
        self._readings: list[float] = []
        self._losses: deque[Any] = deque(maxlen=MAX_LOSSES)
        read_argument("model", model, MODULE, CaptureError)
        self._process_group = process_group_of(group_of(model) if process_group is None else process_group)
        inside, _ = unwrapped(model)
        # processes with different schedules would wait for each other at different steps
        with self._process_group.session():
            given = read_arguments({"progress": False, **options, "into": into}, DEFAULTS)
            all_options = with_defaults(given)
            settings = {**all_options, "schedule": schedule, "on_error": on_error, "the model": inside}
            settings["optimizer"] = optimizer
            check_same_settings(self._process_group, settings)
            self._training_state = TrainingState(optimizers_of(optimizer), ema, lists_of(parameters))
            self._metrics = ModelMetrics(inside, dataloader, all_options, self._process_group)
            if ema is not None and sharded_modules(inside):
                raise FxgrowError("ema= is not supported for a sharded model (FSDP2): leave it out.")
            if not isinstance(schedule, Schedule):
                raise ScheduleError(
                    f"schedule is a {type(schedule).__name__}: give one such as fxgrow.Every(epochs=2)."
                )
            if on_error not in ("raise", "skip"):
                raise FxgrowError(f"on_error={shown(on_error)}: choose 'raise' or 'skip'.")
            if all_options["budget"] is not None and all_options["neurons"] is not None:
                raise PlanError("Give a budget or a number of neurons, not both.")
            check_into(into, inside)
            check_compiled_in_place(inside)
            check_source(dataloader)
            self._training_state.check(inside, lr_scheduler)
        self._ask_at = self._next_step()

    @property
    def ema(self) -> nn.Module | None:
        """The average of the weights now."""
        return self._training_state.ema

    @checked_arguments()
    def step(self, loss: Tensor | float | None = None) -> bool:
        """Counts an optimiser step, and grows if it is time.

        Args:
            loss: of this step, for `OnPlateau`.

        Returns:
            Whether the model has grown: `grower.model` is another one then.

        Raises:
            FxgrowError: a growth failed; everything is as it was before.
        """
        self.steps += 1
        if loss is not None:
            self._losses.append(loss.detach() if isinstance(loss, Tensor) else loss)
        return self.steps >= self._ask_at and self._ask(epoch_end=False)

    @checked_arguments()
    def epoch_end(self, metric: Tensor | float | None = None) -> bool:
        """Counts an epoch, and grows if it is time; `metric` is a reading for `OnPlateau`."""
        self.epochs += 1
        if metric is not None:
            self._readings.append(float(metric))
        return self._ask(epoch_end=True)

    @checked_arguments()
    def observe(self, value: Tensor | float) -> None:
        """Records a reading for `OnPlateau`; the next `step` or `epoch_end` grows if it says so."""
        self._readings.append(float(value))
        self._ask_at = self.steps + 1

    @checked_arguments()
    def grow_now(
        self,
        neurons: int | Mapping[str, int] | None = None,
        budget: str | float | None = None,
        reason: str = "asked for",
    ) -> bool:
        """Grows regardless of the schedule, by what is given here or to the Grower; returns whether it did.

        Call it between two optimiser steps.

        Raises:
            FxgrowError: the growth failed; everything is as it was before.
        """
        options = self._metrics.options
        if neurons is not None or budget is not None:
            options = {**options, "neurons": neurons, "budget": budget}
        return self._grow(options, reason)

    def parameters(self) -> Iterator[nn.Parameter]:
        """The parameters of the model as it is now."""
        return self.model.parameters()

    @checked_arguments()
    def on_growth(self, callback: Callback) -> None:
        """Calls `callback(old_model, new_model, index)` after each growth, when all of it is done.

        The models come without wrappers. `index` has for each parameter and buffer that grew the new positions of
        its old entries, per dimension (None: unchanged).
        """
        self._callbacks.append(callback)

    def state_dict(self) -> dict[str, Any]:
        """Returns counters, the schedule with its state, and the history: numbers, strings, lists and dicts only.

        Weights are not part of it: on loading, the model must already have the sizes that it has now.
        """
        return {
            "version": 1,
            "steps": self.steps,
            "epochs": self.epochs,
            "schedule": self.schedule.to_json(),
            "memory": copy.deepcopy(self._schedule_state),
            "start": dict(self._metrics.start),
            "readings": list(self._readings),
            "losses": _as_floats(self._losses),
            "history": self.history.to_list(),
        }

    @checked_arguments()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores what `state_dict` returned.

        If the schedule differs from the saved one, counters and history are restored and the schedule starts afresh.
        With several processes each one loads a state, of the same step.

        Raises:
            FxgrowError: this is no state of a Grower; nothing has changed then.
        """
        with self._process_group.session():
            try:
                saved = schema.read_as(GrowerState)(dict(state), "the state")
                history, schedule = History.from_list(saved.history), Schedule.from_json(saved.schedule)
                same = schedule == self.schedule
                memory = copy.deepcopy(read_memory(self.schedule, saved.memory, "the state.memory")) if same else {}
            except (SchemaError, TypeError, ValueError) as error:
                raise FxgrowError(f"This is no state of a Grower: {error}.") from None
            steps, epochs, start = saved.steps, saved.epochs, saved.start
            counters = {"steps": steps, "epochs": epochs, "the schedule's state": memory, "start": start}
            check_same_settings(self._process_group, counters)
        if not same:
            log.warning("The saved schedule was %s: %s starts afresh.", schedule, self.schedule)
        self.steps, self.epochs, self.history, self._schedule_state = steps, epochs, history, memory
        self._metrics.start = start
        self._readings, self._losses = list(saved.readings), deque(saved.losses, maxlen=MAX_LOSSES)
        self._ask_at = self._next_step()

    def _ask(self, epoch_end: bool) -> bool:
        before = copy.deepcopy(self._schedule_state), self._readings, self._losses
        try:
            with self._process_group.session(), self._unsharded_metrics():
                status = self._status(epoch_end, self._process_group)
                self._readings, self._losses = [], deque(maxlen=MAX_LOSSES)
                request = self.schedule.ask(status, self._schedule_state)
                self._process_group.assert_same(f"growth at step {self.steps}: {request}")
                options = None if request is None else self._metrics.options_for(request)
            if request is None:
                return False
            if options is None:
                log.info("no growth at step %d (%s): beyond the schedule's total", self.steps, request.reason)
                return False
            return self._grow(options, request.reason)
        except BaseException as error:
            self._schedule_state, self._readings, self._losses = before
            if isinstance(error, FxgrowError) and self._on_error == "skip":
                return self._skipped(error)
            raise
        finally:
            self._ask_at = self._next_step()

    def _next_step(self) -> float:
        step = self.schedule.next_step(self._status(False, SINGLE_PROCESS), self._schedule_state)
        return math.inf if step is None else max(step, self.steps + 1)

    def _status(self, epoch_end: bool, process_group: ProcessGroup) -> TrainingStatus:
        return TrainingStatus(
            steps=self.steps,
            epochs=self.epochs,
            epoch_end=epoch_end,
            # tensors on a GPU are waited for only when the schedule is asked
            readings=process_group.mean(self._readings),
            losses=process_group.mean(_as_floats(self._losses)),
            growths=self.history.growths,
            declines=self.history.declines,
            shares=self._metrics.shares,
            sizes=self._metrics.sizes,
            spent=self._metrics.spent,
        )

    @contextlib.contextmanager
    def _unsharded_metrics(self) -> Iterator[None]:
        """The schedule looks at a sharded model with all of its parameters gathered."""
        sharded = self._metrics.model
        if sharded_modules(sharded):
            self._metrics.model = UnshardedModel(sharded).model
        try:
            yield
        finally:
            self._metrics.model = sharded

    def _grow(self, options: GrowOptions, reason: str) -> bool:
        start = time.perf_counter()
        options = {**options, "seed": options["seed"] + len(self.history)}
        try:
            model, old, result = grow_with_state(
                self.model, self._training_state, self._metrics.source, options, self._process_group
            )
        except SmallBudgetError as error:
            log.info("no growth at step %d (%s): %s", self.steps, reason, error)
            return False
        except FxgrowError as error:
            if self._on_error == "skip":
                return self._skipped(error)
            raise
        self.growth = result.record
        event = make_event(self.steps, self.epochs, reason, self.growth, time.perf_counter() - start)
        self.history.add(event)
        log.info("%s; loss: %s", event, self.growth.profile.loss_name)
        if not self.growth.plan.units:
            return False
        self.model, self._metrics.model = model, result.model
        for callback in self._callbacks:
            callback(old, result.model, result.index)
        return True

    def _skipped(self, error: FxgrowError) -> bool:
        log.warning("growth at step %d failed, training goes on: %s", self.steps, error)
        return False


def _as_floats(values: Sequence[Any]) -> list[float]:
    """Returns numbers as floats; tensors are read in one transfer."""
    if values and all(isinstance(v, Tensor) for v in values):
        return [float(v) for v in torch.stack([v.float().mean() for v in values]).tolist()]
    return [float(v) for v in values]
