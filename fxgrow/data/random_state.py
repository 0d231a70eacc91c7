"""The state of random generators as plain data, and back: the global ones, those of a loader, and single ones."""

from __future__ import annotations

import contextlib
import logging
import random
import sys
from collections.abc import Iterator
from typing import Any

import torch

from fxgrow.errors import FileError

log = logging.getLogger("fxgrow")


def random_state(loader: Any = None) -> dict[str, Any]:
    """Of Python, PyTorch on the CPU and on devices in use, NumPy where it is imported, and a loader's generators."""
    state: dict[str, Any] = {"python": random.getstate(), "torch": torch.get_rng_state()}
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        state["cuda"] = torch.cuda.get_rng_state_all()
    if torch.backends.mps.is_available():
        state["mps"] = torch.mps.get_rng_state()
    numpy: Any = sys.modules.get("numpy.random")
    if numpy is not None:
        state["numpy"] = numpy.get_state(legacy=False)
    if loader is not None:
        state["loader"] = [g.get_state() for g in _generators(loader)]
    return state


def check_random_state(state: Any) -> None:
    """Raises `FileError` for what no generator here can take; of devices that are not here nothing is known."""
    mine = random_state()
    if not isinstance(state, dict) or not {"python", "torch"} <= state.keys() <= {*mine, "cuda", "mps", "numpy"}:
        raise FileError("The state of the random generators has other parts than Python's, PyTorch's and NumPy's.")
    for name in state.keys() & mine.keys() - {"cuda"}:
        _check_like(state[name], mine[name], f"the random state of {name}")
    devices = state.get("cuda", [])
    if not isinstance(devices, list) or not all(isinstance(t, torch.Tensor) for t in devices):
        raise FileError("The random states of the CUDA devices are no list of tensors.")


def _check_like(state: Any, mine: Any, where: str) -> None:
    """Refuses a state that is not built like a generator's own: NumPy reads memory at any position that it is given."""
    either = (type(None), float)  # a second number of a pair, which may be there or not
    wrong = type(state) is not type(mine) and not (isinstance(state, either) and isinstance(mine, either))
    if not wrong and isinstance(mine, dict):
        wrong = state.keys() != mine.keys()
        for key in () if wrong else mine:
            _check_like(state[key], mine[key], f"{where}/{key}")
            if key in ("pos", "buffer_pos"):
                wrong = wrong or not 0 <= state[key] <= len(mine["key" if key == "pos" else "buffer"])
    elif not wrong and isinstance(mine, (tuple, list)):
        wrong = len(state) != len(mine) or (mine[:1] == ("MT19937",) and not 0 <= int(state[2]) <= len(mine[1]))
        for i in () if wrong else range(len(mine)):
            _check_like(state[i], mine[i], f"{where}/{i}")
    elif not wrong and hasattr(mine, "dtype"):
        wrong = (state.shape, state.dtype) != (mine.shape, mine.dtype)
    elif not wrong and isinstance(mine, str):
        wrong = state != mine
    if wrong:
        raise FileError(f"A state is not one of this kind of random generator: {where}.")


def set_random_state(state: dict[str, Any], loader: Any = None) -> None:
    """The inverse; generators that this machine or process does not have are left out, with a warning."""
    random.setstate(state["python"])
    torch.set_rng_state(state["torch"])
    devices = state.get("cuda", [])
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if len(devices) > count:
        log.warning("random states of %d CUDA devices are in the checkpoint, and %d are here", len(devices), count)
    for number, of_device in enumerate(devices[:count]):
        torch.cuda.set_rng_state(of_device, number)
    if "mps" in state and torch.backends.mps.is_available():
        torch.mps.set_rng_state(state["mps"])
    if "numpy" in state:
        try:
            import numpy.random

            numpy.random.set_state(state["numpy"])
        except ImportError:
            log.warning("the random state of NumPy is in the checkpoint, and NumPy is not here")
    if loader is not None:
        for generator, of_loader in zip(_generators(loader), state["loader"], strict=True):
            generator.set_state(of_loader)


def _generators(loader: Any) -> list[torch.Generator]:
    """Those of a DataLoader and its samplers, each once."""
    batch_sampler = getattr(loader, "batch_sampler", None)
    places = (loader, getattr(loader, "sampler", None), batch_sampler, getattr(batch_sampler, "sampler", None))
    found = [getattr(place, "generator", None) for place in places]
    return list({id(g): g for g in found if isinstance(g, torch.Generator)}.values())


@contextlib.contextmanager
def random_state_kept() -> Iterator[None]:
    """Leaves all global random generators as they were, whatever a loss or a dropout layer draws."""
    state = random_state()
    try:
        yield
    finally:
        set_random_state(state)


def state_of(thing: Any) -> Any:
    """What an object with a state is saved as: that of a generator, its `state_dict()`, or itself."""
    if isinstance(thing, torch.Generator) or _is_legacy(thing):
        return thing.get_state()
    if isinstance(thing, random.Random):
        return thing.getstate()
    if _is_numpy_generator(thing):
        return thing.bit_generator.state
    return thing.state_dict() if hasattr(thing, "state_dict") else thing


def set_state_of(thing: Any, state: Any, name: str) -> None:
    """Puts a state back where it came from."""
    if isinstance(thing, (torch.Generator, random.Random)) or _is_numpy_generator(thing) or _is_legacy(thing):
        _check_like(state, state_of(thing), name)
    if isinstance(thing, torch.Generator) or _is_legacy(thing):
        thing.set_state(state)
    elif isinstance(thing, random.Random):
        thing.setstate(state)
    elif _is_numpy_generator(thing):
        thing.bit_generator.state = state
    elif hasattr(thing, "load_state_dict"):
        thing.load_state_dict(state)
    else:
        raise FileError(
            f"{name} is a {type(thing).__name__} without load_state_dict. Plain values are read as "
            f"checkpoint[{name!r}]."
        )


def _is_numpy_generator(thing: Any) -> bool:
    return type(thing).__module__.startswith("numpy.random") and hasattr(thing, "bit_generator")


def _is_legacy(thing: Any) -> bool:
    return type(thing).__module__.startswith("numpy.random") and type(thing).__name__ == "RandomState"
