"""Side by side with gromo, the library of the published method's authors: the same units, and what they cost.

Agreement: `fxgrow.profile(method="tiny", positions="all")` and gromo on the same network and batches in float64.
Cost: CPU time of profiling and solving over that of a plain forward and backward pass on the same batches, all in one
process, taking turns, medians; *limit*: the same ratio in multiply-adds of matrix products, convolutions and Cholesky
factors. `profile` is timed end to end, from the captured graph to proposed units inside a
checked candidate network; gromo from `init_computation` to `compute_optimal_updates` of every layer, without any
analysis of the network: its layers are put in by hand below. gromo serves the widths between two layers with only
elementwise operators between them; fxgrow is timed on the same widths and on all of them. What takes over 10 s is
run once. Memory is how far the resident size of a process rises above model and data while it does one cell alone, for
the first time.

    pip install 'fxgrow[peers]'
    python -m benchmarks.gromo [--repetitions 5] [--threads 1 2] [--only mlp resnet vgg gpt]
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxgrow
from benchmarks._command_line import command_line, parse
from benchmarks._timing import cpu_times, multiply_adds, peak_during, peak_of
from models.gpt import GPT
from models.mlp import MLP
from models.resnet import ResNet
from models.vgg import vgg11

try:
    from gromo.modules.conv2d_growing_module import FullConv2dGrowingModule, RestrictedConv2dGrowingModule
    from gromo.modules.linear_growing_module import LinearGrowingModule
    from gromo.utils.utils import set_device

    INSTALLED = True
except ImportError:
    INSTALLED = False

Batches = list[tuple[Tensor, Tensor]]
#: units per width, for both
UNITS = 8


# -- gromo


def with_gromo(
    net: nn.Module, pairs: list[tuple[str, str]], example: Tensor, restricted: bool = False
) -> tuple[nn.Module, list[nn.Module]]:
    """A copy of `net` whose producers and consumers are gromo's layers with the same weights, and the consumers.

    `restricted`: new units of a convolution get outgoing weights at the centre of the kernel only.
    """
    net = copy.deepcopy(net)
    shapes: dict[str, torch.Size] = {}
    hooks = [
        net.get_submodule(name).register_forward_pre_hook(lambda m, i, name=name: shapes.update({name: i[0].shape}))
        for pair in pairs
        for name in pair
    ]
    net(example)
    for hook in hooks:
        hook.remove()
    made: dict[str, nn.Module] = {}
    for producer, consumer in pairs:
        for name in (producer, consumer):
            if name not in made:
                made[name] = _layer(net.get_submodule(name), shapes[name], name, restricted)
                parent, _, leaf = name.rpartition(".")
                setattr(net.get_submodule(parent), leaf, made[name])
        made[consumer].previous_module = made[producer]
        made[producer].next_module = made[consumer]
    return net, [made[consumer] for _, consumer in pairs]


def _layer(layer: nn.Module, shape: torch.Size, name: str, restricted: bool) -> nn.Module:
    bias = layer.bias is not None
    if isinstance(layer, nn.Linear):
        out: nn.Module = LinearGrowingModule(layer.in_features, layer.out_features, use_bias=bias, name=name)
    elif isinstance(layer, nn.Conv2d):
        out = (RestrictedConv2dGrowingModule if restricted else FullConv2dGrowingModule)(
            layer.in_channels,
            layer.out_channels,
            layer.kernel_size,
            stride=layer.stride,
            padding=layer.padding[0],
            use_bias=bias,
            input_size=tuple(shape[2:]),
            name=name,
        )
    else:
        raise TypeError(f"gromo has no layer like {type(layer).__name__}")
    out.layer.load_state_dict(layer.state_dict())
    return out


def loss_of(out: Tensor, y: Tensor) -> Tensor:
    """Cross-entropy of classes or tokens."""
    return F.cross_entropy(out.flatten(0, -2), y.flatten())


def grow_with_gromo(net: nn.Module, consumers: list[nn.Module], data: Batches, k: int, exact: bool = False) -> None:
    """Statistics over all batches in one pass, then the units of every width. `exact`: without its cut-offs."""
    for consumer in consumers:
        consumer.init_computation()
    for x, y in data:
        net.zero_grad()
        loss_of(net(x), y).backward()
        for consumer in consumers:
            consumer.update_computation()
    cut = {"numerical_threshold": 1e-15, "statistical_threshold": 0.0, "dtype": torch.float64} if exact else {}
    for consumer in consumers:
        consumer.compute_optimal_updates(maximum_added_neurons=k, **cut)


def forget(consumers: list[nn.Module]) -> None:
    """Makes gromo's layers ready to be measured again."""
    for consumer in consumers:
        consumer.reset_computation()
        consumer.delete_update()


# -- agreement


