"""Growing the pretrained CIFAR ResNet-20: on a new task (Fashion-MNIST) and on its original one.

New task: the backbone keeps its CIFAR-10 weights, a new head is trained for one epoch, then the net grows by 25 % of
its parameters with each method under the same line search, and all of it trains for one more epoch. Every figure is a
paired difference over seeds (head initialisation, data order). Original task: growth on CIFAR-10's training images,
which the net nearly interpolates; test accuracy on all 10,000 test images.

    FXGROW_DATA=... python -m benchmarks.resnet20 [--seeds 5] [--images 6000] [--threads 2] [--original-only]
"""

from __future__ import annotations

import statistics
import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxgrow
from benchmarks._command_line import command_line, markdown, paired, parse
from benchmarks._small_nets import loss_and_accuracy
from examples.data import Split, cifar10, fashion_mnist, resnet20_weights
from models import resnet20

METHODS = ("none", "default", "tiny", "random", "random-refit")
#: columns of the table, and how their means over the seeds are printed; "now" is right after growth
COLUMNS = {
    "parameters": "{:,.0f}",
    "units": "{:.1f}",
    "gamma": "{:.2f}",
    "now": "{:.4f}",
    "accuracy now": "{:.2f} %",
    "after": "{:.4f}",
    "accuracy after": "{:.2f} %",
    "seconds": "{:.1f}",
}
Row = dict[str, dict[str, float]]


def fashion_as_rgb(images: int) -> Split:
    """Fashion-MNIST padded to 32x32, three channels, with the statistics the backbone was trained for."""
    split = fashion_mnist(images, 4000)
    mean = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
    std = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    rgb = [(F.pad(x, (2, 2, 2, 2)).expand(-1, 3, -1, -1) - mean) / std for x in (split.x_train, split.x_test)]
    return Split(rgb[0], split.y_train, rgb[1], split.y_test)


def batches(x: Tensor, y: Tensor, generator: torch.Generator | None = None, size: int = 128) -> list:
    order = torch.randperm(len(x), generator=generator) if generator is not None else torch.arange(len(x))
    return [(x[i], y[i]) for i in order.split(size)]


def train(net: nn.Module, parameters: list, data: list, lr: float) -> None:
    net.train()
    optimizer = torch.optim.SGD(parameters, lr, momentum=0.9, weight_decay=5e-4)
    for x, y in data:
        optimizer.zero_grad()
        F.cross_entropy(net(x), y).backward()
        optimizer.step()


def new_task(seed: int, images: int) -> Row:
    """Test loss and accuracy at once and after one more epoch, per method, for one seed."""
    split = fashion_as_rgb(images)
    torch.manual_seed(seed)
    net = resnet20()
    net.load_state_dict(resnet20_weights())
    net.linear = nn.Linear(net.linear.in_features, 10)
    order = torch.Generator().manual_seed(seed)
    train(net, list(net.linear.parameters()), batches(split.x_train, split.y_train, order), 0.05)
    profiled = batches(split.x_train, split.y_train, order)
    epoch = batches(split.x_train, split.y_train, order)
    out: Row = {}
    for method in METHODS:
        row: dict[str, float] = {}
        grown: nn.Module = fxgrow.capture(net, (split.x_train[:2],))
        if method != "none":
            grown = fxgrow.grow(net, profiled, method=method, samples=4096, progress=False, seed=seed)
            record = grown.meta["fxgrow"]
            row["gamma"] = record.plan.scale
            row["units"] = sum(record.plan.units.values())
            row["seconds"] = sum(record.seconds.values())
        else:
            grown = fxgrow.apply(grown, fxgrow.Plan({}))
        row["now"], row["accuracy now"] = loss_and_accuracy(grown, split.x_test, split.y_test)
        train(grown, list(grown.parameters()), epoch, 0.01)
        row["after"], row["accuracy after"] = loss_and_accuracy(grown, split.x_test, split.y_test)
        row["parameters"] = sum(p.numel() for p in grown.parameters())
        out[method] = row
        if method == "default" and seed == 0:
            print(onnx_agreement(grown, split.x_test), flush=True)
    return out


def onnx_agreement(net: nn.Module, x: Tensor) -> str:
    """Largest relative difference between the exported file in onnxruntime and the module, at batch sizes 1 and 7."""
    import onnxruntime

    errors = {}
    with tempfile.TemporaryDirectory() as folder:
        file = fxgrow.export_onnx(net, Path(folder) / "grown.onnx", (x[:7],), tolerance=1e-4)
        session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
        net.eval()
        for n in (1, 7):
            with torch.no_grad():
                expected = net(x[:n])
            (found,) = session.run(None, {session.get_inputs()[0].name: x[:n].numpy()})
            errors[n] = float((torch.from_numpy(found) - expected).abs().max() / expected.abs().max())
    return f"ONNX against the module, relative: batch 1 {errors[1]:.1e}, batch 7 {errors[7]:.1e}"


def original_task() -> None:
    """Growth on the task the net was trained for."""
    split = cifar10()
    net = resnet20()
    net.load_state_dict(resnet20_weights())
    net.eval()
    before = loss_and_accuracy(net, split.x_test, split.y_test)
    grown = fxgrow.grow(net, batches(split.x_train, split.y_train), samples=4096, progress=False)
    after = loss_and_accuracy(grown, split.x_test, split.y_test)
    record = grown.meta["fxgrow"]
    print("\nOriginal task, CIFAR-10, 10,000 test images")
    print(f"  {'declined: ' + record.declined if record.declined else 'grown: ' + str(record.plan)}")
    print(f"  accuracy {before[1]:.2f} % -> {after[1]:.2f} %, loss {before[0]:.4f} -> {after[0]:.4f}")


def default_minus(rows: list[Row], other: str, key: str) -> str:
    mean, error = paired([r["default"][key] for r in rows], [r[other][key] for r in rows])
    return f"{mean:+.4f} ± {error:.4f}"


def cells(rows: list[Row], method: str) -> list[str]:
    """Means over the seeds, one for each of `COLUMNS`."""
    return [form.format(statistics.mean(r[method].get(key, 0.0) for r in rows)) for key, form in COLUMNS.items()]


def main() -> None:
    parser = command_line(__doc__, seeds=5, threads=2)
    parser.add_argument("--images", type=int, default=6000, help="of the new task, to train on (default: 6000)")
    parser.add_argument("--original-only", action="store_true", help="leave the new task out")
    arguments = parse(parser)
    original_task()
    if arguments.original_only:
        return
    rows = []
    for seed in arguments.seeds:
        rows.append(new_task(seed, arguments.images))
        losses = "; ".join(f"{m} {r['now']:.4f} {r['after']:.4f}" for m, r in rows[-1].items())
        print(f"seed {seed}: {losses}", flush=True)
    print(f"\nNew task, Fashion-MNIST as 3x32x32, {arguments.images} training images, {len(rows)} seeds\n")
    print(markdown(["method", *COLUMNS], [[method, *cells(rows, method)] for method in METHODS]))
    print("\nHeld-out loss, default minus the other (mean ± standard error)\n")
    others = [m for m in METHODS if m != "default"]
    lines = [[m, *(default_minus(rows, m, key) for key in ("now", "after"))] for m in others]
    print(markdown(["other", "at once", "after an epoch"], lines))


if __name__ == "__main__":
    main()
