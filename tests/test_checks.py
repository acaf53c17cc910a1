"""What `model.fit` would train, and stages would not: refused, or said."""

import importlib

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers, ops
from matching import assert_same_weights

import fdg_keras

X = np.random.RandomState(0).rand(16, 4).astype("float32")
Y = np.random.RandomState(1).rand(16, 2).astype("float32")


def model_of(*parts):
    model = keras.Sequential([keras.Input((4,)), *parts])
    model.compile(keras.optimizers.SGD(0.1), "mse")
    return model


def fit(model, splits=2, emulate=False, **arguments):
    trainer = fdg_keras.Trainer(
        model, splits, ["CPU:0"] * 2, delay=0, emulate=emulate
    )
    return trainer.fit(X, Y, batch_size=8, verbose=0, **arguments)


@pytest.mark.parametrize("emulate", [False, True])
@pytest.mark.parametrize("splits", [1, 2])
@pytest.mark.parametrize("name", ["first", "last"])
def test_a_loss_that_reads_weights(name, splits, emulate):
    model = model_of(
        layers.Dense(3, name="first"), layers.Dense(2, name="last")
    )
    kernel = model.get_layer(name).kernel

    def loss(y, y_pred):
        return ops.mean((y - y_pred) ** 2) + ops.sum(kernel**2)

    model.compile("sgd", loss)
    with pytest.raises(ValueError, match=f"The loss reads.*{name}.*Received"):
        fit(model, splits, emulate)
    # To evaluate, nothing is differentiated.
    trainer = fdg_keras.Trainer(model, 1, ["CPU:0"])
    found = trainer.evaluate(X, Y, verbose=0)
    assert found == pytest.approx(model.evaluate(X, Y, verbose=0), rel=1e-5)


@pytest.mark.parametrize("emulate", [False, True])
@pytest.mark.parametrize("name", ["first", "last"])
def test_a_metric_that_reads_weights(name, emulate):
    """It would be of another batch, of which one is a matter of chance."""
    model = model_of(
        layers.Dense(3, name="first"), layers.Dense(2, name="last")
    )
    kernel = model.get_layer(name).kernel

    def size(y, y_pred):
        return ops.sum(kernel**2)

    model.compile("sgd", "mse", metrics=[size])
    with pytest.raises(ValueError, match=f"metric reads.*{name}.*Received"):
        fit(model, emulate=emulate)
    trainer = fdg_keras.Trainer(model, 1, ["CPU:0"])
    found = trainer.evaluate(X, Y, verbose=0)
    assert found == pytest.approx(model.evaluate(X, Y, verbose=0), rel=1e-5)


def counting_model(where, eagerly=False):
    """Something in it looks at the optimizer's counter of steps."""
    keras.utils.set_random_seed(1)
    optimizer = keras.optimizers.SGD(
        keras.optimizers.schedules.ExponentialDecay(0.1, 1, 0.9)
    )

    def rate(*_):
        return ops.cast(optimizer.learning_rate, "float32")

    def step(x):
        return x * ops.cast(optimizer.iterations + 1, x.dtype)

    def loss(y, y_pred):
        return ops.mean((y - y_pred) ** 2) * (1 + 10 * rate())

    keep = layers.Activation("linear")
    model = model_of(
        layers.Dense(3),
        layers.Lambda(step) if where == "layer" else keep,
        layers.Dense(2),
    )
    model.compile(
        optimizer,
        loss if where == "loss" else "mse",
        metrics=[rate] if where == "metric" else [],
        run_eagerly=eagerly,
    )
    return model


@pytest.mark.parametrize("where", ["layer", "loss", "metric"])
@pytest.mark.parametrize("emulate", [False, True])
def test_what_reads_the_counter_of_steps(where, emulate):
    """It saw the step of some batch: which one, was a matter of speed."""
    with pytest.raises(ValueError, match=r"reads the `iterations`.*Received"):
        fit(counting_model(where), emulate=emulate)


