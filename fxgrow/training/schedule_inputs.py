"""Measurements of the model for schedules: sizes, costs, bottlenecks; and the options of a growth within a limit."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import fx, nn

from fxgrow.analysis.analyse import analyse, widths
from fxgrow.data.batches import BatchReader, Data
from fxgrow.distributed import ProcessGroup
from fxgrow.errors import PlanError, ScheduleError
from fxgrow.initialisers.registry import find_initialiser
from fxgrow.pipeline.cost import Cost, cost_of
from fxgrow.pipeline.options import GrowOptions
from fxgrow.pipeline.plan import DEFAULT_BUDGET
from fxgrow.pipeline.profile import profile
from fxgrow.rewriting.parametrizations import remove_parametrizations
from fxgrow.tracing.capture import capture
from fxgrow.training.data_source import Source, beside_training
from fxgrow.training.schedule import Request


@dataclass
class ModelMetrics:
    """Measures one model, without wrappers, on one source of data; rank 0 measures costs."""

    model: nn.Module
    source: Source
    options: GrowOptions
    process_group: ProcessGroup
    #: per kind of cost, the cost when it was first measured
    start: dict[str, float] = field(default_factory=dict)

    def sizes(self) -> dict[str, tuple[int, int]]:
        """Returns size and step of each free width."""
        return {w.name: (w.size, w.step) for w in widths(self._graph()) if w.pinned is None}

    def spent(self, kind: str) -> tuple[float, float]:
        """Returns by how much the cost has grown since it was first measured, and that first cost."""
        now = self.process_group.broadcast_from_rank0(lambda: float(self._cost(kind).total({})))
        start = self.start.setdefault(kind, now)
        return now - start, start

    def shares(self, samples: int | None) -> dict[str, float]:
        """Returns `Bottleneck.share` of each width, from a profile by the method of growth, or one that tests units."""
        options = self.options
        method = options["method"] if find_initialiser(options["method"]).needs.refit else "default"
        bottlenecks = profile(
            self._graph(), beside_training(self.source), options["loss_fn"], samples or options["samples"], method,
            memory_limit=options["memory_limit"], progress=options["progress"], seed=options["seed"],
            process_group=self.process_group, batch=options["batch"],
        )  # fmt: skip
        return {name: b.share for name, b in bottlenecks.items()}

    def options_for(self, request: Request) -> GrowOptions | None:
        """Returns the options of a growth within the schedule's limit; None where the requested units exceed it."""
        options = self.options
        if request.neurons is not None:
            options = {**options, "neurons": request.neurons, "budget": None}
        if request.limit is None:
            return options
        neurons, budget, cost = options["neurons"], options["budget"], options["cost"]
        units = {} if neurons is None else self._units(neurons)

        def costs() -> tuple[float, float]:
            measured = self._cost(request.cost)
            return measured.total({}), measured.total(units)

        now, then = self.process_group.broadcast_from_rank0(costs)
        if neurons is not None:
            return options if then - now <= request.limit else None
        if cost != request.cost and isinstance(budget, (int, float)):
            raise ScheduleError(
                f"budget={budget!r} is a number of {cost}, the schedule's total one of {request.cost}: give a share, "
                "or the same cost."
            )
        most = min(budget if isinstance(budget, (int, float)) else _share(budget) * now, request.limit)
        most = most if request.cost == "latency" else max(1, math.floor(most))
        return {**options, "cost": request.cost, "budget": most}

    def _units(self, neurons: int | Mapping[str, int]) -> dict[str, int]:
        steps = {name: step for name, (_, step) in self.sizes().items()}
        units = neurons if isinstance(neurons, Mapping) else dict.fromkeys(steps, neurons)
        return {name: math.ceil(k / steps[name]) * steps[name] for name, k in units.items() if name in steps}

    def _graph(self) -> fx.GraphModule:
        inputs = self.options["example_inputs"]
        if inputs is None:
            reader = BatchReader.of(self.model, self.options["batch"])
            inputs = Data(beside_training(self.source), self.options["samples"], reader=reader).first().inputs
        return capture(self.model, inputs)

    def _cost(self, kind: str) -> Cost:
        gm = remove_parametrizations(self._graph())
        # a latency is measured for each width that may grow
        free = [w.name for w in widths(gm) if w.pinned is None] if self.options["neurons"] is not None else []
        return cost_of(kind, analyse(gm), free)


def _share(budget: Any) -> float:
    """Returns the share that a budget such as `"+25%"` stands for."""
    try:
        return float(str(budget or DEFAULT_BUDGET).strip().removesuffix("%")) / 100
    except ValueError as error:
        raise PlanError(f"budget={budget!r}: give a number, or a share such as '+10%'.") from error
