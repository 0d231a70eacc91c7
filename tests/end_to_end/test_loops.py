"""The example loops: stopped between two growths and resumed, they end with the same weights, bit for bit."""

from __future__ import annotations

import importlib

import pytest
import torch

from examples.data import digits
from fxgrow.training.in_place import recipe_of

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]
NEEDS = {
    "plain": "safetensors",
    "lightning": "fxgrow.integrations.lightning",
    "transformers": "fxgrow.integrations.transformers",
    "accelerate": "fxgrow.integrations.accelerate",
}


@pytest.fixture(autouse=True)
def _deterministic():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("kind", NEEDS)
def test_a_resumed_run_ends_with_the_same_weights(kind, monkeypatch, tmp_path) -> None:
    pytest.importorskip(NEEDS[kind])
    loop = importlib.import_module(f"examples.loop_{kind}")
    stop = 2
    if kind == "transformers":
        for name, value in {"STEPS": 8, "EVERY": 2, "SAMPLES": 64}.items():
            monkeypatch.setattr(loop, name, value)
        stop = 5
    else:
        few = type(digits())(*(part[:640] for part in digits()))
        monkeypatch.setattr(loop, "digits", lambda: few)
        monkeypatch.setattr(loop, "EPOCHS", 5)
        monkeypatch.setattr(loop, "EVERY", 1)
    whole = loop.run()
    stopped = loop.run(tmp_path / "run", stop)
    assert 0 < len(recipe_of(stopped).steps) < len(recipe_of(whole).steps) == 3
    resumed = loop.run(resume=tmp_path / "run")
    assert recipe_of(resumed).steps == recipe_of(whole).steps
    same = resumed.state_dict()
    assert same.keys() == whole.state_dict().keys()
    for name, value in whole.state_dict().items():
        assert torch.equal(value, same[name]), name
