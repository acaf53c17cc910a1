"""Bugs that were there once, each with its story."""

import functools
import gc
import itertools
import re
import threading
import warnings

import keras
import numpy as np
import pytest
import tensorflow as tf

import fdg_keras
from fdg_keras.crossing import STASHES
from fdg_keras.linearize import Linearized, Pure
from fdg_keras.links import Link
from fdg_keras.slicing import trace_graph

CPU = "/job:localhost/replica:0/task:0/device:CPU:0"


def test_collecting_a_link_leaves_no_operation_in_a_graph():
    """A trainer that was let go broke the next one, now and then.

    A link destroys its queue when it is collected. Links and what was
    compiled with them refer to each other, so it is the garbage collector
    that finds them, at any time: also while another function is being traced.
    Then the operation that destroys was not run but added to that graph, with
    the handle of the old queue among its captures. The queue lived on, and
    the function destroyed it each time it was called.
    """

    @tf.function(autograph=False)
    def traced(x):
        link = Link([tf.TensorSpec(())], 1, CPU, "forgotten")
        link.cycle = link
        del link
        gc.collect()
        return x + 1.0

    graph = traced.get_concrete_function(tf.TensorSpec(())).graph
    types = [operation.type for operation in graph.get_operations()]
    assert "AddV2" in types
    assert "DestroyResourceOp" not in types
    assert not graph.captures


def test_an_operation_of_which_one_output_is_kept_and_another_read():
    """Two LSTMs in one stage raised a `KeyError` when the stage was cut.

    The accumulators of the first LSTM's `while` are kept for its gradient.
    The second LSTM's input is kept as well, and is made of another output of
    that `while`. TensorFlow's `prune` copies what lies upstream of what it is
    fed, although nobody needs it, and there found an output without a source.
    """

    def pure(weights, state, inputs):
        left, right = tf.split(tf.tanh(inputs[0]), 2, axis=-1)
        joined = tf.transpose(tf.reshape(right, [-1, 2]))
        return Pure([left**2, tf.transpose(tf.exp(joined**2))], [], [])

    rows = tf.TensorSpec((None, 4))
    cut = Linearized(pure, [], [], [rows], CPU).cut([True] * 2, [True], "exact")
    x = tf.reshape(tf.range(8.0), [2, 4]) / 8
    outputs, _, _, made = cut.forward(x)
    given = [tf.ones_like(y) for y in outputs]
    _, (found,) = cut.backward(*given, *cut.stash([x], made))
    with tf.GradientTape() as tape:
        tape.watch(x)
        total = sum(tf.reduce_sum(y) for y in pure([], [], [x]).outputs)
    np.testing.assert_allclose(found, tape.gradient(total, x), rtol=1e-6)


def test_nested_models_were_never_inlined():
    """Nothing could be cut within a backbone.

    Keras records a call of a nested model with `mask=None` although nobody
    passed a mask, and a call with arguments beyond tensors stays one node.
    """
    backbone = keras.Sequential(
        [keras.Input((4,)), keras.layers.Dense(3, name="inner")],
        name="backbone",
    )
    model = keras.Sequential([keras.Input((4,)), backbone])
    assert [n.name for n in trace_graph(model).nodes] == ["backbone/inner"]


def test_model_fit_after_fit_in_stages():
    """`model.fit` raised "Unknown variable" after a trainer's `fit`.

    Keras' optimizers know a variable by the storage of its value, and the
    model's optimizer was built while the variables had that of their stages.
    """
    model = keras.Sequential(
        [keras.Input((4,)), keras.layers.Dense(3), keras.layers.Dense(2)]
    )
    model.compile("sgd", "mse")
    x, y = np.ones((8, 4), "float32"), np.ones((8, 2), "float32")
    fdg_keras.fit(model, x, y, batch_size=4, verbose=0)
    model.fit(x, y, batch_size=4, verbose=0)
    assert int(model.optimizer.iterations) == 4


def test_a_variable_that_is_at_home_is_not_moved():
    """All variables were copied, those of the first device to itself.

    TensorFlow lists a device as `/device:CPU:0` and calls it
    `/job:localhost/replica:0/task:0/device:CPU:0` when asked where a variable
    is; the two were compared.
    """
    model = keras.Sequential(
        [keras.Input((4,)), keras.layers.Dense(3), keras.layers.Dense(2)]
    )
    model.compile("sgd", "mse")
    trainer = fdg_keras.Trainer(model, splits=2)
    first, second = (stage.device for stage in trainer.plan.stages)
    assert first == model.layers[0].kernel.value.device == CPU
    assert second != first


def small_model(*last, optimizer=None):
    model = keras.Sequential(
        [
            keras.Input((4,)),
            keras.layers.Dense(5, "tanh", name="first"),
            keras.layers.Dense(3, name="second"),
            *last,
        ]
    )
    model.compile(optimizer or keras.optimizers.SGD(0.1, momentum=0.9), "mse")
    return model


def small_data():
    random = np.random.RandomState(0)
    return random.rand(24, 4).astype("f"), random.rand(24, 3).astype("f")


def quiet_fit(trainer, **kwargs):
    x, y = small_data()
    return trainer.fit(x, y, batch_size=4, shuffle=False, verbose=0, **kwargs)


