"""The contract of `keras.Model.fit`, `evaluate` and `predict`.

Most tests here train twice: by `fdg_keras` with `delay=0`, and by Keras; the
weights, the History and whatever else there is to see must be the same.
"""

import csv
import re
import sys
import types
import warnings

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers
from matching import assert_identical_weights, assert_same_weights
from tensorflow.python.eager import context

import fdg_keras

N = 22
FIT = {"batch_size": 4, "verbose": 0, "shuffle": False}


def floats(*shape, seed=0):
    rs = np.random.RandomState(seed)
    return rs.standard_normal((N, *shape)).astype("float32")


X, Y = floats(4), floats(2, seed=1)
LABELS = np.arange(N) % 3


def make_model(**compiled):
    """Dense layers `one`, `two`, `three`, with dropout."""
    keras.utils.set_random_seed(3)
    model = keras.Sequential(
        [
            keras.Input((4,), name="in"),
            layers.Dense(5, "tanh", name="one"),
            layers.Dropout(0.2, name="drop"),
            layers.Dense(5, "tanh", kernel_regularizer="l2", name="two"),
            layers.Dense(2, name="three"),
        ]
    )
    optimizer = keras.optimizers.SGD(0.1, momentum=0.5)
    arguments = {"optimizer": optimizer, "loss": "mse", "metrics": ["mae"]}
    model.compile(**arguments | compiled)
    return model


def make_classifier(**compiled):
    keras.utils.set_random_seed(3)
    inputs = keras.Input((4,))
    h = layers.Dense(5, "tanh", name="one")(inputs)
    model = keras.Model(inputs, layers.Dense(3, "softmax", name="two")(h))
    arguments = {
        "optimizer": "sgd",
        "loss": "sparse_categorical_crossentropy",
        "metrics": ["accuracy"],
        "weighted_metrics": ["accuracy"],
    }
    model.compile(**arguments | compiled)
    return model


def dataset(*arrays, batch=4):
    return tf.data.Dataset.from_tensor_slices(arrays).batch(batch)


def assert_same_history(found, wanted):
    assert list(found.history) == list(wanted.history)
    assert found.epoch == wanted.epoch
    assert found.params == wanted.params
    for key, values in wanted.history.items():
        np.testing.assert_allclose(
            found.history[key], values, rtol=1e-5, atol=1e-6, err_msg=key
        )


def assert_fits_like_keras(make, *data, splits=2, **arguments):
    """Trains in stages and by Keras; returns both models."""
    arguments = FIT | arguments
    callbacks = arguments.pop("callbacks", lambda: None)
    model, expected = make(), make()
    trainer = fdg_keras.Trainer(model, splits=splits, delay=0)
    found = trainer.fit(*data, callbacks=callbacks(), **arguments)
    wanted = expected.fit(*data, callbacks=callbacks(), **arguments)
    assert_same_weights(model, expected)
    assert_same_weights(model.optimizer, expected.optimizer)
    assert_same_history(found, wanted)
    return model, expected


# -- Data ---------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments",
    [
        {"epochs": 2, "validation_split": 0.3, "shuffle": True},
        {
            "epochs": 3,
            "initial_epoch": 1,
            "sample_weight": np.linspace(0, 1, N),
        },
        {
            "epochs": 3,
            "validation_data": (X[:9], Y[:9], np.linspace(1, 2, 9)),
            "validation_batch_size": 2,
            "validation_freq": 2,
        },
    ],
    ids=["split", "weights", "validation data"],
)
def test_arrays(arguments):
    assert_fits_like_keras(make_model, X, Y, **arguments)


def test_a_data_set_with_validation():
    assert_fits_like_keras(
        make_model,
        dataset(X, Y).repeat(),
        epochs=3,
        steps_per_epoch=4,
        validation_data=dataset(X, Y),
        validation_steps=2,
        batch_size=None,
    )


def test_a_data_set_of_unknown_length_with_sample_weights():
    """Keras itself counts a step too many for it, so its length is told."""
    data = dataset(X, Y, LABELS.astype("float32"))
    models, histories = [], []
    # To look for the source of a function takes AutoGraph most of a minute.
    keep = tf.autograph.experimental.do_not_convert(lambda *_: True)
    for one in (data.filter(keep), data):
        models.append(make_model())
        histories.append(
            fdg_keras.fit(models[-1], one, splits=3, epochs=2, verbose=0)
        )
    assert_identical_weights(*models)
    assert_identical_weights(*(model.optimizer for model in models))
    assert histories[0].history == histories[1].history


