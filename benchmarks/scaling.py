"""How the cost of a profile grows with the network and the data, over that of a plain forward and backward pass.

CPU time of `fxgrow.profile`, from the captured graph to proposed units, over a plain forward and backward pass on the
same batches: in one process, taking turns, medians. Exponents are least-squares slopes of log time against log size.
*limit* is what the matrix products and convolutions alone would take: multiply-adds that PyTorch's counter sees in a
profile, and those of its Cholesky factors, over those of the plain pass.

Then one width of 512 channels between two 3x3 convolutions, grown with as many samples as `fxgrow.grow` reads by
default, in seconds; and peak memory beside that of a training step with Adam, each cell alone in a process.

    python -m benchmarks.scaling [--repetitions 3] [--threads 1] [--only width depth image samples grow memory]
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxgrow
from benchmarks._command_line import command_line, parse
from benchmarks._timing import cpu_times, multiply_adds, peak_during, peak_of
from models import MLP, ResNet
from models.vgg import vgg11

Batches = list[tuple[Tensor, Tensor]]
#: units proposed per width
UNITS = 8


@dataclass(frozen=True)
class Axis:
    """Networks and batches along one size."""

    title: str
    sizes: Sequence[int]
    make: Callable[[int], tuple[nn.Module, Batches]]


def rows(features: int, samples: int, batch: int = 128) -> Batches:
    return [(torch.randn(batch, features), torch.randint(10, (batch,))) for _ in range(samples // batch)]


def pictures(size: int, samples: int, batch: int = 32) -> Batches:
    return [(torch.randn(batch, 3, size, size), torch.randint(10, (batch,))) for _ in range(samples // batch)]


def small_conv() -> nn.Module:
    layers: list[nn.Module] = []
    for a, b in zip((3, 16, 16), (16, 16, 16), strict=True):
        layers += [nn.Conv2d(a, b, 3, padding=1, bias=False), nn.BatchNorm2d(b), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10))


AXES = {
    "width": Axis(
        "hidden features of an MLP 256-w-w-10, 2,048 samples",
        (64, 128, 256, 512, 1024, 2048),
        lambda w: (MLP((256, w, w, 10)), rows(256, 2048)),
    ),
    "depth": Axis(
        "hidden layers of 64 features, 2,048 samples",
        (4, 8, 16, 32, 64),
        lambda d: (MLP((64, *[64] * d, 10)), rows(64, 2048)),
    ),
    "image": Axis(
        "height of the images, three 3x3 convolutions of 16 channels, 128 images",
        (8, 16, 32, 64, 96),
        lambda s: (small_conv(), pictures(s, 128)),
    ),
    "samples": Axis(
        "samples, MLP 784-256-256-10",
        (256, 512, 1024, 2048, 4096, 8192),
        lambda n: (MLP((784, 256, 256, 10)), rows(784, n)),
    ),
}


def plain(net: nn.Module, data: Batches) -> None:
    for x, y in data:
        net.zero_grad()
        F.cross_entropy(net(x), y).backward()


def exponent(sizes: Sequence[float], values: Sequence[float]) -> float:
    """Slope of the least-squares line through the logarithms."""
    x, y = ([math.log(v) for v in values_] for values_ in (sizes, values))
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    return sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True)) / sum((a - mean_x) ** 2 for a in x)


def check_axis(axis: Axis, repetitions: int) -> None:
    print(f"**{axis.title}**\n")
    print("| size | plain | profile | ratio | limit |\n|---|---|---|---|---|", flush=True)
    found: list[tuple[float, float]] = []
    for size in axis.sizes:
        torch.manual_seed(0)
        net, data = axis.make(size)
        gm = fxgrow.capture(net, (data[0][0],))
        cells: dict[str, Callable[[], object]] = {
            "plain": lambda net=net, data=data: plain(net, data),
            "profile": lambda gm=gm, data=data: fxgrow.profile(gm, data, units=UNITS, progress=False),
        }
        seconds = cpu_times(cells, repetitions)
        limit = multiply_adds(cells["profile"]) / multiply_adds(cells["plain"])
        found.append((seconds["plain"], seconds["profile"]))
        shown = f"{1e3 * seconds['plain']:.0f} ms | {1e3 * seconds['profile']:.0f} ms"
        print(f"| {size} | {shown} | {seconds['profile'] / seconds['plain']:.2f} | {limit:.2f} |", flush=True)
    slopes = [exponent(axis.sizes, values) for values in zip(*found, strict=True)]
    print(f"| exponent | {slopes[0]:.2f} | {slopes[1]:.2f} | {slopes[1] - slopes[0]:+.2f} | |\n", flush=True)


# -- one large width


def large(samples: int) -> tuple[nn.Module, Batches]:
    """512 channels between two 3x3 convolutions on maps of 4x4, as in the last stage of a ResNet on CIFAR."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 128, 3, stride=4, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(128, 512, 3, padding=1, bias=False),
        nn.BatchNorm2d(512),
        nn.ReLU(),
        nn.Conv2d(512, 512, 3, padding=1, bias=False),
        nn.BatchNorm2d(512),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(512, 10),
    )
    return net, pictures(32, samples, 128)


