"""Growing the pretrained CIFAR ResNet-20: on a new task (Fashion-MNIST) and on its own.

New task: the backbone keeps its CIFAR-10 weights, a new head is trained for one epoch, then the net grows by 25 % of
its parameters with each method under the same line search, and all of it trains for one more epoch. Every figure is a
paired difference over seeds (head initialisation, data order). Own task: growth on CIFAR-10's training images, which
the net nearly interpolates; test accuracy on all 10,000 test images.

    FXGROW_DATA=... python -m benchmarks.resnet20 [--seeds 5] [--images 6000] [--threads 2] [--own-only]
"""

from __future__ import annotations

import argparse
import math
import statistics
import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxgrow
from examples.data import Split, cifar10, fashion_mnist, resnet20_weights
from models import resnet20

METHODS = ("none", "default", "tiny", "random", "random-refit")


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


@torch.no_grad()
def evaluate(net: nn.Module, x: Tensor, y: Tensor) -> tuple[float, float]:
    """Cross-entropy and accuracy in eval mode."""
    was = net.training
    net.eval()
    logits = torch.cat([net(part) for part in x.split(500)])
    net.train(was)
    return float(F.cross_entropy(logits, y)), float((logits.argmax(1) == y).float().mean())


def train(net: nn.Module, parameters: list, data: list, lr: float) -> None:
    net.train()
    optimizer = torch.optim.SGD(parameters, lr, momentum=0.9, weight_decay=5e-4)
    for x, y in data:
        optimizer.zero_grad()
        F.cross_entropy(net(x), y).backward()
        optimizer.step()


def new_task(seed: int, images: int) -> dict[str, dict[str, float]]:
    """Held-back loss at once and after one more epoch, per method, for one seed."""
    split = fashion_as_rgb(images)
    torch.manual_seed(seed)
    net = resnet20()
    net.load_state_dict(resnet20_weights())
    net.linear = nn.Linear(net.linear.in_features, 10)
    order = torch.Generator().manual_seed(seed)
    train(net, list(net.linear.parameters()), batches(split.x_train, split.y_train, order), 0.05)
    profiled = batches(split.x_train, split.y_train, order)
    epoch = batches(split.x_train, split.y_train, order)
    out: dict[str, dict[str, float]] = {}
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
        row["now"], row["accuracy now"] = evaluate(grown, split.x_test, split.y_test)
        train(grown, list(grown.parameters()), epoch, 0.01)
        row["after"], row["accuracy after"] = evaluate(grown, split.x_test, split.y_test)
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


def own_task() -> None:
    """Growth on the task the net was trained for."""
    split = cifar10()
    net = resnet20()
    net.load_state_dict(resnet20_weights())
    net.eval()
    before = evaluate(net, split.x_test, split.y_test)
    grown = fxgrow.grow(net, batches(split.x_train, split.y_train), samples=4096, progress=False)
    after = evaluate(grown, split.x_test, split.y_test)
    record = grown.meta["fxgrow"]
    print("\nOwn task, CIFAR-10, 10,000 test images")
    print(f"  {'declined: ' + record.declined if record.declined else 'grown: ' + str(record.plan)}")
    print(f"  accuracy {100 * before[1]:.2f} % -> {100 * after[1]:.2f} %, loss {before[0]:.4f} -> {after[0]:.4f}")


def paired(rows: list[dict[str, dict[str, float]]], a: str, b: str, key: str) -> str:
    differences = [r[a][key] - r[b][key] for r in rows]
    error = statistics.stdev(differences) / math.sqrt(len(differences)) if len(differences) > 1 else float("nan")
    return f"{statistics.mean(differences):+.4f} +- {error:.4f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--images", type=int, default=6000)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--own-only", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    own_task()
    if arguments.own_only:
        return
    rows = []
    for seed in range(arguments.seeds):
        rows.append(new_task(seed, arguments.images))
        print(
            f"seed {seed}: " + "; ".join(f"{m} {r['now']:.4f} {r['after']:.4f}" for m, r in rows[-1].items()),
            flush=True,
        )
    print(f"\nNew task, Fashion-MNIST as 3x32x32, {arguments.images} training images, {arguments.seeds} seeds")
    print(
        f"  {'method':13s} {'parameters':>10s} {'units':>6s} {'gamma':>6s} {'loss now':>9s} {'acc now':>8s} "
        f"{'loss after':>10s} {'acc after':>9s} {'seconds':>8s}"
    )
    for method in METHODS:
        mean = {
            k: statistics.mean(r[method].get(k, 0.0) for r in rows)
            for k in ("parameters", "units", "gamma", "now", "accuracy now", "after", "accuracy after", "seconds")
        }
        print(
            f"  {method:13s} {mean['parameters']:10,.0f} {mean['units']:6.1f} {mean['gamma']:6.2f} {mean['now']:9.4f} "
            f"{100 * mean['accuracy now']:7.2f}% {mean['after']:10.4f} {100 * mean['accuracy after']:8.2f}% "
            f"{mean['seconds']:8.1f}"
        )
    print("  paired differences of the held-back loss, default minus the other (mean +- standard error):")
    for other in METHODS:
        if other != "default":
            print(
                f"    {other:13s} now {paired(rows, 'default', other, 'now')}   "
                f"after one epoch {paired(rows, 'default', other, 'after')}"
            )


if __name__ == "__main__":
    main()