def test_predict_in_a_callback_sees_the_weights_of_now():
    """What the model had compiled went on reading its variables at home."""
    model = small_model()
    x, _ = small_data()
    model.predict(x, verbose=0)
    found = []

    class Predict(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            found.append(
                np.abs(model.predict(x, verbose=0) - model(x).numpy()).max()
            )

    quiet_fit(fdg_keras.Trainer(model, 2), epochs=2, callbacks=[Predict()])
    assert max(found) < 1e-5
    for weight in model.weights:
        weight.assign(0 * weight)
    assert not model.predict(x, verbose=0).any()


def test_steps_are_counted_without_weights_in_the_last_stage():
    """The counter came from the last stage, which had made no update."""
    softmax = keras.layers.Softmax()
    model = small_model(softmax, optimizer=keras.optimizers.Adam(0.01))
    expected = small_model(
        keras.layers.Softmax(), optimizer=keras.optimizers.Adam(0.01)
    )
    expected.set_weights(model.get_weights())
    x, y = small_data()
    expected.fit(x, y, batch_size=4, epochs=3, shuffle=False, verbose=0)
    quiet_fit(fdg_keras.Trainer(model, ["second"], delay=0), epochs=3)
    assert int(model.optimizer.iterations) == 18
    for a, b in zip(model.get_weights(), expected.get_weights()):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


def test_a_schedule_set_between_fits_is_obeyed():
    """The compiled stages had a variable, and were told a rate of 0."""
    model = small_model()
    trainer = fdg_keras.Trainer(model, 2)
    quiet_fit(trainer)
    model.optimizer.learning_rate = keras.optimizers.schedules.ExponentialDecay(
        0.1, 10, 0.9
    )
    before = model.get_weights()
    quiet_fit(trainer)
    after = model.get_weights()
    assert all(np.abs(a - b).max() > 1e-4 for a, b in zip(before, after))


def test_steps_are_counted_until_a_failure():
    """After an exception the weights were trained and the counter was not."""
    model = small_model()

    class Fail(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            if batch == 3:
                raise KeyError("enough")

    with pytest.raises(KeyError, match="enough"):
        quiet_fit(fdg_keras.Trainer(model, 2), callbacks=[Fail()])
    assert int(model.optimizer.iterations) >= 4


def test_slots_come_home_after_the_stages_were_rebuilt():
    """The second pipeline took the stages' storage for the slots' home."""
    model = small_model()
    trainer = fdg_keras.Trainer(model, 2, ["CPU:1", "CPU:2"])
    homes = [v.value.device for v in model.variables]
    quiet_fit(trainer)
    x, y = small_data()
    trainer.fit(x[:8].astype("int32"), y[:8], batch_size=8, verbose=0)
    assert [v.value.device for v in model.variables] == homes
    assert {v.value.device for v in model.optimizer.variables} == set(homes)


def test_an_interrupt_while_threads_start_hangs_nobody(monkeypatch):
    """Threads that had started waited for messages nobody would send."""
    trainer = fdg_keras.Trainer(small_model(), 2)
    quiet_fit(trainer)
    start = threading.Thread.start

    def interrupted(thread):
        if thread.name == "fdg-stage-1":
            raise KeyboardInterrupt
        start(thread)

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", interrupted)
        with pytest.raises(
            KeyboardInterrupt, match="Interrupted in this epoch"
        ):
            quiet_fit(trainer)
    quiet_fit(trainer)


@pytest.mark.parametrize("stash", STASHES)
def test_a_random_number_is_drawn_once(stash):
    """Without an argument it depended on none, and was drawn again."""

    class Noise(keras.layers.Layer):
        def call(self, x):
            return x * tf.random.uniform((3,), 0.5, 1.5)

    def gradient_over_output(model_stash):
        # d(sum)/db of `noise * (w x + b)` is the noise the output was made of.
        inputs = keras.Input((1,))
        dense = keras.layers.Dense(3, kernel_initializer="zeros", name="dense")
        dense.bias_initializer = keras.initializers.Ones()
        model = keras.Model(inputs, Noise()(dense(inputs)))
        model.compile(
            keras.optimizers.SGD(1.0),
            loss=lambda y, p: keras.ops.sum(p, axis=-1),
        )
        trainer = fdg_keras.Trainer(model, 1, stash=model_stash)
        history = trainer.fit(
            np.zeros((1, 1)), np.zeros((1, 1)), verbose=0, batch_size=1
        )
        applied = 1 - dense.bias.numpy()
        return history.history["loss"][0], applied.sum()

    forward, backward = gradient_over_output(stash)
    assert forward == pytest.approx(backward, rel=1e-5)


def test_shrinking_a_scale_invariant_optimizer_is_said_to_be_futile():
    model = small_model(optimizer="adam")
    with pytest.warns(UserWarning, match="does next to nothing"):
        trainer = fdg_keras.Trainer(model, 2, shrink=0.5)
    # Once for each trainer, and for each class that it was compiled with.
    said = []
    for kind in ("Adam", "SGD", "Lion", "Lion"):
        model.compile(getattr(keras.optimizers, kind)(), "mse")
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            quiet_fit(trainer)
        messages = [str(w.message) for w in found]
        said.append(len([m for m in messages if "next to nothing" in m]))
    assert said == [0, 0, 1, 0]


def test_steps_are_counted_batch_by_batch():
    """Within an epoch callbacks, and checkpoints, saw the epoch's start."""
    model = small_model()
    seen = []

    class Count(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            seen.append(int(model.optimizer.iterations))

    quiet_fit(fdg_keras.Trainer(model, 2), epochs=2, callbacks=[Count()])
    assert seen == list(range(1, 13))


def test_a_model_made_under_a_strategy_is_refused():
    """It failed inside Keras' optimizer, with an error that named nothing."""
    with tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"]).scope():
        model = small_model()
    with pytest.raises(ValueError, match=r"outside of `tf\.distribute`"):
        fdg_keras.Trainer(model, 2)


def test_metrics_with_a_shape():
    """F1 for each class is a vector; `History` holds arrays, as Keras' does."""
    x = np.random.RandomState(0).rand(24, 4).astype("float32")
    y = np.eye(3)[np.arange(24) % 3]
    found = []
    for train in (keras.Model.fit, functools.partial(fdg_keras.fit, delay=0)):
        keras.utils.set_random_seed(1)
        model = keras.Sequential(
            [
                keras.Input((4,)),
                keras.layers.Dense(4),
                keras.layers.Dense(3, "softmax"),
            ]
        )
        model.compile("sgd", "categorical_crossentropy", metrics=["f1_score"])
        history = train(model, x, y, verbose=0, validation_data=(x, y)).history
        found.append(history)
    assert list(found[0]) == list(found[1])
    for key, values in found[0].items():
        np.testing.assert_allclose(found[1][key], values, rtol=1e-5)
    assert np.shape(found[1]["val_f1_score"]) == (1, 3)


def test_many_trainers_are_no_reason_to_warn(caplog):
    """TensorFlow took the feeders of several trainers for one, retraced."""
    for _ in range(6):
        model = keras.Sequential(
            [keras.Input((2,)), keras.layers.Dense(2), keras.layers.Dense(1)]
        )
        model.compile("sgd", "mse")
        fdg_keras.fit(model, np.ones((8, 2)), np.ones((8, 1)), verbose=0)
    assert "retracing" not in caplog.text


def test_gradients_of_a_scaled_loss_are_not_divided_by_what_nobody_applied():
    """With `loss_scale_factor` all gradients were too small by that factor.

    Keras' step multiplies the loss by it and its optimizer divides gradients
    by it. Stages did the second and not the first.
    """
    weights = []
    for factor in (None, 1024.0):
        keras.utils.set_random_seed(0)
        model = small_model(
            optimizer=keras.optimizers.SGD(0.1, loss_scale_factor=factor)
        )
        quiet_fit(fdg_keras.Trainer(model, 2))
        weights.append(model.get_weights())
        assert model.optimizer.loss_scale_factor == factor
    for a, b in zip(*weights):
        np.testing.assert_array_equal(a, b)


def test_a_py_dataset_that_shuffles_has_the_order_of_model_fit():
    """Keras says `on_epoch_end` before the first epoch, too, to start afresh.

    A data set that shuffles then was one shuffle behind in every epoch.
    """

    class Shuffled(keras.utils.PyDataset):
        def __init__(self):
            super().__init__()
            self.random = np.random.RandomState(0)
            self.order, self.orders = list(range(6)), []

        def __len__(self):
            return 6

        def __getitem__(self, index):
            rows = slice(4 * self.order[index], 4 * self.order[index] + 4)
            return tuple(a[rows] for a in small_data())

        def on_epoch_begin(self):
            self.orders.append(list(self.order))

        def on_epoch_end(self):
            self.random.shuffle(self.order)

    model, orders = small_model(), []
    for fitted in (fdg_keras.Trainer(model, 2), model):
        data, validation = Shuffled(), Shuffled()
        fitted.fit(data, validation_data=validation, epochs=2, verbose=0)
        fitted.evaluate(data, verbose=0)
        orders.append((data.orders, validation.orders))
    assert orders[0] == orders[1]


@pytest.mark.parametrize("stash", STASHES)
def test_there_is_no_gradient_through_state_that_was_assigned(stash):
    """A layer that reads its running mean anew had another gradient.

    What was assigned is a tensor while a stage is traced, and the gradient
    went on through it to the layer's inputs.
    """

    class Centre(keras.layers.Layer):
        def build(self, shape):
            self.mean = self.add_weight(shape=shape[-1:], trainable=False)

        def call(self, x):
            self.mean.assign(0.5 * keras.ops.mean(x, axis=0))
            return x - self.mean

    weights = []
    for staged in (True, False):
        keras.utils.set_random_seed(0)
        model = small_model(Centre())
        if staged:
            quiet_fit(fdg_keras.Trainer(model, 2, delay=0, stash=stash))
        else:
            quiet_fit(model)
        weights.append(model.get_weights())
    for a, b in zip(*weights):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_a_stateful_rnn():
    """Its states are no variables of the layer, says Keras: they were lost."""
    x = np.random.RandomState(0).rand(20, 3, 2).astype("float32")
    y = x.sum(axis=(1, 2), keepdims=True)[:, 0]
    trained = []
    for train in (keras.Model.fit, functools.partial(fdg_keras.fit, delay=0)):
        keras.utils.set_random_seed(1)
        model = keras.Sequential(
            [
                keras.Input(batch_shape=(5, 3, 2)),
                keras.layers.LSTM(4, stateful=True, return_sequences=True),
                keras.layers.GRU(3, stateful=True),
                keras.layers.Dense(1),
            ]
        )
        model.compile("sgd", "mse")
        train(model, x, y, batch_size=5, shuffle=False, verbose=0, epochs=2)
        states = keras.tree.flatten([r.states for r in model.layers[:2]])
        trained.append([*model.get_weights(), *map(np.array, states)])
    for found, wanted in zip(*trained, strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-7)
    assert np.abs(trained[0][-1]).max() > 0.01


def test_an_output_with_a_mask_that_is_there_twice():
    """The loss of the first copy forgot the mask.

    The last stage told its outputs apart by the values they stand for, and
    two copies of an output stand for one.
    """
    random = np.random.RandomState(0)
    x = random.rand(12, 4, 3).astype("float32")
    x[:, 2:] = 0.0
    y = random.rand(12, 4, 2).astype("float32")
    losses = []
    for staged in (True, False):
        keras.utils.set_random_seed(1)
        inputs = keras.Input((4, 3))
        h = keras.layers.Masking(name="mask")(inputs)
        h = keras.layers.LSTM(2, return_sequences=True)(h)
        model = keras.Model(inputs, [h, h])
        model.compile("sgd", ["mse", "mae"])
        if staged:
            fitted = fdg_keras.Trainer(model, ["mask"], delay=0)
        else:
            fitted = model
        history = fitted.fit(x, [y, y], verbose=0)
        losses.append(history.history["loss"])
    np.testing.assert_allclose(*losses, rtol=1e-6)


def test_another_trainer_within_training_is_refused():
    """It took the variables away, and brought old values back."""
    model = small_model()
    x, y = small_data()

    class Tests(keras.callbacks.Callback):
        drain_every = None

        def on_train_batch_end(self, batch, logs=None):
            fdg_keras.Trainer(model, 2).evaluate(x, y, verbose=0)

    with pytest.raises(ValueError, match="nor run by another `Trainer`"):
        quiet_fit(fdg_keras.Trainer(model, 2), callbacks=[Tests()])
    model.fit(x, y, verbose=0)


@pytest.mark.parametrize("same", [True, False])
def test_training_within_training_is_refused(same):
    """It waited for ever, or lost updates, in a hook that batches call."""
    model = small_model()
    trainer = fdg_keras.Trainer(model, 2)

    class Trains(keras.callbacks.Callback):
        drain_every = None

        def on_train_batch_end(self, batch, logs=None):
            quiet_fit(trainer if same else fdg_keras.Trainer(model, 2))

    with pytest.raises(ValueError, match="cannot be trained within"):
        quiet_fit(trainer, callbacks=[Trains()])
    quiet_fit(trainer)


def test_a_metric_with_several_values():
    """It ended `fit`: a dictionary is no number."""

    class Two(keras.metrics.Metric):
        def __init__(self, name="two"):
            super().__init__(name=name)
            self.count = self.add_variable((), "zeros")

        def update_state(self, y, y_pred, sample_weight=None):
            self.count.assign_add(1.0)

        def result(self):
            return {"once": self.count * 1.0, "twice": self.count * 2.0}

    histories = []
    for staged in (True, False):
        model = small_model()
        model.compile("sgd", "mse", metrics=[Two()])
        fitted = fdg_keras.Trainer(model, 2, delay=0) if staged else model
        histories.append(quiet_fit(fitted).history)
    assert histories[0]["twice"] == histories[1]["twice"] == [12.0]
    assert list(histories[0]) == list(histories[1])


def test_an_optimizer_with_a_setting_that_is_not_in_its_configuration():
    """Stages trained with the setting's default."""

    class Scaling(keras.optimizers.SGD):
        factor = 1.0

        def update_step(self, gradient, variable, learning_rate):
            scaled = self.factor * gradient
            super().update_step(scaled, variable, learning_rate)

    weights = []
    for staged in (True, False):
        optimizer = Scaling(0.01)
        optimizer.factor = 3.0
        keras.utils.set_random_seed(1)
        model = small_model(optimizer=optimizer)
        quiet_fit(fdg_keras.Trainer(model, 2, delay=0) if staged else model)
        weights.append(model.get_weights())
    for a, b in zip(*weights):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_an_optimizer_that_cannot_be_made_again():
    class Odd(keras.optimizers.SGD):
        def __init__(self, scale):
            super().__init__(scale)

    model = small_model(optimizer=Odd(0.1))
    with pytest.raises(ValueError, match="cannot be made again for each stage"):
        quiet_fit(fdg_keras.Trainer(model, 2))


def test_layers_frozen_within_fit_are_frozen_by_the_next():
    """As in Keras, which obeys when it is compiled anew."""
    weights = []
    for staged in (True, False):
        keras.utils.set_random_seed(1)
        model = small_model()

        def freeze(epoch, logs, model=model):
            model.layers[0].trainable = False

        callback = keras.callbacks.LambdaCallback(on_epoch_end=freeze)
        fitted = fdg_keras.Trainer(model, 2, delay=0) if staged else model
        quiet_fit(fitted, epochs=2, callbacks=[callback])
        weights.append(model.get_weights())
    for a, b in zip(*weights):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("emulate", [False, True])
def test_a_loss_without_any_gradient(emulate):
    """Nothing was trained, and nothing was said."""
    inputs = keras.Input((4,))
    h = keras.layers.Dense(3)(inputs)
    outputs = keras.ops.stop_gradient(keras.layers.Dense(1)(h))
    model = keras.Model(inputs, outputs)
    model.compile("sgd", "mse")
    with pytest.raises(ValueError, match="No weight has a gradient"):
        quiet_fit(fdg_keras.Trainer(model, 2, emulate=emulate))


def sigmoid_times(x):
    return x * tf.sigmoid(x)


@tf.custom_gradient
def waiting(x):
    """As `sigmoid_times`; its gradient waits for what it is given."""

    def gradient(dy):
        with tf.control_dependencies([dy]):
            s = tf.sigmoid(x)
            return dy * (s + x * s * (1 - s))

    return sigmoid_times(x), gradient


@pytest.mark.parametrize("delay", [0, 2])
@pytest.mark.parametrize("stash", ["exact", "current", "replay"])
def test_a_gradient_that_waits_for_what_it_is_given(stash, delay):
    """`Dense(5, "swish")` before a cut failed at the first backward.

    TensorFlow's gradient of it runs after what it is given, by a control
    edge. The backward was cut out along that edge, with the placeholder behind
    it, which nobody fed.
    """
    weights = []
    for first, second in (("swish", waiting), (sigmoid_times, sigmoid_times)):
        keras.utils.set_random_seed(1)
        model = keras.Sequential(
            [
                keras.Input((4,)),
                keras.layers.Dense(5, first, name="first"),
                keras.layers.Dense(5, second, name="second"),
                keras.layers.Dense(3),
            ]
        )
        model.compile(keras.optimizers.SGD(0.1, momentum=0.9), "mse")
        cuts = ["first", "second"]
        quiet_fit(fdg_keras.Trainer(model, cuts, delay=delay, stash=stash))
        weights.append(model.get_weights())
    for a, b in zip(*weights):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["EfficientNetB0", "MobileNetV3Small"])
def test_applications_with_such_gradients(name):
    """Most of today's convolutional networks have them, cut anywhere."""
    random = np.random.RandomState(0)
    x = 255 * random.rand(16, 32, 32, 3).astype("f")
    y = random.randint(3, size=16)
    losses = []
    for staged in (True, False):
        keras.utils.set_random_seed(1)
        model = getattr(keras.applications, name)(
            weights=None, input_shape=(32, 32, 3), classes=3
        )
        loss = "sparse_categorical_crossentropy"
        model.compile(keras.optimizers.SGD(0.01), loss)
        fitted = fdg_keras.Trainer(model, 3, delay=0) if staged else model
        history = fitted.fit(x, y, batch_size=8, shuffle=False, verbose=0)
        losses.append(history.history["loss"])
    # Weights of such deep models are not the same to more than a few digits.
    np.testing.assert_allclose(*losses, rtol=1e-3)


def of_unknown_length(dataset):
    return dataset.filter(lambda *batch: True)


FIT_DATA = {"shuffle": False, "verbose": 0}
SHUFFLED = {
    "known": ({}, 3, None),
    "unknown": ({}, 3, of_unknown_length),
    "steps": ({"steps_per_epoch": 4}, 5, None),
    "unknown and steps": ({"steps_per_epoch": 3}, 4, of_unknown_length),
}


@pytest.mark.filterwarnings("ignore:Your input ran out of data")
@pytest.mark.parametrize("validated", ["no", "another", "itself"])
@pytest.mark.parametrize("kind", SHUFFLED)
def test_a_data_set_that_shuffles_is_opened_as_often_as_by_keras(
    kind, validated
):
    """From the second epoch on, batches came in another order.

    Keras opens a data set of known length once more when an epoch has ended.
    It does not read on, but `shuffle` has another order each time.
    """
    more, epochs, change = SHUFFLED[kind]
    x, y = small_data()
    found = []
    for staged in (True, False):
        keras.utils.set_random_seed(1)
        model = small_model()
        data, other = (
            tf.data.Dataset.from_tensor_slices((x, y)).shuffle(24, seed=s)
            for s in (1, 2)
        )
        data = (change or (lambda d: d))(data.batch(5))
        sets = {"no": None, "another": other.take(20).batch(4), "itself": data}
        arguments = {"validation_data": sets[validated], **FIT_DATA} | more
        fitted = fdg_keras.Trainer(model, 2, delay=0) if staged else model
        history = fitted.fit(data, epochs=epochs, **arguments).history
        tests = fitted.evaluate(data, verbose=0)
        outputs = fitted.predict(data, verbose=0)
        found.append((history, tests, outputs, model.get_weights()))
    keras.tree.map_structure(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
        *found,
    )


class Pairs(keras.utils.PyDataset):
    """The small data in batches of 5, 5, 5, 5, 4."""

    def __len__(self):
        return 5

    def __getitem__(self, index):
        x, y = small_data()
        rows = slice(5 * index, 5 * index + 5)
        return x[rows], y[rows]


def batches_of_small_data(**arguments):
    return tf.data.Dataset.from_tensor_slices(small_data()).batch(**arguments)


UNBUILT = {
    "arrays": small_data,
    "tensors": lambda: map(tf.constant, small_data()),
    "tf.data": lambda: [batches_of_small_data(batch_size=5)],
    "of static shape": lambda: [
        batches_of_small_data(batch_size=5, drop_remainder=True)
    ],
    "PyDataset": lambda: [Pairs()],
}


@pytest.mark.parametrize("kind", UNBUILT)
def test_a_sequential_is_built_for_the_data(kind):
    """One without an input shape was refused, where Keras builds it."""
    models = []
    for staged in (True, False):
        keras.utils.set_random_seed(1)
        model = keras.Sequential(
            [
                keras.layers.Dense(5, "tanh", name="first"),
                keras.Sequential([keras.layers.Dense(4)]),
                keras.layers.Dropout(0.5),
                keras.layers.Dense(3),
            ]
        )
        model.compile("sgd", "mse")
        data = UNBUILT[kind]()
        if staged:
            fdg_keras.fit(model, *data, splits=["first"], delay=0, **FIT_DATA)
        else:
            model.fit(*data, **FIT_DATA)
        models.append(model)
    one, other = models
    assert one.input_shape == other.input_shape
    for a, b in zip(one.get_weights(), other.get_weights(), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_a_sequential_is_not_built_for_a_generator():
    """A batch would be lost by looking at it."""
    model = keras.Sequential([keras.layers.Dense(4), keras.layers.Dense(3)])
    model.compile("sgd", "mse")
    batches = iter([small_data()] * 2)
    with pytest.raises(ValueError, match=r"no input shape yet.*model.build"):
        fdg_keras.fit(model, (batch for batch in batches), steps_per_epoch=2)
    assert len(list(batches)) == 2


class Watched(keras.layers.Layer):
    """Keeps a metric of its own."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.mean = keras.metrics.Mean(name="act")

    def call(self, x):
        self.mean.update_state(x)
        return x


@pytest.mark.parametrize("emulate", [False, True])
@pytest.mark.parametrize("steps", [1, 4])
def test_a_metric_of_an_earlier_stage_without_delay(steps, emulate):
    """It was missing in the logs of batches, as it is with delay."""

    class Log(keras.callbacks.Callback):
        def __init__(self):
            super().__init__()
            self.logs = []

        def on_train_batch_end(self, batch, logs=None):
            self.logs.append([batch, logs])

    found = []
    for staged in (True, False):
        keras.utils.set_random_seed(1)
        model = keras.Sequential(
            [
                keras.Input((4,)),
                Watched(name="watched"),
                keras.layers.Dense(3, name="first"),
                keras.layers.Dense(3),
            ]
        )
        model.compile("sgd", "mse", metrics=["mae"], steps_per_execution=steps)
        fitted = model
        if staged:
            fitted = fdg_keras.Trainer(
                model, ["first"], delay=0, emulate=emulate
            )
        log = Log()
        quiet_fit(fitted, callbacks=[log])
        found.append(log.logs)
    assert [list(logs) for _, logs in found[0]] == [
        list(logs) for _, logs in found[1]
    ]
    keras.tree.map_structure(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), *found
    )


def test_results_of_evaluate_are_in_the_order_of_keras():
    """A dictionary of them, and `val_` logs, were not sorted by name."""
    orders, results = [], []
    for staged in (True, False):
        keras.utils.set_random_seed(1)
        model = small_model()
        model.compile("sgd", "mse", metrics=["mse", "cosine_similarity", "mae"])
        fitted = fdg_keras.Trainer(model, 2, delay=0) if staged else model
        history = quiet_fit(fitted, validation_data=small_data()).history
        named = fitted.evaluate(*small_data(), verbose=0, return_dict=True)
        results.append(fitted.evaluate(*small_data(), verbose=0))
        orders.append((list(history), list(named)))
    assert orders[0] == orders[1]
    np.testing.assert_allclose(*results, rtol=1e-5)


@pytest.mark.parametrize("in_list", [False, True])
def test_an_input_that_a_dictionary_lacks(recwarn, in_list):
    """Keras' own error was hidden by a longer one, and a warning."""
    image, tab = keras.Input((4,), name="image"), keras.Input((4,), name="tab")
    outputs = keras.layers.Dense(3)(keras.layers.Add()([image, tab]))
    inputs = [image, tab] if in_list else {"image": image, "tab": tab}
    model = keras.Model(inputs, outputs)
    model.compile("sgd", "mse")
    x, y = small_data()
    messages = []
    for fitted in (model, fdg_keras.Trainer(model, 1)):
        with pytest.raises(ValueError, match='data for input "tab"') as raised:
            fitted.fit({"image": x, "tabs": x}, y, verbose=0)
        messages.append(str(raised.value))
    assert messages[1] in messages[0]
    assert not [w for w in recwarn if "structure" in str(w.message)]


@pytest.mark.parametrize("hook", ["on_train_batch_end", "on_epoch_end"])
def test_notes_name_a_callback_once(hook):
    """One of a batch's hooks was said to be a NoneType, too."""

    def fail(*args, **kwargs):
        raise KeyError("by the test")

    callback = keras.callbacks.LambdaCallback(on_epoch_begin=lambda *args: None)
    setattr(callback, hook, fail)
    trainer = fdg_keras.Trainer(small_model(), 2, delay=0)
    with pytest.raises(KeyError, match="by the test") as raised:
        quiet_fit(trainer, callbacks=[callback])
    notes = raised.value.__notes__
    assert [n for n in notes if "The callback is a" in n] == [
        "The callback is a LambdaCallback."
    ]
    assert f"Raised in a callback's `{hook}`." in notes


class Watcher(keras.callbacks.Callback):
    """Listens to batches."""

    def on_train_batch_end(self, batch, logs=None):
        pass


WARNED = {
    "futile": ({"shrink": 0.5}, {}, "does next to nothing"),
    "shared": ({"devices": ["CPU:0"]}, {}, r"2 stages share 1 device"),
    "motion": ({}, {"callbacks": [Watcher()]}, "are in motion"),
    "short": ({"delay": 0}, {"steps_per_epoch": 9}, "ran out of data"),
}


@pytest.mark.parametrize("in_one", [True, False])
@pytest.mark.parametrize("kind", WARNED)
def test_warnings_point_at_the_line_of_the_user(kind, in_one):
    """Some pointed into this package, and one at `sys:1`."""
    settings, arguments, match = WARNED[kind]
    arguments = FIT_DATA | arguments
    data = small_data()
    model = small_model(optimizer=keras.optimizers.Adam())

    def train():
        if in_one:
            fdg_keras.fit(model, *data, **settings, **arguments)
        else:
            fdg_keras.Trainer(model, **settings).fit(*data, **arguments)

    with pytest.warns(UserWarning, match=match) as found:
        train()
    where = [w.filename for w in found if re.search(match, str(w.message))]
    assert where == [__file__]


class Failing(Pairs):
    """Lacks one of its batches."""

    def __getitem__(self, index):
        if index == 3:
            raise OSError("by the test")
        return super().__getitem__(index)


@pytest.mark.parametrize("emulate", [False, True])
@pytest.mark.parametrize("workers", [1, 2])
def test_a_batch_that_fails_ahead_of_time(workers, emulate):
    """The batch that was waited for was said to have failed."""
    trainer = fdg_keras.Trainer(small_model(), 2, emulate=emulate)
    with pytest.raises(OSError, match="by the test") as raised:
        trainer.fit(Failing(workers=workers), **FIT_DATA)
    note = r"drawing batch [0-3]\b.*, or a later one ahead of time"
    assert [n for n in raised.value.__notes__ if re.search(note, n)]


class Endpoint(keras.layers.Layer):
    """Adds the crossentropy of what it is given with the first class."""

    def call(self, probabilities):
        first = keras.ops.zeros_like(probabilities[:, 0], "int32")
        self.add_loss(
            keras.losses.sparse_categorical_crossentropy(first, probabilities)
        )
        return probabilities


def sure_model(softmax="softmax", sigmoid="sigmoid"):
    """Its outputs are probabilities that round to 0 and 1, each made early."""
    keras.utils.set_random_seed(1)
    inputs = keras.Input((4,), name="in")
    h = keras.layers.Dense(4, name="first")(inputs)
    kind = keras.layers.Dense(3, softmax, name="kind")(h)
    gate = keras.layers.Dense(1, sigmoid, name="gate")(h)
    h = keras.layers.Dense(4, name="second")(keras.layers.Multiply()([h, gate]))
    inner = keras.layers.Dense(3, softmax)(h)
    h = keras.layers.Dense(4, name="third")(h)
    h = keras.layers.Concatenate()([h, Endpoint(name="endpoint")(inner)])
    last = keras.layers.Dense(3)(h)
    last = keras.layers.Activation(softmax, name="last")(last)
    model = keras.Model(inputs, {"kind": kind, "gate": gate, "last": last})
    losses = {
        "kind": "sparse_categorical_crossentropy",
        "gate": "binary_crossentropy",
        "last": "categorical_crossentropy",
    }
    model.compile(keras.optimizers.SGD(1e-5), losses)
    return model


def sure_data():
    x, y = small_data()
    kinds = np.argmax(y, axis=-1)
    gates = (kinds > 0).astype("float32")
    return 200 * x - 70, {
        "kind": kinds,
        "gate": gates,
        "last": np.eye(3, dtype="float32")[kinds],
    }


SURE_FIT = {"batch_size": 4, "epochs": 2} | FIT_DATA
SURE_CUTS = ["gate", "second", "third"]
SURE_ACTIVATIONS = [("softmax", "sigmoid"), (tf.nn.softmax, tf.nn.sigmoid)]


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"stash": "current"},
        {"stash": "replay"},
        {"emulate": True},
    ],
    ids=str,
)
@pytest.mark.parametrize(
    "activations", SURE_ACTIVATIONS, ids=["Keras", "TensorFlow"]
)
def test_probabilities_that_round_to_zero(settings, activations):
    """Their gradient was zero, and the loss too small.

    Keras remembers the logits that softmax and sigmoid are given, finds in a
    graph those that TensorFlow's are given, and computes crossentropies from
    them. The last stage knew what it was sent.
    """
    found = []
    for staged in (True, False):
        model = fitted = sure_model(*activations)
        if staged:
            fitted = fdg_keras.Trainer(
                model, SURE_CUTS, **{"delay": 0, **settings}
            )
        losses = fitted.fit(*sure_data(), **SURE_FIT).history
        tested = fitted.evaluate(*sure_data(), verbose=0)
        found.append((losses, tested, model.get_weights()))
    assert found[1][0]["loss"][0] > 50
    keras.tree.map_structure(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6),
        *found,
    )