def test_class_weights():
    assert_fits_like_keras(
        make_classifier, X, LABELS, class_weight={0: 1.0, 1: 3.0, 2: 0.5}
    )


class Batches(keras.utils.PyDataset):
    def __len__(self):
        return 5

    def __getitem__(self, index):
        rows = slice(4 * index, 4 * index + 4)
        return X[rows], Y[rows]


def test_a_py_dataset():
    assert_fits_like_keras(make_model, Batches(), epochs=2, batch_size=None)


def test_a_generator():
    def generate():
        while True:
            yield from (Batches()[i] for i in range(5))

    models = [make_model(), make_model()]
    trainer = fdg_keras.Trainer(models[0], splits=2, delay=0)
    arguments = {"steps_per_epoch": 3, "epochs": 2, "shuffle": False}
    histories = [
        fitted.fit(generate(), verbose=0, **arguments)
        for fitted in (trainer, models[1])
    ]
    assert_same_weights(*models)
    assert_same_history(*histories)


# -- Inputs and outputs -------------------------------------------------------


def make_forked(structure):
    """Inputs `a` and `b`, outputs `left` and `right`, in a list or dict."""

    def make():
        keras.utils.set_random_seed(3)
        a, b = keras.Input((4,), name="a"), keras.Input((2,), name="b")
        h = layers.Dense(5, "tanh", name="one")(a)
        h = layers.Concatenate(name="join")([h, b])
        left = layers.Dense(2, name="left")(h)
        h = layers.Dense(5, "tanh", name="two")(h)
        right = layers.Dense(3, "softmax", name="right")(h)
        right_loss = "sparse_categorical_crossentropy"
        if structure == "list":
            model = keras.Model([a, b], [left, right])
            model.compile(
                "sgd",
                ["mse", right_loss],
                loss_weights=[0.3, 1.0],
                metrics=[["mae"], ["accuracy"]],
            )
        else:
            model = keras.Model(
                {"a": a, "b": b}, {"left": left, "right": right}
            )
            model.compile(
                "sgd",
                {"left": "mse", "right": right_loss},
                metrics={"right": "accuracy"},
                weighted_metrics={"left": "mae"},
            )
        return model

    return make


FORKED = {
    "list": ([X, Y], [Y, LABELS]),
    "dict": ({"a": X, "b": Y}, {"right": LABELS, "left": Y}),
}


@pytest.mark.parametrize("structure", FORKED)
def test_several_inputs_and_outputs(structure):
    x, y = FORKED[structure]
    model, expected = assert_fits_like_keras(
        make_forked(structure), x, y, validation_split=0.3
    )
    trainer = fdg_keras.Trainer(model, splits=3)
    found = trainer.predict(x, batch_size=8, verbose=0)
    wanted = expected.predict(x, batch_size=8, verbose=0)
    keras.tree.assert_same_structure(found, wanted)
    for a, b in zip(keras.tree.flatten(found), keras.tree.flatten(wanted)):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_sample_weights_for_each_output():
    x, y = FORKED["dict"]
    weights = {"left": np.linspace(0, 1, N), "right": np.linspace(1, 0, N)}
    data = dataset(x, y, weights)
    assert_fits_like_keras(make_forked("dict"), data, splits=3, batch_size=None)


def make_tagger():
    """Masked steps count in neither loss nor metrics."""
    keras.utils.set_random_seed(3)
    inputs = keras.Input((5,), dtype="int32")
    h = layers.Embedding(7, 4, mask_zero=True, name="embed")(inputs)
    h = layers.Dense(3, "tanh", name="hidden")(h)
    model = keras.Model(inputs, layers.Dense(3, "softmax", name="tag")(h))
    loss = "sparse_categorical_crossentropy"
    model.compile("sgd", loss, metrics=["accuracy"])
    return model


@pytest.mark.parametrize("splits", [1, ["hidden"]])
def test_masks_reach_the_loss(splits):
    x = np.random.RandomState(0).randint(1, 7, (N, 5))
    for row, ids in enumerate(x):
        ids[1 + row % 5 :] = 0
    assert_fits_like_keras(
        make_tagger, x, x % 3, splits=splits, validation_split=0.3
    )


class Watch(layers.Layer):
    """Has a metric of its own."""

    def __init__(self):
        super().__init__(name="watch")
        self.mean = keras.metrics.Mean(name="activity")

    def call(self, x):
        self.mean.update_state(keras.ops.mean(x))
        return x


