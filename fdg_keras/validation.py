"""Bad input, refused before anything is built."""

import numbers
from collections.abc import Sequence
from typing import Any

import keras
import tensorflow as tf

from fdg_keras import _keras
from fdg_keras.crossing import OF_THE_FORWARD, STASHES
from fdg_keras.delays import ORDERS
from fdg_keras.optimizers import (
    check_optimizer,
    check_precision,
    is_scale_invariant,
    looks_at_all_gradients,
    overrides,
)
from fdg_keras.slicing import Graph
from fdg_keras.threads import warn

# TensorFlow counts what waits in a queue in 32 bits, for up to 1,024 stages.
_DELAYS = 2**20

# What Keras' training step is made of, and stages do in their own way.
_STEPS = (
    "train_step",
    "test_step",
    "predict_step",
    "evaluate",
    "predict",
    "make_train_function",
    "make_test_function",
    "make_predict_function",
    "compute_loss",
    "_compute_loss",
    "_aggregate_additional_loss",
    "compute_metrics",
    "losses",
    "trainable_variables",
    "trainable_weights",
    "__call__",
    "call",
)


def check_settings(delay: Any, stash: Any, order: Any) -> None:
    """Checks arguments of `Trainer`.

    Raises:
        ValueError: If one is out of range.
    """
    whole = isinstance(delay, numbers.Integral) and not isinstance(delay, bool)
    if not whole or not 0 <= delay < _DELAYS:
        raise ValueError(
            "Expected `delay` to be the batches of delay per hop: 0 (locked, "
            "as `model.fit`), 1 (DDG), 2 (FDG) or more, below 2**20. Received: "
            f"{delay!r}"
        )
    if stash not in STASHES:
        raise ValueError(
            f"Expected `stash` to be one of {STASHES}. Received: {stash!r}"
        )
    if order not in ORDERS:
        raise ValueError(
            f"Expected `order` to be one of {ORDERS}. Received: {order!r}"
        )


def check_graph(model: keras.Model, graph: Graph) -> None:
    """Checks that a model still is what a `Trainer` has sliced.

    Raises:
        ValueError: If layers were added or taken away since, or if the model
            does more than run its layers.
    """
    parts = [(model, graph.functional), *graph.nested]
    if any(_keras.functional_of(part) is not was for part, was in parts):
        raise ValueError(
            "The model has other layers than when the `Trainer` was made. "
            "Expected it as it was: make a new `Trainer`. Received: "
            f"{model!r}"
        )
    for part, _ in graph.nested:
        if overrides(part, "__call__"):
            raise ValueError(
                f"{type(part).__name__} overrides `__call__`, and of a model "
                "within the model stages run the layers. Override `call` "
                f"instead, which makes it one layer. Received: {part!r}"
            )
    if getattr(model, "activity_regularizer", None) is not None:
        raise ValueError(
            "A model with an `activity_regularizer` is not supported: stages "
            "run its layers, not the model. Give it to the model's last "
            f"layer. Received: {model!r}"
        )


def check_trainable(
    model: keras.Model, stages: Sequence[Sequence[keras.Variable]]
) -> None:
    """Checks that stages train what the model would.

    Args:
        model: The model.
        stages: The trainable variables of each stage.

    Raises:
        ValueError: If one is missing, or is one too many.
    """
    held = {id(v): v for variables in stages for v in variables}
    wanted = {id(v): v for v in model.trainable_variables}
    for key, variable in wanted.items():
        if key not in held:
            raise ValueError(
                "Expected each weight of the model to belong to a layer that "
                "its graph runs: stages have the layers of the graph, and no "
                "other weights nor losses. Set `trainable = False`, or call "
                f"the layer. Received: weight {variable.path!r}"
            )
    for key, variable in held.items():
        if key not in wanted:
            raise ValueError(
                "A layer was thawed in a model that is frozen, where Keras "
                "trains nothing. Expected `model.trainable = True` and layers "
                "frozen one by one. Received: trainable weight "
                f"{variable.path!r}"
            )


