"""BatchNorms in a network that grows. New channels without data are the identity on constants, as `rewrite` fills them.

Those of candidates are the identity on their input (`IdentityBatchNorm`). Along gamma the input of old norms shifts:
training normalises that away at once, and running statistics would lag (`RunningStatistics`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fxgrow.data.batches import Batch
from fxgrow.distributed import SINGLE_PROCESS, ProcessGroup
from fxgrow.graph.conditional import ConditionalInterpreter
from fxgrow.graph.evaluate import eval_mode
from fxgrow.graph.graph import accumulation_dtype, lookup
from fxgrow.graph.node_meta import OTHER_MODE
from fxgrow.rewriting.size_change import NewIndices

#: mean and variance of the input of a norm, per channel, averaged over batches
Moments = tuple[Tensor, Tensor]


def has_batch_norm(model: nn.Module) -> bool:
    """Whether new channels may go through a BatchNorm, which is then set for its input."""
    return any(isinstance(m, _BatchNorm) for m in model.modules())


def can_be_identity(module: nn.Module | None) -> bool:
    """Whether this is a BatchNorm whose new channels can be the identity: it has statistics and an affine map."""
    return isinstance(module, _BatchNorm) and module.running_mean is not None and module.weight is not None


class IdentityBatchNorm(ConditionalInterpreter):
    """Sets new BatchNorm channels to the identity on their input: in eval mode exactly, in train mode nearly."""

    def __init__(self, gm: fx.GraphModule, new_indices: NewIndices) -> None:
        super().__init__(gm)
        #: new channels of each norm that can be the identity
        self.channels = {
            name: torch.cat(list(new_indices[f"{name}.weight"].values())).to(lookup(m, "weight").device)
            for name, m in gm.named_modules()
            if can_be_identity(m) and f"{name}.weight" in new_indices
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


class RunningStatistics:
    """The BatchNorms of a graph that moves along gamma; frozen ones keep their running statistics."""

    def __init__(
        self, gm: fx.GraphModule, batches: Sequence[Batch], process_group: ProcessGroup = SINGLE_PROCESS
    ) -> None:
        self.graph, self.process_group = gm, process_group
        frozen = gm.meta.get(OTHER_MODE, {}).get(True, ())
        self.norms: dict[str, Any] = {
            name: m
            for name, m in gm.named_modules()
            if isinstance(m, _BatchNorm) and m.running_mean is not None and m.track_running_stats
            if name not in frozen and (m.weight is None or m.weight.requires_grad)
        }
        # a batch of one sample has no statistics
        self.live = bool(self.norms) and not process_group.sum_numbers(any(b.size == 1 for b in batches))[0]
        self._start = {name: (m.running_mean.clone(), m.running_var.clone()) for name, m in self.norms.items()}

    @contextlib.contextmanager
    def batch_statistics(self, training: bool = False) -> Iterator[dict[str, Moments]]:
        """Eval mode, or train mode, with the statistics of each batch, which the dictionary has when the block ends."""
        norms = self.norms if self.live else {}
        batches: dict[str, list[Moments]] = {}
        averages: dict[str, Moments] = {}

        def add(name: str, x: Tensor) -> None:
            rows = x.transpose(0, 1).flatten(1)
            rows = rows.to(accumulation_dtype(rows))
            batches.setdefault(name, []).append((rows.mean(1), rows.var(1)))

        with eval_mode(self.graph):
            hooks = [
                m.register_forward_pre_hook(lambda _, args, name=name: add(name, args[0])) for name, m in norms.items()
            ]
            try:
                self.graph.train(training)
                for m in self.graph.modules():
                    m.training &= not isinstance(m, _BatchNorm)
                for m in norms.values():
                    m.training, m.track_running_stats = True, False
                yield averages
            finally:
                for m in norms.values():
                    m.track_running_stats = True
                for hook in hooks:
                    hook.remove()
        for name, pairs in batches.items():
            mean, var = (torch.stack(parts).sum(0) for parts in zip(*pairs, strict=True))
            self.process_group.sum_([mean, var])
            (count,) = self.process_group.sum_numbers(len(pairs))
            averages[name] = mean / count, var / count

    def follow(self, start: Mapping[str, Moments], now: Mapping[str, Moments]) -> None:
        """Moves running statistics as batch statistics moved from `start` to `now`."""
        for name, (mean, var) in now.items():
            (old_mean, old_var), (running_mean, running_var) = start[name], self._start[name]
            self.norms[name].running_mean.copy_(running_mean + (mean - old_mean))
            self.norms[name].running_var.copy_(running_var * torch.where(old_var > 0, var / old_var, 1.0))

    def shifts(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Per buffer that has moved: where it is now, and by how much."""
        buffers = {
            f"{name}.{key}": (lookup(m, key), start)
            for name, m in self.norms.items()
            for key, start in zip(("running_mean", "running_var"), self._start[name], strict=True)
        }
        return {key: (now, now - start) for key, (now, start) in buffers.items() if not torch.equal(now, start)}