def make_watched():
    keras.utils.set_random_seed(3)
    model = keras.Sequential(
        [
            keras.Input((4,)),
            layers.Dense(5, "relu", name="one"),
            Watch(),
            layers.BatchNormalization(momentum=0.7, name="norm"),
            layers.Dense(2, name="two"),
        ]
    )
    model.compile("sgd", "mse", metrics=["mae"])
    return model


def test_a_layers_own_metrics_and_statistics():
    assert_fits_like_keras(
        make_watched, X, Y, splits=["watch"], epochs=2, validation_split=0.3
    )


@pytest.mark.parametrize("splits", [["one"], ["watch"]])
def test_batches_see_the_metrics_of_the_last_stage(splits):
    """Those of other stages are elsewhere, and at another batch."""
    seen = set()
    spy = keras.callbacks.LambdaCallback(
        on_train_batch_end=lambda _, logs: seen.update(logs)
    )
    history = fdg_keras.fit(
        make_watched(), X, Y, splits=splits, callbacks=[spy], **FIT
    )
    assert set(history.history) == {"loss", "mae", "activity"}
    watched = splits == ["one"]
    assert seen == {"loss", "mae"} | ({"activity"} if watched else set())


def test_only_losses_of_the_layers_own():
    class Energy(layers.Layer):
        def call(self, x):
            self.add_loss(keras.ops.mean(keras.ops.square(x)))
            return x

    def make():
        keras.utils.set_random_seed(3)
        inputs = keras.Input((4,))
        h = layers.Dense(5, "tanh", name="one")(inputs)
        model = keras.Model(inputs, Energy()(layers.Dense(3)(h)))
        model.compile("sgd")
        return model

    assert_fits_like_keras(make, X, splits=["one"])


@pytest.mark.filterwarnings("ignore:Gradients do not exist")
def test_weights_that_have_no_gradient():
    """Behind `stop_gradient` a whole stage has nothing to do backwards."""

    def make():
        keras.utils.set_random_seed(3)
        inputs = keras.Input((4,))
        h = layers.Dense(5, name="one")(inputs)
        h = keras.ops.stop_gradient(h)
        h = layers.Dense(5, name="two")(h)
        model = keras.Model(inputs, layers.Dense(2, name="three")(h))
        model.compile("sgd", "mse")
        return model

    assert_fits_like_keras(make, X, Y, splits=["one", "two"])


# -- Callbacks ----------------------------------------------------------------


class Recorder(keras.callbacks.Callback):
    """Writes down every event, with the names in its logs."""

    def __init__(self):
        super().__init__()
        self.events = []

    def __getattribute__(self, name):
        if not re.fullmatch(r"on_(train|test|epoch)\w*", name):
            return super().__getattribute__(name)

        def event(*args, logs=None):
            *at, logs = [*args, logs] if logs is not None else [*args, None]
            if at and isinstance(at[-1], dict):
                logs = at.pop()
            self.events.append((name, *at, sorted(logs or ())))

        return event


@pytest.mark.parametrize("steps_per_execution", [1, 4])
def test_every_event_is_that_of_keras(steps_per_execution):
    recorders = []

    def callbacks():
        recorders.append(Recorder())
        return recorders[-1:]

    # Four batches each, because Keras counts the steps of the last window even
    # if the data have ended before.
    assert_fits_like_keras(
        lambda: make_model(steps_per_execution=steps_per_execution),
        X[:16],
        Y[:16],
        epochs=2,
        validation_data=(X[:16], Y[:16]),
        callbacks=callbacks,
    )
    found, wanted = (recorder.events for recorder in recorders)
    assert len(wanted) > 10
    assert found == wanted


@pytest.fixture(scope="module")
def observed(tmp_path_factory):
    """What callbacks saw and did, in stages and with Keras."""
    return [
        _observe(name, tmp_path_factory.mktemp(name))
        for name in ("stages", "keras")
    ]


def _observe(name, folder):
    model = make_model()
    rates = []

    def schedule(epoch, rate):
        rates.append(rate)
        return rate * 0.9

    callbacks = [
        keras.callbacks.LearningRateScheduler(schedule),
        keras.callbacks.ReduceLROnPlateau(
            "val_loss", factor=0.5, patience=1, min_delta=10.0
        ),
        keras.callbacks.ModelCheckpoint(folder / "{epoch}.keras"),
        keras.callbacks.TensorBoard(folder / "logs"),
        keras.callbacks.CSVLogger(folder / "log.csv"),
    ]
    stages = fdg_keras.Trainer(model, splits=2, delay=0)
    fitted = stages if name == "stages" else model
    history = fitted.fit(
        X, Y, epochs=4, validation_split=0.3, callbacks=callbacks, **FIT
    )
    return {
        "model": model,
        "history": history,
        "rates": rates,
        "folder": folder,
    }


