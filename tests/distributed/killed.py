"""The example of growth under torchrun, of which one process is killed in the middle of the second growth, once.

torchrun --standalone --nproc-per-node 2 --max-restarts 1 -m tests.distributed.killed <checkpoint> <result> <whether
to kill>
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

import fxgrow
from examples.grow_ddp import train

calls = 0
growths = 0


def deadly(output: Tensor, target: Tensor) -> Tensor:
    """The loss as growth asks for it."""
    global calls
    first_life = os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"
    if growths == 1 and first_life and dist.get_rank() == 1 and sys.argv[3] == "kill":
        calls += 1
        if calls == 5:
            os.kill(os.getpid(), signal.SIGKILL)
    return F.cross_entropy(output, target)


def watched(self: fxgrow.Grower, *args: Any) -> bool:
    global growths
    growths = self.history.growths
    return epoch_end(self, *args)


if __name__ == "__main__":
    epoch_end, fxgrow.Grower.epoch_end = fxgrow.Grower.epoch_end, watched
    dist.init_process_group("gloo")
    model, loss = train(Path(sys.argv[1]), epochs=6, loss_fn=deadly)
    if dist.get_rank() == 0:
        shapes = {name: list(t.shape) for name, t in model.state_dict().items()}
        lives = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
        Path(sys.argv[2]).write_text(json.dumps({"loss": loss, "shapes": shapes, "restarts": lives}))
    dist.destroy_process_group()