@pytest.mark.parametrize("where", ["layer", "loss"])
def test_what_reads_the_counter_of_steps_eagerly(where):
    models = [counting_model(where, eagerly=True) for _ in range(2)]
    found = fit(models[0], epochs=2, shuffle=False).history
    expected = models[1].fit(
        X, Y, batch_size=8, epochs=2, shuffle=False, verbose=0
    )
    np.testing.assert_allclose(
        found["loss"], expected.history["loss"], rtol=1e-5
    )
    assert_same_weights(*models)


class Rematerialized(layers.Layer):
    """Has TensorFlow compute a layer, or what a weight does, once more."""

    def __init__(self, how):
        super().__init__(name="again")
        self.how = how

    def build(self, shape):
        self.kernel = self.add_weight(shape=(shape[-1], 3))

    def call(self, x):
        if self.how == "recompute_grad":
            return tf.recompute_grad(lambda x: x @ self.kernel)(x)

        @tf.custom_gradient
        def times(x, kernel):
            return x @ kernel, lambda dy: (
                dy @ tf.transpose(kernel),
                tf.transpose(x) @ dy,
            )

        if self.how == "given":
            return times(x, tf.convert_to_tensor(self.kernel))
        twice = tf.custom_gradient(
            lambda x: (x @ self.kernel, lambda dy, variables=None: (dy, []))
        )
        return twice(x)


@pytest.mark.parametrize("emulate", [False, True])
@pytest.mark.parametrize("how", ["recompute_grad", "custom_gradient"])
def test_a_gradient_of_its_own_that_loses_weights(how, emulate):
    """They were not trained, and a warning said what was not true."""
    model = model_of(Rematerialized(how), layers.Dense(2))
    with pytest.raises(ValueError, match=r"Stage 0 .*again.*Received: weights"):
        fit(model, emulate=emulate)


@pytest.mark.parametrize("emulate", [False, True])
def test_a_gradient_of_its_own_by_a_weight(emulate):
    models = []
    for _ in range(2):
        keras.utils.set_random_seed(1)
        models.append(model_of(Rematerialized("given"), layers.Dense(2)))
    fit(models[0], emulate=emulate, shuffle=False)
    models[1].fit(X, Y, batch_size=8, shuffle=False, verbose=0)
    assert_same_weights(*models)


class Counting(layers.Layer):
    """Reads its state by a function that is traced once."""

    def __init__(self):
        super().__init__(name="counting")
        self.count = self.add_weight(trainable=False, name="count")

    @tf.function
    def read(self):
        return self.count.value + 0.0

    def call(self, x):
        x = x * self.read()
        self.count.assign_add(1.0)
        return x


def test_state_that_a_function_of_its_own_reads():
    """Called once more, it reads what was before the assignment."""
    with pytest.raises(ValueError, match=r"Stage 0 reads .*count.*Received"):
        fit(model_of(Counting(), layers.Dense(2)))


@pytest.mark.parametrize("emulate", [False, True])
@pytest.mark.parametrize("devices", [["CPU:0", "CPU:1"], ["CPU:1", "CPU:2"]])
def test_weights_that_were_read_where_they_are_no_more(devices, emulate):
    """What holds their value at home, kept from before they were moved."""
    first = layers.Dense(3, use_bias=False, name="first")
    last = layers.Dense(2, name="last")
    model = model_of(first, layers.Dense(3), last)
    kernel = last.kernel.value

    @tf.function
    def loss(y, y_pred):
        return tf.reduce_mean((y - y_pred) ** 2) + tf.reduce_sum(kernel**2)

    model.compile("sgd", loss)
    settings = {"devices": devices, "delay": 0, "emulate": emulate}
    told = []
    begins = keras.callbacks.LambdaCallback(
        on_train_begin=lambda logs: told.append(logs)
    )
    with pytest.raises(ValueError, match=r"The loss reads.*last.*Received"):
        fdg_keras.Trainer(model, 2, **settings).fit(
            X, Y, verbose=0, callbacks=[begins]
        )
    weight = first.kernel.value
    tied = layers.Lambda(lambda x: x @ tf.transpose(weight))
    other = model_of(first, layers.Dense(3), tied, layers.Dense(2))
    with pytest.raises(ValueError, match=r"Stage 1 reads.*first.*Received"):
        fdg_keras.Trainer(other, [other.layers[1].name], **settings).fit(
            X, Y, verbose=0, callbacks=[begins]
        )
    assert not told