def test_probabilities_that_round_to_zero_with_delay():
    weights = []
    for emulate in (True, False):
        model = sure_model()
        trainer = fdg_keras.Trainer(
            model, SURE_CUTS, emulate=emulate, shrink=0.5
        )
        trainer.fit(*sure_data(), **SURE_FIT)
        weights.append(model.get_weights())
    for a, b in zip(*weights):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("batch_size", [4, 5, 8])
def test_a_model_of_another_batch_size(batch_size):
    """A size that divides the samples was refused, and others not."""
    x, y = np.ones((32, 4), "float32"), np.ones((32, 1), "float32")
    models = []
    for staged in (True, False):
        keras.utils.set_random_seed(1)
        model = keras.Sequential(
            [
                keras.Input(batch_shape=(8, 4)),
                keras.layers.Dense(3),
                keras.layers.Dense(1),
            ]
        )
        model.compile("sgd", "mse")
        fitted = fdg_keras.Trainer(model, 2, delay=0) if staged else model
        fitted.fit(x, y, batch_size=batch_size, verbose=0)
        fitted.evaluate(x, y, batch_size=batch_size, verbose=0)
        models.append(model)
    for a, b in zip(*(model.weights for model in models)):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def _stopped_by(name):
    """Layers through which no gradient comes back."""
    stop = keras.ops.stop_gradient
    if name == "lambda":
        return keras.layers.Lambda(stop)
    return {"operation": stop, "round": keras.ops.round}[name]