def test_learning_rates_that_callbacks_set(observed):
    found, wanted = observed
    np.testing.assert_allclose(found["rates"], wanted["rates"], rtol=1e-6)
    assert len(set(wanted["rates"])) == 4
    assert_same_history(found["history"], wanted["history"])
    assert "learning_rate" in found["history"].history
    assert_same_weights(found["model"], wanted["model"])


def test_model_checkpoints(observed):
    found, wanted = (
        [
            keras.saving.load_model(one["folder"] / f"{epoch}.keras")
            for epoch in (1, 4)
        ]
        for one in observed
    )
    for a, b in zip(found, wanted, strict=True):
        assert_same_weights(a.optimizer, b.optimizer)
        # Not the seed of dropout, which Keras draws anew.
        for x, y in zip(a.get_weights(), b.get_weights(), strict=True):
            np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6)
    last = observed[0]["model"].get_weights()
    for x, y in zip(found[-1].get_weights(), last, strict=True):
        np.testing.assert_array_equal(x, y)


def test_csv_logs(observed):
    def read(one):
        with open(one["folder"] / "log.csv", encoding="utf-8") as file:
            return list(csv.DictReader(file))

    found, wanted = read(observed[0]), read(observed[1])
    assert [sorted(row) for row in found] == [sorted(row) for row in wanted]
    for a, b in zip(found, wanted, strict=True):
        for key in b:
            assert float(a[key]) == pytest.approx(float(b[key]), rel=1e-5)


def test_tensorboard_logs(observed):
    def read(one):
        scalars = {}
        for path in sorted((one["folder"] / "logs").rglob("events*")):
            for event in tf.compat.v1.train.summary_iterator(str(path)):
                for value in event.summary.value:
                    if value.tensor.dtype:
                        array = tf.make_ndarray(value.tensor)
                        key = (path.parent.name, value.tag, event.step)
                        scalars[key] = array
        return scalars

    found, wanted = read(observed[0]), read(observed[1])
    assert sorted(found) == sorted(wanted)
    assert ("validation", "epoch_loss", 3) in wanted
    for key, value in wanted.items():
        if value.dtype.kind == "f":
            np.testing.assert_allclose(found[key], value, rtol=1e-5)


def test_early_stopping_restores_the_best_weights():
    def callbacks():
        return [
            keras.callbacks.EarlyStopping(
                "val_loss",
                patience=1,
                mode="max",  # so that it stops
                restore_best_weights=True,
            )
        ]

    model, _ = assert_fits_like_keras(
        make_model,
        X,
        Y,
        epochs=9,
        validation_data=(X, Y),
        callbacks=callbacks,
    )
    assert int(model.optimizer.iterations) == 2 * 6
    # The best epoch was the first.
    once = make_model()
    once.fit(X, Y, **FIT)
    for a, b in zip(model.get_weights(), once.get_weights(), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_weights_that_a_callback_sets():
    def callbacks():
        def reset(epoch, logs):
            (model,) = {c.model for c in made}
            model.get_layer("one").set_weights(
                [w * 0 + epoch for w in model.get_layer("one").get_weights()]
            )

        made = [keras.callbacks.LambdaCallback(on_epoch_begin=reset)]
        return made

    assert_fits_like_keras(make_model, X, Y, epochs=2, callbacks=callbacks)


class StopAfter(keras.callbacks.Callback):
    def __init__(self, batch):
        super().__init__()
        self.batch = batch
        self.seen = []

    def on_train_batch_end(self, batch, logs=None):
        self.seen.append(batch)
        if batch == self.batch:
            self.model.stop_training = True


def test_stopping_in_a_batch_without_delay():
    assert_fits_like_keras(
        make_model, X, Y, epochs=3, callbacks=lambda: [StopAfter(2)]
    )


def test_stopping_in_a_batch():
    """What was announced is still run: by all stages, and without callbacks."""
    model = make_model()
    stop = StopAfter(2)
    x, y = np.tile(X, (5, 1)), np.tile(Y, (5, 1))
    history = fdg_keras.fit(
        model, x, y, splits=3, epochs=5, callbacks=[stop], **FIT
    )
    assert history.epoch == [0]
    assert stop.seen == [0, 1, 2]
    # The last stage had run three batches when six were announced beyond the
    # two before, as `delays.windows_ahead` has it. The same in every run.
    assert int(model.optimizer.iterations) == 8


# -- Windows ------------------------------------------------------------------


def test_windows_change_nothing_but_the_callbacks():
    models, ends = [], []
    for steps in (1, 2, 5, 64):
        model = make_model(steps_per_execution=steps)
        stop = StopAfter(-1)
        fdg_keras.fit(model, X, Y, splits=2, callbacks=[stop], **FIT)
        models.append(model)
        ends.append(stop.seen)
    for model in models[1:]:
        assert_identical_weights(model, models[0])
    # Six batches. A short last window has the index of a whole one, as Keras
    # has it.
    assert ends == [[0, 1, 2, 3, 4, 5], [1, 3, 5], [4, 9], [63]]


# -- Evaluate and predict -----------------------------------------------------


@pytest.fixture(scope="module")
def trained():
    """A trainer of three stages, and its model."""
    model = make_model()
    trainer = fdg_keras.Trainer(model, splits=3)
    trainer.fit(X, Y, epochs=2, **FIT)
    return trainer


@pytest.mark.parametrize(
    "arguments",
    [
        {"x": X, "y": Y, "batch_size": 4},
        {"x": X, "y": Y, "sample_weight": np.linspace(0, 1, N)},
        {"x": X, "y": Y, "batch_size": 4, "return_dict": True},
        {"x": dataset(X, Y), "steps": 3},
    ],
    ids=["arrays", "weights", "dict", "steps"],
)
def test_evaluate_equals_that_of_the_model(trained, arguments):
    found = trained.evaluate(verbose=0, **arguments)
    wanted = trained.model.evaluate(verbose=0, **arguments)
    if arguments.get("return_dict"):
        assert list(found) == list(wanted)
        found, wanted = list(found.values()), list(wanted.values())
    np.testing.assert_allclose(found, wanted, rtol=1e-5)


@pytest.mark.parametrize(
    "arguments",
    [
        {"x": X, "batch_size": 4},
        {"x": X[:1]},
        {"x": dataset(X, Y)},
        {"x": dataset(X).repeat(), "steps": 7},
    ],
    ids=["arrays", "one", "data set", "steps"],
)
def test_predict_equals_that_of_the_model(trained, arguments):
    found = trained.predict(verbose=0, **arguments)
    wanted = trained.model.predict(verbose=0, **arguments)
    assert isinstance(found, np.ndarray)
    assert found.shape == wanted.shape
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6)