def check_growth(samples: int) -> None:
    net, data = large(samples)
    gm = fxgrow.capture(net, (data[0][0],))
    name = "3"
    torch.set_num_threads(2)
    start, cpu = time.perf_counter(), time.process_time()
    plain(net, data)
    once = time.perf_counter() - start, time.process_time() - cpu
    start, cpu = time.perf_counter(), time.process_time()
    found = fxgrow.profile(gm, data, widths=[name], progress=False)
    profiled = time.perf_counter() - start
    fxgrow.apply(gm, fxgrow.plan(found, neurons={name: 64}))
    grown = time.perf_counter() - start, time.process_time() - cpu
    print(f"**A width of 512 channels between two 3x3 convolutions on 4x4 maps, {samples:,} samples, 2 threads**\n")
    print("| | wall time | CPU time |\n|---|---|---|")
    print(f"| plain forward and backward | {once[0]:.1f} s | {once[1]:.1f} s |")
    print(f"| profile, plan and rewrite, 64 units | {grown[0]:.1f} s ({profiled:.1f} s profile) | {grown[1]:.1f} s |")
    print("\nTarget: at most 60 s.\n", flush=True)


# -- memory


def deep() -> tuple[nn.Module, Batches]:
    return MLP((64, *[64] * 32, 10)), rows(64, 2048)


MEMORY: dict[str, Callable[[], tuple[nn.Module, Batches]]] = {
    "MLP 784-256-256-10, batches of 128": lambda: (MLP((784, 256, 256, 10)), rows(784, 2048)),
    "MLP 256-2048-2048-10, batches of 128": lambda: (MLP((256, 2048, 2048, 10)), rows(256, 2048)),
    "32 layers of 64, batches of 128": deep,
    "ResNet 16/32/64, one block each, 32x32, batches of 64": lambda: (
        ResNet((1, 1, 1), shortcut="conv"),
        pictures(32, 512, 64),
    ),
    "VGG-11 at a quarter, 32x32, batches of 64": lambda: (vgg11(0.25), pictures(32, 256, 64)),
    "512 channels between 3x3 convolutions, batches of 128": lambda: large(1024),
}


def memory_cell(key: str, kind: str) -> float:
    """Peak in MB of training steps with Adam, or of a profile."""
    net, data = MEMORY[key]()
    if kind == "train":
        optimizer = torch.optim.Adam(net.parameters())

        def steps() -> None:
            for x, y in data[:3]:
                optimizer.zero_grad()
                F.cross_entropy(net(x), y).backward()
                optimizer.step()

        return peak_during(steps)
    gm = fxgrow.capture(net, (data[0][0],))
    widths = ["3"] if key.startswith("512") else None
    return peak_during(lambda: fxgrow.profile(gm, data, widths=widths, units=UNITS, progress=False))


def check_memory() -> None:
    print("**Peak memory above model and data**\n")
    print("| net | parameters | training step | profile | over 1.5 times the step |\n|---|---|---|---|---|")
    for key, make in MEMORY.items():
        step, profile = (peak_of("benchmarks.scaling", ["--cell", key, kind]) for kind in ("train", "profile"))
        size = sum(p.numel() for p in make()[0].parameters())
        print(f"| {key} | {size:,} | {step:.0f} MB | {profile:.0f} MB | {profile - 1.5 * step:+.0f} MB |", flush=True)


def main() -> None:
    parts = (*AXES, "grow", "memory")
    parser = command_line(__doc__, only=parts)
    parser.add_argument("--repetitions", type=int, default=3, help="a cell is the median of so many (default: 3)")
    parser.add_argument("--samples", type=int, default=8192, help="for --only grow (default: 8192)")
    parser.add_argument("--cell", nargs=2, metavar=("NET", "KIND"), help="one cell alone, prints its peak in MB")
    arguments = parse(parser)
    if arguments.cell:
        print(memory_cell(*arguments.cell))
        return
    for name in arguments.only:
        if name == "grow":
            check_growth(arguments.samples)
        elif name == "memory":
            check_memory()
        else:
            check_axis(AXES[name], arguments.repetitions)


if __name__ == "__main__":
    main()
