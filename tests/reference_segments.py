"""Stages that see nothing but what comes over their links; for tests only.

The design's first description of the training, where `reference.py` follows
the second; notation as there.
"""

from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np
import reference
import tensorflow as tf


class Segment:
    """A stage that is a chain of layers with one input and one output.

    It keeps of F(b) the input, the weights, and the state (seeds, BatchNorm
    statistics), and runs the forward again for B(b): with the kept weights
    ("exact") or with today's ("replay"), always from the kept state, and
    without moving the state a second time.
    """

    def __init__(self, layers, stash: str):
        assert stash in ("exact", "replay")
        self.layers = layers
        self.stash = stash
        self.weights = [v for x in layers for v in x.trainable_variables]
        self.state = [v for x in layers for v in x.non_trainable_variables]
        self.kept: dict[int, tuple] = {}

    def forward(self, b: int, inputs: tf.Tensor):
        """F(b): the output and the stage's own loss."""
        self.kept[b] = (inputs, _read(self.weights), _read(self.state))
        return self._run(inputs)

    def backward(self, b: int, output_gradient: tf.Tensor):
        """B(b) without the update: gradients of the weights and the input."""
        inputs, kept_weights, kept_state = self.kept.pop(b)
        weights, state = _read(self.weights), _read(self.state)
        if self.stash == "exact":
            _write(self.weights, kept_weights)
        _write(self.state, kept_state)
        with tf.GradientTape(persistent=True) as tape:
            if inputs.dtype.is_floating:
                tape.watch(inputs)
            outputs, own = self._run(inputs)
            # Its gradient is the backward of `outputs` and of `own`.
            descended = tf.reduce_sum(outputs * output_gradient) + own
        gradients = tape.gradient(descended, self.weights)
        input_gradient = None
        if inputs.dtype.is_floating:
            input_gradient = tape.gradient(descended, inputs)
        _write(self.weights, weights)
        _write(self.state, state)
        return gradients, input_gradient

    def _run(self, inputs: tf.Tensor):
        outputs = inputs
        for layer in self.layers:
            outputs = layer(outputs, training=True)
        return outputs, reference.own_loss(self.layers)


def _read(variables) -> list[np.ndarray]:
    return [v.numpy() for v in variables]


def _write(variables, values) -> None:
    for variable, value in zip(variables, values, strict=True):
        variable.assign(value)


def train(
    model: keras.Model,
    groups: Sequence[Sequence[str]],
    batches: Sequence[tuple],
    loss: Any,
    optimizer: keras.optimizers.Optimizer,
    *,
    stash: str = "exact",
    delay: int = 2,
    shrink: float = 1.0,
    order: str = "forward_first",
    epochs: int = 1,
) -> reference.Result:
    """Trains a chain of layers in place, stage by stage; args as there."""
    assert order in reference.ORDERS
    segments = [Segment(reference.find_layers(model, g), stash) for g in groups]
    K = len(segments)
    weights = [segment.weights for segment in segments]
    optimizers = reference.make_optimizers(optimizer, weights)
    result = reference.Result(
        [], reference.batch_sizes(batches), [], optimizers
    )

    for _ in range(epochs):
        result.losses.append([])
        result.outputs.append([])
        link: dict = {}  # link[k, b]: gradient for stage k's output, batch b

        def forward(t, link=link):
            x, y, sample_weight = (*batches[t], None)[:3]
            value, tensor = tf.zeros([]), tf.convert_to_tensor(x)
            for segment in segments:
                tensor, own = segment.forward(t, tensor)
                value += own
            with tf.GradientTape() as tape:
                tape.watch(tensor)
                main = reference.main_loss(loss, y, tensor, sample_weight)
            link[K - 1, t] = tape.gradient(main, tensor)
            result.losses[-1].append(float(value + main))
            result.outputs[-1].append([np.array(tensor)])

        def backward(k, b, link=link):
            gradient = link.pop((k, b))
            gradients, input_gradient = segments[k].backward(b, gradient)
            if k > 0:
                link[k - 1, b] = shrink * input_gradient
            reference.apply(optimizers[k], gradients, weights[k])

        run_schedule(K, len(batches), delay, order, forward, backward)
    return result


def run_schedule(
    K: int,
    n: int,
    delay: int,
    order: str,
    forward: Callable[[int], None],
    backward: Callable[[int, int], None],
) -> None:
    """Calls `forward(t)` for all stages and `backward(k, b)`, for n batches.

    The last stage comes first among the backwards of one tick, so that with
    delay=0 the gradient is there when the stage before wants it.
    """
    d = [delay * (K - 1 - k) for k in range(K)]
    backwards_first = [order == "update_first" and d[k] > 0 for k in range(K)]
    for t in range(n):
        for k in reversed(range(K)):
            if backwards_first[k] and t >= d[k]:
                backward(k, t - d[k])
        forward(t)
        for k in reversed(range(K)):
            if not backwards_first[k] and t >= d[k]:
                backward(k, t - d[k])
    for k in reversed(range(K)):
        for b in range(max(0, n - d[k]), n):
            backward(k, b)