def test_evaluate_with_nothing_but_a_loss():
    model = make_model(metrics=None)
    trainer = fdg_keras.Trainer(model, splits=2)
    found = trainer.evaluate(X, Y, verbose=0)
    assert isinstance(found, float)
    assert found == pytest.approx(model.evaluate(X, Y, verbose=0), rel=1e-5)


def test_evaluate_and_predict_change_nothing(trained):
    before = trained.model.get_weights()
    trained.evaluate(X, Y, verbose=0)
    trained.predict(X, verbose=0)
    for a, b in zip(before, trained.model.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)


class Outputs(keras.callbacks.Callback):
    """Notes the shapes of outputs, and may stop."""

    def __init__(self, stop_after=None):
        super().__init__()
        self.events = []
        self.stop_after = stop_after

    def on_predict_begin(self, logs=None):
        self.events.append("begin")

    def on_predict_batch_end(self, batch, logs=None):
        shapes = keras.tree.map_structure(np.shape, logs["outputs"])
        self.events.append((batch, shapes))
        self.model.stop_predicting = batch == self.stop_after

    def on_predict_end(self, logs=None):
        self.events.append("end")


@pytest.mark.parametrize("stop_after", [None, 1])
def test_predict_calls_callbacks_as_keras_does(trained, stop_after):
    results, events = [], []
    for one in (trained, trained.model):
        spy = Outputs(stop_after)
        results.append(one.predict(X, batch_size=4, callbacks=[spy], verbose=0))
        events.append(spy.events)
    assert events[0] == events[1]
    np.testing.assert_allclose(*results, rtol=1e-5, atol=1e-6)
    # What was on its way is not taken for the next outputs.
    np.testing.assert_allclose(
        trained.predict(X, batch_size=4, verbose=0),
        trained.model.predict(X, batch_size=4, verbose=0),
        rtol=1e-5,
        atol=1e-6,
    )


# -- Precision and compilation ------------------------------------------------


def test_mixed_bfloat16():
    keras.config.set_dtype_policy("mixed_bfloat16")
    model, expected = make_model(), make_model()
    fdg_keras.fit(model, X, Y, splits=3, delay=0, epochs=2, **FIT)
    expected.fit(X, Y, epochs=2, **FIT)
    for a, b in zip(model.get_weights(), expected.get_weights(), strict=True):
        assert a.dtype == b.dtype
        # Eight bits of a mantissa, and sums in another order.
        np.testing.assert_allclose(
            a.astype("float64"), b.astype("float64"), rtol=0.05, atol=0.01
        )


