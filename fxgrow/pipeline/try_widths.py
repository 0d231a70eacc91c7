"""Each width grown alone on a copy: by how much a few more units lower the held-out loss.

requires: a profile that proposes units.
ensures:  nothing of the profiled network changes; one short line search a width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from fxgrow.data.argument_checks import COUNT, an, checked_arguments
from fxgrow.data.batches import BatchReader, Data
from fxgrow.data.loss import LossFn
from fxgrow.data.random_state import random_state_kept
from fxgrow.errors import PlanError, ProfileError
from fxgrow.graph.evaluate import own_modes
from fxgrow.pipeline.held_out import HeldOut
from fxgrow.pipeline.line_search import GammaLine, search
from fxgrow.pipeline.plan import plan
from fxgrow.pipeline.profile_record import Profile


@dataclass(frozen=True)
class Tried:
    """What growing one width alone would bring.

    Attributes:
        units: that were tried.
        parameters: that they add.
        gamma: with the smallest loss; 0 where no step lowers it.
        decrease: of the mean held-out loss at that gamma, by the units and the update of existing weights together.
    """

    units: int
    parameters: int
    gamma: float
    decrease: float

    @property
    def per_parameter(self) -> float:
        """Decrease per parameter added."""
        return self.decrease / self.parameters


@checked_arguments(ProfileError, profile=an(Profile), units=COUNT)
@own_modes()
@random_state_kept()
def try_widths(
    profile: Profile,
    dataloader: Iterable[Any],
    loss_fn: LossFn | None = None,
    *,
    units: int = 4,
    samples: int | None = None,
    batch: Callable[[Any], Any] | None = None,
) -> dict[str, Tried]:
    """Grows each width in turn, on a copy, and measures by how much that lowers the held-out loss.

    The score of where to grow a little that holds best: its rank correlation with the gain per parameter, at once and
    after further training, is in `benchmarks/RESULTS.md` beside those of scores that cost nothing. It takes about
    ten passes over at most 1,024 samples for each width, forward only.

    Args:
        profile: from `fxgrow.profile`, with a method that predicts (`default`, say).
        dataloader: the batches of the profile.
        loss_fn: see `fxgrow.profile`.
        units: to try at each width, in whole steps, at most as many as the profile proposes.
        samples: as given to `fxgrow.profile`.
        batch: see `fxgrow.profile`.

    Returns:
        Width name -> `Tried`, the largest decrease per parameter first.

    Raises:
        PlanError: `units` is not positive, the profile is the record of a growth, or its units leave the function as it
            is whatever they are scaled by.
        ProfileError: the data do not allow it.

    Example:
        >>> import torch, fxgrow
        >>> _ = torch.manual_seed(0)
        >>> x = torch.randn(512, 6)
        >>> batches = [(part, part[:, :2].prod(1, keepdim=True).sign()) for part in x.split(64)]
        >>> net = torch.nn.Sequential(
        ...     torch.nn.Linear(6, 2), torch.nn.Tanh(), torch.nn.Linear(2, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1)
        ... )
        >>> tried = fxgrow.try_widths(fxgrow.profile(net, batches, progress=False), batches, units=2)
        >>> sorted(tried), tried["0"].units, tried["0"].parameters
        (['0', '2'], 2, 30)
    """
    data = Data(dataloader, samples, reader=BatchReader.of(profile.graph, batch))
    held_out = HeldOut.of(data.leave_out_refused(profile.graph), loss_fn)
    tried = {}
    for name, b in profile.items():
        k = min(math.ceil(units / b.width.step) * b.width.step, profile.proposed[name])
        decided = plan(profile, neurons={name: k})
        if not decided.moves:
            raise PlanError(
                f"Units by {profile.method.name!r} change nothing at first, so there is nothing to try: profile with "
                "method='default'."
            )
        # what `apply` would write, which keeps to the plan
        result = search(GammaLine(profile.analysed, decided, held_out, bounds=False))
        before, after = decided.parameters
        tried[name] = Tried(k, after - before, result.best, result.losses[0] - min(result.losses))
    return dict(sorted(tried.items(), key=lambda item: -item[1].per_parameter))
