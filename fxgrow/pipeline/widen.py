"""Rewrites without data: a plan's units, or units that change nothing at first."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, TypeVar, overload

import torch
from torch import fx, nn

from fxgrow.data.argument_checks import PER_WIDTH, an, checked_arguments
from fxgrow.errors import CaptureError, PlanError
from fxgrow.graph.evaluate import own_modes
from fxgrow.graph.node_meta import EXAMPLE_INPUTS, is_captured
from fxgrow.rewriting.into_module import check_into, into_module
from fxgrow.rewriting.memory import memory_errors
from fxgrow.rewriting.plan import Plan
from fxgrow.rewriting.replay import record
from fxgrow.rewriting.rewrite import rewrite
from fxgrow.rewriting.verify import check_function
from fxgrow.tracing.capture import capture
from fxgrow.transfer.optimizer_state import check_owner, repoint

M = TypeVar("M", bound=nn.Module)


@checked_arguments(PlanError, plan=an(Plan))
@own_modes()
@memory_errors()
def apply(gm: nn.Module, plan: Plan, example_inputs: tuple[Any, ...] | dict[str, Any] | None = None) -> fx.GraphModule:
    """Rewrites alone: adds a plan's units to a copy of the graph, as large as the plan says (`grow` bounds them).

    Args:
        gm: a captured graph, or a fresh copy of the model with `example_inputs`.
        plan: from `fxgrow.plan`, `Plan.from_json`, or `Plan({"name": units})`, which keeps the function.
        example_inputs: to capture a model that is no graph yet.

    Returns:
        The grown GraphModule.

    Raises:
        PlanError: a width is unknown or pinned, or the units do not fit its step.
        RewriteError: the rewritten graph failed its checks.

    Example:
        >>> import torch, fxgrow
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.ReLU(), torch.nn.Linear(3, 2))
        >>> grown = fxgrow.apply(fxgrow.capture(net, (torch.zeros(1, 4),)), fxgrow.Plan({"0": 2}))
        >>> grown.get_submodule("2")
        Linear(in_features=5, out_features=2, bias=True)
    """
    if not is_captured(gm):
        if example_inputs is None:
            raise PlanError("apply needs a captured graph, or example_inputs to capture the model with.")
        gm = capture(gm, example_inputs)
    grown, _ = rewrite(gm, plan.units, plan.at(plan.scale), torch.Generator().manual_seed(0))
    if not (plan.values.new or plan.values.delta):
        check_function(gm, grown, gm.meta[EXAMPLE_INPUTS])
    record(grown, gm, grown, plan.units, plan.method)
    return grown


@overload
def widen(
    model: nn.Module,
    example_inputs: tuple[Any, ...] | dict[str, Any],
    units: Mapping[str, int],
    *,
    optimizer: torch.optim.Optimizer | None = ...,
    seed: int = ...,
    into: Literal["graph"] = ...,
) -> fx.GraphModule: ...


@overload
def widen(
    model: M,
    example_inputs: tuple[Any, ...] | dict[str, Any],
    units: Mapping[str, int],
    *,
    optimizer: torch.optim.Optimizer | None = ...,
    seed: int = ...,
    into: Literal["module"],
) -> M: ...


@checked_arguments(CaptureError, units=PER_WIDTH)
@own_modes()
@memory_errors()
def widen(
    model: nn.Module,
    example_inputs: tuple[Any, ...] | dict[str, Any],
    units: Mapping[str, int],
    *,
    optimizer: torch.optim.Optimizer | None = None,
    seed: int = 0,
    into: Literal["graph", "module"] = "graph",
) -> nn.Module:
    """Adds units without data; the network computes exactly the same function.

    New rows of producers are random (Kaiming), new columns of consumers zero, followers the identity.

    Args:
        model: any module that `fxgrow.capture` can read.
        example_inputs: a tuple of positional or a dict of keyword inputs.
        units: units to add per width, multiples of the width's step.
        optimizer: re-pointed to the new parameters, its state kept.
        seed: of the random rows.
        into: `graph` for a GraphModule, `module` for a copy of the model itself; see `grow`.

    Returns:
        The wider network.

    Raises:
        PlanError: a width is unknown or pinned, the units do not fit its step, or the model's code does not allow
            `into="module"`.
        RewriteError: the outputs are not the same; nothing is returned.

    Example:
        >>> import torch, fxgrow
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.ReLU(), torch.nn.Linear(3, 2))
        >>> x = torch.randn(5, 4)
        >>> torch.allclose(fxgrow.widen(net, (x,), {"0": 8})(x), net(x))
        True
    """
    check_into(into, model)
    model = getattr(model, "_orig_mod", model)  # without torch.compile
    if optimizer is not None:
        check_owner(optimizer, model)
    gm = capture(model, example_inputs)
    grown, index = rewrite(gm, units, generator=torch.Generator().manual_seed(seed))
    check_function(gm, grown, gm.meta[EXAMPLE_INPUTS])
    out = into_module(model, example_inputs, gm, grown) if into == "module" else grown
    record(out, gm, grown, units, "widen")
    if optimizer is not None:
        repoint(optimizer, model, out, index)
    return out
