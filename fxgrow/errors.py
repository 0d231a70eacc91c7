"""Everything fxgrow raises or warns of on purpose: what was found, where, and what to do."""

import contextlib
import os
import sys
import warnings


class FxgrowError(Exception):
    """Base class of all fxgrow errors.

    Example:
        >>> import torch, fxgrow
        >>> try:
        ...     fxgrow.widen(torch.nn.Linear(2, 2), (torch.zeros(1, 2),), {"nowhere": 1})
        ... except fxgrow.FxgrowError as error:
        ...     print(type(error).__name__)
        PlanError
    """


class CaptureError(FxgrowError):
    """The model could not be traced into a graph."""


class ProfileError(FxgrowError):
    """The data, the loss or the model's state do not allow a profile."""


class InfiniteLossError(ProfileError):
    """The loss of a batch is infinite or not a number."""


class PlanError(FxgrowError):
    """A budget, a width name or a number of units that cannot be met."""


class SmallBudgetError(PlanError):
    """A budget that no unit fits into."""


class ScheduleError(FxgrowError):
    """A schedule that cannot be followed: a number out of range, a width that is not there."""


class RewriteError(FxgrowError):
    """A rewritten graph failed its checks; nothing was returned."""


class ExportError(FxgrowError):
    """The ONNX file could not be written, or disagrees with the module."""


class FileError(FxgrowError):
    """A file could not be written or read, or is not of the model it is loaded into."""


class OptionError(FxgrowError, TypeError):
    """An option that there is not."""


class MissingExtraError(FxgrowError, ImportError):
    """An optional package is not installed."""


class FxgrowWarning(UserWarning):
    """Base class of the warnings that fxgrow gives by `warnings.warn`."""


class LossWarning(FxgrowWarning):
    """The loss that `loss_fn=None` stands for may not be the one that trains the model."""


class StaleModelWarning(FxgrowWarning):
    """A model is trained that was grown into another one, or the grown one by the optimizer of the old."""


def warn(message: str, category: type[FxgrowWarning]) -> None:
    """Warns at the line of the user's code, outside of this library and of torch, that led here."""
    libraries = tuple(os.path.dirname(sys.modules[name].__file__ or "") + os.sep for name in ("fxgrow", "torch"))
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and frame.f_code.co_filename.startswith((*libraries, contextlib.__file__)):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, category, stacklevel=level)


def first_lines(error: BaseException, count: int = 3, named: bool = False) -> str:
    """The first lines of an error's root cause as one line, for messages: torch adds pages of its own stack."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text, name = " ".join(lines[:count])[:400], type(error).__name__
    return (f"{name}: {text}" if named else text or name).rstrip(" .;:")
