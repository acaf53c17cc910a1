"""Every private Keras name the library touches, and nothing else.

Each function here is the one place that knows a private name, says which, and
has its own test in `tests/test_keras_compat.py`, so that a Keras release that
changes it fails there, by name, and not in somebody's training run.

Checked against Keras 3.15 on TensorFlow 2.21.
"""

import contextlib
import weakref
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import keras
import tensorflow as tf
from keras.src import backend as _backend
from keras.src import tree as tree
from keras.src.models.functional import Functional, operation_fn
from keras.src.ops.node import Node as Call
from keras.src.trainers import data_adapters as _data_adapters
from keras.src.trainers.data_adapters import array_slicing as _array_slicing

# -- Graphs: Functional._nodes_by_depth, Sequential._functional, ... -----------


def functional_of(layer: Any) -> Functional | None:
    """Returns the graph of layers that calling `layer` runs, if it is one.

    Private: `Functional`, `Sequential._functional`.

    Returns:
        The `Functional` behind a Functional or Sequential model whose `call`
        is Keras' own; `None` for anything else.
    """
    call = getattr(type(layer), "call", None)
    if isinstance(layer, keras.Sequential):
        return layer._functional if call is keras.Sequential.call else None
    if isinstance(layer, Functional) and call is Functional.call:
        return layer
    return None


def calls_in_order(functional: Functional) -> list[Call]:
    """Returns the recorded calls of a graph in Keras' own execution order.

    Private: `Function._nodes_by_depth`, and the attributes `operation`,
    `arguments`, `outputs`, `is_input`, `input_tensors` of its nodes.
    """
    by_depth = functional._nodes_by_depth
    return [
        call
        for depth in sorted(by_depth, reverse=True)
        for call in by_depth[depth]
        if call.operation is not None and not call.is_input
    ]


def fill_in(call: Call, tensors: Mapping[int, Any]) -> tuple[tuple, dict]:
    """Returns the arguments of a recorded call with tensors filled in.

    Private: `SymbolicArguments.fill_in`.

    Args:
        call: A recorded call.
        tensors: Values by the `id` of the symbolic tensor they stand for.
    """
    return call.arguments.fill_in(tensors)


def run_operation(
    operation: Any, args: tuple, kwargs: dict, training: bool
) -> Any:
    """Calls an operation as `Functional.call` does.

    Private: `operation_fn`, which injects `training` into every operation
    that takes it and overrides a recorded `training=False`, as Keras does.
    """
    return operation_fn(operation, training=training)(*args, **kwargs)


@contextlib.contextmanager
def one_call(layer: keras.layers.Layer, training: bool) -> Iterator[None]:
    """Within, calls of layers are parts of a call of `layer`.

    So a layer that is called twice keeps the losses of both calls, and layers
    deep within others learn whether they train, as in a model.

    Private: `Layer._get_call_context` and `Layer._maybe_reset_call_context`.

    Args:
        layer: Holds the others. No other call may be going on.
        training: Whether layers run in training mode.
    """
    layer._get_call_context().set_value("training", training)
    try:
        yield
    finally:
        layer._maybe_reset_call_context()


def standardize_inputs(functional: Functional, x: Any) -> list[tf.Tensor]:
    """Returns model inputs in the order, dtype and rank the graph wants.

    Private: `Functional._standardize_inputs`.
    """
    return functional._standardize_inputs(x)


def layers_within(layer: keras.layers.Layer) -> list[keras.layers.Layer]:
    """Returns a layer or model, and all in it. Private: `_flatten_layers`."""
    return list(layer._flatten_layers())


def check_names(functional: Functional, x: Any) -> None:
    """Raises Keras' own error if `x` is a dictionary that lacks an input.

    Private: `Layer._assert_input_compatibility`, which would check shapes, too.
    """
    specs = functional.input_spec or []
    if isinstance(x, dict) and any(spec.name not in x for spec in specs):
        functional._assert_input_compatibility(x)


def get_mask(tensor: Any) -> Any:
    """Returns the mask that Keras attached to a tensor, or `None`."""
    return _backend.get_keras_mask(tensor)


def set_mask(tensor: Any, mask: Any) -> None:
    """Attaches a mask to a tensor, as Keras' layers do."""
    _backend.set_keras_mask(tensor, mask)


