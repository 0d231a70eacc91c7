"""Run the ``>>>`` lines of the documentation: ``python -m docs.check [files]``."""

from __future__ import annotations

import doctest
import re
import sys
from pathlib import Path

FENCE = re.compile(r"^\s*```.*$", re.MULTILINE)


def failures(file: Path) -> tuple[int, int]:
    """Return how many examples of a file failed, and how many there are."""
    # doctest takes a closing fence for expected output; an empty line in its place ends that output.
    text = FENCE.sub("", file.read_text(encoding="utf-8"))
    test = doctest.DocTestParser().get_doctest(text, {"__name__": "__main__"}, str(file), str(file), 0)
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    # torch.fx.wrap remembers the namespace it was called in, so it must outlive the file.
    result = runner.run(test, clear_globs=False)
    return result.failed, result.attempted


def main(names: list[str]) -> int:
    """Check the named files, or all of the project's, and return the exit status."""
    files = [Path(name) for name in names] or [
        *(file for file in (Path("README.md"), Path("CONTRIBUTING.md")) if file.exists()),
        *sorted(Path("docs").rglob("*.md")),
    ]
    failed = 0
    for file in files:
        bad, total = failures(file)
        failed += bad
        print(f"{file}: {total - bad} of {total} examples")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
