"""One growth of a model in training: the model in its wrappers, and all that holds its parameters."""

from __future__ import annotations

from torch import nn

from fxgrow.distributed import ProcessGroup
from fxgrow.graph.evaluate import own_modes
from fxgrow.pipeline.grow import grown_copy
from fxgrow.pipeline.growth_record import GrowthResult, keep_record
from fxgrow.pipeline.options import GrowOptions
from fxgrow.training.data_source import Source, beside_training
from fxgrow.transfer.device_mesh import sharded_modules
from fxgrow.transfer.fsdp import UnshardedModel
from fxgrow.transfer.parameter_change import ParameterChange
from fxgrow.transfer.stale_model import watch
from fxgrow.transfer.transfer import TrainingState
from fxgrow.transfer.wrappers import unwrapped


@own_modes()
def grow_with_state(
    model: nn.Module, state: TrainingState, source: Source, options: GrowOptions, process_group: ProcessGroup
) -> tuple[nn.Module, nn.Module, GrowthResult[nn.Module]]:
    """Grows a model on all processes that train it, and changes what holds its parameters.

    Returns:
        The model to train from here on, wrapped as the old one (the old one itself where nothing was added); the old
        model without wrappers and shards; and the result of the growth.

    Raises:
        FxgrowError: the growth failed; nothing has changed.
    """
    inside, wrap = unwrapped(model)
    unsharded = UnshardedModel(inside) if sharded_modules(inside) else None
    old = inside if unsharded is None else unsharded.model
    result = grown_copy(old, beside_training(source), options, process_group)
    if not result.record.plan.units:
        return model, old, result
    change = ParameterChange(old, result.model, result.index)
    with process_group.session():
        assign = state.prepare(change) if unsharded is None else unsharded.prepare(state, change)
    if unsharded is None:
        grown = wrap(result.model)
        assign()
        watch(old, result.model, result.record, moved=True)
    else:
        assign()  # shards the model, which comes before its wrappers
        grown = wrap(result.model)
    keep_record(result.model, result.record)
    return grown, old, result