@pytest.mark.parametrize("emulate", [False, True])
def test_a_layer_that_reads_weights_of_another_stage(emulate):
    first = layers.Dense(3, use_bias=False, name="first")
    tied = layers.Lambda(lambda x: x @ ops.transpose(first.kernel))
    model = model_of(first, layers.Dense(3), tied, layers.Dense(2))
    with pytest.raises(ValueError, match=r"Stage 1 reads.*first.*Received"):
        fit(model, ["dense"], emulate)
    fit(model_of(layers.Dense(3), layers.Dense(2)), 2, emulate)


def test_a_weight_as_an_argument_of_an_operation():
    """No cut parts the operation from the layer."""
    inputs = keras.Input((4,))
    first = layers.Dense(3, name="first")
    h = layers.Dense(4, name="middle")(first(inputs))
    h = ops.matmul(h, first.kernel)
    model = keras.Model(inputs, layers.Dense(2, name="last")(h))
    model.compile("sgd", "mse")
    plan = fdg_keras.Trainer(model, 2, ["CPU:0"] * 2).plan
    assert plan.stages[1].layers == ("last",)
    with pytest.raises(ValueError, match=r"first/kernel.* is used on both"):
        fdg_keras.Trainer(model, ["middle"], ["CPU:0"] * 2)


def test_a_layer_that_is_a_tf_function():
    class Compiled(layers.Dense):
        @tf.function
        def call(self, x):
            return super().call(x)

    model = model_of(Compiled(3, name="mine"), layers.Dense(2))
    with pytest.raises(ValueError, match=r"`call` of layer 'mine'.*Received"):
        fit(model)


def test_within_a_tf_function():
    model = model_of(layers.Dense(3), layers.Dense(2))
    with pytest.raises(ValueError, match=r"eager mode.*Received"):
        tf.function(lambda: fit(model), autograph=False)()
    fit(model)


def test_a_model_without_layers():
    inputs = keras.Input((4,))
    model = keras.Model(inputs, inputs)
    model.compile("sgd", "mse")
    for splits in 1, 2:
        with pytest.raises(ValueError, match=r"one layer or more.*Received"):
            fit(model, splits)


class Scaling(keras.optimizers.SGD):
    def scale_loss(self, loss):
        return 10 * loss


class Zeroing(keras.optimizers.SGD):
    def apply_gradients(self, pairs):
        super().apply_gradients([(0 * g, v) for g, v in pairs])


def test_an_optimizer_that_scales_the_loss():
    model = model_of(layers.Dense(3), layers.Dense(2))
    model.compile(Scaling(0.1), "mse")
    with pytest.raises(ValueError, match=r"`scale_loss`.*Received"):
        fit(model)


@pytest.mark.filterwarnings("ignore:Zeroing overrides")
def test_an_optimizer_that_changes_gradients():
    model = model_of(layers.Dense(3), layers.Dense(2))
    model.compile(Zeroing(0.1), "mse")
    before = model.get_weights()
    fit(model)
    for a, b in zip(model.get_weights(), before):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(
    ("loss", "y", "data"),
    [
        ("mse", Y, (X,)),
        (keras.losses.CosineSimilarity(), Y, (X, Y, Y)),
        ("sparse_categorical_crossentropy", Y[:, 0], (X, np.hstack([Y, Y]))),
    ],
)
def test_validation_data_that_do_not_fit(loss, y, data):
    """Not after an epoch, as with Keras, but before it."""
    begun = []
    start = keras.callbacks.LambdaCallback(
        on_epoch_begin=lambda epoch, logs: begun.append(epoch)
    )
    model = model_of(layers.Dense(3), layers.Dense(2))
    model.compile("sgd", loss)
    trainer = fdg_keras.Trainer(model, 2, ["CPU:0"] * 2)
    with pytest.raises(ValueError, match=r"No targets|targets do not fit"):
        trainer.fit(
            X,
            y,
            batch_size=8,
            validation_data=data,
            callbacks=[start],
            verbose=0,
        )
    assert not begun


