"""What new units are worth at each kind of width of a small decoder or an LSTM, by initialiser, over paired seeds.

A two-layer character-level decoder (RMSNorm, rotary positions, SwiGLU) or a character-level LSTM is trained on
Shakespeare. One kind of width then grows (in both layers) by a quarter, with every method from the same checkpoint and
with the same line search, and all of it trains on with the same batches, the old Adam state and a rate that falls to
zero. The weights that exist are not moved by the growth unless `--update`: their move is most of the gain at once,
alike for all methods, and gone after some steps. Figures are held-out losses in nats per character, at once and after
further steps; differences are paired over seeds, with their standard error.

    FXGROW_DATA=... python -m benchmarks.width_kinds [--seeds 6] [--steps 300] [--further 200] [--only values heads ...]
"""

from __future__ import annotations

import copy
import statistics

import torch
from torch import Tensor, nn

import fxgrow
from benchmarks._command_line import command_line, markdown, paired, parse
from benchmarks._small_nets import Batches, loss_of, train
from examples.data import shakespeare
from models import Decoder

METHODS = ("random", "random-refit", "default")
#: the end of the names of the widths of each kind
KINDS = {"values": "attention.v", "heads": "attention.q", "gated": "mlp.gate", "stream": "tokens"}
#: those of the LSTM: its units, the output of a linear layer in front of it, and the embedding that it reads
RECURRENT = {"hidden": "lstm", "input": "input", "embedding": "tokens"}
KINDS |= RECURRENT
SHARE = 0.25
CONTEXT, BATCH, RATE = 64, 32, 2e-3

#: per method: the losses `now` and `after`, and what was added
Row = dict[str, dict[str, float]]


class CharacterLSTM(nn.Module):
    """Embedding, a linear layer with tanh (if there is one), an LSTM and a linear head."""

    def __init__(self, characters: int, with_input: bool) -> None:
        super().__init__()
        self.tokens = nn.Embedding(characters, 16)
        self.input = nn.Linear(16, 16) if with_input else None
        self.lstm, self.head = nn.LSTM(16, 32, batch_first=True), nn.Linear(32, characters)

    def forward(self, x: Tensor) -> Tensor:
        h = self.tokens(x)
        h = h if self.input is None else torch.tanh(self.input(h))
        return self.head(self.lstm(h)[0])


def draw(text: Tensor, count: int, generator: torch.Generator) -> Batches:
    """Batches of (characters, next characters) from random places."""
    out = []
    for _ in range(count):
        start = torch.randint(len(text) - CONTEXT - 1, (BATCH,), generator=generator)
        part = text[start[:, None] + torch.arange(CONTEXT + 1)]
        out.append((part[:, :-1], part[:, 1:]))
    return out


@torch.no_grad()
def evaluate(net: nn.Module, data: Batches) -> float:
    return statistics.mean(float(loss_of(net(x), y)) for x, y in data)


def one_seed(kind: str, seed: int, steps: int, further: int, update: bool) -> Row:
    train_text, test_text, characters = shakespeare()
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    net: nn.Module
    if kind in RECURRENT:
        net = CharacterLSTM(len(characters), with_input=kind == "input")
    else:
        net = Decoder(len(characters), CONTEXT, fixed_heads=kind == "values")
    optimizer = torch.optim.Adam(net.parameters(), RATE)
    train(net, optimizer, draw(train_text, steps, generator))
    state, profiled = optimizer.state_dict(), draw(train_text, 32, generator)
    continued, test = draw(train_text, further, generator), draw(test_text, 32, torch.Generator().manual_seed(99))
    every = fxgrow.widths(fxgrow.capture(net, (test[0][0],)))
    chosen = [w for w in every if w.pinned is None and w.name.endswith(KINDS[kind])]
    neurons = {w.name: max(1, round(SHARE * w.size / w.step)) * w.step for w in chosen}
    out: Row = {"ungrown": {"now": evaluate(net, test)}}
    for method in METHODS:
        twin = copy.deepcopy(net)
        own = torch.optim.Adam(twin.parameters(), RATE)
        own.load_state_dict(copy.deepcopy(state))
        options = {"neurons": neurons, "method": method, "seed": seed, "progress": False, "update_existing": update}
        grown = fxgrow.grow(twin, profiled, loss_fn=loss_of, optimizer=own, **options)
        plan = grown.meta["fxgrow"].plan
        row = {"now": evaluate(grown, test), "units": sum(plan.units.values()), "gamma": plan.scale}
        train(grown, own, continued, decay=True)
        row["after"] = evaluate(grown, test)
        out[method] = row
    return out


def default_minus(rows: list[Row], other: str, key: str) -> str:
    """Default minus another method in thousandths of a nat, with its standard error."""
    mean, error = paired([1e3 * r["default"][key] for r in rows], [1e3 * r[other][key] for r in rows])
    return f"{mean:+.2f} ± {error:.2f}"


def main() -> None:
    parser = command_line(__doc__, seeds=6, only=KINDS)
    parser.add_argument("--steps", type=int, default=300, help="before growth (default: 300)")
    parser.add_argument("--further", type=int, default=200, help="steps after growth (default: 200)")
    parser.add_argument("--update", action="store_true", help="also move the weights that exist")
    arguments = parse(parser)
    rows: dict[str, list[Row]] = {kind: [] for kind in arguments.only}
    for kind in arguments.only:
        for seed in arguments.seeds:
            row = one_seed(kind, seed, arguments.steps, arguments.further, arguments.update)
            rows[kind].append(row)
            parts = [f"{m} " + " ".join(f"{k} {v:.4f}" for k, v in r.items()) for m, r in row.items()]
            print(f"{kind}, seed {seed}: " + "; ".join(parts), flush=True)
    count = len(arguments.seeds)
    print(f"\nDefault minus the other, 10^-3 nats, {count} paired seeds (negative: the default is better)\n")
    pairs = [(key, other) for key in ("now", "after") for other in METHODS[:2]]
    lines = [[kind, *(default_minus(rows[kind], other, key) for key, other in pairs)] for kind in arguments.only]
    print(markdown(["width", *(f"{key}, {other}" for key, other in pairs)], lines))


if __name__ == "__main__":
    main()
