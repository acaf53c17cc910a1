"""Bad input gets a `ValueError` that says what was expected and what to do."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

import fdg_keras

X = np.ones((8, 4), "float32")
Y = np.ones((8, 2), "float32")


def make_model(compiled=True):
    model = keras.Sequential(
        [
            keras.Input((4,), name="in"),
            layers.Dense(3, name="one"),
            layers.Dense(3, name="two"),
            layers.Dense(2, name="three"),
        ]
    )
    if compiled:
        model.compile("sgd", "mse")
    return model


def make_trainer(**settings):
    return fdg_keras.Trainer(make_model(), **settings)


def fit(model, x=X, y=Y, **arguments):
    return fdg_keras.fit(model, x, y, verbose=0, **arguments)


# -- Splits -------------------------------------------------------------------


@pytest.mark.parametrize("splits", [4, 100, 0, -1])
def test_more_splits_than_can_be_cut(splits):
    message = (
        r"can be cut into 1 to 3 stages: it has 3 layers.*"
        rf"Received: splits={splits}"
    )
    with pytest.raises(ValueError, match=message):
        make_trainer(splits=splits)


@pytest.mark.parametrize("splits", [None, "one", 2.5, True])
def test_splits_of_another_type(splits):
    message = (
        r"Expected `splits` to be a number of stages, a list of names.*"
        r"`Plan`\. Received: "
    )
    with pytest.raises(ValueError, match=message):
        make_trainer(splits=splits)


def test_unknown_layer_name():
    message = (
        r"No layer is called 'four'\. "
        r"Expected names among \['one', 'two', 'three'\]"
    )
    with pytest.raises(ValueError, match=message):
        make_trainer(splits=["one", "four"])


def test_layer_names_out_of_order():
    message = (
        r"in the order in which the model runs them.*'one' is out of order\. "
        r"Received: \['two', 'one'\]"
    )
    with pytest.raises(ValueError, match=message):
        make_trainer(splits=["two", "one"])


def test_the_last_layer():
    message = r"'three' ends the model.*names of earlier layers.*Received"
    with pytest.raises(ValueError, match=message):
        make_trainer(splits=["three"])


def test_a_cut_that_a_shared_layer_forbids():
    inputs = keras.Input((4,))
    shared = layers.Dense(4, name="shared")
    h = layers.Dense(4, name="between")(shared(inputs))
    model = keras.Model(inputs, layers.Dense(2)(shared(h)))
    model.compile("sgd", "mse")
    message = (
        r"cannot be cut after 'between': 'shared/kernel' is used on both "
        r"sides.*Cut before or after all layers that share it\. Received"
    )
    with pytest.raises(ValueError, match=message):
        fdg_keras.Trainer(model, splits=["between"])
    # And what is left is said.
    message = r"1 to 2 stages.*2 of the places.*shared layer.*splits=3"
    with pytest.raises(ValueError, match=message):
        fdg_keras.Trainer(model, splits=3)


def test_a_plan_for_another_model():
    plan = make_trainer(splits=2).plan
    model = keras.Sequential([keras.Input((4,)), layers.Dense(2, name="x")])
    model.compile("sgd", "mse")
    with pytest.raises(ValueError, match=r"made for another model.*'one'"):
        fdg_keras.Trainer(model, splits=plan)


# -- Models -------------------------------------------------------------------


def test_a_model_that_is_not_compiled():
    message = (
        r"not compiled\. Call `model.compile\(optimizer, loss\)`.*Received"
    )
    with pytest.raises(ValueError, match=message):
        fdg_keras.Trainer(make_model(compiled=False))


def test_a_model_that_was_compiled_without_an_optimizer():
    model = make_model()
    model.compile(optimizer=None, loss="mse")
    message = (
        r"compiled with an optimizer\. Call `model.compile.*Received: None"
    )
    with pytest.raises(ValueError, match=message):
        fdg_keras.Trainer(model)


def test_a_model_that_was_compiled_without_a_loss():
    model = make_model(compiled=False)
    model.compile("sgd")
    message = r"No loss to compute\. Expected a `loss` in `compile\(\)`.*Pass"
    with pytest.raises(ValueError, match=message):
        fit(model)


def test_a_model_that_is_not_built():
    model = keras.Sequential([layers.Dense(3), layers.Dense(2)])
    model.compile("sgd", "mse")
    message = (
        r"no input shape yet.*`keras.Input\(shape\)`, or call "
        r"`model.build\(input_shape\)`\. Received"
    )
    with pytest.raises(ValueError, match=message):
        fdg_keras.Trainer(model)


class Subclassed(keras.Model):
    def __init__(self):
        super().__init__()
        self.dense = layers.Dense(2)

    def call(self, inputs):
        return self.dense(inputs)


def test_a_subclassed_model():
    model = Subclassed()
    model.compile("sgd", "mse")
    message = (
        r"do not tell which layer follows which\. Make it functional: .*"
        r"Received: .*Subclassed"
    )
    with pytest.raises(ValueError, match=message):
        fdg_keras.Trainer(model)


@pytest.mark.parametrize(
    "name",
    [
        "train_step",
        "test_step",
        "predict_step",
        "compute_loss",
        "compute_metrics",
        "make_test_function",
        "evaluate",
    ],
)
def test_an_overridden_step(name):
    own = type("Own", (keras.Model,), {name: lambda self, *args: None})
    inputs = keras.Input((4,))
    model = own(inputs, layers.Dense(2)(inputs))
    model.compile("sgd", "mse")
    message = rf"overrides `{name}`.*Put the computation into layers.*Received"
    with pytest.raises(ValueError, match=message):
        fdg_keras.Trainer(model, splits=1)


@pytest.mark.parametrize("model", [None, "model", layers.Dense(2)])
def test_what_is_no_model(model):
    message = r"Expected `model` to be a compiled `keras.Model`\. Received: "
    with pytest.raises(ValueError, match=message):
        fdg_keras.Trainer(model)


def test_norms_over_all_stages():
    model = make_model()
    model.compile(keras.optimizers.SGD(global_clipnorm=1.0), "mse")
    message = (
        r"`global_clipnorm` needs the gradients of all stages.*Use `clipnorm`"
        r".*Received: global_clipnorm=1.0"
    )
    with pytest.raises(ValueError, match=message):
        fdg_keras.Trainer(model)


def test_several_optimizers():
    model = make_model()
    each = keras.optimizers.OptimizerMap(keras.optimizers.SGD(0.1))
    model.compile(keras.optimizers.MultiOptimizer(each), "mse")
    with pytest.raises(ValueError, match="`MultiOptimizer` is not supported"):
        fdg_keras.Trainer(model)


def test_loss_scaling():
    model = make_model()
    scaled = keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD())
    model.compile(scaled, "mse")
    message = r"`LossScaleOptimizer` are not supported.*`mixed_bfloat16`.*Rec"
    with pytest.raises(ValueError, match=message):
        fdg_keras.Trainer(model)


def test_float16_without_a_scale():
    """`auto_scale_loss=False` had it trained as it is."""
    model = keras.Sequential(
        [
            keras.Input((4,)),
            layers.Dense(3, dtype="mixed_float16", name="half"),
            layers.Dense(2),
        ]
    )
    model.compile("sgd", "mse", auto_scale_loss=False)
    message = r"`mixed_float16` and.*`mixed_bfloat16`.*Received: layer 'half'"
    with pytest.raises(ValueError, match=message):
        fdg_keras.Trainer(model)


def test_a_model_that_was_compiled_anew_in_a_bad_way():
    """Between making the trainer and using it."""
    trainer = make_trainer()
    trainer.model.compile(keras.optimizers.SGD(global_clipnorm=1.0), "mse")
    with pytest.raises(ValueError, match="`global_clipnorm` needs"):
        trainer.fit(X, Y)


def test_an_optimizer_that_was_built_on_other_variables():
    model = make_model()
    model.optimizer.build(model.trainable_variables)
    model.get_layer("one").trainable = False
    message = (
        r"built on 6 variables, but the model now has 4 trainable.*"
        r"Call `model.compile` again"
    )
    with pytest.raises(ValueError, match=message):
        fit(model)


# -- Layers that no stage can run ---------------------------------------------


class AssignsWeight(layers.Layer):
    def build(self, shape):
        self.scale = self.add_weight(shape=(), name="scale")

    def call(self, x):
        self.scale.assign(self.scale + 1.0)
        return x * self.scale


OUTSIDE = keras.random.SeedGenerator(1)


class DrawsFromOutside(layers.Layer):
    def call(self, x):
        return x + keras.random.normal((1,), seed=OUTSIDE)


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (
            AssignsWeight,
            r"assigns to its trainable variable '.*scale'.*Make the variable "
            r"non-trainable",
        ),
        (
            DrawsFromOutside,
            r"Stage 0 \(layers 'one' to 'bad'\) updates a variable that "
            r"belongs to none of its layers.*`keras.random.SeedGenerator`",
        ),
        (
            lambda name: layers.SpectralNormalization(
                layers.Dense(4), name=name
            ),
            r"Layer 'bad' assigns to its trainable variable '.*kernel' in "
            r"`call`.*as they were\. Take the layer out.*SpectralNormalization",
        ),
    ],
)
def test_updates_that_a_stage_would_lose(layer, message):
    inputs = keras.Input((4,))
    h = layer(name="bad")(layers.Dense(4, name="one")(inputs))
    model = keras.Model(inputs, layers.Dense(2)(h))
    model.compile("sgd", "mse")
    with pytest.raises(ValueError, match=message):
        fit(model, splits=["bad"])


# -- Settings -----------------------------------------------------------------


@pytest.mark.parametrize("devices", [["CPU:99"], ["GPU:7"], ["cup:0"], [None]])
def test_unknown_devices(devices):
    message = (
        r"Unknown device\. Expected one of \['CPU:0'.*Received: "
        r".*logical devices"
    )
    with pytest.raises(ValueError, match=message):
        make_trainer(devices=devices)


@pytest.mark.parametrize("devices", ["CPU:0", []])
def test_devices_that_are_no_list(devices):
    message = r"Expected `devices` to be a list of device names.*Received: "
    with pytest.raises(ValueError, match=message):
        make_trainer(devices=devices)


@pytest.mark.parametrize("delay", [-1, 0.5, "2", None, True, 10**30])
def test_delays(delay):
    message = (
        r"Expected `delay` to be the batches of delay per hop: 0 \(locked.*"
        r"Received: "
    )
    with pytest.raises(ValueError, match=message):
        make_trainer(delay=delay)


@pytest.mark.parametrize(
    "shrink", [0, -0.5, 1.5, float("nan"), "half", None, True, [0.5]]
)
def test_shrinking(shrink):
    message = (
        r"`shrink` must be a number in \(0, 1\].*or a gradient transformer\. "
        r"Received: "
    )
    with pytest.raises(ValueError, match=message):
        make_trainer(shrink=shrink)


@pytest.mark.parametrize("stash", ["all", None, 1])
def test_stashes(stash):
    message = (
        r"`stash` to be one of \('exact', 'selective', 'current', 'replay'\)\. "
        "Received"
    )
    with pytest.raises(ValueError, match=message):
        make_trainer(stash=stash)


@pytest.mark.parametrize("order", ["backward_first", None])
def test_orders(order):
    message = r"`order` to be one of \('forward_first', 'update_first'\)\. Rec"
    with pytest.raises(ValueError, match=message):
        make_trainer(order=order)


@pytest.mark.parametrize(
    ("transform", "received"),
    [
        (lambda gradients: [], r"\[\]"),
        (lambda gradients: [g[:, 1:] for g in gradients], r"\(None, 2\)"),
        (lambda gradients: [tf.cast(g, "int32") for g in gradients], "int32"),
    ],
    ids=["count", "shape", "dtype"],
)
def test_transformers_that_return_something_else(transform, received):
    message = (
        r"return as many gradients as it is given, of the same shapes and "
        rf"dtypes: .*\(None, 3\).*Received from .*{received}"
    )
    with pytest.raises(ValueError, match=message):
        fit(make_model(), shrink=transform)


# -- Data ---------------------------------------------------------------------


def test_inputs_of_another_shape():
    message = (
        r"do not fit the model's input 'in': expected batches of shape "
        r"\(None, 4\).*Received: \(None, 5\)"
    )
    with pytest.raises(ValueError, match=message):
        fit(make_model(), np.ones((8, 5), "float32"))


def test_targets_of_another_shape():
    """The loss says so, as in `model.fit`."""
    with pytest.raises(ValueError, match=r"must be equal, but are 3 and 2"):
        fit(make_model(), X, np.ones((8, 3), "float32"))


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("batch_size", -1),
        ("batch_size", 0),
        ("batch_size", 2.5),
        ("batch_size", "8"),
        ("steps_per_epoch", -1),
        ("validation_steps", 0),
        ("validation_freq", 0),
        ("validation_freq", "2"),
        ("epochs", "3"),
        ("epochs", 1.5),
        ("initial_epoch", None),
        ("validation_split", "a"),
        ("validation_batch_size", -4),
        ("validation_split", 1.0),
        ("validation_split", -0.1),
        ("validation_split", False),
    ],
)
def test_sizes(argument, value):
    x, y = np.zeros((8, 4)), np.zeros((8, 2))
    with pytest.raises(ValueError, match=f"`{argument}` to be .* {value!r}"):
        fdg_keras.fit(make_model(), x, y, verbose=0, **{argument: value})


def test_a_share_of_any_number_type():
    """NumPy's numbers were refused."""
    history = fit(make_model(), validation_split=np.float32(0.25))
    assert "val_loss" in history.history