def test_compiled_by_xla():
    def make(**compiled):
        keras.utils.set_random_seed(3)
        model = keras.Sequential(
            [
                keras.Input((4,)),
                layers.Dense(5, "tanh", name="one"),
                layers.BatchNormalization(name="norm"),
                layers.Dense(2, kernel_regularizer="l2", name="two"),
            ]
        )
        model.compile("adam", "mse", **compiled)
        return model

    expected = make(jit_compile=False)
    fdg_keras.fit(expected, X, Y, splits=["norm"], **FIT)
    for stash in ("exact", "selective"):
        model = make(jit_compile=True)
        fdg_keras.fit(model, X, Y, splits=["norm"], stash=stash, **FIT)
        assert_same_weights(model, expected)


def make_of_xla(kind, **compiled):
    """A model of operations that XLA has kernels of its own for."""
    keras.utils.set_random_seed(3)
    inputs = keras.Input((8, 4))
    if kind == "loop":
        h = layers.GRU(5, name="first")(inputs)
    elif kind == "attention":
        h = layers.MultiHeadAttention(2, 3, name="first")(inputs, inputs)
        h = layers.Flatten()(layers.LayerNormalization()(h))
    else:
        h = layers.Conv1D(5, 3, use_bias=False, name="first")(inputs)
        h = layers.BatchNormalization()(layers.MaxPooling1D()(h))
        h = layers.Flatten()(layers.Dropout(0.2, seed=1)(h))
    h = layers.Dense(5, "gelu", kernel_regularizer="l2", name="second")(h)
    model = keras.Model(inputs, layers.Dense(2)(h))
    # Not one that divides by the size of gradients: some are zero but for
    # rounding.
    optimizer = keras.optimizers.SGD(0.05, 0.9, gradient_accumulation_steps=2)
    model.compile(optimizer, "mse", metrics=["mae"], **compiled)
    return model


@pytest.mark.parametrize("emulate", [False, True])
@pytest.mark.parametrize("kind", ["convolution", "attention", "loop"])
def test_compiled_by_xla_as_keras_does(kind, emulate):
    x = np.random.default_rng(0).random((len(X), 8, 4), "float32")
    expected = make_of_xla(kind, jit_compile=True)
    wanted = expected.fit(x, Y, epochs=2, **FIT).history
    model = make_of_xla(kind, jit_compile=True)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = fdg_keras.fit(
            model,
            x,
            Y,
            splits=["first", "second"],
            delay=0,
            emulate=emulate,
            epochs=2,
            **FIT,
        ).history
    without = [w for w in caught if "without XLA" in str(w.message)]
    assert bool(without) == (kind == "loop" and not emulate)
    for name, values in wanted.items():
        np.testing.assert_allclose(found[name], values, rtol=1e-4, atol=1e-6)
    assert_same_weights(model, expected)
    assert model.jit_compile


class Traced(layers.Layer):
    """Counts how often Python runs it."""

    calls = 0

    def call(self, x):
        Traced.calls += 1
        return x


def test_nothing_is_traced_again():
    inputs = keras.Input((4,))
    h = Traced()(layers.Dense(3, name="one")(inputs))
    model = keras.Model(inputs, layers.Dense(2, name="two")(h))
    losses = []

    def loss(y, y_pred):
        losses.append(y)
        return keras.losses.mean_squared_error(y, y_pred)

    model.compile("sgd", loss)
    trainer = fdg_keras.Trainer(model, splits=["one"])

    def everything():
        trainer.fit(X, Y, epochs=2, validation_data=(X, Y), **FIT)
        trainer.evaluate(X, Y, verbose=0)
        trainer.predict(X, verbose=0)
        return Traced.calls, len(losses)

    first = everything()
    assert first[0] > 0
    assert everything() == first
    # Data of another shape or kind are not served by what there is.
    trainer.fit(X, Y, sample_weight=np.ones(N), **FIT)
    assert len(losses) > first[1]


# -- Devices ------------------------------------------------------------------


