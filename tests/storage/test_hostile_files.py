"""Hostile files with checksums that fit: an error of fxgrow, or what was saved; no code, no memory, no other net."""

from __future__ import annotations

import ast
import copy
import json
import random
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import fxgrow
from tests.storage.hostile import CODE, FORMS, TEXTS, Net, Watch, contents, get, mutated, put

#: mutants of each of the kinds of file: 3,050 in all, of which the fast tests make one in twenty
MANY = {"model": 1200, "checkpoint": 800, "plan": 450, "schedule": 300, "state": 300}
FEW = {kind: n // 20 for kind, n in MANY.items()}
COUNTS = [pytest.param(FEW, id="few"), pytest.param(MANY, id="many", marks=pytest.mark.slow)]


@pytest.fixture(scope="module")
def watch() -> Watch:
    return Watch()


def inputs() -> dict[str, Any]:
    return {"x": torch.randn(3, 4, generator=torch.Generator().manual_seed(1)), "factor": 1.0}


def refused_or(check: Callable[[], None]) -> bool:
    """Whether fxgrow refuses it, for another reason than memory; all else is left to pytest."""
    try:
        check()
    except fxgrow.FxgrowError as error:
        assert "allocat" not in str(error) and len(str(error)) < 2000
        return True
    return False


class Files:
    """A grown net, its optimiser and its file."""

    def __init__(self, folder: Path) -> None:
        torch.manual_seed(0)
        self.path, self.mutant = folder / "net", folder / "mutant"
        self.net = fxgrow.widen(Net(), inputs(), {"up": 3, "embed": 2})
        self.optimizer = torch.optim.Adam(self.net.parameters())
        self.net(**inputs()).sum().backward()
        self.optimizer.step()
        self.expected = self.net.eval()(**inputs())

    def same(self, net: Any) -> None:
        assert torch.equal(net.eval()(**inputs()), self.expected)

    def load(self) -> None:
        self.same(fxgrow.load(Net(), self.mutant))

    def restore(self) -> None:
        """A checkpoint that is refused changes nothing."""
        ckpt = fxgrow.load_checkpoint(self.mutant)
        net = ckpt.model(Net())
        self.same(net)
        optimizer, generator = torch.optim.Adam(net.parameters()), torch.Generator()
        before = [copy.deepcopy(optimizer.state_dict()), generator.get_state(), torch.get_rng_state()]
        try:
            ckpt.restore(optimizer=optimizer, generator=generator)
        except fxgrow.FxgrowError:
            assert optimizer.state_dict() == before[0]
            assert torch.equal(generator.get_state(), before[1]) and torch.equal(torch.get_rng_state(), before[2])
            raise


@pytest.fixture
def files(tmp_path: Path) -> Files:
    return Files(tmp_path)


@pytest.mark.parametrize("counts", COUNTS)
@pytest.mark.parametrize("kind", ["model", "checkpoint"])
def test_mutants_of_files(kind: str, counts: dict[str, int], files: Files, watch: Watch) -> None:
    if kind == "model":
        fxgrow.save(files.net, files.path)
    else:
        generator = torch.Generator()
        fxgrow.save_checkpoint(files.path, files.net, optimizer=files.optimizer, generator=generator, epoch=3)
    body, tensors = contents(files.path)
    numbers, refused = random.Random(0), 0
    random_state = random.getstate()
    for _ in range(counts[kind]):
        put(files.mutant, mutated(body, numbers), tensors)
        with watch.on(files.path.parent):
            refused += refused_or(files.load if kind == "model" else files.restore)
    random.setstate(random_state)
    assert refused > counts[kind] * 0.5


def plan() -> str:
    batches = [(torch.randn(16, 4), torch.randn(16, 2)) for _ in range(4)]
    profile = fxgrow.profile(fxgrow.capture(Net(), (batches[0][0],)), batches, progress=False)
    return fxgrow.plan(profile, neurons=2).to_json()


def plain(data: Any) -> Any:
    """Numbers of JSON compare as numbers, lists and tuples alike."""
    return json.loads(json.dumps(data))


@pytest.mark.parametrize("counts", COUNTS)
def test_mutants_of_plans(counts: dict[str, int], tmp_path: Path, watch: Watch) -> None:
    """A plan says what its text says, and does it or is refused."""
    torch.manual_seed(0)
    data, numbers = json.loads(plan()), random.Random(0)
    net = fxgrow.capture(Net(), (torch.randn(3, 4),))

    def check() -> None:
        found = fxgrow.Plan.from_json(text)
        assert json.loads(found.to_json()) == {"bounded": {}, **json.loads(text)}  # that may be left out
        if sum(found.units.values()) < 2**20:
            grown = fxgrow.apply(net, found)
            assert grown(torch.randn(3, 4)).shape == (3, 2)

    for _ in range(counts["plan"]):
        text = json.dumps(mutated(data, numbers))
        with watch.on(tmp_path):
            refused_or(check)


SCHEDULE = (fxgrow.Every(steps=3) | fxgrow.OnPlateau(patience=2, min_delta=0.1)).until(total="+100%", declines=2) | (
    fxgrow.LayerByLayer({"up": 9, "embed": 8}, steps=4)
)


@pytest.mark.parametrize("counts", COUNTS)
def test_mutants_of_schedules(counts: dict[str, int], tmp_path: Path, watch: Watch) -> None:
    data, numbers = json.loads(SCHEDULE.to_json()), random.Random(0)

    def check() -> None:
        found = fxgrow.Schedule.from_json(text)
        assert fxgrow.Schedule.from_json(found.to_json()) == found

    for _ in range(counts["schedule"]):
        text = json.dumps(mutated(data, numbers))
        with watch.on(tmp_path):
            refused_or(check)


@pytest.mark.parametrize("counts", COUNTS)
def test_mutants_of_states_of_a_grower(counts: dict[str, int], tmp_path: Path, watch: Watch) -> None:
    """A state that is refused changes nothing; with any other the run goes on."""
    torch.manual_seed(0)
    batches = [(torch.randn(8, 4), torch.randn(8, 2)) for _ in range(3)]

    def grower() -> fxgrow.Grower:
        model = Net()
        return fxgrow.Grower(model, torch.optim.SGD(model.parameters(), 0.1), SCHEDULE, dataloader=batches, neurons=1)

    first = grower()
    for loss in (3.0, 2.0, 2.0, 2.0):
        first.step(loss)
    data, numbers = plain(first.state_dict()), random.Random(0)
    assert data["memory"] and data["history"]

    def check() -> None:
        again, before = grower(), None
        before = plain(again.state_dict())
        try:
            again.load_state_dict(state)
        except fxgrow.FxgrowError:
            assert plain(again.state_dict()) == before
            raise
        again.schedule.ask(again._status(False, again._process_group), again._schedule_state)

    for _ in range(counts["state"]):
        state = mutated(data, numbers)
        with watch.on(tmp_path):
            refused_or(check)


# -- by hand

Change = Callable[[Any], None]


def at(*path: Any) -> Callable[[Any], Change]:
    """Sets a value of the body."""

    def value(new: Any) -> Change:
        def change(body: Any) -> None:
            get(body, path[:-1])[path[-1]] = new

        return change

    return value


def renamed(*path: Any) -> Callable[[Any], Change]:
    """Renames a key of the body."""

    def to(new: Any) -> Change:
        def change(body: Any) -> None:
            owner = get(body, path[:-1])
            owner[new] = owner.pop(path[-1])

        return change

    return to


STEP = ("recipe", "steps", 0)
NUMBER, ATTRIBUTE = (*STEP, "numbers", 0), (*STEP, "attributes", 0)
#: where a text could reach code, the file system or an attribute
NAMES = {
    "keyword": at(*NUMBER, "path", 0), "target": at(*NUMBER, "place", "target"), "attribute": at(*ATTRIBUTE, "name"),
    "module": at(*ATTRIBUTE, "module"), "number": at(*NUMBER, "after"), "parameter": renamed(*STEP, "sizes", "up.bias"),
    "input": renamed("recipe", "example", "inputs", "dict", "factor"), "alias": renamed("aliases", "twin.bias"),
    "kind": at("kind"), "form": at("recipe", "into"), "extra": at("extra"), "layout": at("layouts"),
}  # fmt: skip
SIZES = {
    "size": at(*STEP, "sizes", "up.bias", 0, 2), "dimension": at(*STEP, "sizes", "up.bias", 0, 0),
    "argument": at(*NUMBER, "after"), "out_features": at(*ATTRIBUTE, "after"), "call": at(*NUMBER, "place", "nth"),
    "input": at("recipe", "example", "tensors", "inputs/x", "shape", 0), "version": at("version"),
}  # fmt: skip
BY_HAND = [(f"{place}: {text[:12]!a}", make(text)) for place, make in NAMES.items() for text in TEXTS[:8]]
BY_HAND += [(f"{place}: {n}", make(n)) for place, make in SIZES.items() for n in (-1, 2**40, 2**62, 1.5)]
BY_HAND += [(f"steps: {form}", at("recipe", "steps")(form)) for form in FORMS]
#: texts that are no body at all
TEXTS_BY_HAND = [
    "", "[]", "null", "{}", "{", '{"kind": "model"}', '{"version": 1, "kind": "model", "kind": "model"}',
    '{"extra": ' + "[" * 5000 + "]" * 5000 + "}", "[" * 100_000, "[0" + ",0" * 2_100_000 + "]", "9" * 5000, "NaN",
]  # fmt: skip


def test_files_by_hand(files: Files, watch: Watch) -> None:
    fxgrow.save(files.net, files.path)
    body, tensors = contents(files.path)
    assert len(BY_HAND) >= 100
    for name, change in BY_HAND:
        out = copy.deepcopy(body)
        change(out)
        put(files.mutant, out, tensors)
        with watch.on(files.path.parent):
            assert refused_or(files.load), name
    for text in TEXTS_BY_HAND:
        put(files.mutant, text, tensors)
        with watch.on(files.path.parent):
            assert refused_or(files.load), text[:100]


def header(path: Path, change: Callable[[Any], Any]) -> None:
    """Changes the header of a file of safetensors."""
    data = path.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    text = change(data[8 : 8 + length].decode())
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])


