"""`Profile.merge`: one profile from moments of parts of the data."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import fx

from fxgrow.data.batches import Data
from fxgrow.data.loss import LossFn
from fxgrow.data.random_state import random_state_kept
from fxgrow.errors import ProfileError
from fxgrow.initialisers.registry import find_initialiser
from fxgrow.pipeline.profile import profiled
from fxgrow.pipeline.profile_record import Profile
from fxgrow.rewriting.batch_norm import has_batch_norm
from fxgrow.statistics.mergeable import Moments, check_parts


@random_state_kept()
def merge(
    parts: Sequence[Profile | Moments],
    gm: fx.GraphModule | None,
    dataloader: Iterable[Any] | None,
    loss_fn: LossFn | None,
    samples: int | None,
    units: int | Mapping[str, int] | None,
    progress: bool,
    seed: int,
) -> Profile:
    """See `fxgrow.Profile.merge`."""
    graph = gm if gm is not None else next((p.gm for p in parts if isinstance(p, Profile) and p.gm is not None), None)
    if not isinstance(graph, fx.GraphModule) or "example_inputs" not in graph.meta:
        raise ProfileError("Moments alone hold no network: give gm=, a graph that fxgrow.capture returned.")
    moments = [_moments(part, i) for i, part in enumerate(parts)]
    check_parts(moments, graph)
    method = find_initialiser(moments[0].method)
    if dataloader is None and (method.needs.refit or has_batch_norm(graph)):
        what = "new channels go through a BatchNorm, which is set on"
        if method.needs.refit:
            what = f"method={method.name!r} fits"
        raise ProfileError(f"{what} what new units put out, which no moment holds: give dataloader=.")
    data = Data(() if dataloader is None else dataloader, samples)
    first = moments[0]
    return profiled(
        graph, data, loss_fn, method, first.positions, None, first.widths, units, progress, seed, parts=moments
    )


def _moments(part: Profile | Moments, i: int) -> Moments:
    found = part.moments if isinstance(part, Profile) else part
    if not isinstance(found, Moments):
        raise ProfileError(f"Part {i} has no moments: make it with fxgrow.profile(..., keep_moments=True).")
    return found