def test_weights_without_a_gradient():
    model = model_of(layers.Dense(3, name="one"), layers.Dense(2, name="two"))
    inputs = keras.Input((4,))
    h = ops.stop_gradient(model.layers[0](inputs))
    model = keras.Model(inputs, model.layers[1](h))
    model.compile("sgd", "mse")
    with pytest.warns(UserWarning, match=r"Gradients do not exist.*one/kernel"):
        fit(model)
    with pytest.warns(UserWarning, match=r"Gradients do not exist.*one/kernel"):
        model.fit(X, Y, verbose=0)


@pytest.mark.parametrize("name", ["train_step", "compute_loss", "call"])
def test_what_an_instance_overrides(name):
    model = model_of(layers.Dense(3), layers.Dense(2))
    setattr(model, name, getattr(model, name))
    with pytest.raises(ValueError, match=f"overrides `{name}`.*Received"):
        fit(model)


@pytest.mark.parametrize(
    "name", ["_compute_loss", "make_train_function", "losses", "__call__"]
)
def test_what_a_class_overrides(name):
    kind = type("Mine", (keras.Sequential,), {name: lambda self, *_: None})
    model = kind([keras.Input((4,)), layers.Dense(3), layers.Dense(2)])
    model.compile("sgd", "mse")
    with pytest.raises(ValueError, match=f"Mine overrides `{name}`.*Received"):
        fit(model)


@pytest.mark.parametrize("splits", [1, 2])
def test_an_optimizer_that_looks_at_all_gradients(splits, recwarn):
    class Normed(keras.optimizers.SGD):
        def apply(self, grads, trainable_variables=None):
            norm = ops.sqrt(sum(ops.sum(g**2) for g in grads))
            super().apply([g / norm for g in grads], trainable_variables)

    model = model_of(layers.Dense(3), layers.Dense(2))
    model.compile(Normed(0.1), "mse")
    fit(model, splits)
    found = [str(w.message) for w in recwarn if "Normed" in str(w.message)]
    assert len(found) == splits - 1
    assert all("of that stage alone" in text for text in found)


class Once(keras.callbacks.Callback):
    """Changes a model when training, or an epoch, begins."""

    def __init__(self, change, epoch):
        super().__init__()
        self._change, self._epoch = change, epoch

    def on_train_begin(self, logs=None):
        if self._epoch is None:
            self._change(self.model)

    def on_epoch_begin(self, epoch, logs=None):
        if epoch == self._epoch:
            self._change(self.model)


def set_rate(model):
    model.get_layer("drop").rate = 0.7


def set_momentum(model):
    model.optimizer.momentum = 0.0


def set_clipnorm(model):
    model.optimizer.clipnorm = 0.01


def freeze(model):
    model.layers[0].trainable = False


@pytest.mark.parametrize("epoch", [None, 0, 1])
@pytest.mark.parametrize(
    "change", [set_rate, set_momentum, set_clipnorm, freeze]
)
def test_what_callbacks_set_before_the_first_batch(change, epoch):
    """Keras traces then; what is set later it does not see until `compile`."""
    found = []
    for run in fit, lambda model, **given: model.fit(X, Y, verbose=0, **given):
        keras.utils.set_random_seed(1)
        model = model_of(
            layers.Dense(6, "tanh"),
            layers.Dropout(0.1, seed=3, name="drop"),
            layers.Dense(6),
            layers.Dense(2),
        )
        model.compile(keras.optimizers.SGD(0.1, momentum=0.9), "mse")
        given = {"epochs": 3, "shuffle": False}
        if run is not fit:
            given["batch_size"] = 8
        history = run(model, callbacks=[Once(change, epoch)], **given)
        found.append((history.history["loss"], *model.get_weights()))
    for actual, expected in zip(*found):
        np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-7)


