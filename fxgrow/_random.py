"""The state of random generators as plain data, and back: the global ones, and any that are passed around."""

from __future__ import annotations

import logging
import random
import sys
from typing import Any

import torch

from fxgrow._errors import FileError

log = logging.getLogger("fxgrow")


def random_state() -> dict[str, Any]:
    """Of Python, PyTorch on the CPU and on devices in use, and NumPy where it is imported."""
    state: dict[str, Any] = {"python": random.getstate(), "torch": torch.get_rng_state()}
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        state["cuda"] = torch.cuda.get_rng_state_all()
    if torch.backends.mps.is_available():
        state["mps"] = torch.mps.get_rng_state()
    numpy: Any = sys.modules.get("numpy.random")
    if numpy is not None:
        state["numpy"] = numpy.get_state(legacy=False)
    return state


def set_random_state(state: dict[str, Any]) -> None:
    """The inverse; generators that this machine or process has not are left out, with a warning."""
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
        except ImportError:
            log.warning("the random state of NumPy is in the checkpoint, and NumPy is not here")
        else:
            numpy.random.set_state(state["numpy"])


def state_of(thing: Any) -> Any:
    """What an object with a state is saved as: that of a generator, its `state_dict()`, or itself."""
    if isinstance(thing, torch.Generator):
        return thing.get_state()
    if isinstance(thing, random.Random):
        return thing.getstate()
    if _is_numpy_generator(thing):
        return thing.bit_generator.state
    return thing.state_dict() if hasattr(thing, "state_dict") else thing


def set_state_of(thing: Any, state: Any, name: str) -> None:
    """Puts a state back where it came from.

    Raises:
        FileError: the object has no way to take it.
    """
    if isinstance(thing, torch.Generator):
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