def get_logits(tensor: Any) -> tuple[Any, str]:
    """Returns what a softmax or sigmoid made a tensor of, and who did.

    Private: `_keras_logits`, from which Keras' crossentropies are computed in
    place of the tensor, that has rounded small probabilities to zero. Those of
    `tf.nn.softmax` and `tf.nn.sigmoid` they find in a graph.

    Returns:
        The logits, or `None`; and `"Keras"`, `"Softmax"` or `"Sigmoid"`.
    """
    logits = getattr(tensor, "_keras_logits", None)
    if logits is not None or not tf.is_symbolic_tensor(tensor):
        return logits, "Keras"
    kind = tensor.op.type
    known = kind in ("Softmax", "Sigmoid")
    return (tensor.op.inputs[0], kind) if known else (None, "Keras")


def with_logits(tensor: Any, logits: Any, by: str) -> Any:
    """Returns a tensor that is known to be made of logits.

    Args:
        tensor: Its values.
        logits: What they were made of.
        by: Who made them, as `get_logits` says.
    """
    if by == "Softmax":
        return tf.nn.softmax(logits)
    if by == "Sigmoid":
        return tf.nn.sigmoid(logits)
    tensor._keras_logits = logits
    return tensor


# -- Variables: Variable._value -----------------------------------------------


def get_storage(variable: keras.Variable) -> tf.Variable:
    """Returns the TensorFlow variable that holds a Keras variable's value.

    Private: `Variable._value`.
    """
    return variable._value


def set_storage(variable: keras.Variable, storage: tf.Variable) -> None:
    """Makes `storage` hold a Keras variable's value from now on.

    Private: `Variable._value`.
    """
    for one in (variable._value, storage):
        vars(one)["_stands_for"] = weakref.ref(variable)
    variable._value = storage


def stood_for(storage: tf.Variable) -> keras.Variable | None:
    """Returns the variable whose value `storage` was last set to hold.

    Also if another one holds it now. `None` if it was never set for any.
    """
    owner = vars(storage).get("_stands_for")
    return None if owner is None else owner()


# -- Optimizers ---------------------------------------------------------------


def learning_rate_of(optimizer: keras.optimizers.Optimizer) -> Any:
    """Returns the variable, schedule or callable behind `learning_rate`.

    Private: `Optimizer._learning_rate`.
    """
    return optimizer._learning_rate


def has_momentum(optimizer: keras.optimizers.Optimizer) -> bool:
    """Whether `momentum_step` knows the optimizer."""
    if type(optimizer) is keras.optimizers.SGD:
        return bool(optimizer.momentum)
    adam = (keras.optimizers.Adam, keras.optimizers.AdamW)
    return type(optimizer) in adam and not optimizer.amsgrad


def momentum_step(
    optimizer: keras.optimizers.Optimizer, variable: keras.Variable
) -> tf.Tensor:
    """Returns what an update without a gradient, momentum alone, would add.

    For SGD the last step is returned, undiminished.

    Private: `SGD.momentums`, `Adam._momentums`, `Adam._velocities`,
    `Optimizer._get_variable_index`.
    """
    index = optimizer._get_variable_index(variable)
    if isinstance(optimizer, keras.optimizers.SGD):
        return tf.convert_to_tensor(optimizer.momentums[index])
    m = tf.convert_to_tensor(optimizer._momentums[index])
    v = tf.convert_to_tensor(optimizer._velocities[index])
    # Before the first update m is zero, and so is the step.
    n = tf.cast(tf.maximum(optimizer.iterations, 1), m.dtype)
    rate = tf.cast(optimizer.learning_rate, m.dtype)
    rate *= tf.sqrt(1 - optimizer.beta_2**n) / (1 - optimizer.beta_1**n)
    return -rate * m / (tf.sqrt(v) + optimizer.epsilon)


def current_learning_rate(optimizer: keras.optimizers.Optimizer) -> Any:
    """Returns what the next update applies.

    Private: `Optimizer._get_current_learning_rate`.
    """
    return optimizer._get_current_learning_rate()


@contextlib.contextmanager
def scaled_learning_rate(
    optimizer: keras.optimizers.Optimizer, factor: Any
) -> Iterator[None]:
    """Within, the optimizer applies its learning rate times `factor`.

    Private: `Optimizer._get_current_learning_rate`, which all updates ask.
    """
    own = optimizer._get_current_learning_rate
    # Keras' way of setting attributes would track what is set.
    vars(optimizer)["_get_current_learning_rate"] = lambda: (
        tf.convert_to_tensor(own()) * factor
    )
    try:
        yield
    finally:
        del vars(optimizer)["_get_current_learning_rate"]