@pytest.mark.parametrize("name", ["operation", "lambda", "round"])
@pytest.mark.parametrize("delay", [0, 2])
def test_a_stage_without_a_backward_is_sent_no_gradients(name, delay):
    """It never took them, and the stage after it waited for room for ever."""

    def make():
        keras.utils.set_random_seed(1)
        inputs = keras.Input((4,))
        h = _stopped_by(name)(keras.layers.Dense(5, name="first")(inputs))
        h = keras.layers.Dense(5, name="second")(h)
        model = keras.Model(inputs, keras.layers.Dense(1)(h))
        model.compile("sgd", "mse")
        return model

    random = np.random.default_rng(0)
    x, y = random.random((48, 4), "float32"), random.random((48, 1))
    model, expected = make(), make()
    cut = [trace_graph(model).nodes[1].name]  # after what stops
    trainer = fdg_keras.Trainer(model, cut, ["CPU:0", "CPU:1"], delay)
    trainer.fit(x, y, batch_size=4, epochs=2, shuffle=False, verbose=0)
    expected.fit(x, y, batch_size=4, epochs=2, shuffle=False, verbose=0)
    # The last stage has no delay, and no other one learns.
    for a, b in zip(model.weights, expected.weights):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("emulate", [False, True])
def test_a_tf_variable_that_a_layer_assigns_to(emulate):
    """What was assigned was lost."""

    class Counter(keras.layers.Layer):
        def __init__(self):
            super().__init__()
            self.count = tf.Variable(1.0, trainable=False, name="count")

        def call(self, x):
            self.count.assign_add(1.0)
            return x * 1.0

    model = keras.Sequential(
        [
            keras.Input((4,)),
            Counter(),
            keras.layers.Dense(3),
            keras.layers.Dense(1),
        ]
    )
    model.compile("sgd", "mse")
    trainer = fdg_keras.Trainer(model, 2, ["CPU:0"] * 2, emulate=emulate)
    if emulate:  # one device, in order: there it is as in Keras
        quiet_fit(trainer)
        assert float(model.layers[0].count) > 1.0
        return
    with pytest.raises(
        ValueError, match=r"assigns to the `tf.Variable` 'count"
    ):
        quiet_fit(trainer)


