"""A folder beside a file that is written: removed at the end, or by the next writer if a process is killed.

A lock on a file in it says that its writer lives: the operating system releases that with the process. Where it has no
such locks (Windows), what killed processes have left stays.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

try:
    import fcntl
except ImportError:
    fcntl = None  # type: ignore[assignment]

_SUFFIX, _LOCK = ".fxgrow", "lock"


@contextlib.contextmanager
def temporary_folder(target: Path) -> Iterator[Path]:
    """Makes a folder beside a file, and removes those of earlier writers of that file that were killed."""
    _remove_abandoned(target)
    with contextlib.ExitStack() as stack:
        folder = None
        while folder is None:  # another writer may take one without a lock for abandoned
            made = tempfile.TemporaryDirectory(_SUFFIX, f".{target.name}.", target.parent, ignore_cleanup_errors=True)
            folder = Path(stack.enter_context(made))
            try:
                lock = os.open(folder / _LOCK, os.O_RDWR | os.O_CREAT)
                stack.callback(os.close, lock)
                _lock(lock)
                os.stat(folder / _LOCK)
            except (BlockingIOError, FileNotFoundError):
                folder = None
            except OSError:
                pass  # a file system without locks
        yield folder


def _remove_abandoned(target: Path) -> None:
    ours = re.compile(re.escape(f".{target.name}.") + "[a-z0-9_]{8}" + re.escape(_SUFFIX))
    with contextlib.suppress(OSError):  # of a folder that can be written and not read
        for entry in os.scandir(target.parent):
            if ours.fullmatch(entry.name) and entry.is_dir(follow_symlinks=False):
                _remove_if_abandoned(Path(entry.path))


def _remove_if_abandoned(folder: Path) -> None:
    with contextlib.suppress(OSError):
        os.rmdir(folder)  # empty: its writer was killed before it could lock it
        return
    with contextlib.suppress(OSError):
        lock = os.open(folder / _LOCK, os.O_RDWR)
        try:
            _lock(lock)
            shutil.rmtree(folder, ignore_errors=True)
        finally:
            os.close(lock)


def _lock(descriptor: int) -> None:
    """Locks a file, until its descriptor is closed. Raises `OSError` where it is locked, or there are no locks."""
    if fcntl is None:
        raise OSError("This system has no locks on files.")
    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