def test_every_stage_computes_on_its_device():
    """By what TensorFlow says it ran, after all its rewriting."""
    model = keras.Sequential(
        [
            keras.Input((4,)),
            layers.Dense(5, "softsign", name="one"),
            layers.Dense(5, "relu6", name="two"),
            layers.Dense(5, "selu", name="three"),
            layers.Dense(2, name="four"),
        ]
    )
    model.compile("adam", "mse")
    trainer = fdg_keras.Trainer(
        model, splits=["one", "two"], devices=["CPU:3", "CPU:4", "CPU:5"]
    )
    context.enable_run_metadata()
    try:
        trainer.fit(X, Y, **FIT)
        metadata = context.export_run_metadata()
    finally:
        context.disable_run_metadata()
    where = {}
    for function in metadata.function_graphs:
        for graph in function.partition_graphs:
            for node in graph.node:
                where.setdefault(node.op, set()).add(node.device[-5:])
    for device, operations in {
        "CPU:3": ["Softsign", "SoftsignGrad"],
        "CPU:4": ["Relu6Grad"],  # TensorFlow fuses Relu6
        "CPU:5": ["Selu", "SeluGrad"],
    }.items():
        for operation in operations:
            assert where[operation] == {device}, operation
    for part in ("MatMul", "AssignSub", "QueueEnqueue", "QueueDequeue"):
        found = set().union(*(where[name] for name in where if part in name))
        assert found == {"CPU:3", "CPU:4", "CPU:5"}, part


def test_variables_are_with_their_stages_while_these_train():
    model = make_model()
    seen = []
    spy = keras.callbacks.LambdaCallback(
        on_epoch_end=lambda *_: seen.append(
            {v.path.split("/")[1]: v.value.device[-5:] for v in model.weights}
        )
    )
    trainer = fdg_keras.Trainer(
        model, splits=["one", "two"], devices=["CPU:3", "CPU:4", "CPU:5"]
    )
    home = [v.value for v in model.variables]
    trainer.fit(X, Y, callbacks=[spy], **FIT)
    assert seen == [{"one": "CPU:3", "two": "CPU:4", "three": "CPU:5"}]
    # They are back in the very storage they came from.
    assert all(
        v.value is storage
        for v, storage in zip(model.variables, home, strict=True)
    )


def test_stages_may_share_a_device():
    models = []
    for devices in (["CPU:1"] * 2, ["CPU:2", "CPU:3"]):
        model = make_model()
        fdg_keras.fit(model, X, Y, splits=2, devices=devices, **FIT)
        models.append(model)
    assert_identical_weights(*models)


# -- The function and the class -----------------------------------------------


def test_the_function_is_the_class():
    settings = {"splits": ["one"], "delay": 1, "shrink": 0.5}
    model, other = make_model(), make_model()
    found = fdg_keras.fit(model, X, Y, 4, 2, **FIT_REST, **settings)
    trainer = fdg_keras.Trainer(other, **settings)
    wanted = trainer.fit(X, Y, 4, 2, **FIT_REST)
    assert_identical_weights(model, other)
    assert found.history == wanted.history
    assert [stage.layers for stage in trainer.plan.stages] == [
        ("one",),
        ("drop", "two", "three"),
    ]


FIT_REST = {"verbose": 0, "shuffle": False}


def test_the_progress_bar(capsys):
    fdg_keras.fit(make_model(), X, Y, batch_size=4, epochs=2, verbose=2)
    out = capsys.readouterr().out
    assert "Epoch 1/2" in out
    assert "Epoch 2/2" in out
    assert re.search(r"6/6 - .*loss: \d", out)


# -- Saving within an epoch ---------------------------------------------------


class Snapshots(keras.callbacks.Callback):
    """Keeps the weights, and the updates made, every `drain_every` batches."""

    def __init__(self, drain_every):
        super().__init__()
        self.drain_every = drain_every
        self.taken = {}

    def on_train_batch_end(self, batch, logs=None):
        if (batch + 1) % self.drain_every == 0:
            steps = int(self.model.optimizer.iterations)
            self.taken[batch + 1] = (steps, self.model.get_weights())


class Halve(keras.callbacks.Callback):
    """Changes weights before and after each batch."""

    def on_train_batch_begin(self, batch, logs=None):
        for weight in self.model.trainable_weights:
            weight.assign(1.5 * weight)

    def on_train_batch_end(self, batch, logs=None):
        for weight in self.model.trainable_weights:
            weight.assign(0.5 * weight)


def test_a_callback_is_warned_of_weights_in_motion():
    with pytest.warns(UserWarning, match=r"Halve has hooks.*`drain_every = 1`"):
        fdg_keras.fit(make_model(), X, Y, callbacks=[Halve()], **FIT)