def test_a_model_that_got_other_layers():
    """The layers that were added were not trained."""
    model = keras.Sequential(
        [keras.Input((4,)), keras.layers.Dense(3), keras.layers.Dense(1)]
    )
    model.compile("sgd", "mse")
    trainer = fdg_keras.Trainer(model, 2, ["CPU:0"] * 2)
    model.add(keras.layers.Dense(1))
    model.compile("sgd", "mse")
    for run in (quiet_fit, lambda t: t.evaluate(np.ones((4, 4)), np.ones(4))):
        with pytest.raises(ValueError, match="make a new `Trainer`"):
            run(trainer)


def test_what_an_optimizer_was_given_to_call():
    """It was left behind when each stage got an optimizer of its own."""

    class Scaled(keras.optimizers.SGD):
        scale = None

        def update_step(self, gradient, variable, learning_rate):
            gradient = self.scale(gradient) * self.factors["all"]
            super().update_step(gradient, variable, learning_rate)

    def make():
        keras.utils.set_random_seed(1)
        model = keras.Sequential(
            [keras.Input((4,)), keras.layers.Dense(3), keras.layers.Dense(1)]
        )
        optimizer = Scaled(0.01)
        optimizer.scale = lambda gradient: 5 * gradient
        optimizer.factors = {"all": 0.5}
        model.compile(optimizer, "mse")
        return model

    model, expected = make(), make()
    x, y = np.ones((16, 4)), np.ones(16)
    fdg_keras.fit(
        model, x, y, delay=0, devices=["CPU:0"] * 2, shuffle=False, verbose=0
    )
    expected.fit(x, y, shuffle=False, verbose=0)
    for a, b in zip(model.weights, expected.weights):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


