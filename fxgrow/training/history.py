"""The history of growth: light records that can be printed, plotted, saved and written to TensorBoard."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fxgrow.data.argument_checks import PATH, read_argument, shown
from fxgrow.errors import FileError, FxgrowError, MissingExtraError, first_lines
from fxgrow.pipeline.growth_record import Growth
from fxgrow.report.plot import history_panels, new_figure, save_figure
from fxgrow.report.table import Column, count, number, table
from fxgrow.storage import schema
from fxgrow.storage.schema import SchemaError, checked

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: losses, which may have become infinite
_PAIR = schema.array(schema.real(finite=False), schema.real(finite=False))


@dataclass(frozen=True)
class Event:
    """One growth, or one that declined: numbers and strings only.

    Attributes:
        step: optimiser steps before it.
        epoch: epochs before it.
        reason: why the schedule wanted it.
        units: units that were added, per width.
        parameters: of the model, before and after.
        loss: held-out loss in eval mode, before and after.
        train_loss: the same in train mode.
        gamma: step size that was applied.
        predicted: predicted decrease of the held-out loss.
        seconds: wall time.
        declined: why nothing was added, or None.
    """

    step: int = checked(schema.integer())
    epoch: int = checked(schema.integer())
    reason: str = checked(schema.string())
    units: Mapping[str, int] = checked(schema.mapping(schema.integer()))
    parameters: tuple[int, int] = checked(schema.array(schema.integer(), schema.integer()))
    loss: tuple[float, float] = checked(_PAIR)
    train_loss: tuple[float, float] = checked(_PAIR)
    gamma: float = checked(schema.real())
    predicted: float = checked(schema.real(finite=False))
    seconds: float = checked(schema.real())
    declined: str | None = checked(schema.optional(schema.string()), default=None)

    def __str__(self) -> str:
        where = f"step {self.step:,}, epoch {self.epoch}: {self.reason}"
        if self.declined is not None:
            return f"declined at {where}: {self.declined}; {self.seconds:.1f} s"
        added = ", ".join(f"{name} +{k}" for name, k in self.units.items())
        before, after = self.parameters
        return (
            f"grew at {where}: {added}; {before:,} → {after:,} parameters, held-out loss {self.loss[0]:.4f} → "
            f"{self.loss[1]:.4f}, {self.seconds:.1f} s"
        )


def make_event(step: int, epoch: int, reason: str, growth: Growth, seconds: float) -> Event:
    plan, losses = growth.plan, growth.losses
    before, after = plan.parameters
    predicted = float(plan.decrease(plan.scale)) if plan.units else 0.0
    return Event(
        step, epoch, reason, dict(plan.units), (int(before), int(after)), losses["eval"], losses["train"],
        gamma=float(plan.scale), predicted=predicted, seconds=seconds, declined=growth.declined,
    )  # fmt: skip


NUMBERS = "step", "epoch", "parameters", "loss, eval", "loss, train", "predicted", "gamma", "seconds"
COLUMNS = (*map(number, NUMBERS), Column("added", wrap=True))


class History(Sequence[Event]):
    """The growths of a run in order; prints as a table."""

    def __init__(self, events: Iterable[Event] = ()) -> None:
        self._events = list(events)

    def __getitem__(self, at: Any) -> Any:
        return self._events[at]

    def __len__(self) -> int:
        return len(self._events)

    def add(self, event: Event) -> None:
        """Appends an event."""
        self._events.append(event)

    @property
    def growths(self) -> int:
        """Number of growths that added something."""
        return sum(e.declined is None for e in self)

    @property
    def declines(self) -> int:
        """Number of growths that declined since the last one that did not."""
        added = [event.declined is None for event in reversed(self._events)]
        return added.index(True) if True in added else len(added)

    @property
    def seconds(self) -> float:
        """Wall time of all growths."""
        return sum(e.seconds for e in self)

    def __str__(self) -> str:
        if not self._events:
            return "no growth yet"
        total = f"{count(self.growths, 'growth')}, {len(self) - self.growths} declined, {self.seconds:.1f} s"
        return f"{table(COLUMNS, [_row(e) for e in self])}\n\n{total}"

    def to_list(self) -> list[dict[str, Any]]:
        """Returns plain data for `from_list`."""
        return [{**dataclasses.asdict(e), "units": dict(e.units)} for e in self]

    @classmethod
    def from_list(cls, items: Iterable[Mapping[str, Any]]) -> History:
        """Reads what `to_list` returned.

        Raises:
            FxgrowError: the data is something else.
        """
        try:
            return cls(schema.array(schema.read_as(Event))([dict(item) for item in items], "the history"))
        except (SchemaError, TypeError, ValueError) as error:
            raise FxgrowError(f"Invalid history of growth: {error}.") from None

    def plot(self, path: str | None = None) -> Figure:
        """Parameters and held-out loss over steps; written to `path` if given. Needs matplotlib."""
        figure = new_figure(2, 4)
        steps, parameters, losses = [e.step for e in self], [e.parameters for e in self], [e.loss for e in self]
        history_panels(figure, steps, parameters, losses, [e.declined is None for e in self])
        counts = f"{self.growths} growths, {len(self) - self.growths} declined"
        return save_figure(figure, f"fxgrow · {counts} · {self.seconds:.1f} s growing", path)

    def to_tensorboard(self, writer: Any) -> None:
        """Writes parameters, losses, gamma, seconds and added units as scalars `fxgrow/...` at their steps.

        Args:
            writer: a `SummaryWriter`, which stays open, or the folder to write to.

        Raises:
            MissingExtraError: a folder is given and tensorboard is not installed.
            FileError: the folder cannot be written to.
        """
        if isinstance(writer, (str, os.PathLike)):
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError as error:
                message = "Writing for TensorBoard needs tensorboard: pip install 'fxgrow[tensorboard]'."
                raise MissingExtraError(message) from error
            read_argument("writer", writer, PATH, FileError)
            try:
                with SummaryWriter(str(writer)) as opened:
                    self.to_tensorboard(opened)
                return
            except (OSError, NotImplementedError) as error:  # the second: a kind of address without its package
                raise FileError(
                    f"{writer} could not be written: {first_lines(error, named=True)}. Give a folder."
                ) from error
        if not hasattr(writer, "add_scalar"):
            raise FileError(f"writer={shown(writer)}: give a SummaryWriter, or a folder.")
        for e in self:
            scalars = {"parameters": e.parameters[1], "loss/before": e.loss[0], "loss/after": e.loss[1]}
            scalars |= {"gamma": e.gamma, "seconds": e.seconds, **{f"units/{name}": k for name, k in e.units.items()}}
            for name, value in scalars.items():
                writer.add_scalar(f"fxgrow/{name}", value, e.step)


def _row(e: Event) -> tuple[str, ...]:
    (before, after), (loss, new_loss), (train, new_train) = e.parameters, e.loss, e.train_loss
    added = ", ".join(f"{name} +{k}" for name, k in e.units.items())
    return (
        f"{e.step:,}", str(e.epoch), f"{before:,} → {after:,}", f"{loss:.4f} → {new_loss:.4f}",
        f"{train:.4f} → {new_train:.4f}", f"{e.predicted:.4f}", f"{e.gamma:.3g}", f"{e.seconds:.1f}",
        added if e.declined is None else f"declined: {e.declined}",
    )  # fmt: skip