@pytest.mark.filterwarnings("error:.*are in motion")
def test_who_is_not_warned_of_weights_in_motion(tmp_path):
    quiet = Halve()
    quiet.drain_every = None
    saves = keras.callbacks.ModelCheckpoint(tmp_path / "a.keras", save_freq=2)
    found = [quiet, saves, keras.callbacks.TerminateOnNaN()]
    fdg_keras.fit(make_model(), X, Y, callbacks=found, **FIT)
    fdg_keras.fit(make_model(), X, Y, delay=0, callbacks=[Halve()], **FIT)
    fdg_keras.fit(make_model(), X, Y, emulate=True, callbacks=[Halve()], **FIT)


def test_weights_changed_where_stages_drain():
    """The same in each run, and as if each batch were a stream of its own."""
    models = []
    for _ in range(2):
        halve, model = Halve(), make_model()
        halve.drain_every = 1
        fdg_keras.fit(model, X, Y, splits=3, callbacks=[halve], **FIT)
        models.append(model)
    assert_identical_weights(*models)
    expected = make_model()
    trainer = fdg_keras.Trainer(expected, splits=3)
    for start in range(0, N, FIT["batch_size"]):
        rows = slice(start, start + FIT["batch_size"])
        halving(expected).on_train_batch_begin(0)
        trainer.fit(X[rows], Y[rows], **FIT)
        halving(expected).on_train_batch_end(0)
    assert_identical_weights(models[0], expected)


def halving(model):
    callback = Halve()
    callback.set_model(model)
    return callback


def test_a_pause_is_the_end_of_a_stream():
    """Drained after 4 batches: as if the data had ended there, and goes on."""
    paused, pieces = make_model(), make_model()
    snapshots = Snapshots(4)
    fdg_keras.fit(paused, X, Y, splits=3, callbacks=[snapshots], **FIT)
    trainer = fdg_keras.Trainer(pieces, splits=3)
    assert list(snapshots.taken) == [4]
    for start, stop in ((0, 16), (16, N)):
        trainer.fit(X[start:stop], Y[start:stop], **FIT)
        if stop == 16:
            steps, weights = snapshots.taken[4]
            assert steps == 4
            for a, b in zip(weights, pieces.get_weights()):
                np.testing.assert_array_equal(a, b)
    assert_identical_weights(paused, pieces)


def test_a_checkpoint_within_an_epoch_is_drained(tmp_path):
    model = make_model()
    path = str(tmp_path / "{batch:02d}.weights.h5")
    snapshots = Snapshots(3)
    checkpoint = keras.callbacks.ModelCheckpoint(
        path, save_freq=3, save_weights_only=True
    )
    fdg_keras.fit(
        model, X, Y, splits=3, callbacks=[checkpoint, snapshots], **FIT
    )
    assert list(snapshots.taken) == [3, 6]
    saved = sorted(tmp_path.iterdir())
    assert len(saved) == 2
    for file, (_, weights) in zip(saved, snapshots.taken.values()):
        other = make_model()
        other.load_weights(file)
        for a, b in zip(weights, other.get_weights()):
            np.testing.assert_array_equal(a, b)


# -- What needs more than Keras -----------------------------------------------


class StandInTensor(np.ndarray):
    def cpu(self):
        return self


class StandInLoader:
    """As much of torch's `DataLoader` as Keras looks at."""

    def __init__(self, batches):
        self._batches = batches
        self.dataset = range(sum(len(x) for x, _ in batches))
        self.batch_size = len(batches[0][0])

    def __len__(self):
        return len(self._batches)

    def __iter__(self):
        for batch in self._batches:
            yield tuple(a.view(StandInTensor) for a in batch)


def test_a_data_loader(monkeypatch):
    """Torch is no dependency: a stand-in that Keras takes for the real one."""
    loader = type("DataLoader", (StandInLoader,), {})
    loader.__module__ = "torch.utils.data.dataloader"
    torch = types.ModuleType("torch")
    torch.utils = types.SimpleNamespace(
        data=types.SimpleNamespace(DataLoader=loader)
    )
    monkeypatch.setitem(sys.modules, "torch", torch)
    batches = [(X[i : i + 4], Y[i : i + 4]) for i in range(0, N, 4)]
    found, wanted = make_model(), make_model()
    history = fdg_keras.fit(
        found, loader(batches), delay=0, verbose=0, validation_data=(X, Y)
    )
    expected = wanted.fit(X, Y, **FIT, validation_data=(X, Y))
    assert_same_weights(found, wanted)
    assert list(history.history) == list(expected.history)


def test_a_profile_is_written(tmp_path):
    board = keras.callbacks.TensorBoard(str(tmp_path), profile_batch=(2, 4))
    fdg_keras.fit(make_model(), X, Y, callbacks=[board], **FIT)
    assert list(tmp_path.rglob("*.xplane.pb"))
