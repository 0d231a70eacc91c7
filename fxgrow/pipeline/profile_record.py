"""The records of a profile: what it says of each width, and of a network."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx

from fxgrow.analysis.analyse import AnalysedGraph, analyse
from fxgrow.axes.records import Width
from fxgrow.candidates.refit import Refit
from fxgrow.candidates.widened import Candidates
from fxgrow.errors import PlanError
from fxgrow.initialisers.registry import Initialiser, Proposal

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from fxgrow.data.loss import LossFn
    from fxgrow.statistics.mergeable import Moments


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
            anyway, the second what the data can tell; `benchmarks.where_to_grow` compares scores. 0 with no prediction.
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
        moments: what was added up over the data, where `keep_moments=True` asked for it.
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
    moments: Moments | None = field(default=None, repr=False)

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

    @cached_property
    def analysed(self) -> AnalysedGraph:
        """The graph that was profiled, with its widths."""
        return analyse(self.graph)

    def candidates(self) -> Candidates:
        """The network with all proposed units, as the refit left it, or made now where nothing has needed it yet."""
        if self.found is not None:
            return self.found
        generator = torch.Generator().manual_seed(self.seed)
        return Candidates(self.analysed, self.proposals, self.proposed, self.calibration, generator)

    @classmethod
    def merge(
        cls,
        parts: Sequence[Profile | Moments],
        gm: fx.GraphModule | None = None,
        dataloader: Iterable[Any] | None = None,
        loss_fn: LossFn | None = None,
        samples: int | None = None,
        *,
        units: int | Mapping[str, int] | None = None,
        progress: bool = True,
        seed: int = 0,
    ) -> Profile:
        """The profile of all data, from moments of parts of it that were read apart, on machines that never talk.

        Moments are means over samples; their weighted mean is that over all of them, and bottlenecks and new units
        follow from it as from one reading. A method without a refit (`tiny`, `gradmax`, `north`) needs nothing else.
        The refit of the others fits and tests what the new units put out, which no moment of the old network holds: it
        reads `dataloader`. Give it data of one part, batch by batch as that part had it, so that what was held back
        there is held back here, or data that no part has seen.

        Args:
            parts: profiles made with `keep_moments=True`, or their moments, all with the same model and settings.
            gm: the graph with the same weights; None for that of the first profile.
            dataloader: for the refit, and where new channels go through a BatchNorm, whose input is measured.
            loss_fn: see `fxgrow.profile`.
            samples: to read of `dataloader` at most.
            units: see `fxgrow.profile`.
            progress: see `fxgrow.profile`.
            seed: see `fxgrow.profile`.

        Raises:
            ProfileError: the parts are of different models, weights or settings, or the method needs `dataloader`.

        Example:
            >>> import torch, fxgrow
            >>> _ = torch.manual_seed(0)
            >>> net = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Tanh(), torch.nn.Linear(3, 2))
            >>> gm = fxgrow.capture(net, (torch.zeros(2, 4),))
            >>> here, there = ([(torch.randn(32, 4), torch.randn(32, 2))] for _ in range(2))
            >>> parts = [
            ...     fxgrow.profile(gm, data, method="tiny", keep_moments=True, progress=False) for data in (here, there)
            ... ]
            >>> merged = fxgrow.Profile.merge(parts)
            >>> whole = fxgrow.profile(gm, here + there, method="tiny", progress=False)
            >>> abs(merged["0"].bottleneck - whole["0"].bottleneck) < 1e-4
            True
        """
        from fxgrow.pipeline.merge import merge

        return merge(parts, gm, dataloader, loss_fn, samples, units, progress, seed)

    def record(self) -> Profile:
        """The figures alone, without the network and the candidates."""
        return replace(self, gm=None, updates={}, proposals={}, calibration=(), found=None, refit=None, moments=None)

    def __str__(self) -> str:
        from fxgrow.pipeline.report import profile_table

        return profile_table(self)

    def plot(self, path: str | None = None) -> Figure:
        """Bars of the bottleneck and the best gains per width; written to `path` if given. Needs matplotlib."""
        from fxgrow.report.plot import plot_profile

        return plot_profile(self, path)