@contextmanager
def float64() -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def difference(found: Tensor, expected: Tensor) -> float:
    return float(((found - expected).norm() / expected.norm()).detach())


def agreement(name: str, net: nn.Module, pair: tuple[str, str], data: Batches, k: int = 3) -> float:
    """Prints and returns the largest relative difference of singular values and of the new weights' product."""
    twin, (consumer,) = with_gromo(net, [pair], data[0][0])
    grow_with_gromo(twin, [consumer], data, k, exact=True)
    gm = fxgrow.capture(net, (data[0][0],))
    profile = fxgrow.profile(gm, data, method="tiny", positions="all", widths=[pair[0]], units=k, progress=False)
    grown = fxgrow.apply(gm, fxgrow.plan(profile, neurons=k, update_existing=False))
    into, out = grown.get_submodule(pair[0]), grown.get_submodule(pair[1])
    size = profile[pair[0]].width.size
    alpha, omega = into.weight[size:].flatten(1), out.weight[:, size:]
    theirs = twin.get_submodule(pair[0]).extended_output_layer
    their_alpha, their_omega = theirs.weight.flatten(1), consumer.extended_input_layer.weight
    if into.bias is not None:
        alpha = torch.cat([alpha, into.bias[size:, None]], 1)
        their_alpha = torch.cat([their_alpha, theirs.bias[:, None]], 1)
    # its gradients are those of the mean over the batch, ours of each sample
    batch = len(data[0][0])
    values = difference(torch.tensor(profile[pair[0]].singular_values[:k]) / batch, consumer.eigenvalues_extension)
    product, their_product = (
        torch.einsum("kp,ok...->po...", a, o) for a, o in ((alpha, omega), (their_alpha, their_omega))
    )
    units = difference(product / batch, their_product)
    print(f"| {name} | {values:.0e} | {units:.0e} |")
    return max(values, units)