def test_a_generator_of_no_weights():
    """Keras takes `None` for the weights of samples."""

    def batches():
        for i in range(0, 16, 8):
            yield X[i : i + 8], Y[i : i + 8], None

    found = []
    for staged in True, False:
        keras.utils.set_random_seed(1)
        model = model_of(layers.Dense(3), layers.Dense(2))
        trained = fdg_keras.Trainer(model, 2, ["CPU:0"] * 2, delay=0)
        (trained if staged else model).fit(batches(), verbose=0)
        found.append(model.get_weights())
    for actual, expected in zip(*found):
        np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-7)


def test_an_input_that_is_none():
    inputs = [keras.Input((4,)), keras.Input((4,), optional=True)]
    model = keras.Model(inputs, layers.Dense(2)(layers.Dense(2)(inputs[0])))
    model.compile("sgd", "mse")
    with pytest.raises(ValueError, match=r"a tensor for each.*Received"):
        fdg_keras.fit(model, [X, None], Y, devices=["CPU:0"] * 2, verbose=0)


@pytest.mark.parametrize("delay", [0, 2])
def test_evaluation_that_a_callback_stops(delay):
    class Stop(keras.callbacks.Callback):
        def on_test_batch_end(self, batch, logs=None):
            self.model.stop_evaluating = batch == 1

    model = model_of(layers.Dense(3), layers.Dense(2))
    trainer = fdg_keras.Trainer(model, 2, ["CPU:0"] * 2, delay=delay)
    given = {"batch_size": 4, "callbacks": [Stop()], "verbose": 0}
    found = trainer.evaluate(X, Y, **given)
    assert found == pytest.approx(model.evaluate(X, Y, **given), rel=1e-5)
    assert found != pytest.approx(model.evaluate(X, Y, verbose=0), rel=1e-3)


def test_batches_that_are_known_not_to_come():
    """No batch begins that does not end."""

    class Log(keras.callbacks.Callback):
        def on_train_batch_begin(self, batch, logs=None):
            events.append(("begin", batch))

        def on_train_batch_end(self, batch, logs=None):
            events.append(("end", batch))

    found = []
    for staged in True, False:
        events = []
        model = model_of(layers.Dense(3), layers.Dense(2))
        trained = fdg_keras.Trainer(model, 2, ["CPU:0"] * 2, delay=0)
        run = trained.fit if staged else model.fit
        given = {"steps_per_epoch": 3, "epochs": 2, "callbacks": [Log()]}
        with pytest.warns(UserWarning, match="ran out of data"):
            run(X, Y, batch_size=8, verbose=0, **given)
        found.append(events)
    assert found[0] == found[1]


class Guard(layers.Layer):
    """Asserts and tells, as a TensorFlow user writes it."""

    def __init__(self, path):
        super().__init__()
        self.file = path

    def call(self, x):
        tf.debugging.assert_less(tf.reduce_max(x), 100.0)
        tf.print("seen", output_stream=f"file://{self.file}")
        return x * 1.0


@pytest.mark.parametrize("stash", ["exact", "replay"])
@pytest.mark.parametrize("delay", [0, 2])
def test_assertions_and_prints_of_layers(tmp_path, delay, stash):
    """Nothing is computed from them, and still they are there to be run."""
    path = tmp_path / "told"
    model = model_of(Guard(path), layers.Dense(3), layers.Dense(2))
    trainer = fdg_keras.Trainer(
        model, 2, ["CPU:0", "CPU:1"], delay=delay, stash=stash
    )
    trainer.fit(X, Y, batch_size=4, verbose=0)
    assert path.read_text().count("seen") == 4
    trainer.evaluate(X, Y, batch_size=8, verbose=0)
    assert path.read_text().count("seen") == 6
    trainer.predict(X, batch_size=8, verbose=0)
    assert path.read_text().count("seen") == 8
    failure = pytest.raises(tf.errors.InvalidArgumentError, match="assertion")
    for run in (trainer.fit, trainer.evaluate):
        with failure:
            run(1000 * X, Y, verbose=0)
    with failure:
        trainer.predict(1000 * X, verbose=0)


