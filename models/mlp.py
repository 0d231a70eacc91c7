"""Multilayer perceptron."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor, nn

from ._scale import scaled


class MLP(nn.Module):
    """Linear layers with an activation between them; the inputs are flattened.

    Args:
        sizes: features of the input, of each hidden layer, and of the output.
        activation: makes the activation between two layers.
        width: factor on the hidden sizes.
    """

    def __init__(self, sizes: Sequence[int], activation: Callable[[], nn.Module] = nn.ReLU, width: float = 1.0) -> None:
        super().__init__()
        if len(sizes) < 2:
            raise ValueError(f"sizes needs an input and an output, got {list(sizes)}")
        sizes = [sizes[0], *(scaled(size, width) for size in sizes[1:-1]), sizes[-1]]
        self.layers = nn.ModuleList(nn.Linear(*pair) for pair in zip(sizes[:-1], sizes[1:], strict=True))
        self.activation = activation()

    def forward(self, x: Tensor) -> Tensor:
        """Maps [n, ...] to [n, sizes[-1]]."""
        x = x.flatten(1)
        for layer in self.layers[:-1]:
            x = self.activation(layer(x))
        return self.layers[-1](x)
