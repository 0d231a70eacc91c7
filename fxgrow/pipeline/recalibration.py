"""Running statistics that lag behind the weights: then eval mode, in which everything is measured, is another network.

With a small momentum, or just after the weights have moved far, a BatchNorm's running statistics are those of earlier
weights. Activations vanish or explode in eval mode, and units that are fitted to them are of no use in training.
"""

from __future__ import annotations

from torch import fx, nn

from fxgrow.data.batches import Data, take
from fxgrow.data.loss import LossFn
from fxgrow.graph.graph import copy_graph
from fxgrow.pipeline.held_out import HeldOut
from fxgrow.rewriting.batch_norm import RunningStatistics, has_batch_norm

#: both modes are compared on so many samples, and running statistics measured on so many
COMPARED, MEASURED = 128, 1024
#: they lag where the loss in eval mode is higher by so many standard errors, and by such a part of it
ERRORS, PART = 4.0, 0.1


def recalibrated(gm: fx.GraphModule, data: Data, loss_fn: LossFn | None) -> tuple[fx.GraphModule, str | None]:
    """The graph with current running statistics, if its own lag, and what was found; it shares the parameters."""
    if not has_batch_norm(gm):
        return gm, None
    size = data.process_group.size
    few = HeldOut(list(take(data.fitting(), -(-COMPARED // size))), loss_fn, data.process_group)
    norms = RunningStatistics(gm, few.batches, data.process_group)
    if not norms.live:
        return gm, None
    with norms.batch_statistics():
        train = few.losses(gm)
    before = few.in_eval_mode(gm)
    lag, loss = few.difference(before, train), few.mean(train)
    if not lag.mean > max(ERRORS * lag.error, PART * abs(loss)):
        return gm, None
    batches = list(take((b for b in data.fitting() if b.size > 1), -(-MEASURED // size)))
    with norms.batch_statistics() as moments:
        HeldOut(batches, loss_fn, data.process_group).losses(gm)
    copy = copy_graph(gm, {id(p): p for p in gm.parameters()})
    for name, (mean, var) in moments.items():
        norm: nn.Module = copy.get_submodule(name)
        norm.running_mean.copy_(mean)  # type: ignore[operator]
        norm.running_var.copy_(var)  # type: ignore[operator]
    after = few.in_eval_mode(copy)
    if not few.difference(after, before).mean < 0:
        return gm, None
    old, new = few.mean(before), few.mean(after)
    return copy, (
        f"running statistics of BatchNorm lag behind the weights (loss {old:.4g} in eval mode, {loss:.4g} with batch "
        f"statistics): measured again on {sum(b.size for b in batches):,} samples (eval loss {new:.4g})"
    )