def test_state_of_an_optimizer_that_is_for_all_variables():
    class Global(keras.optimizers.SGD):
        def build(self, variables):
            super().build(variables)
            self.total = self.add_variable((), name="total")

    model = model_of(layers.Dense(3), layers.Dense(2))
    model.compile(Global(0.1), "mse")
    with pytest.warns(UserWarning, match="Global keeps state that is not for"):
        fit(model)


def test_a_stop_when_an_epoch_begins():
    """Keras looks at it when a batch has ended, and so after the first."""

    class Stop(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch, logs=None):
            self.model.stop_training = epoch == 1

    found = []
    for run in (None, 0, 2):
        keras.utils.set_random_seed(0)
        model = model_of(layers.Dense(3), layers.Dense(2))
        data = {"batch_size": 2, "epochs": 3, "verbose": 0, "shuffle": False}
        data["callbacks"] = [Stop()]
        if run is None:
            model.fit(X, Y, **data)
        else:
            trainer = fdg_keras.Trainer(model, 2, ["CPU:0"] * 2, delay=run)
            trainer.fit(X, Y, **data)
        assert int(model.optimizer.iterations) == 8 + 1
        found.append(model.get_weights())
    for mine, keras_own in zip(found[1], found[0]):
        np.testing.assert_allclose(mine, keras_own, rtol=1e-5)


def test_corrections_are_checked_against_the_optimizer_of_today():
    model = model_of(layers.Dense(3), layers.Dense(2))
    model.compile(keras.optimizers.SGD(0.1, momentum=0.9), "mse")
    trainer = fdg_keras.Trainer(
        model, 2, ["CPU:0"] * 2, corrections=[fdg_keras.WeightPrediction()]
    )
    trainer.fit(X, Y, verbose=0)
    model.compile(keras.optimizers.RMSprop(0.1), "mse")
    with pytest.raises(ValueError, match="needs a momentum"):
        trainer.fit(X, Y, verbose=0)


def test_layers_that_were_added_since():
    inner = keras.Sequential([keras.Input((4,)), layers.Dense(3)])
    outer = keras.Sequential([keras.Input((4,)), inner, layers.Dense(2)])
    outer.compile("sgd", "mse")
    trainer = fdg_keras.Trainer(outer, 2, ["CPU:0"] * 2)
    trainer.predict(X, verbose=0)
    inner.add(layers.Dense(3))
    for run in (trainer.fit, trainer.evaluate):
        with pytest.raises(ValueError, match="other layers than when"):
            run(X, Y, verbose=0)
    with pytest.raises(ValueError, match="other layers than when"):
        trainer.predict(X, verbose=0)


def test_summaries_of_layers(tmp_path):
    class Told(layers.Layer):
        def call(self, x):
            tf.summary.scalar("highest", tf.reduce_max(x), step=0)
            return x * 1.0

    model = model_of(Told(), layers.Dense(3), layers.Dense(2))
    with tf.summary.create_file_writer(str(tmp_path)).as_default():
        trainer = fdg_keras.Trainer(model, 2, ["CPU:0", "CPU:1"])
        trainer.fit(X, Y, batch_size=4, verbose=0)
    (path,) = tmp_path.iterdir()
    # Names of scopes are before it.
    tags = [
        value.tag.rpartition("/")[2]
        for event in tf.compat.v1.train.summary_iterator(str(path))
        for value in event.summary.value
    ]
    assert tags == ["highest"] * 4


def test_determinism_of_operations():
    """TensorFlow forbids then to read the clock, which stages do."""
    # It has no public way back.
    config = importlib.import_module("tensorflow.python.framework.config")
    tf.config.experimental.enable_op_determinism()
    try:
        model = model_of(layers.Dense(3), layers.Dense(2))
        with pytest.raises(ValueError, match="enable_op_determinism"):
            fit(model)
        with pytest.raises(ValueError, match="measure=False"):
            fdg_keras.plan(model, 2, 4)
        assert fdg_keras.plan(model, 2, 4, measure=False).cuts
        fit(model, emulate=True)
    finally:
        config.disable_op_determinism()
    fit(model)


