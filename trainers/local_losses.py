"""Decoupled greedy learning (DGL): each stage has a loss of its own.

At each cut an auxiliary head computes logits from what crosses it, and a layer
adds their loss, by labels that are a second input of the model. Behind the cut
no gradient goes back. So all that a stage needs is there once its forward has
run: with `delay=0` no stage waits for the one after it, and each is trained as
if by back-propagation. Source: Belilovsky, Eickenberg, Oyallon, "Decoupled
Greedy Learning of CNNs" (arXiv 1901.08164).

Deviation: the head is the network's own, average pooling and one dense layer;
the paper's have hidden layers. Nothing in the engine knows of all this: it
trains a model with two inputs whose layers add losses.
"""

import re
from collections.abc import Callable, Sequence
from typing import Any

import keras
import tensorflow as tf
from keras import KerasTensor

from fdg_keras.planning import choose_cuts
from fdg_keras.slicing import trace_graph
from trainers import models


@keras.saving.register_keras_serializable("trainers")
class LocalLoss(keras.layers.Layer):
    """Hands on features as they are, and adds a loss.

    The mean cross-entropy of logits `[B, classes]` and labels `[B]` counts
    with weight 1, in the loss that is reported, too.
    """

    def __init__(self, **kwargs: Any):
        # Features and logits stay in what precision they are.
        super().__init__(autocast=False, **kwargs)

    def call(
        self, features: Any, logits: Any, labels: Any, training: bool = False
    ) -> Any:
        # When testing, the loss is the network's own.
        if training:
            losses = keras.losses.sparse_categorical_crossentropy(
                labels, logits, from_logits=True
            )
            self.add_loss(keras.ops.mean(losses))
        return features


@keras.saving.register_keras_serializable("trainers")
class Detach(keras.layers.Layer):
    """Lets no gradient pass.

    The first layer behind a cut: before it, the stage that sends would wait
    for a gradient to throw away.
    """

    def call(self, features: Any) -> Any:
        return keras.ops.stop_gradient(features)


def add(model: keras.Model, splits: int | Sequence[str]) -> keras.Model:
    """Returns a model with the same layers, and a local loss at each cut.

    Args:
        model: One of `models.build`, from images to logits.
        splits: Number of stages, cut after blocks near where their estimated
            costs balance; or names of blocks to cut after.

    Returns:
        A model from `[images, labels]`, labels int64 `[B]`, to the logits of
        `model`, whose outputs do not depend on the labels.

    Raises:
        ValueError: If it cannot be cut so.
    """
    blocks = _blocks(model, splits)
    labels = keras.Input((), dtype="int64", name="label")
    head = model.get_layer("logits").get_config()

    def call(layer: Any, *args: Any, **kwargs: Any) -> Any:
        x = layer(*args, **kwargs)
        if layer.name not in blocks:
            return x
        name = layer.name
        pooled = keras.layers.GlobalAveragePooling2D(
            name=f"{name}_local_pool", dtype="float32"
        )(x)
        logits = keras.layers.Dense.from_config(
            {**head, "name": f"{name}_local_logits"}
        )(pooled)
        x = LocalLoss(name=f"{name}_local_loss")(x, logits, labels)
        return Detach(name=f"{name}_detach")(x)

    inputs = [model.inputs[0], labels]
    with models.deep_recursion():
        wider = keras.Model(inputs, model.outputs, name=model.name)
        return _again(wider, inputs, call)


def remove(model: keras.Model) -> keras.Model:
    """Returns the model that `add` was given: the same layers and weights."""

    def call(layer: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(layer, (LocalLoss, Detach)):
            return args[0]
        return layer(*args, **kwargs)

    inputs = model.inputs
    with models.deep_recursion():
        return keras.Model(inputs[0], _again(model, inputs, call).outputs[0])


def cuts(model: keras.Model) -> list[str]:
    """Returns the layers to cut after, of a model that `add` made."""
    return [
        layer.name for layer in model.layers if isinstance(layer, LocalLoss)
    ]


def with_labels(batches: tf.data.Dataset) -> tf.data.Dataset:
    """Returns batches with the labels among the inputs, too."""
    return batches.map(lambda images, labels: ((images, labels), labels))


def _again(
    model: keras.Model, inputs: list[KerasTensor], call: Callable
) -> keras.Model:
    """Returns the same layers, called in another way."""
    return keras.models.clone_model(
        model,
        input_tensors=inputs,
        clone_function=lambda layer: layer,
        call_function=call,
    )


def _blocks(model: keras.Model, splits: int | Sequence[str]) -> list[str]:
    """Returns the blocks to cut after: only one tensor leaves a block."""
    graph = trace_graph(model)
    blocks = {
        node.name: position
        for position, node in enumerate(graph.nodes)
        if re.fullmatch(r"block\d+", node.name)
    }
    if not isinstance(splits, int):
        found = list(splits)
    elif 1 <= splits <= len(blocks) + 1:
        found = []
        for cut in choose_cuts(graph, splits):
            left = [name for name in blocks if name not in found]
            found.append(min(left, key=lambda name: abs(blocks[name] - cut)))
    else:
        found = [str(splits)]
    if not set(found) <= set(blocks):
        raise ValueError(
            f"Expected local losses after some of the {len(blocks)} blocks "
            f"{', '.join(blocks)}: `splits` their names, or a number of stages "
            f"up to {len(blocks) + 1}. Received: splits={splits!r}"
        )
    return found
