"""Ideas for the residual stream: who writes a new coordinate, and who reads it."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from benchmarks._ideas import OUTPUT_RIDGE, Key, Outcome, Ray, Trial, Watch, _root, along
from benchmarks.widths import Batches, evaluate
from fxgrow.graph.graph import lookup

#: root mean square of what new units carry, relative to the stream's
SIZE = 0.1
#: what is read where: reader -> its norm
READERS = {"q": "norm1", "k": "norm1", "v": "norm1", "gate": "norm2", "up": "norm2"}
#: relative ridge on the stacked inputs of the writers
INPUT_RIDGE = 1.0


class Stream:
    """N = E[b (V / rms)^T] from the stacked inputs b of all writers to all readers, S = E[b b^T], G per reader.

    A writer that comes after a reader adds nothing to it.
    """

    def __init__(self, trial: Trial) -> None:
        (self.name,) = trial.units
        depth = len(trial.net.blocks)
        inside = [f"blocks.{i}.{m}" for i in range(depth) for m in ("attention.o", "mlp.down")]
        self.writers = ["tokens", *inside]
        places = {"q": "attention", "k": "attention", "v": "attention", "gate": "mlp", "up": "mlp"}
        readers = {
            f"blocks.{i}.{places[r]}.{r}": (f"blocks.{i}.{norm}", 1 + 2 * i + (norm == "norm2"))
            for i in range(depth)
            for r, norm in READERS.items()
        }
        #: reader -> its norm, and how many writers come before it
        self.readers = readers | {"head": ("norm", len(self.writers))}
        norms = {norm for norm, _ in self.readers.values()}
        self.watch = Watch(trial.net, [*inside, "tokens", *self.readers, *norms])
        self.vocabulary = trial.net.tokens.num_embeddings
        self.s: Tensor | float = 0.0
        self.n: dict[str, Tensor] = {}
        self.g: dict[str, Tensor] = {}
        self.squares = dict.fromkeys(norms, 0.0)
        self.count = 0
        self.watch.run(trial.fit, self._read)
        #: where each writer's inputs stand in b
        sizes = [self.vocabulary] + [trial.net.get_parameter(f"{w}.weight").shape[1] for w in inside]
        ends = torch.tensor(sizes).cumsum(0).tolist()
        self.spans = dict(zip(self.writers, zip([0, *ends], ends, strict=False), strict=True))

    def _read(self) -> None:
        tokens = self.watch.inputs["tokens"][0].flatten()
        parts = [torch.nn.functional.one_hot(tokens, self.vocabulary).float()]
        parts += [self.watch.inputs[w][0].flatten(0, 1) for w in self.writers[1:]]
        b, ends = torch.cat(parts, 1), torch.tensor([p.shape[1] for p in parts]).cumsum(0).tolist()
        self.s = self.s + b.mT @ b
        self.count += len(b)
        for norm in self.squares:
            self.squares[norm] += float(self.watch.inputs[norm][0].square().mean()) * len(b)
        for reader, (norm, before) in self.readers.items():
            x, v = self.watch.inputs[norm][0].flatten(0, 1), self.watch.v[reader]
            scaled = v / (x.square().mean(1, keepdim=True) + 1e-5).sqrt()
            moment = b.mT @ scaled
            moment[ends[before - 1] :] = 0
            self.n[reader] = self.n.get(reader, 0) + moment
            self.g[reader] = self.g.get(reader, 0) + v.mT @ v

    def directions(self, k: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Per writer `[k, P]` with mean square 1 together, per reader `[O, k]`: the SVD whitened on both sides."""
        s = torch.as_tensor(self.s).double() / self.count
        roots = {r: _root(g.double() / self.count, OUTPUT_RIDGE) for r, g in self.g.items()}
        white = torch.cat([self.n[r].double() / self.count @ roots[r] for r in self.readers], 1)
        root = _root(s, INPUT_RIDGE)
        u, _, vt = torch.linalg.svd(root @ white, full_matrices=False)
        alpha = root @ u[:, :k]
        alpha = alpha / (alpha * (s @ alpha)).sum(0).sqrt()
        parts = vt[:k].split([len(g) for g in self.g.values()], 1)
        omega = {r: roots[r] @ part.mT for r, part in zip(self.readers, parts, strict=True)}
        return {w: alpha[a:b].mT for w, (a, b) in self.spans.items()}, omega

    def normalised(self, alpha: dict[str, Tensor]) -> dict[str, Tensor]:
        """Rows scaled so that no norm sees more of a unit than `SIZE` of its input's root mean square."""
        stacked = torch.cat(list(alpha.values()), 1).double()
        s = torch.as_tensor(self.s).double() / self.count
        scales = []
        for norm, before in set(self.readers.values()):
            seen = stacked.clone()
            seen[:, self.spans[self.writers[before - 1]][1] :] = 0
            own = (seen @ s * seen).sum(1, keepdim=True).sqrt()
            scales.append(SIZE * math.sqrt(self.squares[norm] / self.count) / own.clamp_min(1e-12))
        scale = torch.stack(scales).amin(0)
        return {w: rows * scale for w, rows in alpha.items()}

    def writer_keys(self) -> dict[str, Key]:
        """An embedding is stored [tokens, units], the others [units, inputs]."""
        return {w: (f"{w}.weight", self.name, 1 if w == "tokens" else 0) for w in self.writers}


