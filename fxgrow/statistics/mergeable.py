"""Moments of a profile that can be added to those of other parts of the data.

They hold N = E[b V^T] and C = E[b h^T]. The update dW* that the existing weights need is known only for all parts
together; N less E[b (dW* h)^T] is then N - C dW*^T, without another pass over the data.
"""

from __future__ import annotations

import hashlib
import json
import os
import reprlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, fx, nn

from fxgrow.distributed import checksum
from fxgrow.errors import FileError, ProfileError
from fxgrow.statistics.collect import SAMPLED_RIDGE, Statistics
from fxgrow.statistics.consumer_moments import GATHERED
from fxgrow.statistics.width_moments import WidthMoments
from fxgrow.storage import schema
from fxgrow.storage.safetensors_file import read, require_kind, write
from fxgrow.storage.schema import SchemaError, checked


@dataclass(frozen=True)
class Moments:
    """Moments that `fxgrow.profile(..., keep_moments=True)` has formed from its data; see `fxgrow.Profile.merge`.

    Attributes:
        samples: number of samples (of the batches that are not held out).
        loss: the sum of their losses.
        method: the initialiser.
        positions: `sampled` or `all`.
        widths: names of the widths.
        weights: a checksum of the model's weights.
        tensors: means over the samples, by name.
    """

    samples: int = checked(schema.integer(1))
    loss: float = checked(schema.real(finite=False))
    method: str = checked(schema.name)
    positions: str = checked(schema.name)
    widths: tuple[str, ...] = checked(schema.array(schema.name))
    weights: str = checked(schema.name)
    tensors: Mapping[str, Tensor] = checked(schema.anything, repr=False)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes a `.safetensors` file, atomically and without pickle.

        Raises:
            FileError: it cannot be written.
            MissingExtraError: safetensors is not installed.
        """
        body = {name: value for name, value in vars(self).items() if name != "tensors"}
        write(path, dict(self.tensors), {"kind": "moments", **body, "widths": list(self.widths)})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Moments:
        """Reads what `save` wrote.

        Raises:
            FileError: the file is missing, damaged or another kind of file.
            MissingExtraError: safetensors is not installed.
        """
        body, tensors = read(path)
        require_kind(body, "moments", path, "Write one with profile.moments.save().")
        try:
            found = {key: value for key, value in body.items() if key != "kind"} | {"tensors": tensors}
            return schema.read_as(cls)(found, "the file")
        except SchemaError as error:
            raise FileError(f"{path} holds no moments of this version of fxgrow: {error}.") from None


def fingerprint(model: nn.Module) -> str:
    """A checksum of all bits of the parameters and buffers."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    sums = [[name, str(t.dtype), list(t.shape), checksum(t)] for name, t in tensors.items()]
    return hashlib.sha256(json.dumps(sums).encode()).hexdigest()


def mergeable_tensors(stats: Statistics) -> dict[str, Tensor]:
    """Means and counts of finished statistics by name, without C (`InputCrossMoment`)."""
    out: dict[str, Tensor] = {}
    for name, c in stats.consumers.items():
        moments = {"vh": c.vh, "m": c.m, "g": c.g}
        out |= {f"reads/{name}/{key}": t for key, t in moments.items() if t is not None}
        counts = float(c.vv), c.samples, c.position_count, c.rows
        out[f"reads/{name}/counts"] = torch.tensor(counts, dtype=torch.float64)
    for name, w in stats.widths.items():
        out |= {f"width/{name}/N/{weight}": block for weight, block in w.blocks.items()}
        out |= {} if w.s is None else {f"width/{name}/S": w.second_moment}
        out |= {f"width/{name}/rows": torch.cat(w.sampled)} if w.sampled else {}
        out[f"width/{name}/counts"] = torch.tensor([w.rows, w.positions_per_sample], dtype=torch.float64)
    return {name: t.detach().cpu().clone() for name, t in out.items()}