def config_of(optimizer: keras.optimizers.Optimizer) -> dict[str, Any]:
    """Returns an optimizer's configuration, with a schedule as it is.

    Private: `Optimizer._learning_rate`. A user's own schedule need be neither
    registered nor serializable.
    """
    schedule = optimizer._learning_rate
    if isinstance(schedule, keras.Variable):
        return optimizer.get_config()
    # Keras' way of setting attributes would begin to track this.
    vars(optimizer)["_learning_rate"] = None
    try:
        return optimizer.get_config() | {"learning_rate": schedule}
    finally:
        vars(optimizer)["_learning_rate"] = schedule


def step_counter_of(optimizer: keras.optimizers.Optimizer) -> keras.Variable:
    """Returns the variable that counts the calls of `apply`.

    Private: `Optimizer._iterations`; the public `iterations` is divided by
    `gradient_accumulation_steps`.
    """
    return optimizer._iterations


def variables_built_on(optimizer: keras.optimizers.Optimizer) -> list:
    """Returns the variables that a built optimizer has slots for, in order.

    Private: `Optimizer._trainable_variables`.
    """
    return list(optimizer._trainable_variables)


def start_averages(optimizer: keras.optimizers.Optimizer) -> None:
    """Sets the averages of a built optimizer with `use_ema` to the weights.

    Private: `Optimizer._model_variables_moving_average`.
    """
    averages = optimizer._model_variables_moving_average
    for average, variable in zip(averages, optimizer._trainable_variables):
        average.assign(variable)


def decays(optimizer: keras.optimizers.Optimizer, variable: Any) -> bool:
    """Whether `exclude_from_weight_decay` has spared a variable.

    Private: `Optimizer._use_weight_decay`.
    """
    return optimizer._use_weight_decay(variable)


def slots_of(
    optimizer: keras.optimizers.Optimizer,
) -> dict[tuple[str, int], keras.Variable]:
    """Returns what a built optimizer keeps for single variables.

    Semi-private: Keras' optimizers keep slots of one kind in a list, an
    attribute, in the order of the variables they were built on, with `None`
    where a variable has none. Private: `_trainable_variables`, `_variables`.

    Returns:
        Slots by the name of the attribute and the index of the variable.
    """
    built_on = optimizer._trainable_variables
    others = (id(built_on), id(optimizer._variables))
    return {
        (kind, index): slot
        for kind, kept in vars(optimizer).items()
        if isinstance(kept, list)
        and len(kept) == len(built_on)
        and id(kept) not in others
        for index, slot in enumerate(kept)
        if isinstance(slot, keras.Variable)
    }


# -- Losses, metrics, and the rest of Trainer ---------------------------------


def compiled_loss(model: keras.Model) -> Any:
    """Returns the compiled loss, or `None`. Private: `_compile_loss`.

    `Model.compute_loss` would add the regularizers of all layers, which
    belong to the stages.
    """
    return model._compile_loss


def compiled_parts(model: keras.Model) -> tuple:
    """Returns what `compile` made, and the learning rate's schedule if any.

    Private: `_compile_loss`, `_compile_metrics`, `Optimizer._learning_rate`.
    """
    rate = model.optimizer._learning_rate
    schedule = None if isinstance(rate, keras.Variable) else rate
    parts = (model.optimizer, model._compile_loss, model._compile_metrics)
    return (*parts, schedule)


def loss_tracker(model: keras.Model) -> keras.metrics.Mean:
    """Returns the metric behind `logs["loss"]`. Private: `_loss_tracker`."""
    return model._loss_tracker


def build_losses_and_metrics(
    model: keras.Model, y: Any, y_pred: Any, sample_weight: Any
) -> None:
    """Creates the state of the compiled loss and metrics.

    Private: `backend.compute_output_spec`, `_compile_loss`,
    `_compile_metrics`. Keras does this when its step is first traced; it must
    happen before variables are placed.

    Args:
        model: A compiled model.
        y: Nested `KerasTensor`s of the targets.
        y_pred: Nested `KerasTensor`s of the outputs.
        sample_weight: Nested `KerasTensor`s or `None`.
    """
    metrics = model._compile_metrics
    if metrics is not None and not metrics.built:
        _backend.compute_output_spec(
            metrics.update_state, y, y_pred, sample_weight
        )
    loss = model._compile_loss
    if loss is not None and not loss.built:
        _backend.compute_output_spec(loss, y, y_pred, sample_weight)


