"""One optimizer for each stage, and the model's own that shares their slots."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers
from matching import assert_same_weights

import fdg_keras

X = np.random.RandomState(0).standard_normal((20, 4)).astype("float32")
Y = np.random.RandomState(1).standard_normal((20, 2)).astype("float32")
FIT = {"batch_size": 4, "verbose": 0, "shuffle": False}


def make_model(optimizer, loss="mse"):
    """Two dense layers `one` and `two`, compiled."""
    keras.utils.set_random_seed(3)
    model = keras.Sequential(
        [
            keras.Input((4,)),
            layers.Dense(5, "tanh", name="one"),
            layers.Dense(2, name="two"),
        ]
    )
    model.compile(optimizer, loss)
    return model


def assert_same(actual, expected):
    """Weights, and whatever the optimizer keeps."""
    assert_same_weights(actual, expected)
    assert_same_weights(actual.optimizer, expected.optimizer)


def excluding(optimizer, names):
    """Returns the optimizer, told to spare variables of these names."""
    optimizer.exclude_from_weight_decay(var_names=names)
    return optimizer


OPTIMIZERS = {
    "amsgrad": lambda: keras.optimizers.Adam(0.05, amsgrad=True),
    # Has a variable of its own that belongs to no weight.
    "nadam": lambda: keras.optimizers.Nadam(0.05),
    # Its rows and columns have shapes of their own.
    "adafactor": lambda: keras.optimizers.Adafactor(0.05),
    "average": lambda: keras.optimizers.SGD(
        0.1, use_ema=True, ema_momentum=0.7
    ),
    "average overwrites": lambda: keras.optimizers.SGD(
        0.1, use_ema=True, ema_momentum=0.7, ema_overwrite_frequency=3
    ),
    "accumulate": lambda: keras.optimizers.Adam(
        0.05, gradient_accumulation_steps=2
    ),
    "names without decay": lambda: excluding(
        keras.optimizers.AdamW(0.05, weight_decay=0.3), ["bias"]
    ),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_without_delay_the_state_is_that_of_model_fit(name):
    """And again after a second `fit`."""
    model = make_model(OPTIMIZERS[name]())
    expected = make_model(OPTIMIZERS[name]())
    trainer = fdg_keras.Trainer(model, splits=2, delay=0)
    for _ in range(2):
        trainer.fit(X, Y, **FIT)
        expected.fit(X, Y, **FIT)
        assert_same(model, expected)


def test_variables_without_weight_decay():
    """Given as variables, before the optimizer is built."""
    models = []
    for _ in range(2):
        adam = keras.optimizers.AdamW(0.05, weight_decay=0.3)
        model = make_model(adam)
        adam.exclude_from_weight_decay(
            [model.get_layer("one").kernel, model.get_layer("two").kernel]
        )
        models.append(model)
    model, expected = models
    fdg_keras.fit(model, X, Y, delay=0, **FIT)
    expected.fit(X, Y, **FIT)
    assert_same_weights(model, expected)
    decayed = make_model(keras.optimizers.AdamW(0.05, weight_decay=0.3))
    decayed.fit(X, Y, **FIT)
    kernel = model.get_layer("two").kernel.numpy()
    assert not np.allclose(kernel, decayed.get_layer("two").kernel, rtol=1e-3)


# -- Where slots are ----------------------------------------------------------


def devices_of(optimizer):
    """The device of each variable, by the end of its path."""
    return {
        v.path.rpartition("/")[2]: v.value.device[-5:]
        for v in optimizer.variables
    }


def test_slots_are_with_their_stages_while_these_train():
    model = make_model(keras.optimizers.SGD(0.1, momentum=0.9))
    seen = []
    spy = keras.callbacks.LambdaCallback(
        on_epoch_end=lambda *_: seen.append(devices_of(model.optimizer))
    )
    fdg_keras.fit(
        model, X, Y, callbacks=[spy], devices=["CPU:2", "CPU:3"], **FIT
    )
    slots = {k: v for k, v in seen[0].items() if "momentum" in k}
    assert slots == {
        "sequential_one_kernel_momentum": "CPU:2",
        "sequential_one_bias_momentum": "CPU:2",
        "sequential_two_kernel_momentum": "CPU:3",
        "sequential_two_bias_momentum": "CPU:3",
    }
    # And at home afterwards.
    assert set(devices_of(model.optimizer).values()) == {"CPU:0"}


def test_callbacks_see_slots_and_steps_as_they_are():
    """A checkpoint of the model in a callback holds the optimizer's state."""
    model, expected = (make_model("adam") for _ in range(2))

    def fit(fitted, of):
        states = []
        spy = keras.callbacks.LambdaCallback(
            on_epoch_end=lambda *_: states.append(
                [v.numpy() for v in of.optimizer.variables]
            )
        )
        fitted.fit(X, Y, epochs=2, callbacks=[spy], **FIT)
        return states

    found = fit(fdg_keras.Trainer(model, splits=2, delay=0), model)
    wanted = fit(expected, expected)
    for epoch in range(2):
        for a, b in zip(found[epoch], wanted[epoch], strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)


def test_one_step_for_each_batch():
    model = make_model("adam")
    trainer = fdg_keras.Trainer(model, splits=2)
    for epochs in (2, 1):
        trainer.fit(X, Y, epochs=epochs, **FIT)
    assert int(model.optimizer.iterations) == 3 * 5


def test_a_learning_rate_that_is_set_between_fits():
    model = make_model(keras.optimizers.SGD(0.1))
    trainer = fdg_keras.Trainer(model, splits=2, delay=0)
    trainer.fit(X, Y, **FIT)
    before = model.get_weights()
    model.optimizer.learning_rate = 0.0
    trainer.fit(X, Y, **FIT)
    assert float(model.optimizer.learning_rate) == 0.0
    for a, b in zip(before, model.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)