def exact_svd(trial: Trial, test: Batches) -> Outcome:
    """Writers zero, readers' new columns the right singular vectors, as long as the old columns are on average.

    Nothing changes at once; what the writers then learn first is what the loss asks for most (GradMax for the stream).
    """
    stream, ray = Stream(trial), Ray(trial)
    _, omega = stream.directions(trial.units[stream.name])
    old = torch.cat([trial.net.get_parameter(f"{r}.weight").detach() for r in stream.readers])
    new = torch.cat(list(omega.values()))
    for r, columns in omega.items():
        ray.put((f"{r}.weight", stream.name, 1), columns * old.norm(dim=0).mean() / new.norm(dim=0))
    return ray.graph, ray.index, math.nan, evaluate(ray.graph, test)


def isometric(trial: Trial, test: Batches) -> Outcome:
    """Randomly drawn coordinates are split in two of equal signal; readers' columns differ by random ones.

    x becomes (x, x) / sqrt(2), which keeps the norm, and w x becomes (w / sqrt(2) - r) x + (w / sqrt(2) + r) x: exact.
    """
    stream, ray = Stream(trial), Ray(trial)
    size = trial.net.tokens.embedding_dim
    chosen = torch.randperm(size, generator=trial.generator)[: trial.units[stream.name]]
    half = math.sqrt(0.5)
    with torch.no_grad():
        for key in stream.writer_keys().values():
            p = lookup(ray.graph, key[0])
            rows = p.index_select(key[2], ray.index[key[0]][key[2]][chosen]) * half
            p.index_copy_(key[2], ray.index[key[0]][key[2]][chosen], rows)
            ray.put(key, rows)
        for reader, (norm, _) in stream.readers.items():
            p = lookup(ray.graph, f"{reader}.weight")
            old = p.index_select(1, chosen) * half
            drawn = ray.get((f"{reader}.weight", stream.name, 1))
            p.index_copy_(1, chosen, old - drawn)
            ray.put((f"{reader}.weight", stream.name, 1), old + drawn)
            ray.put((f"{norm}.weight", stream.name, 0), lookup(ray.graph, f"{norm}.weight")[chosen])
    return ray.graph, ray.index, math.nan, evaluate(ray.graph, test)


def stream_svd(trial: Trial, test: Batches, directions: bool, share: float = 0.25) -> Outcome:
    """Small signals, random ones or the left singular vectors; readers' columns by `newton`.

    New information changes the norm, so this start is exact only up to the square of `SIZE`.
    """
    stream, ray = Stream(trial), Ray(trial)
    k = trial.units[stream.name]
    alpha = stream.directions(k)[0]
    if not directions:
        alpha = {w: torch.randn(rows.shape, generator=trial.generator) for w, rows in alpha.items()}
    alpha = stream.normalised(alpha)
    for writer, key in stream.writer_keys().items():
        rows = alpha[writer]
        ray.put(key, rows.mT.contiguous() if key[2] == 1 else rows)
    for key in trial.outgoing():
        ray.put(key, 0.0)
    return along(ray, trial, test, share)
