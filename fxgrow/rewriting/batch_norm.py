"""What happens to the channels of a BatchNorm when a network grows: new ones, and the statistics of old ones.

- *Added without data* they are the identity on constants: the defaults of `rewrite` (weight and variance are filled
  like any follower's).
- *Candidates* put out what they get (`IdentityBatchNorm`): train and eval mode agree from the first step.
- *Along gamma* (`RunningStatistics`) what growth adds to the input of an old norm shifts its mean and variance.
  Training normalises that away at once; in eval mode the running statistics would lag until training has moved them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fxgrow.data.batches import Batch
from fxgrow.distributed import SINGLE_PROCESS, ProcessGroup
from fxgrow.graph.conditional import ConditionalInterpreter
from fxgrow.graph.evaluate import eval_mode
from fxgrow.graph.graph import accumulation_dtype
from fxgrow.rewriting.size_change import NewIndices

#: mean and variance of what enters a norm, per channel, averaged over batches
Moments = tuple[Tensor, Tensor]


def has_batch_norm(model: nn.Module) -> bool:
    """Whether new channels may go through a BatchNorm, which then is set on what enters it."""
    return any(isinstance(m, _BatchNorm) for m in model.modules())


def can_be_identity(module: nn.Module | None) -> bool:
    """Whether this is a BatchNorm whose new channels can put out what they get: it has statistics and an affine map."""
    return isinstance(module, _BatchNorm) and module.running_mean is not None and module.weight is not None


class IdentityBatchNorm(ConditionalInterpreter):
    """Sets new BatchNorm channels so that they put out what they get: in eval mode exactly, in train mode nearly.

    running_mean and running_var become those of the channel's input, weight = sqrt(var + eps), bias = mean.
    """

    def __init__(self, gm: fx.GraphModule, new_indices: NewIndices) -> None:
        super().__init__(gm)
        #: new channels of each norm that has statistics and an affine map
        self.channels = {
            name: torch.cat(list(new_indices[f"{name}.weight"].values())).to(m.weight.device)
            for name, m in gm.named_modules()
            if isinstance(m, _BatchNorm) and m.running_mean is not None and f"{name}.weight" in new_indices
        }

    def call_module(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        channels = self.channels.get(target)
        if channels is not None:
            module = self.fetch_attr(target)
            x = args[0].index_select(1, channels).transpose(0, 1).flatten(1)
            x = x.to(accumulation_dtype(x))
            mean, var = x.mean(1), x.var(1, unbiased=False)
            module.running_mean[channels] = mean.to(module.running_mean)
            module.running_var[channels] = var.to(module.running_var)
            module.weight[channels] = (var + module.eps).sqrt().to(module.weight)
            module.bias[channels] = mean.to(module.bias)
        return super().call_module(target, args, kwargs)


def norms_of(gm: nn.Module) -> dict[str, _BatchNorm]:
    """Norms that training would feed with batch statistics; a frozen one keeps its own."""
    return {
        name: m
        for name, m in gm.named_modules()
        if isinstance(m, _BatchNorm)
        and m.running_mean is not None
        and m.track_running_stats
        and (m.weight is None or m.weight.requires_grad)
    }


def moments(x: Tensor) -> Moments:
    """Of what enters a norm in one batch, `[n, channels, ...]`."""
    rows = x.transpose(0, 1).flatten(1)
    rows = rows if rows.dtype == torch.float64 else rows.float()
    return rows.mean(1), rows.var(1)


def average(pairs: Sequence[Moments], process_group: ProcessGroup = SINGLE_PROCESS) -> Moments:
    """The mean over the batches of all processes."""
    mean, var = (torch.stack(each).sum(0) for each in zip(*pairs, strict=True))
    process_group.sum_([mean, var])
    (count,) = process_group.sum_numbers(len(pairs))
    return mean / count, var / count


class RunningStatistics:
    """The norms of a graph that moves along gamma.

    Attributes:
        live: norms see batch statistics in training. A batch of one sample has none: where there is one, norms keep
            their running ones.
    """

    def __init__(
        self, gm: fx.GraphModule, batches: Sequence[Batch], process_group: ProcessGroup = SINGLE_PROCESS
    ) -> None:
        self.graph, self.process_group = gm, process_group
        self.norms = norms_of(gm)
        self.live = bool(self.norms) and not process_group.sum_numbers(any(b.size == 1 for b in batches))[0]
        self._running = {name: (_buffers(m)[0].clone(), _buffers(m)[1].clone()) for name, m in self.norms.items()}

    @contextlib.contextmanager
    def batch_statistics(self) -> Iterator[dict[str, Moments]]:
        """Eval mode, but norms use the statistics of each batch and leave their running ones alone.

        The dictionary holds these statistics when the block ends.
        """
        seen: dict[str, list[Moments]] = {}
        found: dict[str, Moments] = {}

        def see(name: str, x: Tensor) -> None:
            seen.setdefault(name, []).append(moments(x))

        with eval_mode(self.graph):
            norms = self.norms if self.live else {}
            hooks = [
                m.register_forward_pre_hook(lambda _, args, name=name: see(name, args[0])) for name, m in norms.items()
            ]
            try:
                for m in norms.values():
                    m.training, m.track_running_stats = True, False
                yield found
            finally:
                for m in norms.values():
                    m.track_running_stats = True
                for hook in hooks:
                    hook.remove()
        for name, pairs in seen.items():
            found[name] = average(pairs, self.process_group)

    def follow(self, start: Mapping[str, Moments], now: Mapping[str, Moments]) -> None:
        """Moves running statistics as batch statistics moved from `start` to `now`."""
        for name, (mean, var) in now.items():
            (old_mean, old_var), (base_mean, base_var) = start[name], self._running[name]
            running_mean, running_var = _buffers(self.norms[name])
            running_mean.copy_(base_mean + (mean - old_mean))
            running_var.copy_(base_var * torch.where(old_var > 0, var / old_var, 1.0))

    def shifts(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Per buffer that has moved: where it is now, and by how much."""
        out = {}
        for name, m in self.norms.items():
            for key, buffer, base in zip(
                ("running_mean", "running_var"), _buffers(m), self._running[name], strict=True
            ):
                if not torch.equal(buffer, base):
                    out[f"{name}.{key}"] = buffer, buffer - base
        return out


def _buffers(m: _BatchNorm) -> tuple[Tensor, Tensor]:
    return cast(Tensor, m.running_mean), cast(Tensor, m.running_var)