def merge_into(stats: Statistics, parts: Sequence[Moments], device: torch.device) -> dict[str, Tensor]:
    """Fills empty statistics with the means over all parts, and returns C by its names in the parts."""
    total = sum(part.samples for part in parts)
    shares = [part.samples / total for part in parts]

    def mean(name: str) -> Tensor | None:
        tensors = [part.tensors[name] for part in parts if name in part.tensors]
        if not tensors:
            return None
        if len(tensors) < len(parts):
            raise ProfileError(f"One part has {name!r} and another has not: profile all of them alike.")
        if len({(t.shape, t.dtype) for t in tensors}) > 1:
            raise ProfileError(f"The parts have {name!r} in different shapes: profile all of them alike.")
        products = (t * share for t, share in zip(tensors, shares, strict=True))
        return sum(products, torch.zeros_like(tensors[0])).to(device)

    def counts(name: str) -> tuple[Tensor, Tensor]:
        """The sums over all parts, and the means."""
        try:
            numbers = torch.stack([part.tensors[name] for part in parts])
        except KeyError as error:
            raise ProfileError(f"A part has no {name!r}: it is of another model.") from error
        return numbers.sum(0), torch.tensor(shares, dtype=torch.float64) @ numbers

    for name, c in stats.consumers.items():
        vh, c.m, c.g = (mean(f"reads/{name}/{key}") for key in ("vh", "m", "g"))
        c.vh = c.vh if vh is None else vh
        sums, means = counts(f"reads/{name}/counts")
        c.vv, c.samples = float(means[0]), float(sums[1])
        c.position_count, c.rows = map(int, sums[2:])
    crosses: dict[str, Tensor] = {}
    for name, w in stats.widths.items():
        w.s = mean(f"width/{name}/S")
        rows = [part.tensors.get(f"width/{name}/rows") for part in parts]
        w.sampled = [(t * share**0.5).to(device) for t, share in zip(rows, shares, strict=True) if t is not None]
        if w.sampled and len(w.sampled) < len(parts):
            raise ProfileError(f"The parts have the rows of width {name!r} in different ways: profile all alike.")
        sums, means = counts(f"width/{name}/counts")
        w.rows, w.samples, w.position_count = int(sums[0]), 1.0, float(means[1])
        w.ridge = 0.0 if stats.exact else SAMPLED_RIDGE[w.rows < 10 * w.features]
        for weight in {path.consumer.weight: None for path in w.paths}:
            block, cross = mean(f"width/{name}/N/{weight}"), mean(f"width/{name}/C/{weight}")
            w.blocks |= {} if block is None else {weight: block}
            crosses |= {} if cross is None else {f"width/{name}/C/{weight}": cross}
    stats.samples, stats.total = total, float(total)
    return crosses


class InputCrossMoment:
    """C = E[b h^T] of every width and weight, `[P, taps, H]`, accumulated batch by batch."""

    def __init__(self, stats: Statistics) -> None:
        self.stats = stats
        self.widths = {name: replace(w, blocks={}) for name, w in stats.widths.items()}

    def add_cached(self) -> None:
        """Adds the samples in the cache of the statistics."""
        stats = self.stats
        for name, w in stats.widths.items():
            sources = [n for path in w.paths for n in (path.producer.source, path.consumer.source)]
            for share, _, inputs, _ in stats.cache.groups(sources, keep=w.keep):
                self._add(self.widths[name], inputs, share / len(inputs[sources[0]]))

    def add(self, inputs: Mapping[fx.Node, Tensor]) -> None:
        """Adds all positions of one more batch."""
        for w in self.widths.values():
            self._add(w, inputs, 1.0 / self.stats.samples)

    def _add(self, w: WidthMoments, inputs: Mapping[fx.Node, Tensor], scale: float) -> None:
        for path in w.paths:
            c = self.stats.consumers[path.consumer.weight]
            x, h = inputs[path.producer.source], c.layer_input(inputs[path.consumer.source])
            # with the unit matrix for weights, the output is the patches that the weight multiplies
            eye = torch.eye(c.vh.shape[1]).to(c.vh)
            most = max(1, GATHERED // max(1, c.apply(eye, h[:1]).nbytes))
            for part, rows in zip(x.split(most), h.split(most), strict=True):
                w.add(path, part, c.apply(eye, rows), scale)

    def tensors(self) -> dict[str, Tensor]:
        """C by the names in `Moments`."""
        return {f"width/{n}/C/{weight}": t.cpu() for n, w in self.widths.items() for weight, t in w.blocks.items()}


@torch.no_grad()
def subtract_by_cross_moment(stats: Statistics, crosses: Mapping[str, Tensor], updates: Mapping[str, Tensor]) -> None:
    """Replaces N by N - C dW*^T."""
    for name, w in stats.widths.items():
        for weight, block in w.blocks.items():
            w.blocks[weight] = block - crosses[f"width/{name}/C/{weight}"].to(block) @ updates[weight].mT.to(block)


def check_parts(parts: Iterable[Moments], model: nn.Module) -> None:
    """Refuses parts that cannot be added: there is none, or they are of different profiles or weights."""
    parts = list(parts)
    if not parts:
        raise ProfileError("There is nothing to merge: give at least one profile with moments.")
    first, weights = parts[0], fingerprint(model)
    for i, part in enumerate(parts):
        for key in ("method", "positions", "widths"):
            mine, theirs = getattr(first, key), getattr(part, key)
            if mine != theirs:
                mine, theirs = reprlib.repr(mine), reprlib.repr(theirs)
                raise ProfileError(f"Part 0 has {key} {mine}, part {i} {theirs}: profile all alike.")
        if part.weights != weights:
            raise ProfileError(
                f"Part {i} was profiled with other weights than the model's: moments can be added only where the "
                "weights are the same, bit for bit."
            )
