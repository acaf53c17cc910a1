"""How much memory a loss takes, as far as a model tells before it is fed."""

from collections.abc import Callable, Sequence
from typing import Any

import keras
import tensorflow as tf

from fdg_keras import recompute
from fdg_keras.liveness import most_alive
from fdg_keras.subgraphs import tensor_bytes


def loss_bytes(model: keras.Model, outputs: Sequence[tf.TensorSpec]) -> int:
    """Returns the most bytes that a loss and its gradient have at once.

    Outputs included, targets not. They are taken to be as large as outputs, or
    numbers of classes for a loss with "sparse" in its name. Of a loss for which
    that is not so nothing is counted.

    Args:
        model: A compiled model, or not.
        outputs: Shape and dtype of a batch of each of its outputs.
    """
    try:
        losses = _losses(model, len(outputs))
        used = [(one, spec) for one, spec in zip(losses, outputs) if one]
        graph = _gradients(used).graph if used else None
    except Exception:  # It is the user's, and made for other targets.
        return 0
    if graph is None:
        return 0
    sizes = tensor_bytes(graph, graph.inputs, graph.get_operations(), 1)
    before = {t.name for t in graph.inputs[len(used) :]}
    return most_alive(
        graph.outputs, (), before, sizes, (), in_place=recompute.CHEAP
    )


def _gradients(used: Sequence[tuple[Callable, tf.TensorSpec]]) -> Any:
    """Traces the gradients of losses by outputs, of outputs and targets."""

    def gradients(sent: list, targets: list) -> Any:
        with tf.GradientTape() as tape:
            tape.watch(sent)
            found = [
                tf.reduce_sum(loss(target, output))
                for (loss, _), target, output in zip(used, targets, sent)
            ]
        return tape.gradient(found, sent)

    sent = [spec for _, spec in used]
    targets = [_target(*each) for each in used]
    return tf.function(gradients, autograph=False).get_concrete_function(
        sent, targets
    )


def _losses(model: keras.Model, count: int) -> Sequence[Callable | None]:
    """Returns the loss of each output, `None` where that is not known."""
    loss = getattr(model, "loss", None)
    if isinstance(loss, dict):
        loss = [loss.get(name) for name in model.output_names]
    found = list(loss) if isinstance(loss, (list, tuple)) else [loss] * count
    return [None if one is None else keras.losses.get(one) for one in found]


def _target(loss: Callable, spec: tf.TensorSpec) -> tf.TensorSpec:
    name = getattr(loss, "__name__", type(loss).__name__)
    if "sparse" in name.lower() and spec.shape.rank:
        return tf.TensorSpec(spec.shape[:-1], tf.int32)
    return spec