def test_no_data():
    with pytest.raises(ValueError, match=r"Expected data: .* x=None"):
        fit(make_model(), None, None)


def test_inputs_and_targets_of_different_length():
    message = r"Make sure all arrays contain the same number of samples"
    with pytest.raises(ValueError, match=message):
        fit(make_model(), X, Y[:4])


@pytest.mark.filterwarnings("ignore:The structure of `inputs`")
def test_fewer_inputs_than_the_model_has():
    inputs = [keras.Input((4,), name=name) for name in "ab"]
    model = keras.Model(inputs, layers.Dense(2)(layers.Add()(inputs)))
    model.compile("sgd", "mse")
    message = (
        r"one tensor for each of the inputs \['a', 'b'\], as a list.*"
        r"received 1 of shapes \[\(None, 4\)\]"
    )
    with pytest.raises(ValueError, match=message):
        fit(model, X)


def test_no_targets():
    message = (
        r"Expected targets to compare the outputs with.*loss='mse'\. "
        r"Received: y=None\. Pass targets"
    )
    with pytest.raises(ValueError, match=message):
        fit(make_model(), X, None)


@pytest.mark.parametrize(
    "x",
    [
        lambda: tf.data.Dataset.from_tensor_slices((X, Y)).batch(4).take(0),
        lambda: (
            tf.data.Dataset.from_tensor_slices((X, Y))
            .batch(4)
            .filter(lambda x, y: False)
        ),
    ],
    ids=["known", "unknown length"],
)
def test_an_empty_data_set(x):
    message = r"data set is empty: expected at least one batch, received none"
    with pytest.raises(ValueError, match=message):
        fit(make_model(), x(), None)


