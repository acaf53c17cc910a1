"""Dense layers trained by hand, in NumPy and float64; used by tests only.

The reference for `stash="current"`: a backward with the activations of the
batch's own forward but with today's weights. That is no gradient of anything,
so no automatic differentiation can serve as its reference. Notation and the
order of forwards and backwards as in `reference_segments.py`.
"""

from collections.abc import Callable, Sequence

import keras
import numpy as np
from reference import find_layers
from reference_segments import run_schedule


class DenseByHand:
    """`a = f(x W + b)`, with f the identity, relu or tanh, and L2 on W."""

    SLOPES: dict[str, Callable[[np.ndarray], np.ndarray]] = {
        "linear": np.ones_like,
        "relu": lambda a: (a > 0).astype(a.dtype),
        "tanh": lambda a: 1 - a**2,
    }

    def __init__(self, layer: keras.layers.Dense):
        self.W, self.b = (v.numpy().astype("float64") for v in layer.variables)
        self.activation = layer.activation.__name__
        regularizer = layer.kernel_regularizer
        self.l2 = float(regularizer.l2) if regularizer else 0.0
        self.velocity = [np.zeros_like(self.W), np.zeros_like(self.b)]
        self.kept: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    def forward(self, t: int, x: np.ndarray) -> np.ndarray:
        z = x @ self.W + self.b
        a = {"linear": z, "relu": np.maximum(z, 0), "tanh": np.tanh(z)}
        self.kept[t] = (x, a[self.activation])
        return a[self.activation]

    def backward(self, b: int, da: np.ndarray):
        """dx through today's W, dW through the kept x and the kept slope."""
        x, a = self.kept.pop(b)
        dz = da * self.SLOPES[self.activation](a)
        dW = x.T @ dz + 2 * self.l2 * self.W
        return dz @ self.W.T, [dW, dz.sum(axis=0)]

    def update(self, gradients, learning_rate: float, momentum: float) -> None:
        for variable, velocity, gradient in zip(
            (self.W, self.b), self.velocity, gradients, strict=True
        ):
            velocity *= momentum
            velocity -= learning_rate * gradient
            variable += velocity


def train(
    model: keras.Sequential,
    groups: Sequence[Sequence[str]],
    batches: Sequence[tuple[np.ndarray, np.ndarray]],
    *,
    learning_rate: float,
    momentum: float,
    delay: int = 2,
    shrink: float = 1.0,
    order: str = "forward_first",
) -> tuple[list[np.ndarray], list[float]]:
    """One epoch with `stash="current"`; `model` stays as it is.

    The loss is the sparse softmax cross entropy of the last layer's outputs.
    Returns:
        The trained `[W, b, W, b ...]` and the loss of each batch.
    """
    stages = [[DenseByHand(x) for x in find_layers(model, g)] for g in groups]
    K = len(stages)
    layers = [layer for stage in stages for layer in stage]
    link: dict = {}
    losses: list[float] = []

    def forward(t):
        a, y = batches[t][0].astype("float64"), batches[t][1]
        for layer in layers:
            a = layer.forward(t, a)
        p = np.exp(a - a.max(axis=1, keepdims=True))
        p /= p.sum(axis=1, keepdims=True)
        rows = np.arange(len(y))
        l2 = sum(layer.l2 * (layer.W**2).sum() for layer in layers)
        losses.append(float(-np.log(p[rows, y]).mean() + l2))
        p[rows, y] -= 1
        link[K - 1, t] = p / len(y)

    def backward(k, b):
        gradient, updates = link.pop((k, b)), []
        for layer in reversed(stages[k]):
            gradient, gradients = layer.backward(b, gradient)
            updates.append((layer, gradients))
        for layer, gradients in updates:
            layer.update(gradients, learning_rate, momentum)
        if k > 0:
            link[k - 1, b] = shrink * gradient

    run_schedule(K, len(batches), delay, order, forward, backward)
    return [w for layer in layers for w in (layer.W, layer.b)], losses
