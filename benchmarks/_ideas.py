"""Tools of `benchmarks.ideas`: moments of the decoder's own modules, directions, and a refit on the true curvature.

They know the decoder, not the library's graphs: what an idea is worth is asked here before it is written for any model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.func import functional_call, jvp, vjp
from torch.nn.attention import SDPBackend, sdpa_kernel

import fxgrow
from benchmarks.widths import Batches, evaluate, loss_of
from fxgrow.analysis.analyse import analyse
from fxgrow.analysis.widths import hidden
from fxgrow.candidates.refit import run_refit
from fxgrow.candidates.widened import candidates
from fxgrow.data.batches import Data
from fxgrow.graph.graph import lookup
from fxgrow.initialisers import Proposal
from fxgrow.pipeline.fill_plan import fill_plan
from fxgrow.pipeline.gauss_newton import conjugate_gradients
from fxgrow.pipeline.line_search import GammaLine, held_batches, search
from fxgrow.rewriting.axis_growth import places
from fxgrow.rewriting.batch_norm import RunningStatistics
from fxgrow.rewriting.plan import Plan
from fxgrow.rewriting.rewrite import rewrite
from models import Decoder
from models.decoder import _rotated

#: relative ridges on the inputs' and the output side's second moments
INPUT_RIDGE, OUTPUT_RIDGE = 0.1, 0.1
#: part of its diagonal that is added to the second moment of the units that exist
DEFLATION_RIDGE = 0.1
#: rows per batch that second moments are made from
ROWS = 256
#: batches that the curvature is taken from, as in `fxgrow.pipeline.gauss_newton`
CURVATURE_BATCHES = 6

#: new entries of a parameter: its name, the width and the dimension
Key = tuple[str, str, int]
Index = dict[str, tuple[Tensor | None, ...]]
#: a grown graph, the index of its old entries, gamma
Grown = tuple[fx.GraphModule, Index, float]
#: the same, and the held-out loss at the whole of the best gamma
Outcome = tuple[fx.GraphModule, Index, float, float]


class Trial:
    """One checkpoint and what is asked of it."""

    def __init__(self, net: Decoder, profiled: Batches, units: dict[str, int], seed: int) -> None:
        self.net, self.units, self.seed = net, units, seed
        self.gm = fxgrow.capture(net, (profiled[0][0],))
        self.structure = analyse(self.gm)
        self.widths = {h.width.name: h for h in hidden(self.structure) if h.width.name in units}
        self.data = Data(profiled)
        self.fit: Batches = [(b.inputs[0], b.targets) for b in self.data.fitting()]
        self.held = held_batches(self.data)
        self.generator = torch.Generator().manual_seed(seed)

    def outgoing(self) -> list[Key]:
        """Entries of consumers that read the new units."""
        keys = [(p.weight, name, p.in_dim) for name, h in self.widths.items() for p in h.reads]
        return list(dict.fromkeys(keys))

    def refitted(self, alpha: dict[str, dict[str, Tensor]], share: float = 0.25) -> tuple[GammaLine, float]:
        """Units with these incoming weights, per width and producer, and the library's refit and line search."""
        proposals = {name: Proposal({w: rows.float() for w, rows in alpha[name].items()}) for name in self.units}
        options = {"units": self.units, "widths": list(self.units), "progress": False}
        base = fxgrow.profile(self.gm, self.data.loader, loss_of, method="random-refit", **options)
        found = candidates(self.gm, self.structure, proposals, self.units, [], self.generator)
        refit = run_refit(found, self.data, loss_of, self.generator)
        profile = replace(base, proposals=proposals, found=found, refit=refit)
        plan = fill_plan(profile, self.structure, dict(self.units), False, (0, 0))
        line = GammaLine(self.gm, plan, self.held)
        return line, search(line, loss_of, share, follow=False).applied


