"""Whether traced stages train what `keras.Model.fit` would."""

import itertools
from collections.abc import Sequence

import tensorflow as tf

from fdg_keras import _keras
from fdg_keras.slicing import Graph
from fdg_keras.stages import Stage
from fdg_keras.threads import warn


class OutsideRead(ValueError):
    """A weight is read by somebody who was not handed it."""


def check_gradients(
    stages: Sequence[Stage], has_gradient: Sequence[Sequence[bool]]
) -> None:
    """Checks that there is something to train, as Keras does.

    Warns, as Keras does, if some weights have no gradient.

    Args:
        stages: All of a model.
        has_gradient: For each of them, of which weights there is one; empty
            if of none.

    Raises:
        ValueError: If there are trainable weights, and none has a gradient.
    """
    without = [
        weight.path
        for stage, found in zip(stages, has_gradient)
        for weight, has in itertools.zip_longest(stage.weights, found)
        if not has
    ]
    if without and not any(map(any, has_gradient)):
        raise ValueError(
            "No weight has a gradient. Expected a loss that depends on "
            "trainable weights, by operations that can be differentiated. "
            f"Received: a model with the weights {without[:5]}"
        )
    if without:
        warn(
            f"Gradients do not exist for variables {without}: the loss does "
            "not depend on them, and they are not trained."
        )


def check_reads(
    where: str, watched: Sequence[tf.Variable], graph: Graph
) -> None:
    """Checks that nobody reads weights that he was not handed.

    Args:
        where: Who reads, for people.
        watched: Trainable TensorFlow variables that were read.
        graph: The model.

    Raises:
        OutsideRead: If one of them is a weight of the model, because the
            gradient by it would be lost.
    """
    # A function of the user's may have kept a variable where the value of the
    # weight was before it was moved to the device of its stage.
    owners = [_keras.stood_for(read) for read in watched]
    for node in graph.nodes:
        for variable in node.trainable_variables:
            storage = _keras.get_storage(variable)
            if any(storage is read for read in watched) or any(
                variable is owner for owner in owners
            ):
                raise OutsideRead(
                    f"{where} reads the weight {variable.path!r} of layer "
                    f"{node.name!r} as a Python variable of its own, and the "
                    "gradient by it would be lost. Expected weights to be "
                    "read by their layer, or by one of the same stage that "
                    "has that layer as an attribute; and what is a penalty "
                    "on weights to be a regularizer. Received: a function "
                    "that reads it from outside"
                )
