"""The line of the model's code that is being traced, for messages and for ``node.stack_trace``."""

from __future__ import annotations

import contextlib
import linecache
import os
import traceback
from pathlib import Path
from types import FrameType

import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException

_INTERNAL = (os.path.dirname(torch.__file__) + os.sep, str(Path(__file__).parents[1]) + os.sep, contextlib.__file__)
_DATA_HINT = (
    "A graph cannot contain a decision on data: write it with torch.where, or move it into a separate function, "
    "which then becomes one node."
)


def user_frame(frame: FrameType | None) -> FrameType | None:
    """Returns the innermost frame, from ``frame`` outwards, of neither PyTorch nor fxgrow."""
    while frame is not None and not is_user_code(frame):
        frame = frame.f_back
    return frame


def asking_frames(frame: FrameType | None) -> list[FrameType]:
    """Returns the innermost frame that is not of fxgrow, and that of the model's code, which may have called it."""
    user = user_frame(frame)
    while frame is not None and frame.f_code.co_filename.startswith(_INTERNAL[1]):
        frame = frame.f_back
    return [f for f in dict.fromkeys((frame, user)) if f is not None]


def last_place(frame: FrameType | None) -> tuple[str, int] | None:
    """Returns file and line of the innermost frame of the model's code."""
    user = user_frame(frame)
    return (user.f_code.co_filename, user.f_lineno) if user is not None else None


def is_user_code(frame: FrameType) -> bool:
    """Whether a frame runs code of neither PyTorch nor fxgrow."""
    return not frame.f_code.co_filename.startswith(_INTERNAL)


def source(file: str, line: int) -> str:
    """Returns one line of a file, without its indentation."""
    return linecache.getline(file, line).strip()


def stack_trace(frame: FrameType) -> str:
    """Returns the frame's line in the form of ``fx.Node.stack_trace``."""
    file, line = frame.f_code.co_filename, frame.f_lineno
    return f'File "{file}", line {line}, in {frame.f_code.co_name}\n    {source(file, line)}'


def last_user_line(error: BaseException) -> tuple[str, int] | None:
    """Returns file and line of the innermost frame of the model's code that an error went through."""
    frames = traceback.walk_tb(error.__traceback__)
    places = [(frame.f_code.co_filename, line) for frame, line in frames if is_user_code(frame)]
    return places[-1] if places else None


def looks_at_data(error: BaseException) -> bool:
    """Whether an operator failed because its result depends on values a fake tensor does not have."""
    return isinstance(error, (DataDependentOutputException, DynamicOutputShapeException))


def failure(error: BaseException, module: str, place: tuple[str, int] | None) -> str:
    """Returns an error message: the module (path and class), the line of the model's code, the problem, and advice."""
    at = f" at {place[0]}:{place[1]}: `{source(*place)}`" if place else ""
    if looks_at_data(error):
        problem, hint = "its code looks at the values of a tensor, or makes sizes from them", _DATA_HINT
    else:
        text = (str(error).strip() or "no message").splitlines()[0][:300].rstrip(".")
        problem = f"its code raises {type(error).__name__}: {text}"
        hint = "Check that the model runs on these example inputs without fxgrow."
        if isinstance(error, NotImplementedError) and "argument of type" in text:
            hint = "A graph holds tensors, numbers, strings, and tuples, lists, dicts and dataclasses of them."
    return f"Cannot capture {module}{at}: {problem}. {hint}"