def check_agreement() -> None:
    print("gromo against fxgrow, tiny, float64, all positions, rank 3: relative differences\n")
    print("| case | singular values | product of the new weights |\n|---|---|---|")
    with float64():
        torch.manual_seed(0)
        labels = [torch.randint(5, (32,)) for _ in range(4)]
        rows = [(torch.randn(32, 9), y) for y in labels]
        images = [(torch.randn(32, 2, 8, 8), y) for y in labels]

        def conv(stride: int, kernel: int, bias: bool, activation: nn.Module) -> nn.Module:
            return nn.Sequential(
                nn.Conv2d(2, 3, 3, stride=stride, padding=1, bias=bias),
                activation,
                nn.Conv2d(3, 4, kernel, padding=kernel // 2, bias=bias),
                nn.Flatten(),
                nn.Linear(4 * (8 // stride) ** 2, 5),
            )

        def dense(activation: nn.Module, bias: bool) -> nn.Module:
            return nn.Sequential(nn.Linear(9, 6, bias), activation, nn.Linear(6, 5, bias))

        worst = max(
            agreement("Linear to Linear, bias, ReLU", dense(nn.ReLU(), True), ("0", "2"), rows),
            agreement("Linear to Linear, no bias, GELU", dense(nn.GELU(), False), ("0", "2"), rows),
            agreement("Conv 3x3 to 3x3, bias, ReLU", conv(1, 3, True, nn.ReLU()), ("0", "2"), images),
            agreement("Conv 3x3 stride 2 to 3x3, no bias, tanh", conv(2, 3, False, nn.Tanh()), ("0", "2"), images),
            agreement("Conv 3x3 to 5x5, bias, ReLU", conv(1, 5, True, nn.ReLU()), ("0", "2"), images),
        )
    print(f"\nlargest: {worst:.0e} ({'agrees' if worst < 1e-6 else 'DISAGREES'}: limit 1e-6)\n")


# -- cost


@dataclass(frozen=True)
class Case:
    """A network, its batches, the pairs of layers gromo can serve, and what the cost of ours may be."""

    title: str
    make: Callable[[], nn.Module]
    data: Callable[[], Batches]
    pairs: list[tuple[str, str]]
    limit: float


def _images(batches: int, size: int) -> Batches:
    return [(torch.randn(size, 3, 32, 32), torch.randint(10, (size,))) for _ in range(batches)]


CASES = {
    "mlp": Case(
        "MLP 784-256-256-10, 2048 samples in batches of 128",
        lambda: MLP((784, 256, 256, 10)),
        lambda: [(torch.randn(128, 784), torch.randint(10, (128,))) for _ in range(16)],
        [("layers.0", "layers.1"), ("layers.1", "layers.2")],
        1.7,
    ),
    "resnet": Case(
        "ResNet 16/32/64, one block each, 512 images of 32x32 in batches of 64",
        lambda: ResNet((1, 1, 1), shortcut="conv"),
        lambda: _images(8, 64),
        [(f"layer{i}.0.conv1", f"layer{i}.0.conv2") for i in (1, 2, 3)],
        1.5,
    ),
    "vgg": Case(
        "VGG-11 at a quarter of its widths, 256 images of 32x32 in batches of 64",
        lambda: vgg11(0.25),
        lambda: _images(4, 64),
        [("features.6", "features.8"), ("features.11", "features.13"), ("features.16", "features.18")],
        3.0,
    ),
    "gpt": Case(
        "GPT of 4 blocks, stream 64, perceptrons 256, 256 sequences of 64 tokens in batches of 16",
        lambda: GPT(),
        lambda: [(torch.randint(65, (16, 64)), torch.randint(65, (16, 64))) for _ in range(16)],
        [(f"blocks.{i}.mlp.0", f"blocks.{i}.mlp.2") for i in range(4)],
        1.1,
    ),
}


def cells(case: Case) -> dict[str, Callable[[], object]]:
    """The plain pass and every way to profile."""
    torch.manual_seed(0)
    net, data = case.make(), case.data()
    gm = fxgrow.capture(net, (data[0][0],))
    same = [producer for producer, _ in case.pairs]
    every = [w.name for w in fxgrow.widths(gm) if w.pinned is None]

    def plain() -> None:
        for x, y in data:
            net.zero_grad()
            loss_of(net(x), y).backward()

    def gromo(restricted: bool) -> Callable[[], object]:
        twin, consumers = with_gromo(net, case.pairs, data[0][0], restricted)

        def work() -> None:
            grow_with_gromo(twin, consumers, data, UNITS)
            forget(consumers)

        return work

    def ours(method: str, widths: list[str]) -> Callable[[], object]:
        return lambda: fxgrow.profile(gm, data, method=method, widths=widths, units=UNITS, progress=False)

    found: dict[str, Callable[[], object]] = {
        "plain forward and backward": plain,
        f"gromo, {len(same)} widths": gromo(restricted=False),
    }
    if any(isinstance(net.get_submodule(name), nn.Conv2d) for name in same):
        found[f"gromo restricted to centre taps, {len(same)} widths"] = gromo(restricted=True)
    # heads and streams of a transformer mix units, and are another matter
    for widths in (
        [same] if same == every or not any(isinstance(m, nn.Conv2d) for m in net.modules()) else [same, every]
    ):
        for method in ("tiny", "default"):
            found[f"fxgrow {method}, {len(widths)} widths"] = ours(method, widths)
    return found


def check_cost(key: str, repetitions: int, threads: list[int]) -> None:
    case = CASES[key]
    print(f"**{case.title}**\n")
    times = {}
    for n in threads:
        torch.set_num_threads(n)
        times[n] = cpu_times(cells(case), repetitions)
    names = list(times[threads[0]])
    torch.manual_seed(0)
    work = cells(case)
    # gromo's own arithmetic is not asked for: some of it takes minutes
    limits = {n: multiply_adds(w) / multiply_adds(work[names[0]]) for n, w in work.items() if n.startswith("fxgrow")}
    peaks = [peak_of("benchmarks.gromo", ["--cell", key, str(i)]) for i in range(len(names))]
    print("| | " + " | ".join(f"{n} thread{'s'[: n > 1]}" for n in threads) + " | limit | peak memory |")
    print("|---|" + "---|" * (len(threads) + 2))
    for name, peak in zip(names, peaks, strict=True):
        plain = name == names[0]
        shown = [
            f"{1e3 * times[n][name]:.0f} ms" if plain else f"{times[n][name] / times[n][names[0]]:.2f}" for n in threads
        ]
        limit = f"{limits[name]:.2f}" if name in limits else ""
        print(f"| {name} | " + " | ".join(shown) + f" | {limit} | {peak:.0f} MB |", flush=True)
    print(f"\nTarget for fxgrow at the same widths: at most {case.limit}.\n", flush=True)


def main() -> None:
    parser = command_line(__doc__, threads=None, only=CASES)
    parser.add_argument("--repetitions", type=int, default=5, help="a cell is the median of so many (default: 5)")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2], help="a column for each number")
    parser.add_argument("--cell", nargs=2, metavar=("CASE", "NUMBER"), help="one cell alone, prints its peak in MB")
    arguments = parse(parser)
    if not INSTALLED:
        sys.exit("This benchmark needs gromo, which is not installed: pip install 'fxgrow[peers]' (gromo 0.1.0).")
    set_device(torch.device("cpu"))
    if arguments.cell:
        torch.set_num_threads(1)
        work = list(cells(CASES[arguments.cell[0]]).values())[int(arguments.cell[1])]
        print(peak_during(work))
        return
    check_agreement()
    for key in arguments.only:
        check_cost(key, arguments.repetitions, arguments.threads)


if __name__ == "__main__":
    main()
