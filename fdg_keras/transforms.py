"""Gradient transformers: what happens to a gradient that arrives over a link.

A transformer acts on the gradient that arrives from the next stage, before
the backward. What it returns is also what flows further down, so a factor
accumulates hop by hop. A stage's own losses (regularizers, `add_loss`) and the
optimizer's weight decay do not pass through it.
"""

import math
import numbers
from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import tensorflow as tf


@runtime_checkable
class GradientTransformer(Protocol):
    """The interface of a gradient transformer.

    It is traced into the compiled loop of each stage but the last, so it is
    made of TensorFlow operations and holds no Python state between calls.
    """

    def __call__(self, gradients: Sequence[tf.Tensor]) -> Sequence[tf.Tensor]:
        """Transforms the gradients of one batch that arrived over one link.

        Args:
            gradients: Gradients of the loss with respect to the floating-point
                tensors that cross the cut, each of shape `[B, ...]` and of the
                dtype of its tensor.

        Returns:
            As many tensors of the same shapes and dtypes.
        """


class GradientShrinking:
    """Shrinks a delayed gradient by a constant factor at each hop.

    Symbols: `beta` is the argument, `g` a gradient that arrives over a link.

        g' = beta * g

    so that the gradient which reaches stage k (k = 0 ... K-1) has been
    multiplied by `beta ** (K - 1 - k)`: the staler, the smaller. Source: the
    gradient shrinking process of arXiv 1906.09108, where `beta` between 0.2
    and 0.8 gave the best test errors.

    Args:
        beta: Factor per hop, in (0, 1]; 1 leaves gradients alone.

    Raises:
        ValueError: If `beta` is not a real number in (0, 1].
    """

    def __init__(self, beta: float):
        if (
            isinstance(beta, bool)
            or not isinstance(beta, numbers.Real)
            or not math.isfinite(beta)
            or not 0 < beta <= 1
        ):
            raise ValueError(
                "`shrink` must be a number in (0, 1], the factor by which a "
                "gradient is multiplied at each hop (1 switches shrinking "
                f"off), or a gradient transformer. Received: {beta!r}"
            )
        self.beta: float = float(beta)

    def __call__(self, gradients: Sequence[tf.Tensor]) -> Sequence[tf.Tensor]:
        if self.beta == 1:
            return gradients
        return [g * tf.cast(self.beta, g.dtype) for g in gradients]

    def __repr__(self) -> str:
        return f"GradientShrinking(beta={self.beta:g})"


def get(shrink: float | GradientTransformer) -> GradientTransformer:
    """Returns the transformer that `shrink` stands for.

    Args:
        shrink: A number in (0, 1], or an object with the interface of
            `GradientTransformer`.

    Raises:
        ValueError: If it is neither.
    """
    # A class is callable, too, and a common slip.
    if callable(shrink) and not isinstance(shrink, type):
        return shrink
    return GradientShrinking(shrink)  # type: ignore[arg-type]


def apply(
    transform: GradientTransformer, gradients: Sequence[tf.Tensor]
) -> list[tf.Tensor]:
    """Returns the transformed gradients.

    Raises:
        ValueError: If they are not as many, of the same shapes and dtypes.
    """
    found = list(transform(gradients))
    wanted = [f"{t.dtype.name}{t.shape}" for t in gradients]
    received = [f"{t.dtype.name}{t.shape}" for t in found]
    fits = len(found) == len(gradients) and all(
        a.dtype == b.dtype and a.shape.is_compatible_with(b.shape)
        for a, b in zip(found, gradients)
    )
    if not fits:
        raise ValueError(
            "Expected a gradient transformer to return as many gradients as "
            f"it is given, of the same shapes and dtypes: {wanted}. Received "
            f"from {transform!r}: {received}"
        )
    return found