def test_empty_arrays():
    with pytest.raises(ValueError, match="expected at least one batch"):
        fit(make_model(), X[:0], Y[:0])


def _begun(logs):
    raise AssertionError("training has begun")


def test_an_empty_validation_set():
    message = r"data set is empty: expected at least one batch, received none"
    with pytest.raises(ValueError, match=message):
        # Before training, in which `_begun` would fail.
        fit(
            make_model(),
            validation_data=(X[:0], Y[:0]),
            callbacks=[keras.callbacks.LambdaCallback(on_train_begin=_begun)],
        )


@pytest.mark.parametrize("method", ["evaluate", "predict"])
def test_nothing_to_evaluate_or_predict(method):
    trainer = make_trainer(splits=1)
    data = (X[:0], Y[:0]) if method == "evaluate" else (X[:0],)
    with pytest.raises(ValueError, match="expected at least one batch"):
        getattr(trainer, method)(*data, verbose=0)


def test_sparse_data():
    x = tf.sparse.from_dense(X)
    dataset = tf.data.Dataset.from_tensor_slices((x, Y)).batch(4)
    message = r"Expected dense tensors\. Convert the data with .*Received: "
    with pytest.raises(ValueError, match=message):
        fit(make_model(), dataset, None)


def test_the_model_can_be_used_after_an_error():
    model = make_model()
    before = model.get_weights()
    with pytest.raises(ValueError, match="do not fit"):
        fit(model, np.ones((8, 5), "float32"))
    for a, b in zip(model.get_weights(), before, strict=True):
        np.testing.assert_array_equal(a, b)
    fit(model)
    assert all(np.all(np.isfinite(w)) for w in model.get_weights())


def test_a_python_function_whose_gradient_is_late():
    class Python(layers.Layer):
        def call(self, x):
            y = tf.py_function(lambda v: v * 2.0, [x], x.dtype)
            y.set_shape(x.shape)
            return y

    def make():
        model = keras.Sequential(
            [
                keras.Input((4,)),
                layers.Dense(3, name="one"),
                Python(name="python"),
                layers.Dense(2, name="two"),
            ]
        )
        model.compile("sgd", "mse")
        return model

    message = r"`tf.py_function`, which remembers one forward only.*`delay=0`"
    with pytest.raises(ValueError, match=message):
        fit(make(), splits=["python"])
    fit(make(), splits=["one"])
    fit(make(), splits=["python"], delay=0)


@pytest.mark.parametrize("method", ["fit", "train_on_batch"])
@pytest.mark.parametrize("hook", ["on_epoch_begin", "on_train_end"])
def test_training_within_a_callback(hook, method):
    model = make_model()
    train = keras.callbacks.Callback()
    setattr(train, hook, lambda *args, **logs: getattr(model, method)(X, Y))
    message = "A model cannot be trained within"
    with pytest.raises(ValueError, match=message):
        fit(model, callbacks=[train])
    model.fit(X, Y, verbose=0)