class Ray(GammaLine):
    """A widened graph that moves along new entries; at gamma = 0 it computes what it did before.

    A plan cannot say everything that is tried here: a compensated width's writers stay zero in it.
    """

    def __init__(self, trial: Trial) -> None:
        generator = torch.Generator().manual_seed(trial.seed)
        self.graph, self.index = rewrite(trial.gm, trial.units, generator=generator)
        self.where = places(trial.structure, trial.units)
        self.batches, self.plan, self.steps = trial.held, Plan({}), []
        self.norms = RunningStatistics(self.graph, self.batches)

    def at(self, key: Key) -> tuple[nn.Parameter, Tensor]:
        """The parameter and the positions of a key's entries."""
        return lookup(self.graph, key[0]), self.where[key[0]][key[1], key[2]]

    def get(self, key: Key) -> Tensor:
        p, positions = self.at(key)
        return p.detach().index_select(key[2], positions)

    def put(self, key: Key, entries: Tensor | float) -> None:
        p, positions = self.at(key)
        with torch.no_grad():
            if isinstance(entries, float):
                p.index_fill_(key[2], positions, entries)
            else:
                p.index_copy_(key[2], positions, entries.to(p).reshape(self.get(key).shape))

    def aim(self, step: dict[Key, Tensor]) -> None:
        """Moves along these entries from here on."""
        whole: dict[str, Tensor] = {}
        for key, entries in step.items():
            p, positions = self.at(key)
            whole[key[0]] = whole.get(key[0], torch.zeros_like(p)).index_add(key[2], positions, entries.to(p))
        self.steps = [
            (p, p.detach().clone(), whole[name], torch.zeros_like(p))
            for name, p in self.graph.named_parameters()
            if name in whole
        ]

    def search(self, share: float) -> Grown:
        found = search(self, loss_of, share, follow=False)
        self.move(found.applied)
        return self.graph, self.index, found.applied


def along(ray: Ray, trial: Trial, test: Batches, share: float) -> Outcome:
    """Outgoing weights of the units in `ray` by `newton`, and the line search."""
    ray.aim(newton(ray, trial.outgoing(), trial.fit))
    graph, index, gamma = ray.search(share)
    best = evaluate(ray.move(gamma / share), test)
    ray.move(gamma)
    return graph, index, gamma, best


