"""A character-level GPT whose stream, heads and perceptrons grow while it trains, beside the same net never grown.

FXGROW_DATA=... python -m examples.grow_gpt     (tiny Shakespeare; without the variable Python's own manual)

  step  parameters  held-out  grew
   200       9,184    2.5083
   400      18,384    2.3570  tokens +8, blocks.0.attention.qkv +24, blocks.0.mlp.0 +32, ...
   600      18,384    2.2301
   800      30,656    2.1179  tokens +8, blocks.0.attention.qkv +24, blocks.0.mlp.0 +32, ...
 1,000      30,656    2.0550
 1,200      46,000    1.9985  tokens +8, blocks.0.attention.qkv +24, blocks.0.mlp.0 +32, ...
 1,400      46,000    1.9707
 1,600      46,000    1.9430
 1,800      46,000    1.9189
 2,000      46,000    1.8958
 2,200      46,000    1.8826
 2,400      46,000    1.8796

growing took 3.2 of 41.2 CPU seconds: 7.8%

the same net, never grown
   200       9,184    2.5083
   400       9,184    2.3702
   600       9,184    2.2906
   800       9,184    2.2295
 1,000       9,184    2.1786
 1,200       9,184    2.1560
 1,400       9,184    2.1337
 1,600       9,184    2.1138
 1,800       9,184    2.1004
 2,000       9,184    2.0919
 2,200       9,184    2.0885
 2,400       9,184    2.0848

held-out loss 1.8796 with 46,000 parameters in 41 CPU seconds, 2.0848 with 9,184 in 34
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from examples.data import text
from examples.growing import Pace, Task, compare
from models import GPT

CONTEXT, BATCH, DEPTH, WIDTH = 32, 32, 2, 0.25  # a stream of 16, heads of 4, perceptrons of 64


def task(context: int = CONTEXT, batch: int = BATCH, depth: int = DEPTH) -> Task:
    """Pieces of the first nine tenths of the text; the held-out loss is of pieces of the last tenth, in nats."""
    train, held, alphabet = text()

    def pieces(tokens: Tensor, starts: Tensor) -> tuple[Tensor, Tensor]:
        rows = tokens[starts[:, None] + torch.arange(context + 1)]
        return rows[:, :-1], rows[:, 1:]

    def drawn(order: torch.Generator) -> tuple[Tensor, Tensor]:
        return pieces(train, torch.randint(len(train) - context, (batch,), generator=order))

    last = torch.arange(0, len(held) - context, context)[:2048]
    return Task(
        build=lambda: GPT(len(alphabet), context, depth=depth, heads=4, width=WIDTH),
        batch=drawn,
        held=[pieces(held, starts) for starts in last.split(256)],
        loss=lambda logits, targets: F.cross_entropy(logits.flatten(0, 1), targets.flatten()),
    )


def units(depth: int = DEPTH) -> dict[str, int]:
    """At each growth: 8 more in the stream, 2 in each of 4 heads (of q, k and v), 32 in each perceptron."""
    heads = {f"blocks.{i}.attention.qkv": 24 for i in range(depth)}
    return {"tokens": 8, **heads, **{f"blocks.{i}.mlp.0": 32 for i in range(depth)}}


if __name__ == "__main__":
    torch.set_num_threads(1)
    compare(task(), Pace(steps=2400, every=400, growths=3, units=units(), batches=8, rate=3e-3))