def test_a_metric_in_bfloat16():
    metric = keras.metrics.MeanSquaredError(dtype="bfloat16")
    model = model_of(layers.Dense(3), layers.Dense(2))
    model.compile("sgd", "mse", metrics=[metric])
    (value,) = fit(model).history["mean_squared_error"]
    assert 0 < value < 10


def same_as_model_fit(make, splits, targets=(Y,)):
    """Trains two models without delay, one of them in stages."""
    found, wanted = make(), make()
    trainer = fdg_keras.Trainer(found, splits, ["CPU:0"] * 2, delay=0)
    targets = list(targets) if len(targets) > 1 else targets[0]
    for fitted in (trainer, wanted):
        fitted.fit(X, targets, batch_size=8, epochs=2, shuffle=False, verbose=0)
    assert_same_weights(found, wanted)
    return wanted


def test_averages_of_a_stage_without_a_gradient():
    def make():
        keras.utils.set_random_seed(1)
        inputs = keras.Input((4,))
        dead = layers.Dense(5, "tanh", name="dead")(inputs)
        alive = layers.Dense(2)(layers.Dense(4)(inputs))
        model = keras.Model(inputs, [alive, layers.Dense(2)(dead)])
        sgd = keras.optimizers.SGD(0.1, use_ema=True, ema_momentum=0.9)
        model.compile(sgd, ["mse", None])
        return model

    model = same_as_model_fit(make, ["dead"], (Y, Y))
    assert np.abs(model.get_layer("dead").kernel).max() > 0


def test_a_layer_thawed_in_a_frozen_one():
    def make():
        keras.utils.set_random_seed(1)
        wrapped = layers.TimeDistributed(layers.Dense(5))
        model = model_of(
            layers.Reshape((2, 2)), wrapped, layers.Flatten(), layers.Dense(2)
        )
        wrapped.trainable = False
        wrapped.layer.trainable = True
        model.compile(keras.optimizers.SGD(0.1), "mse")
        return model

    before = make().layers[1].layer.kernel.numpy()
    model = same_as_model_fit(make, 2)
    assert np.abs(model.layers[1].layer.kernel - before).max() > 1e-4


def test_weights_of_no_layer():
    inputs = keras.Input((4,))
    model = keras.Model(inputs, layers.Dense(2)(layers.Dense(3)(inputs)))
    model.extra = model.add_weight(shape=(3,), regularizer="l2", name="extra")
    model.compile("sgd", "mse")
    with pytest.raises(ValueError, match=r"no other weights.*extra"):
        fit(model)


def test_a_layer_thawed_in_a_frozen_model():
    model = model_of(layers.Dense(3), layers.Dense(2))
    model.trainable = False
    model.layers[0].trainable = True
    model.compile("sgd", "mse")
    with pytest.raises(ValueError, match="thawed in a model that is frozen"):
        fit(model)


def test_a_regularizer_of_the_model_itself():
    model = model_of(layers.Dense(3), layers.Dense(2))
    model.activity_regularizer = keras.regularizers.L2(0.1)
    with pytest.raises(ValueError, match="model's last layer"):
        fit(model)


def test_a_call_of_a_model_within_the_model():
    class Tripled(keras.Model):
        def __call__(self, *args, **kwargs):
            return 3.0 * super().__call__(*args, **kwargs)

    inputs = keras.Input((4,))
    inner = Tripled(inputs, layers.Dense(3)(inputs))
    model = model_of(inner, layers.Dense(2))
    with pytest.raises(ValueError, match="overrides `__call__`"):
        fit(model)


def test_a_plain_variable_of_an_optimizer():
    class Gained(keras.optimizers.SGD):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.gain = tf.Variable(0.5, trainable=False)

    model = model_of(layers.Dense(3), layers.Dense(2))
    model.compile(Gained(0.1), "mse")
    with pytest.raises(ValueError, match=r"plain `tf\.Variable`"):
        fit(model)


def test_nothing_to_train():
    model = model_of(layers.Dense(3), layers.Dense(2))
    model.trainable = False
    model.compile("sgd", "mse")
    with pytest.warns(UserWarning, match="not have any trainable weights"):
        fit(model)