def entry(field: str, value: Any, name: str = "up.bias") -> Callable[[str], bytes]:
    def change(text: str) -> bytes:
        entries = json.loads(text)
        entries[name][field] = value
        return json.dumps(entries).encode()

    return change


HEADERS = [
    *(entry("shape", shape) for shape in ([2**62, 4], [-8], [8.0], [True] * 8, ["8"], [], [2**40], [1] * 70, 8, None)),
    *(entry("data_offsets", o) for o in ([0, 32], [0, 2**62], [-32, 0], [0], [1.0, 2.0], [2**64, 2**65], None)),
    *(entry("dtype", dtype) for dtype in ("F64", "F4", "os", None, 4, CODE)),
    lambda text: text.replace('"shape"', '"shape":[8],"shape"', 1).encode(),
    lambda text: b"[" * 100_000,
    lambda text: b"{" * 100_000,
    lambda text: text.rstrip().encode()[:-1],
    lambda text: b'{"__metadata__": {"fxgrow": 1}}',
    lambda text: b'{"a": NaN}',
    lambda text: b"\xff" + text.encode(),
]


@pytest.mark.parametrize("number", range(len(HEADERS)))
def test_headers_by_hand(number: int, files: Files, watch: Watch) -> None:
    fxgrow.save(files.net, files.mutant)
    header(files.mutant, HEADERS[number])
    with watch.on(files.path.parent):
        assert refused_or(files.load)


def test_pickles_are_read_in_one_place() -> None:
    """`torch.load` has weights_only=True; what the processes of one run send to each other is no file."""
    root = Path(fxgrow.__file__).parents[1]
    found = {}
    for folder in ("fxgrow", "examples", "benchmarks", "models", "docs"):
        for path in sorted((root / folder).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text())):
                called = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
                safe = isinstance(node, ast.Call) and "weights_only=True" in map(ast.unparse, node.keywords)
                unpickles = called in ("pickle.load", "pickle.loads", "pickle.Unpickler", "eval", "exec")
                if unpickles or (called == "torch.load" and not safe):
                    found[str(path.relative_to(root))] = called
    assert found == {"fxgrow/distributed.py": "torch.load", "fxgrow/statistics/forward_backward.py": "exec"}