def check_model(model: Any) -> None:
    """Checks that a model can be trained in stages, before it is sliced.

    Raises:
        ValueError: If it is no Keras model, is not compiled, overrides a part
            of Keras' training step, or was compiled with something that
            cannot be done in stages.
    """
    if not isinstance(model, keras.Model):
        raise ValueError(
            "Expected `model` to be a compiled `keras.Model`. Received: "
            f"{model!r} of type {type(model).__name__}"
        )
    for name in _STEPS:
        # On the model itself, `make_train_function` is set while it is in
        # stages; and what its class has as `call`, its graph must agree with.
        if (overrides(model, name) and name != "call") or (
            name in vars(model) and name != "make_train_function"
        ):
            raise ValueError(
                f"{type(model).__name__} overrides `{name}`, which decoupled "
                "stages cannot run: no stage has the whole model. Put the "
                "computation into layers, `add_loss`, a compiled loss or "
                "compiled metrics. Received: "
                f"{model!r}"
            )
    if not tf.executing_eagerly():
        raise ValueError(
            "Expected to train in eager mode: stages are compiled by "
            "themselves. Received: a call within a `tf.function` or a "
            "`tf.Graph`. Call it from outside"
        )
    if not model.compiled:
        raise ValueError(
            "The model is not compiled. Call `model.compile(optimizer, loss)` "
            f"before training it in stages. Received: {model!r}"
        )
    if model.distribute_strategy is not tf.distribute.get_strategy() or (
        tf.distribute.has_strategy()
    ):
        raise ValueError(
            "Expected a model made outside of `tf.distribute`. Its variables "
            "are mirrored, and a stage has one device. Build and compile the "
            "model without a strategy. Received: "
            f"{model.distribute_strategy!r}"
        )
    check_optimizer(model.optimizer)
    check_precision(model)
    for layer in _keras.layers_within(model):
        if hasattr(layer.call, "get_concrete_function"):
            raise ValueError(
                f"The `call` of layer {layer.name!r} is a `tf.function`, which "
                "reads weights where they were when it was traced first. "
                "Expected a plain method: stages are compiled anyway. "
                f"Received: a layer of type {type(layer).__name__}"
            )


def check_emulation(model: keras.Model, emulate: bool, stash: str) -> None:
    """Checks that stages may run one after the other, if they are to.

    Raises:
        ValueError: If they keep something else than the forward's weights.
    """
    if stash not in OF_THE_FORWARD and (emulate or model.run_eagerly):
        what = "`emulate=True`" if emulate else "`run_eagerly=True`"
        raise ValueError(
            f"{what} runs the backward of a batch at once, with the weights of "
            'its forward. Expected `stash="exact"` or `"selective"`. Received: '
            f"stash={stash!r}"
        )


def check_sizes(
    batch_size: Any,
    steps_per_epoch: Any = None,
    validation_batch_size: Any = None,
    validation_steps: Any = None,
    validation_split: Any = 0.0,
    validation_freq: Any = 1,
    steps: Any = None,
) -> None:
    """Checks arguments of `fit`, `evaluate` and `predict`.

    Keras itself lets most of them through, to fail later and elsewhere.

    Raises:
        ValueError: If one is out of range.
    """
    is_number = isinstance(validation_split, numbers.Real)
    is_number = is_number and not isinstance(validation_split, bool)
    if not is_number or not 0 <= validation_split < 1:
        raise ValueError(
            "Expected `validation_split` to be the share of the samples to "
            f"validate on, at least 0 and less than 1. Received: "
            f"{validation_split!r}"
        )
    for name, size, otherwise in (
        ("batch_size", batch_size, "32 samples"),
        ("validation_batch_size", validation_batch_size, "`batch_size`"),
        ("steps_per_epoch", steps_per_epoch, "all batches"),
        ("steps", steps, "all batches"),
        ("validation_steps", validation_steps, "all batches"),
    ):
        if size is not None and not _is_count(size):
            raise ValueError(
                f"Expected `{name}` to be a whole number, 1 or more, or "
                f"`None` for {otherwise}. Received: {size!r}"
            )
    epochs = isinstance(validation_freq, (list, tuple, set, range))
    if not epochs and not _is_count(validation_freq):
        raise ValueError(
            "Expected `validation_freq` to be a whole number of epochs, 1 or "
            f"more, or a list of epochs. Received: {validation_freq!r}"
        )


def check_epochs(epochs: Any, initial_epoch: Any) -> None:
    """Checks which epochs `fit` is to train.

    Raises:
        ValueError: If they are no whole numbers.
    """
    for name, value in (("epochs", epochs), ("initial_epoch", initial_epoch)):
        if not isinstance(value, numbers.Integral):
            raise ValueError(
                f"Expected `{name}` to be a whole number. Received: {value!r}"
            )


def _is_count(value: Any) -> bool:
    whole = isinstance(value, numbers.Integral) and not isinstance(value, bool)
    return whole and value >= 1


def warn_if_shrinking_is_futile(transform: Any, model: keras.Model) -> None:
    """Warns where an optimizer undoes what a transform does."""
    shrinks = getattr(transform, "beta", 1) != 1
    if shrinks and is_scale_invariant(model.optimizer):
        warn(
            f"{type(model.optimizer).__name__} divides gradients by their own "
            f"size, so that {transform!r} does next to nothing. Lower the "
            "learning rate, or use SGD."
        )


def warn_if_gradients_are_apart(model: keras.Model, splits: int) -> None:
    """Warns where an optimizer may want to see the gradients of all stages."""
    if splits > 1 and looks_at_all_gradients(model.optimizer):
        warn(
            f"{type(model.optimizer).__name__} overrides what Keras' "
            "optimizers do with the gradients of all variables. Here each "
            f"stage has an optimizer like it, which is given the gradients of "
            f"that stage alone, {splits} times for each batch: what it "
            "computes over all of them at once, a norm say, is another."
        )
