"""The records of a profile: what it says of each width, and of a network."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx

from fxgrow._analyse import analyse
from fxgrow._candidates import Candidates, candidates
from fxgrow._errors import PlanError
from fxgrow._records import Width
from fxgrow._refit import Refit
from fxgrow.initialisers import Initialiser, Proposal

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Bottleneck:
    """What the profile says of one width.

    Attributes:
        width: the width.
        bottleneck: expressivity bottleneck Psi = E|V - dW* h|^2, in squared units of loss per pre-activation: what the
            loss asks of the consumers that no move of their weights can express (Verbockhaven et al. 2024, def. 2.3).
        desired: E|V|^2, what the loss asks for in all; `bottleneck / desired` is between 0 and 1.
        gains: predicted decrease of the loss per step of the width (one unit for most), best first. For `tiny` the
            squared singular values (decrease per unit of gamma); with a refit, nats measured on held-back batches.
        singular_values: of the whitened E[b V^T], largest first.
        significant: how many units a held-back test accepts (with no test: how many there are).
        samples: samples that were read.
        positions: sampled positions behind the second moments.
        worth: score of widths by what a few more units are worth to them, now and after further training: the predicted
            decrease by units and dW together times the root of Psi. The first alone forgets what training would bring
            anyway, the second what the data can tell; `benchmarks.where` compares scores. 0 with no prediction.
    """

    width: Width
    bottleneck: float
    desired: float
    gains: tuple[float, ...]
    singular_values: tuple[float, ...]
    significant: int
    samples: int
    positions: int
    worth: float = 0.0


@dataclass(frozen=True)
class Profile(Mapping[str, Bottleneck]):
    """Width name -> `Bottleneck`, for every width that was profiled; prints as a table.

    Attributes:
        gm: the graph that was profiled; None in the record of a growth, which keeps no copy of the old network.
        widths: all widths, the pinned ones too.
        bottlenecks: the entries of the mapping.
        method: the initialiser.
        loss: mean loss over the samples, before growth.
        samples: samples that were read.
    """

    gm: fx.GraphModule | None
    widths: tuple[Width, ...]
    bottlenecks: Mapping[str, Bottleneck]
    method: Initialiser
    loss: float
    samples: int
    updates: Mapping[str, Tensor] = field(repr=False)
    proposals: Mapping[str, Proposal] = field(repr=False)
    #: units proposed per width; inputs for the norms of new channels; seed of rows that no proposal gives
    proposed: Mapping[str, int] = field(repr=False)
    calibration: Sequence[Any] = field(repr=False)
    seed: int = field(repr=False)
    found: Candidates | None = field(repr=False)
    refit: Refit | None = field(repr=False)

    def __getitem__(self, name: str) -> Bottleneck:
        return self.bottlenecks[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.bottlenecks)

    def __len__(self) -> int:
        return len(self.bottlenecks)

    @property
    def graph(self) -> fx.GraphModule:
        """The graph that was profiled.

        Raises:
            PlanError: this is the record of a growth, which keeps no network.
        """
        if self.gm is None:
            raise PlanError("This profile is the record of a growth: profile the grown network again.")
        return self.gm

    def candidates(self) -> Candidates:
        """The network with all proposed units, as the refit left it, or made now where nothing has needed it yet."""
        if self.found is not None:
            return self.found
        generator = torch.Generator().manual_seed(self.seed)
        return candidates(self.graph, analyse(self.graph), self.proposals, self.proposed, self.calibration, generator)

    def record(self) -> Profile:
        """The figures alone, without the network and the candidates."""
        return replace(self, gm=None, updates={}, proposals={}, calibration=(), found=None, refit=None)

    def __str__(self) -> str:
        from fxgrow._report import profile_table

        return profile_table(self)

    def plot(self, path: str | None = None) -> Figure:
        """Bars of the bottleneck and the best gains per width; written to `path` if given. Needs matplotlib."""
        from fxgrow._plot import plot_profile

        return plot_profile(self, path)