@pytest.fixture
def float64():
    """Has Keras compute in float64."""
    keras.config.set_floatx("float64")
    keras.config.set_dtype_policy("float64")
    yield
    keras.config.set_floatx("float32")


@pytest.mark.parametrize("emulate", [False, True])
@pytest.mark.usefixtures("float64")
def test_a_learning_rate_in_float64(emulate):
    """It went through float32, and lost half of its digits."""

    def make():
        keras.utils.set_random_seed(1)
        model = keras.Sequential(
            [
                keras.Input((4,)),
                keras.layers.Dense(3, "tanh"),
                keras.layers.Dense(1),
            ]
        )
        model.compile(keras.optimizers.SGD(0.1, momentum=0.9), "mse")
        return model

    model, expected = make(), make()
    x, y = np.random.rand(16, 4), np.random.rand(16)
    trainer = fdg_keras.Trainer(
        model, 2, ["CPU:0"] * 2, delay=0, emulate=emulate
    )
    given = {"batch_size": 4, "epochs": 2, "shuffle": False, "verbose": 0}
    found = trainer.fit(x, y, **given).history["loss"]
    wanted = expected.fit(x, y, **given).history["loss"]
    np.testing.assert_allclose(found, wanted, rtol=1e-12)
    for a, b in zip(model.weights, expected.weights):
        assert a.dtype == "float64"
        np.testing.assert_allclose(a, b, rtol=1e-12)


