"""A venv with the packages of the benchmark, in the versions of `packages.txt`."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

PACKAGES = Path(__file__).parent / "packages.txt"


def install(folder: Path) -> None:
    """Makes the venv, or goes on where it stopped.

    PyTorch comes first; what follows is installed as listed, without dependencies, as some packages ask for another
    PyTorch or for CUDA.
    """
    if not (folder / "bin" / "python").exists():
        venv.create(folder, with_pip=True)
    python = str(folder.absolute() / "bin" / "python")
    torch = next(line for line in PACKAGES.read_text().splitlines() if line.startswith("torch=="))
    with tempfile.TemporaryDirectory() as scratch:
        constraint = Path(scratch) / "constraint.txt"
        constraint.write_text(torch)
        environment = {**os.environ, "PIP_CONSTRAINT": str(constraint)}
        pip = [python, "-m", "pip", "install", "--disable-pip-version-check"]
        subprocess.run([*pip, torch], check=True, env=environment)
        subprocess.run([*pip, "--no-deps", "-r", str(PACKAGES)], check=True, env=environment)
    for compiled in folder.glob("lib/python*/site-packages/torchaudio/lib"):
        # linked against CUDA: without it, torchaudio's Python code is used, with it torchaudio cannot be imported
        shutil.rmtree(compiled)
    print(f"{python} -m benchmarks.wild", file=sys.stderr)