def pack_outputs(functional: Functional, outputs: list) -> Any:
    """Returns flat outputs in the structure that calling the model gives.

    Private: `Function._outputs_struct`; `Functional.call` unpacks a list of
    one, and so does this.
    """
    packed = tree.pack_sequence_as(functional._outputs_struct, outputs)
    if isinstance(packed, (list, tuple)) and len(packed) == 1:
        return packed[0]
    return packed


def in_order_of_metrics(model: keras.Model, logs: dict) -> Any:
    """Returns results as `evaluate` does: a list, or the only one.

    Private: `Model._flatten_metrics_in_order`.
    """
    return model._flatten_metrics_in_order(logs)


def initial_epoch_of(model: keras.Model) -> int | None:
    """Returns the epoch to resume at. Private: `Model._initial_epoch`.

    `BackupAndRestore` sets it in `on_train_begin`.
    """
    return model._initial_epoch


def profiles(callback: keras.callbacks.TensorBoard) -> bool:
    """Whether the callback profiles batches. Private: `_start_batch`."""
    return callback._start_batch > 0


# -- Callbacks ----------------------------------------------------------------


#: Callbacks that save the model every `save_freq` batches, or every epoch.
SAVING = (
    keras.callbacks.ModelCheckpoint,
    keras.callbacks.BackupAndRestore,
    keras.callbacks.OrbaxCheckpoint,
)


def batches_until_save(callback: Any, batch: int, window: int) -> int | None:
    """Returns after how many more batches of an epoch a callback saves.

    Private: `_batches_seen_since_last_saving` and `_last_batch_seen` of
    `ModelCheckpoint`, `BackupAndRestore` and `OrbaxCheckpoint`.

    Args:
        callback: Any callback.
        batch: How many batches of the epoch have been trained.
        window: After how many batches each it is called.

    Returns:
        `None` if it does not save in the midst of an epoch.
    """
    if not isinstance(callback, SAVING) or callback.save_freq == "epoch":
        return None
    seen = callback._batches_seen_since_last_saving
    last = callback._last_batch_seen
    position = batch
    while True:
        position += window
        begins = last is None or position - 1 <= last
        seen += position if begins else position - 1 - last
        last = position - 1
        if seen >= callback.save_freq:
            return position - batch


# -- Data ---------------------------------------------------------------------


def get_data_adapter(**kwargs: Any) -> Any:
    """Returns Keras' adapter for any data `fit` takes.

    Private: `data_adapters.get_data_adapter`, and `get_tf_dataset`,
    `num_batches`, `on_epoch_begin`, `on_epoch_end` of what it returns.
    """
    return _data_adapters.get_data_adapter(**kwargs)


def remember_failures(adapter: Any, failures: list[BaseException]) -> None:
    """Has what Python data raise appended to `failures`.

    TensorFlow passes on the text of what a generator raises, not the exception.

    Private: `get_tf_dataset` of an adapter iterates over `generator()` (for
    generators), `_get_iterator()` (`PyDataset`) or `get_numpy_iterator()`
    (torch's `DataLoader`).
    """

    def watched(iterate: Callable[[], Any]) -> Callable[[], Iterator[Any]]:
        def generator() -> Iterator[Any]:
            try:
                yield from iterate()
            except GeneratorExit:
                raise
            except BaseException as failure:
                failures.append(failure)
                raise

        return generator

    for name in ("generator", "_get_iterator", "get_numpy_iterator"):
        if hasattr(adapter, name):
            setattr(adapter, name, watched(getattr(adapter, name)))


def device_of(data: Any) -> str | None:
    """Returns where a `tf.data.Dataset` or an iterator over one is.

    Private: TensorFlow's `DatasetV2._variant_tensor` and
    `OwnedIterator._iterator_resource`.

    Returns:
        A full device name; `None` for anything else.
    """
    if isinstance(data, tf.data.Dataset):
        return data._variant_tensor.device
    if isinstance(data, tf.data.Iterator):
        return data._iterator_resource.device
    return None


def train_validation_split(arrays: Any, validation_split: float) -> Any:
    """Splits arrays as `fit(validation_split=...)` does.

    Private: `array_slicing.train_validation_split`.
    """
    return _array_slicing.train_validation_split(
        arrays, validation_split=validation_split
    )


__all__ = [name for name in dict(globals()) if not name.startswith("_")]
