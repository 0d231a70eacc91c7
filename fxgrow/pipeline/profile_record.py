"""The records of a profile: what it says of each width, and of a network."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, fx

from fxgrow.analysis.analyse import AnalysedGraph, analyse
from fxgrow.axes.records import Width
from fxgrow.candidates.refit import Refit
from fxgrow.candidates.widened import Candidates
from fxgrow.data.argument_checks import checked_arguments
from fxgrow.data.loss import Loss, LossFn, known_loss
from fxgrow.errors import PlanError, ProfileError
from fxgrow.initialisers.registry import Initialiser, Proposal
from fxgrow.report.bottleneck import LEGEND, Bottleneck, bottleneck_table, parameters_added, pinned_table, random_units
from fxgrow.report.plot import bottleneck_panel, gain_panel, new_figure, save_figure
from fxgrow.report.table import WIDTH, count
from fxgrow.rewriting.plan import Plan
from fxgrow.statistics.mergeable import Moments

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class ProfileRequest:
    """Options of `fxgrow.profile`; `parts` are moments of parts of the data, in place of a first pass."""

    loss_fn: Loss = field(default_factory=Loss)
    method: str = "default"
    positions: str = "sampled"
    memory_limit: int | None = None
    widths: Sequence[str] | None = None
    units: int | Mapping[str, int] | None = None
    progress: bool = True
    seed: int = 0
    keep_moments: bool = False
    parts: Sequence[Moments] = ()
    #: what will be spent on units, if `units` does not say how many: enough are proposed for it
    budget: str | float | None = None
    cost: str = "parameters"


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
        loss_name: which loss that is.
        moments: the sums over the data, of a profile with `keep_moments=True`.
        recalibrated: that running statistics lagged and were measured again, on a copy; None where they did not.
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
    loss_name: str = ""
    recalibrated: str | None = None
    #: what `fxgrow.plan` adds by default, without values; None where its budget allows no unit
    suggested: Plan | None = field(default=None, init=False, repr=False)
    #: the function behind `merge`, of the file that makes profiles
    _merge: ClassVar[Callable[..., Profile]]

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
    @checked_arguments(ProfileError, gm=None)
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
        """The profile of all data, from moments of parts of it that were read separately, say on different machines.

        Moments are means over samples; their weighted mean is the mean over all of them, and bottlenecks and new units
        follow from it as from one pass. Methods without a refit need nothing else. A refit needs activations of the new
        units, which no moments of the old network hold: it reads `dataloader`. Give it the batches of one part in their
        order, so that the same ones are held out, or data that no part has seen.

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
        request = ProfileRequest(known_loss(loss_fn), units=units, progress=progress, seed=seed)
        return cls._merge(parts, gm, dataloader, samples, request)

    def record(self) -> Profile:
        """The figures alone, without the network and the candidates."""
        return replace(self, gm=None, updates={}, proposals={}, calibration=(), found=None, refit=None, moments=None)

    @property
    def unit_of_gains(self) -> str:
        """What gains are measured in."""
        return "nats" if self.method.needs.refit else "per unit of γ"

    def __str__(self) -> str:
        """Lines of at most 120 characters: loss and samples; one row per width; pinned widths and the reasons."""
        pinned = {w.name: w.pinned for w in self.widths if w.pinned is not None}
        suggested, name = self.suggested, f" ({self.loss_name})" if self.loss_name else ""
        lines = [
            f"Profile by {self.method.name}: loss{name} {self.loss:.4f} over {self.samples:,} samples, "
            f"{count(len(self), 'free width')}, {len(pinned)} pinned",
            *textwrap.wrap(self.recalibrated or "", WIDTH),
            "",
            bottleneck_table(self, "add", {} if suggested is None else suggested.units),
            "",
        ]
        if suggested is not None:
            what = f"with the default budget: {parameters_added(suggested)}" if suggested.units else str(suggested)
            lines += [f"add: {what}", ""]
        return "\n".join([*lines, LEGEND, *random_units(self.method.name, self), *pinned_table(pinned)])

    def plot(self, path: str | None = None) -> Figure:
        """Bars of the bottleneck and the best gains per width; written to `path` if given. Needs matplotlib."""
        figure = new_figure(2, len(self))
        left, right = figure.subplots(1, 2, sharey=True, width_ratios=(1, 1.15))
        bottleneck_panel(left, self)
        gain_panel(right, self, self.unit_of_gains)
        title = f"fxgrow profile · {self.method.name} · loss {self.loss:.4f} over {self.samples:,} samples"
        return save_figure(figure, title, path)