def activity_of_each_call():
    inputs = keras.Input((4,))
    dense = keras.layers.Dense(
        4, "tanh", activity_regularizer=keras.regularizers.L2(0.5)
    )
    return keras.Model(inputs, keras.layers.Dense(2)(dense(dense(inputs))))


def activity_within_a_shared_model():
    encoder = keras.Sequential(
        [
            keras.Input((4,)),
            keras.layers.Dense(3, activity_regularizer="l2"),
        ]
    )
    left, right = keras.Input((4,)), keras.Input((4,))
    h = keras.layers.Subtract()([encoder(left), encoder(right)])
    return keras.Model([left, right], keras.layers.Dense(2)(h))


class Transposed(keras.layers.Layer):
    """Multiplies by the table of an embedding."""

    def __init__(self, embedding):
        super().__init__()
        self.embedding = embedding

    def call(self, x):
        return x @ keras.ops.transpose(self.embedding.embeddings)


def regularizer_of_a_tied_table():
    inputs = keras.Input((4,))
    embedding = keras.layers.Embedding(5, 3, embeddings_regularizer="l2")
    h = keras.layers.Dense(3)(embedding(inputs))
    h = keras.layers.GlobalAveragePooling1D()(Transposed(embedding)(h))
    return keras.Model(inputs, h)