class Halves(keras.optimizers.schedules.LearningRateSchedule):
    """Of the user's own: neither registered nor serializable."""

    def __call__(self, step):
        return 0.2 * 0.5 ** tf.cast(step, "float32")


@pytest.mark.parametrize(
    "make",
    [
        Halves,
        lambda: keras.optimizers.schedules.ExponentialDecay(0.2, 3, 0.5),
        lambda: lambda: 0.05,
    ],
    ids=["own", "decay", "function"],
)
def test_schedules(make):
    model, expected = (
        make_model(keras.optimizers.SGD(make(), momentum=0.5)) for _ in range(2)
    )
    fdg_keras.fit(model, X, Y, delay=0, **FIT)
    expected.fit(X, Y, **FIT)
    assert_same(model, expected)


class Slotted(keras.optimizers.SGD):
    """An optimizer of the user's own, with a slot of its own."""

    def build(self, variables):
        super().build(variables)
        self.seen = self.add_optimizer_variables(variables, "seen")

    def update_step(self, gradient, variable, learning_rate):
        seen = self.seen[self._get_variable_index(variable)]
        self.assign_add(seen, tf.abs(gradient))
        super().update_step(gradient, variable, learning_rate)


def test_an_optimizer_of_the_users_own():
    model, expected = (make_model(Slotted(0.1)) for _ in range(2))
    fdg_keras.fit(model, X, Y, delay=0, **FIT)
    expected.fit(X, Y, **FIT)
    assert_same(model, expected)


class Mapped(keras.optimizers.SGD):
    """Keeps a slot for each variable, and does not say whose it is."""

    def build(self, variables):
        super().build(variables)
        made = self.add_optimizer_variables(variables, "seen")
        self.seen = dict(enumerate(made))


def test_slots_that_do_not_say_whose_they_are():
    """One stage needs no telling apart."""
    model, expected = (make_model(Mapped(0.1)) for _ in range(2))
    message = r"an entry for each variable.*or `splits=1`\. Received: "
    with pytest.raises(ValueError, match=message):
        fdg_keras.fit(model, X, Y, splits=2, **FIT)
    fdg_keras.fit(model, X, Y, splits=1, **FIT)
    expected.fit(X, Y, **FIT)
    assert_same(model, expected)


# -- Before and after ---------------------------------------------------------


def test_training_goes_on_in_model_fit_and_back():
    models = [make_model("adam") for _ in range(2)]
    model, expected = models
    trainer = fdg_keras.Trainer(model, splits=2, delay=0)
    for fit in (trainer.fit, model.fit, trainer.fit):
        fit(X, Y, **FIT)
        expected.fit(X, Y, **FIT)
        assert_same(model, expected)


def test_training_goes_on_in_a_model_that_was_saved(tmp_path):
    """The built optimizer of a loaded model is taken as it is."""
    path = tmp_path / "model.keras"
    model, expected = make_model("adam"), make_model("adam")
    fdg_keras.fit(model, X, Y, delay=0, **FIT)
    model.save(path)
    loaded = keras.saving.load_model(path)
    assert_same(loaded, model)
    fdg_keras.fit(loaded, X, Y, delay=0, **FIT)
    expected.fit(X, Y, epochs=2, **FIT)
    assert_same(loaded, expected)
    # And without stages.
    loaded.fit(X, Y, **FIT)
    expected.fit(X, Y, **FIT)
    assert_same_weights(loaded, expected)


def test_other_splits_find_the_slots_that_one_left():
    model, expected = make_model("adam"), make_model("adam")
    for splits in (2, 1):
        fdg_keras.fit(model, X, Y, delay=0, splits=splits, **FIT)
        expected.fit(X, Y, **FIT)
        assert_same(model, expected)


def test_compiling_anew_starts_with_a_new_optimizer():
    model, expected = make_model("adam"), make_model("adam")
    trainer = fdg_keras.Trainer(model, splits=2, delay=0)
    for one in (trainer, expected):
        one.fit(X, Y, **FIT)
    for one in (model, expected):
        one.compile(keras.optimizers.SGD(0.1, momentum=0.9), "mae")
    for one in (trainer, expected):
        one.fit(X, Y, **FIT)
    assert_same(model, expected)


def test_freezing_a_layer_between_fits():
    model, expected = make_model("adam"), make_model("adam")
    trainer = fdg_keras.Trainer(model, splits=2, delay=0)
    for one in (trainer, expected):
        one.fit(X, Y, **FIT)
    for one in (model, expected):
        one.get_layer("one").trainable = False
        one.compile("adam", "mse")
    frozen = model.get_layer("one").kernel.numpy()
    for one in (trainer, expected):
        one.fit(X, Y, **FIT)
    np.testing.assert_array_equal(model.get_layer("one").kernel, frozen)
    assert_same_weights(model, expected)


def test_layers_of_one_name():
    """Slots are told apart although the paths of their variables are equal."""

    def nested():
        def block(name):
            return keras.Sequential(
                [keras.Input((4,)), layers.Dense(4, "tanh", name="dense")],
                name=name,
            )

        keras.utils.set_random_seed(3)
        model = keras.Sequential(
            [keras.Input((4,)), block("a"), block("b"), layers.Dense(2)]
        )
        model.compile("adam", "mse")
        return model

    model, expected = nested(), nested()
    fdg_keras.fit(model, X, Y, splits=3, delay=0, **FIT)
    expected.fit(X, Y, **FIT)
    assert_same(model, expected)
