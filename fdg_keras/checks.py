"""Whether traced stages train what `keras.Model.fit` would."""

import itertools
from collections.abc import Sequence

import keras
import tensorflow as tf

from fdg_keras import _keras
from fdg_keras.slicing import Graph
from fdg_keras.stages import Stage
from fdg_keras.threads import warn


class OutsideRead(ValueError):
    """A variable is read by somebody who was not handed it."""


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
            "not depend on them by operations that can be differentiated, and "
            "they are not trained."
        )


def check_reads(
    where: str,
    read: Sequence[tf.Variable],
    graph: Graph,
    optimizer: keras.optimizers.Optimizer,
) -> None:
    """Checks that nobody reads what is not handed to him and changes.

    Args:
        where: Who reads, for people.
        read: TensorFlow variables that were read.
        graph: The model.
        optimizer: Its optimizer.

    Raises:
        OutsideRead: If one of them is a variable of the model, because the
            gradient by it would be lost, or its value be of no known batch; or
            the optimizer's counter of steps.
    """
    # A function of the user's may have kept a variable where the value was
    # before it was moved to the device of its stage.
    known = {id(one) for one in read}
    owners = {id(_keras.stood_for(one)) for one in read}

    def is_read(variable: keras.Variable) -> bool:
        storage = _keras.get_storage(variable)
        return id(storage) in known or id(variable) in owners

    if is_read(_keras.step_counter_of(optimizer)):
        raise OutsideRead(
            f"{where} reads the `iterations` of the optimizer, itself or by "
            "the rate of a schedule. Each stage counts its own, and the "
            "model's are set when callbacks are called. Expected what depends "
            "on the step to count batches in a weight of its own, with "
            "`trainable=False`, and learning rates to be read by a callback. "
            "Received: a function that reads it"
        )
    for node in graph.nodes:
        for variable in node.variables:
            if is_read(variable):
                what = "a variable that is updated with another batch"
                if variable.trainable:
                    what = "a weight, the gradient by which would be lost"
                raise OutsideRead(
                    f"{where} reads {variable.path!r} of layer {node.name!r} "
                    f"from outside: {what}. Expected variables to be read by "
                    "their layer, or by one of the same stage that has that "
                    "layer as an attribute, without a `tf.function` of its "
                    "own around it; what is a penalty on weights to be a "
                    "regularizer, and other functions of weights to be "
                    "computed by a callback at the end of an epoch. Received: "
                    "a function that reads it as a Python variable of its own"
                )