@pytest.mark.parametrize("splits", [1, 2])
@pytest.mark.parametrize(
    "make",
    [
        activity_of_each_call,
        activity_within_a_shared_model,
        regularizer_of_a_tied_table,
    ],
)
def test_losses_of_what_is_used_twice(make, splits):
    """Of the calls of a layer only the last one's losses counted.

    And the regularizer of a variable counted once for each layer that has it.
    """
    random = np.random.RandomState(1)
    x = random.randint(0, 5, (16, 4)).astype("float32")
    found = []
    for staged in True, False:
        keras.utils.set_random_seed(1)
        model = make()
        model.compile(keras.optimizers.SGD(0.01), "mse")
        y = np.linspace(0, 1, 16 * model.output_shape[1]).reshape(16, -1)
        fit = functools.partial(fdg_keras.fit, model, splits=splits, delay=0)
        history = (fit if staged else model.fit)(
            [x, 1 - x] if len(model.inputs) > 1 else x,
            y,
            batch_size=4,
            epochs=2,
            shuffle=False,
            verbose=0,
        )
        found.append((history.history["loss"], *model.get_weights()))
    for actual, expected in zip(*found):
        np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-7)


def test_ticks_of_a_stage_do_not_go_through_the_caller(cpus):
    """The number of ticks was read where the caller is, each tick anew.

    In a cluster that was a message to the chief and back for every tick.
    """
    layers = [keras.layers.Dense(4, "relu") for _ in range(3)]
    model = keras.Sequential([keras.Input((8,)), *layers])
    model.compile("sgd", "mse")
    trainer = fdg_keras.Trainer(model, 2, ["CPU:1", "CPU:2"])
    x, y = np.ones((8, 8), "float32"), np.ones((8, 4), "float32")
    trainer.fit(x, y, batch_size=4, verbose=0)
    loops = trainer._deployment._built["train"].pipeline.loops
    for loop, device in zip(loops, ["CPU:1", "CPU:2"], strict=True):
        whiles = [
            op
            for op in loop._function.graph.get_operations()
            if op.type in ("While", "StatelessWhile")
        ]
        assert whiles
        for tensor in itertools.chain(*(op.inputs for op in whiles)):
            # Resources are where they are, whoever holds their handle.
            if tensor.dtype != tf.resource:
                assert tensor.op.device.endswith(device), tensor.name