def newton(ray: Ray, keys: Sequence[Key], batches: Batches) -> dict[Key, Tensor]:
    """`fxgrow.pipeline.gauss_newton` for a graph that no plan describes, with exact products of the curvature."""
    base = {n: p.detach() for n, p in ray.graph.named_parameters()}
    zero = tuple(torch.zeros_like(ray.get(key)) for key in keys)

    def logits(x: Tensor) -> Callable[..., Tensor]:
        def run(*entries: Tensor) -> Tensor:
            now = dict(base)
            for key, e in zip(keys, entries, strict=True):
                now[key[0]] = now[key[0]].index_add(key[2], ray.at(key)[1], e)
            out: Tensor = functional_call(ray.graph, now, (x,))
            return out

        return run

    def slope() -> list[Tensor]:
        out = [torch.zeros_like(z) for z in zero]
        for x, y in batches:
            entries = [z.clone().requires_grad_() for z in zero]
            for s, g in zip(out, torch.autograd.grad(loss_of(logits(x)(*entries), y), entries), strict=True):
                s.sub_(g, alpha=1 / len(batches))
        return out

    few = batches[:: max(1, len(batches) // CURVATURE_BATCHES)][:CURVATURE_BATCHES]

    def curvature(v: list[Tensor]) -> list[Tensor]:
        out = [torch.zeros_like(z) for z in zero]
        for x, _ in few:
            y, u = jvp(logits(x), zero, tuple(v))
            p = y.softmax(-1)
            pulled = (p * u - p * (p * u).sum(-1, keepdim=True)) / p[..., 0].numel()
            for s, g in zip(out, vjp(logits(x), *zero)[1](pulled), strict=True):
                s.add_(g, alpha=1 / len(few))
        return out

    # scaled dot products have no forward derivative but as plain mathematics
    with sdpa_kernel(SDPBackend.MATH):
        found = conjugate_gradients(slope(), curvature)
    return dict(zip(keys, zero if found is None else found, strict=True))


@dataclass
class Features:
    """Features b of several blocks (heads, gates) that one consumer reads, each unit linear in those of its block.

    Attributes:
        n: E[b V^T], `[blocks, P, O]`, over all positions.
        g: E[V V^T], `[O, O]`.
        rows: sampled b of a block, `[m, P]`.
    """

    n: Tensor
    g: Tensor
    rows: Callable[[int], Tensor]


def per_block(f: Features, k: int) -> Tensor:
    """The k best directions of every block for itself, `[blocks, k, P]`: the SVD of (S + eps)^-1/2 N (G + eps)^-1/2."""
    return torch.stack([_best(_second(f.rows(j)), f.n[j] @ _root(f.g, OUTPUT_RIDGE), k)[0] for j in range(len(f.n))])


def together(f: Features, k: int, keep: int | None = None, sweeps: int = 2) -> tuple[Tensor, list[int]]:
    """Directions of all blocks, each block's found given those of the others, `[kept, k, P]`, and the blocks kept.

    Heads read alike, so their best directions ask for the same of the loss: taken one by one they are counted several
    times over. Here the units of the other blocks are projected out of b and V (block coordinate ascent on the
    reduced-rank regression of V on all units). With `keep`, the blocks of the largest values are kept after one sweep.
    """
    n = f.n @ _root(f.g, OUTPUT_RIDGE)
    blocks = list(range(len(n)))
    alpha: dict[int, Tensor] = {}
    z: dict[int, Tensor] = {}
    for sweep in range(sweeps):
        worth = {}
        for j in blocks:
            b, own = f.rows(j), n[j]
            second = _second(b)
            ridge = INPUT_RIDGE * float(second.diagonal().mean())
            others = [i for i in blocks if i != j and i in alpha]
            if others:
                put_out = torch.cat([z[i] for i in others], 1)
                mixed = put_out.mT @ b / len(b)
                inner = _second(put_out)
                inner.diagonal().mul_(1 + DEFLATION_RIDGE)
                asked = torch.cat([alpha[i] @ n[i] for i in others])
                solved = torch.linalg.solve(inner, torch.cat([mixed, asked], 1))
                second_left = second - mixed.mT @ solved[:, : len(second)]
                own = own - mixed.mT @ solved[:, len(second) :]
            else:
                second_left = second
            rows, worth[j] = _best(second_left, own, k, ridge)
            alpha[j] = rows / (rows @ second * rows).sum(1, keepdim=True).sqrt()
            z[j] = b @ alpha[j].mT
        if sweep == 0 and keep is not None:
            blocks = sorted(sorted(blocks, key=lambda j: -worth[j])[:keep])
            alpha, z = {j: alpha[j] for j in blocks}, {j: z[j] for j in blocks}
    return torch.stack([alpha[j] for j in blocks]), blocks


def _best(second: Tensor, white_n: Tensor, k: int, ridge: float | None = None) -> tuple[Tensor, float]:
    mean = float(second.diagonal().mean())
    root = _root((second + second.mT) / 2, INPUT_RIDGE if ridge is None else ridge / mean)
    u, values, _ = torch.linalg.svd(root @ white_n, full_matrices=False)
    rows = (root @ u[:, :k]).mT
    return rows / (rows @ second * rows).sum(1, keepdim=True).sqrt(), float(values[:k].square().sum())


def _second(rows: Tensor) -> Tensor:
    return rows.mT @ rows / len(rows)


def _root(a: Tensor, ridge: float) -> Tensor:
    """(A + eps)^-1/2, eps relative to the mean eigenvalue."""
    values, vectors = torch.linalg.eigh(a)
    values = values.clamp_min(0)
    return vectors @ ((values + ridge * values.mean()).rsqrt()[:, None] * vectors.mT)


class Watch:
    """What enters some modules, and V per position at the output of some, for every batch."""

    def __init__(self, net: nn.Module, names: Sequence[str]) -> None:
        self.inputs: dict[str, tuple[Tensor, ...]] = {}
        self.v: dict[str, Tensor] = {}
        self._hooks = [net.get_submodule(n).register_forward_hook(self._hook(n)) for n in names]
        self.net = net

    def _hook(self, name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def see(module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
            self.inputs[name] = args
            out.register_hook(lambda g: self.v.__setitem__(name, -g.flatten(0, 1) * g[..., 0].numel()))

        return see

    def run(self, batches: Batches, read: Callable[[], None]) -> None:
        for x, y in batches:
            loss_of(self.net(x), y).backward()
            self.net.zero_grad()
            with torch.no_grad():
                read()
        for hook in self._hooks:
            hook.remove()


def value_features(trial: Trial) -> dict[str, Features]:
    """b(t) = sum_s A(t, s) x(s) of every head, per width."""
    names = {name: name.removesuffix(".v") for name in trial.units}
    watch = Watch(trial.net, [n for a in names.values() for n in (a, f"{a}.o")])
    out: dict[str, _Sums] = {name: _Sums(trial.generator) for name in names}

    def read() -> None:
        for name, attention in names.items():
            module = trial.net.get_submodule(attention)
            x, cos, sin = watch.inputs[attention]
            q, k = (layer(x).unflatten(-1, module.shape).transpose(1, 2) for layer in (module.q, module.k))
            scores = _rotated(q, cos, sin) @ _rotated(k, cos, sin).mT / math.sqrt(q.shape[-1])
            future = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
            mixed = scores.masked_fill(future, -math.inf).softmax(-1) @ x[:, None]
            out[name].add(mixed.transpose(1, 2).flatten(0, 1), watch.v[f"{attention}.o"])

    watch.run(trial.fit, read)
    return {name: s.features() for name, s in out.items()}


def gate_features(trial: Trial, gates: dict[str, Tensor]) -> dict[str, Features]:
    """b = silu(g^T x) x for every given gate `[J, P]`, per width: a unit is linear in its row of the other factor."""
    layers = {name: name.removesuffix(".gate") for name in trial.units}
    watch = Watch(trial.net, [n for a in layers.values() for n in (f"{a}.gate", f"{a}.down")])
    out: dict[str, _Sums] = {name: _Sums(trial.generator) for name in layers}

    def read() -> None:
        for name, layer in layers.items():
            x = watch.inputs[f"{layer}.gate"][0].flatten(0, 1)
            b = F.silu(x @ gates[name].mT)[..., None] * x[:, None]
            out[name].add(b, watch.v[f"{layer}.down"])

    watch.run(trial.fit, read)
    return {name: s.features() for name, s in out.items()}


class _Sums:
    """Sums over batches of what `Features` holds."""

    def __init__(self, generator: torch.Generator) -> None:
        self.n: Tensor | float = 0.0
        self.g: Tensor | float = 0.0
        self.kept: list[Tensor] = []
        self.generator, self.count = generator, 0

    def add(self, b: Tensor, v: Tensor) -> None:
        """b `[n, blocks, P]`, V `[n, O]`."""
        self.n = self.n + (b.flatten(1).mT @ v).unflatten(0, b.shape[1:])
        self.g = self.g + v.mT @ v
        self.kept.append(b[torch.randperm(len(b), generator=self.generator)[:ROWS]])
        self.count += len(b)

    def features(self) -> Features:
        rows = torch.cat(self.kept)
        n, g = torch.as_tensor(self.n) / self.count, torch.as_tensor(self.g) / self.count
        return Features(n.double(), g.double(), lambda j: rows[:, j].double())
