"""The statistics by a loop over samples: autograd per sample, unfolded by hand, pinv and a dense SVD.

Nothing of fxgrow is in here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass
class Case:
    """A model, its data, and one width: who writes it, who reads it, and what lies between.

    `uses` of a module are the numbers of its calls. `between[consumer, call]` maps each producer's call to what
    happens to its map on the way to that consumer: a function of a `[1, P, *map]` tensor (tokens: `[1, T, P]`).
    """

    model: nn.Module
    batches: list[tuple[Any, Any]]
    loss: Callable[[Any, Any], Tensor]
    width: str
    producers: list[str]
    consumers: list[str]
    between: dict[tuple[str, int], dict[tuple[str, int], Callable[[Tensor], Tensor]]]
    #: which b enters S together: per round the call of each producer
    rounds: list[dict[str, int]] = field(default_factory=list)
    count_once: bool = False
    #: a sample has so many maps beside each other, each of which is a call
    frames: int = 1


@dataclass
class Expected:
    psi: float
    desired: float
    values: Tensor
    product: Callable[[int], dict[str, Tensor]]
    updates: dict[str, Tensor]
    slope: float


def same(x: Tensor) -> Tensor:
    return x


def _features(module: nn.Module, x: Tensor) -> Tensor:
    """The unfolded input with a trailing 1: `[1, P, *map]` of a convolution, `[1, T, P]` of a linear layer."""
    if isinstance(module, nn.Conv2d):
        y = F.unfold(x, module.kernel_size, module.dilation, module.padding, module.stride)
        size = [
            (n + 2 * p - d * (k - 1) - 1) // s + 1
            for n, p, d, k, s in zip(
                x.shape[2:], module.padding, module.dilation, module.kernel_size, module.stride, strict=True
            )
        ]
        y = y.reshape(1, -1, *size)
        return torch.cat([y, torch.ones_like(y[:, :1])], 1) if module.bias is not None else y
    x = x.reshape(1, -1, x.shape[-1])
    return torch.cat([x, torch.ones_like(x[..., :1])], 2) if module.bias is not None else x


def _windows(module: nn.Module, b: Tensor) -> Tensor:
    """What each window of a consumer sees of a b map: `[P, taps, windows]`, zero outside the map."""
    if isinstance(module, nn.Conv2d):
        y = F.unfold(b, module.kernel_size, module.dilation, module.padding, module.stride)
        return y.reshape(b.shape[1], -1, y.shape[-1])
    if b.dim() == 3:
        return b[0].T.unsqueeze(1)
    return b.flatten(2).mT.reshape(1, -1, b.shape[1]).permute(2, 1, 0)  # flattened map: every position is a tap


def _columns(v: Tensor, conv: bool) -> Tensor:
    """`[O, positions]`."""
    return v[0].flatten(1) if conv else v.reshape(-1, v.shape[-1]).T


def _h(module: nn.Module, x: Tensor) -> Tensor:
    y = _features(module, x)
    return y[0].flatten(1) if isinstance(module, nn.Conv2d) else y[0].T


def naive(case: Case) -> Expected:
    model = case.model
    names = {*case.producers, *case.consumers}
    seen: list[dict[str, list[tuple[Tensor, Tensor]]]] = []
    for inputs, targets in case.batches:
        for i in range(len(inputs)):
            calls: dict[str, list[tuple[Tensor, Tensor]]] = {n: [] for n in names}
            hooks = [
                model.get_submodule(n).register_forward_hook(
                    lambda m, a, out, n=n, calls=calls: calls[n].append((a[0].detach().clone(), out))
                )
                for n in names
            ]
            loss = case.loss(model(inputs[i : i + 1]), targets[i : i + 1]).mean()
            for hook in hooks:
                hook.remove()
            outs = [(n, j, out) for n in case.consumers for j, (_, out) in enumerate(calls[n])]
            grads = torch.autograd.grad(loss, [o for *_, o in outs])
            vs = {(n, j): -g for (n, j, _), g in zip(outs, grads, strict=True)}
            pairs = {n: [(x, vs.get((n, j), x)) for j, (x, _) in enumerate(c)] for n, c in calls.items()}
            if case.frames > 1:
                pairs = {n: list(zip(x.split(1), v.split(1), strict=True)) for n, ((x, v),) in pairs.items()}
            seen.append(pairs)
    count = len(seen)
    modules = {n: model.get_submodule(n) for n in names}
    convs = {n: isinstance(m, nn.Conv2d) for n, m in modules.items()}

    updates, psi, desired, slope = {}, 0.0, 0.0, 0.0
    for n in case.consumers:
        pairs = [(_h(modules[n], x), _columns(v, convs[n])) for s in seen for x, v in s[n]]
        m = sum(h @ h.T for h, _ in pairs) / count
        vh = sum(v @ h.T for h, v in pairs) / count
        updates[n] = vh @ torch.linalg.pinv(m, hermitian=True, rcond=1e-12)
        slope += float((vh * updates[n]).sum())
        psi += sum(float((v - updates[n] @ h).square().sum()) for h, v in pairs) / count
        desired += sum(float(v.square().sum()) for _, v in pairs) / count

    sizes = [modules[p].weight[0].numel() + (modules[p].bias is not None) for p in case.producers]
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    blocks = {n: 0.0 for n in case.consumers}
    s_total: Any = 0.0
    for sample in seen:
        maps = {(p, j): _features(modules[p], x) for p in case.producers for j, (x, _) in enumerate(sample[p])}
        for (n, j), sources in case.between.items():
            x, v = sample[n][j]
            v = _columns(v, convs[n])
            v = v - updates[n] @ _h(modules[n], x)
            for (p, i), way in sources.items():
                b = _windows(modules[n], way(maps[p, i]))
                block = torch.zeros(sum(sizes), b.shape[1], len(v), dtype=b.dtype)
                at = starts[case.producers.index(p)]
                block[at : at + b.shape[0]] = torch.einsum("ptl,ol->pto", b, v)
                blocks[n] = blocks[n] + block / count
        for r in case.rounds or [dict.fromkeys(case.producers, 0)]:
            for weight, ways, n in _readings(case):
                parts = []
                for p in case.producers:
                    b = ways.get(p, same)(maps[p, r.get(p, 0)])
                    b = b if p in r else b * 0
                    every = b.flatten(2)[0] if b.dim() == 4 else b[0].T
                    parts.append(every if n is None else _windows(modules[n], b).flatten(1))
                stacked = torch.cat(parts)
                s_total = s_total + weight * stacked @ stacked.T / count
    values, vectors = torch.linalg.eigh(s_total)
    keep = values > 1e-12 * values[-1]
    root = vectors[:, keep] / values[keep].sqrt() @ vectors[:, keep].T  # S^(-1/2), pseudo-inverse
    matrix = torch.cat([blocks[n].flatten(1) for n in case.consumers], 1)
    u, lam, wt = torch.linalg.svd(root @ matrix, full_matrices=False)

    def product(k: int) -> dict[str, Tensor]:
        low = root @ (u[:, :k] * lam[:k]) @ wt[:k]
        parts = low.split([blocks[n][0].numel() for n in case.consumers], 1)
        return {n: part.reshape(blocks[n].shape) for n, part in zip(case.consumers, parts, strict=True)}

    return Expected(psi, desired, lam[lam > 1e-6 * lam[0]], product, updates, slope)


def _readings(case: Case) -> list[tuple[float, dict[str, Callable[[Tensor], Tensor]], str | None]]:
    """How S counts: over the windows of each consumer, averaged over consumers; or every position once."""
    if case.count_once:
        return [(1.0, {}, None)]
    one = {n: {p: way for (p, _), way in s.items()} for (n, _), s in reversed(case.between.items())}
    first = {p: way for ways in one.values() for p, way in ways.items()}
    return [(1 / len(one), first | ways, n) for n, ways in one.items()]
