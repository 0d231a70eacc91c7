"""Random states: one list of generators, for checkpoints and for readers that leave no trace."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

import fxgrow
from fxgrow.data.batches import Data
from fxgrow.data.random_state import (
    check_random_state,
    random_state,
    random_state_kept,
    set_random_state,
    set_state_of,
)


@pytest.fixture
def devices(monkeypatch: pytest.MonkeyPatch) -> dict[Any, int]:
    """Two CUDA devices and MPS that are not here; their states are numbers."""
    states: dict[Any, int] = {0: 1, 1: 2, "mps": 3}
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.is_initialized", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setattr("torch.cuda.get_rng_state_all", lambda: [states[0], states[1]])
    monkeypatch.setattr("torch.cuda.set_rng_state", lambda state, number: states.update({number: state}))
    monkeypatch.setattr("torch.backends.mps.is_available", lambda: True)
    monkeypatch.setattr("torch.mps.get_rng_state", lambda: states["mps"])
    monkeypatch.setattr("torch.mps.set_rng_state", lambda state: states.update(mps=state))
    return states


class Reader:
    """Batches that draw from every generator on the way."""

    def __init__(self, devices: dict[Any, int]) -> None:
        self.devices, self.generator = devices, torch.Generator().manual_seed(0)

    def draw(self) -> list[float]:
        for name in self.devices:
            self.devices[name] += 10
        return [
            random.random(), float(np.random.rand()), float(torch.rand(())),
            float(torch.rand((), generator=self.generator)), *map(float, self.devices.values()),
        ]  # fmt: skip

    def __iter__(self) -> Any:
        for _ in range(3):
            yield torch.tensor([self.draw()]), torch.zeros(1)


def test_a_checkpoint_goes_on_with_the_same_numbers(devices: dict[Any, int]) -> None:
    reader = Reader(devices)
    state = random_state(reader)
    assert state.keys() == {"python", "torch", "cuda", "mps", "numpy", "loader"}
    expected = reader.draw()
    assert expected != reader.draw()
    set_random_state(state, reader)
    assert reader.draw() == expected


def test_a_function_leaves_the_global_generators_as_they_were(devices: dict[Any, int]) -> None:
    reader = Reader(devices)

    @random_state_kept()
    def drawn() -> list[float]:
        return reader.draw()

    first, second = drawn(), drawn()
    assert first[3] != second[3]  # a loader's own generator is not global
    assert first[:3] + first[4:] == second[:3] + second[4:]


def test_every_pass_over_data_draws_the_same_and_leaves_all_generators_as_they_were(devices: dict[Any, int]) -> None:
    reader = Reader(devices)
    data = Data(reader)
    before = random_state(reader)
    passes = [[b.inputs[0].tolist() for b in data] for _ in range(2)]
    assert passes[0] == passes[1] and len(passes[0]) == 3
    set_random_state(before, reader)
    expected = reader.draw()
    set_random_state(before, reader)
    list(data)
    assert reader.draw() == expected


def test_generators_of_a_loader_and_of_its_samplers() -> None:
    own = torch.Generator().manual_seed(0)
    loader = DataLoader(TensorDataset(torch.arange(8)), 2, shuffle=True, generator=own)
    (state,) = random_state(loader)["loader"]  # the sampler holds the same one
    assert torch.equal(state, own.get_state())


def test_positions_beyond_the_buffer_of_a_generator_are_refused() -> None:
    """NumPy takes any position, and reads the memory there."""
    legacy, philox = np.random.RandomState(0), np.random.Generator(np.random.Philox(0))
    name, key, _, *rest = legacy.get_state()
    far = {**philox.bit_generator.state, "buffer_pos": 10**6}
    for thing, state in ((legacy, (name, key, 10**8, *rest)), (philox, far), (legacy, "MT19937"), (philox, {})):
        with pytest.raises(fxgrow.FileError, match="not one of this kind of random generator"):
            set_state_of(thing, state, "generator")
    whole = random_state()
    assert isinstance(whole["numpy"], dict)
    whole["numpy"]["state"]["pos"] = 625
    with pytest.raises(fxgrow.FileError, match="the random state of numpy/state"):
        check_random_state(whole)
