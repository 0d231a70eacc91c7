"""Growth over two processes against growth in one with the data of both."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import fxgrow
from fxgrow.distributed import SINGLE_PROCESS, checksum, process_group_of
from tests.distributed.processes import EQUAL, ONE_BY_ONE, SINGLE, SIZES, joined, shard

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch was built without torch.distributed")
ROOT = Path(__file__).parents[2]
#: float64
CLOSE = 1e-10


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two processes found, for every case."""
    folder = tmp_path_factory.mktemp("processes")
    running = []
    for rank in range(2):
        environment = os.environ | {"RANK": str(rank), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-m", "tests.distributed.processes", str(folder)]
        running.append(
            subprocess.Popen(
                command, env=environment, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
            )
        )
    try:
        for process in running:
            output, _ = process.communicate(timeout=300)
            assert process.returncode == 0, output[-4000:]
    finally:
        for process in running:
            process.kill()
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


def close(found: Any, expected: Any) -> None:
    """Equal to rounding, tensors and numbers at any depth."""
    if isinstance(expected, Tensor):
        torch.testing.assert_close(found, expected, rtol=CLOSE, atol=CLOSE)
    elif isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for key in expected:
            close(found[key], expected[key])
    elif isinstance(expected, (tuple, list)):
        assert len(found) == len(expected)
        for mine, theirs in zip(found, expected, strict=True):
            close(mine, theirs)
    elif isinstance(expected, float):
        assert found == pytest.approx(expected, rel=1e-8, abs=CLOSE)
    else:
        assert found == expected


@pytest.mark.parametrize("name", [*EQUAL, *ONE_BY_ONE])
def test_two_processes_do_what_one_does_with_the_data_of_both(name: str, results: list[dict[str, Any]]) -> None:
    case, shape = (EQUAL | ONE_BY_ONE)[name]
    shards = [shard(rank, shape, SIZES.get(name, 16)) for rank in range(2)]
    alone = case(joined(*shards) if name in EQUAL else shards[0] + shards[1], {})
    for rank in range(2):
        found = results[rank][name]
        if name in ("ddp", "fsdp"):
            wrapped, found, alone_ = found[-1], found[:-1], alone[:-1]
            assert wrapped == ("DistributedDataParallel" if name == "ddp" else "FSDPGraphModule")
            assert len(found[-1]) == 2, "two growths"
            close(found, alone_)
        else:
            assert found[1], "something was added"
            close(found, alone)


@pytest.mark.parametrize("method", SINGLE)
def test_in_single_precision_they_differ_by_rounding(method: str, results: list[dict[str, Any]]) -> None:
    weights, *plan = SINGLE[method](joined(shard(0), shard(1)), {})
    expected = torch.cat([w.flatten() for w in weights.values()])
    for rank in range(2):
        found, *own = results[rank]["float32"][method]
        assert own[0] == plan[0] != {}, "the same units"
        difference = torch.cat([found[name].flatten() for name in weights]) - expected
        assert difference.norm() < 1e-6 * expected.norm()


@pytest.mark.parametrize("name", [*EQUAL, *ONE_BY_ONE])
def test_both_processes_have_the_same_bits(name: str, results: list[dict[str, Any]]) -> None:
    first, second = (r[name][0] for r in results)
    assert all(torch.equal(t, second[key]) for key, t in first.items())


@pytest.mark.parametrize(
    "name, first, second",
    [
        ("a loss that is no number", "InfiniteLossError: Process 1 of 2 failed: The", "InfiniteLossError: The loss"),
        ("other weights", "FxgrowError: Processes 0 and 1 have different values of '0.bias'", ""),
        ("other settings", "", ""),
        ("a shard of one batch", "ProfileError: 1 of 2 processes have a single batch", ""),
        ("no data", "ProfileError: Process 1 of 2 failed: The dataloader is empty", "ProfileError: The dataloader is"),
        ("a small budget", "SmallBudgetError: ", "SmallBudgetError: Process 0 of 2 failed: "),
        ("splitting", "ProfileError: method='splitting' reads the data in a way of its own", ""),
        ("moments", "ProfileError: keep_moments=True keeps the moments of one process", ""),
        ("skipped", "False True True", ""),
    ],
)  # fmt: skip
def test_an_error_of_one_is_raised_by_all(name: str, first: str, second: str, results: list[dict[str, Any]]) -> None:
    found = [r["failing"][name] for r in results]
    assert found[0].startswith(first), found
    assert found[1].startswith(second or first), found
    assert "nothing" not in found


def test_no_group_is_this_process_alone() -> None:
    assert process_group_of(None) is SINGLE_PROCESS
    with pytest.raises(fxgrow.FxgrowError, match="not initialised"):
        fxgrow.profile(nn.Linear(2, 2), [], process_group="gloo")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.int64, torch.bool])
def test_a_checksum_changes_with_every_bit_and_place(dtype: torch.dtype) -> None:
    t = torch.arange(24).reshape(4, 6).remainder(5).to(dtype)
    swapped, other = t.clone(), t.clone()
    swapped[0, 0], swapped[2, 3] = t[2, 3], t[0, 0]
    other.view(torch.uint8)[1, 1] ^= 1
    sums = [checksum(x) for x in (t, t.clone(), swapped, other)]
    assert sums[0] == sums[1]
    assert torch.equal(t, swapped) or sums[2] != sums[0]
    assert sums[3] != sums[0]


def torchrun(*arguments: str) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    # a store that restarts share has the addresses of those that died: pytorch/pytorch#135712
    alone = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)} | alone
    done = subprocess.run(
        [*command, "--max-restarts", "1", *arguments],
        env=environment, cwd=ROOT, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.mark.slow
def test_a_run_goes_on_when_a_process_is_killed_in_the_middle_of_a_growth(tmp_path: Path) -> None:
    pytest.importorskip("safetensors")
    found = {}
    for kind in ("kill", "none"):
        torchrun(
            "-m",
            "tests.distributed.killed",
            str(tmp_path / f"{kind}.safetensors"),
            str(tmp_path / f"{kind}.json"),
            kind,
        )
        found[kind] = json.loads((tmp_path / f"{kind}.json").read_text())
    assert found["kill"]["restarts"] == 1 and found["none"]["restarts"] == 0
    assert found["kill"]["shapes"] == found["none"]["shapes"]
    assert found["kill"]["loss"] == pytest.approx(found["none"]["loss"], abs=0.01)
