"""The same networks through Torch-Pruning at 20 %, used as its README has it (`pip install torch-pruning`).

Fang et al. 2023, "DepGraph: Towards Any Structural Pruning". It removes channels where fxgrow adds them; both must find
which layers change together.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from benchmarks.coverage.subjects import Subject

RATIO = 0.2
_LAYERS = (nn.Linear, nn.modules.conv._ConvNd)


def prune(subject: Subject) -> Iterator[dict[str, Any]]:
    """Yields whether its graph builds, whether the pruned network runs, and the share of layers it made narrower."""
    import torch_pruning as tp

    model, example = subject.model.eval(), subject.inputs(2, 0)
    before = {name: _outputs(m) for name, m in model.named_modules() if isinstance(m, _LAYERS)}
    ignored = [m for m in model.modules() if isinstance(m, _LAYERS) and _outputs(m) == subject.targets]
    heads = {m.qkv: m.num_heads for m in model.modules() if hasattr(m, "qkv") and hasattr(m, "num_heads")}
    try:
        pruner = tp.pruner.BasePruner(
            model,
            example[0] if isinstance(example, tuple) else example,
            importance=tp.importance.MagnitudeImportance(p=2),
            pruning_ratio=RATIO,
            ignored_layers=ignored,
            num_heads=heads,
        )
        pruner.step()
        for m in model.modules():
            if hasattr(m, "qkv") and m.qkv in pruner.num_heads:
                m.num_heads = pruner.num_heads[m.qkv]
                m.head_dim = m.qkv.out_features // (3 * m.num_heads)
    except Exception as error:  # whatever goes wrong inside it
        yield {"builds": False, "runs": False, "error": f"{type(error).__name__}: {error}"[:300]}
        return
    yield {"builds": True, "runs": False}
    after = {name: _outputs(m) for name, m in model.named_modules() if isinstance(m, _LAYERS)}
    narrower = sum(after[name] < n for name, n in before.items() if name in after)
    inner = max(1, len(before) - len(ignored))
    try:
        with torch.no_grad():
            model(*example)
    except Exception as error:
        yield {"error": f"{type(error).__name__}: {error}"[:300], "narrower": narrower / inner}
        return
    yield {"runs": True, "narrower": narrower / inner}


def _outputs(layer: nn.Module) -> int:
    return int(layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels)
