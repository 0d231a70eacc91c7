"""What a model's code may look at besides its inputs, parameters, buffers and mode: a graph does not see it.

A trace notes that the code has looked. Then its result may not depend on it: the model and its graph run again with
other random numbers, with gradients and so on, and must agree.
"""

from __future__ import annotations

import importlib
import random
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

#: a change for one run; takes the inputs and what runs a model on them, and gives the inputs that are run
Change = Callable[[list[Any], Callable[[list[Any]], Any]], AbstractContextManager[list[Any]]]


class Question(NamedTuple):
    """Something that the code has looked at."""

    what: str
    advice: str
    where: tuple[nn.Module, str] | None = None  # of an attribute: its module and name


RANDOM = Question(
    "numbers that its code draws from Python's `random` or from NumPy",
    "Draw them with torch.rand and choose with torch.where, or switch that part of the model off",
)
GRADIENTS = Question("whether gradients are recorded (requires_grad, grad_fn)", "Compute the same in both cases")
INFERENCE = Question("whether inference mode is on", "Compute the same in both cases")
OUTCOMES = Question("random decisions that come together", "Choose with torch.where")
STRIDES = Question("whether its inputs are contiguous", "Compute the same in both cases")
KEPT = Question("what it keeps from one call to the next", "Make that a buffer, or an input")
CLOCK = Question("the time", "Make that an input")
#: attributes of a tensor, and methods, that say so
ASKED_BY = {name: GRADIENTS for name in ("requires_grad", "grad_fn", "is_leaf", "is_grad_enabled")}
ASKED_BY |= {"is_inference": INFERENCE, "is_inference_mode_enabled": INFERENCE, "is_contiguous": STRIDES}
CLOCKS = ("time", "perf_counter", "monotonic")
ASKED_BY |= dict.fromkeys(CLOCKS, CLOCK)
_GENERATORS = {"Random", "Generator", "RandomState"}  # of Python, PyTorch and NumPy
# the first numbers of these seeds lie at the ends of (0, 1), of both generators; then any
_SEEDS = (3719, 5473, 1751, 1470, 1, 2, 3, 4)


def _numbers() -> dict[Any, tuple[str, str]]:
    names = {"random": "random uniform gauss normalvariate betavariate"}
    with suppress(ImportError):
        names[importlib.import_module("numpy.random").__name__] = "rand random random_sample uniform randn normal beta"
    found = ((home, name) for home in names for name in names[home].split())
    return {getattr(sys.modules[home], name): (home, name) for home, name in found}


#: functions of a number from the generators of Python and NumPy: their modules and names
NUMBERS = _numbers()


def counter(module: nn.Module, name: str) -> Question:
    """A number among the attributes of a module that a call of the model changes."""
    return Question(f"{type(module).__name__}.{name}, which each call changes", "Make that a buffer", (module, name))


def generators_of(model: nn.Module) -> list[Any]:
    """Random generators among the attributes of modules."""
    kept = [value for module in model.modules() for value in vars(module).values()]
    return [value for value in kept if type(value).__name__ in _GENERATORS]


def seed_all(generators: Sequence[Any], seed: int) -> None:
    """Seeds Python's and NumPy's generators, and those of a model."""
    numpy: Any = sys.modules.get("numpy")
    random.seed(seed)
    if numpy is not None:
        numpy.random.seed(seed)
    for generator in generators:
        if hasattr(generator, "bit_generator"):
            generator.bit_generator.state = type(generator.bit_generator)(seed).state
        elif isinstance(generator, torch.Generator):
            generator.manual_seed(seed)
        else:
            generator.seed(seed)


def changes(model: nn.Module, question: Question) -> Iterator[Change]:
    """Runs of the model in which it would get other answers."""
    if question is RANDOM:
        yield from (_during(partial(seed_all, generators_of(model), seed)) for seed in _SEEDS)
    elif question is OUTCOMES:
        generators = [*generators_of(model), torch.default_generator]
        yield from (_during(partial(seed_all, generators, seed)) for seed in _SEEDS)
    elif question is GRADIENTS:
        yield _inside(torch.enable_grad)
    elif question is INFERENCE:
        yield _inside(torch.inference_mode)
    elif question is STRIDES:
        yield _not_contiguous
    elif question is CLOCK:
        yield _later
    elif question is KEPT:
        yield _second_call
    elif question.where is not None:
        attributes, name = vars(question.where[0]), question.where[1]
        for value in (attributes[name] + 1, attributes[name] + 2, 10**6):
            yield partial(_other_count, attributes, name, type(attributes[name])(value))


def _during(before: Callable[[], None]) -> Change:
    @contextmanager
    def change(inputs: list[Any], run: Callable[[list[Any]], Any]) -> Iterator[list[Any]]:
        before()
        yield inputs

    return change


def _inside(mode: Callable[[], AbstractContextManager[Any]]) -> Change:
    @contextmanager
    def change(inputs: list[Any], run: Callable[[list[Any]], Any]) -> Iterator[list[Any]]:
        with mode():
            yield inputs

    return change


as_it_is: Change = _during(lambda: None)


@contextmanager
def _not_contiguous(inputs: list[Any], run: Callable[[list[Any]], Any]) -> Iterator[list[Any]]:
    def spread(x: Tensor) -> Tensor:
        return x.mT.contiguous().mT if x.dim() > 1 else x

    yield list(pytree.tree_map_only(Tensor, spread, inputs))


@contextmanager
def _second_call(inputs: list[Any], run: Callable[[list[Any]], Any]) -> Iterator[list[Any]]:
    run(pytree.tree_map_only(Tensor, torch.clone, inputs))
    yield inputs


@contextmanager
def _other_count(
    attributes: dict[str, Any], name: str, value: Any, inputs: list[Any], run: Callable[[list[Any]], Any]
) -> Iterator[list[Any]]:
    """Another number, if each call changes it; one that stays in a second call says what the model keeps."""
    run(pytree.tree_map_only(Tensor, torch.clone, inputs))
    kept = attributes[name]
    run(pytree.tree_map_only(Tensor, torch.clone, inputs))
    if attributes[name] != kept:
        attributes[name] = value
    yield inputs


@contextmanager
def _later(inputs: list[Any], run: Callable[[list[Any]], Any]) -> Iterator[list[Any]]:
    thread, clocks = threading.get_ident(), {name: getattr(time, name) for name in CLOCKS}
    try:
        for name, clock in clocks.items():
            setattr(time, name, lambda clock=clock: clock() + 1e7 * (threading.get_ident() == thread))
        yield inputs
    finally:
        vars(time).update(clocks)
