"""Stages emulated one after the other train as those in threads do."""

import threading

import keras
import numpy as np
import pytest
import tensorflow as tf
import zoo
from grid import Setting, pairwise
from matching import assert_same_weights
from test_hooks import OnBatchEnd

import fdg_keras

KINDS = ["emulate", "run_eagerly"]


def train(name, kind=None, K=3, optimizer=None, epochs=1, fit=None, **settings):
    """Trains a case of the zoo, in threads or as `kind` says."""
    case = zoo.ZOO[name]()
    case.model.compile(
        optimizer or keras.optimizers.SGD(0.05, momentum=0.9),
        case.loss,
        metrics=case.metrics,
        run_eagerly=kind == "run_eagerly",
    )
    trainer = fdg_keras.Trainer(
        case.model,
        case.cuts[K] if K > 1 else 1,
        emulate=kind == "emulate",
        **settings,
    )
    history = trainer.fit(
        case.x,
        case.y,
        **{
            "batch_size": zoo.BATCH_SIZE,
            "shuffle": False,
            "verbose": 0,
            "epochs": epochs,
            **(fit or {}),
        },
    )
    return case, trainer, history.history


def assert_same(found, wanted):
    (case, _, history), (other, _, expected) = found, wanted
    assert_same_weights(case.model, other.model)
    assert_same_weights(case.model.optimizer, other.model.optimizer)
    assert list(history) == list(expected)
    for key, values in expected.items():
        # Keras weighs the losses of outputs by batch size if it is known.
        if not (case.model.run_eagerly and key.endswith("_loss")):
            np.testing.assert_allclose(history[key], values, rtol=1e-5)


@pytest.mark.filterwarnings("ignore:Adam divides gradients")
@pytest.mark.parametrize(
    "setting",
    [
        Setting(*values)
        for values in pairwise(
            (2, 3, 4),
            (0, 1, 2, 3),
            ("forward_first", "update_first"),
            (1.0, 0.5),
            ("sgd", "adam"),
        )
    ],
    ids=str,
)
def test_mlp(setting):
    runs = [
        train(
            "mlp",
            kind,
            setting.K,
            setting.make_optimizer(),
            epochs=2,
            **setting.rule,
        )
        for kind in ("emulate", None)
    ]
    assert_same(*runs)


@pytest.mark.parametrize(
    "name",
    ["conv", "lstm", "unet", "two_inputs", "shared", "activity", "integers"],
)
def test_models(name):
    assert_same(train(name, "emulate", shrink=0.5), train(name, shrink=0.5))


@pytest.mark.parametrize("name", ["mlp", "conv", "attention", "two_inputs"])
def test_eagerly(name):
    # In float64: eager and compiled kernels round differently, and rounding
    # grows with each batch.
    keras.config.set_floatx("float64")
    keras.config.set_dtype_policy("float64")
    try:
        runs = [train(name, kind, delay=1) for kind in ("run_eagerly", None)]
    finally:
        keras.config.set_floatx("float32")
    assert {v.dtype for v in runs[0][0].model.trainable_weights} == {"float64"}
    assert_same(*runs)


@pytest.mark.parametrize("kind", KINDS)
def test_corrections(kind):
    corrections = [
        fdg_keras.WeightPrediction(),
        fdg_keras.DelayCompensation(0.5),
        fdg_keras.LearningRateRescheduling(30),
    ]
    assert_same(
        train("mlp", kind, epochs=2, corrections=corrections),
        train("mlp", epochs=2, corrections=corrections),
    )


class Lower(keras.callbacks.Callback):
    """Lowers the learning rate after each batch, and stops in the end."""

    drain_every = 5

    def on_train_batch_end(self, batch, logs=None):
        rate = self.model.optimizer.learning_rate
        rate.assign(0.9 * rate)
        if batch == 8:
            self.model.stop_training = True


@pytest.mark.parametrize("kind", KINDS)
def test_callbacks_act_at_the_same_batch(kind):
    """On rates, on when to stop, and where stages drain."""
    found = train("mlp", kind, fit={"callbacks": [Lower()]})
    wanted = train("mlp", fit={"callbacks": [Lower()]})
    assert_same(found, wanted)


@pytest.mark.parametrize("kind", KINDS)
def test_evaluate_and_predict(kind):
    case, trainer, _ = train("unet", kind)
    found = trainer.evaluate(case.x, case.y, verbose=0)
    np.testing.assert_allclose(
        found, case.model.evaluate(case.x, case.y, verbose=0), rtol=1e-5
    )
    np.testing.assert_allclose(
        trainer.predict(case.x, verbose=0),
        case.model.predict(case.x, verbose=0),
        rtol=1e-4,
        atol=1e-6,
    )


def test_eager_layers_run_in_the_caller_s_thread():
    seen = set()

    class Look(keras.layers.Layer):
        def call(self, x):
            seen.add((threading.current_thread().name, tf.executing_eagerly()))
            return x + 0.0

    model = keras.Sequential(
        [
            keras.Input((2,)),
            keras.layers.Dense(2),
            Look(),
            keras.layers.Dense(1),
        ]
    )
    model.compile("sgd", "mse", run_eagerly=True)
    seen.clear()
    fdg_keras.fit(model, np.ones((8, 2)), np.ones((8, 1)), verbose=0)
    assert seen == {(threading.current_thread().name, True)}


def test_an_eager_failure_says_where():
    class Bomb(keras.layers.Layer):
        def call(self, x):
            if tf.executing_eagerly() and float(tf.reduce_max(x)) > 5:
                raise ZeroDivisionError("the layer's own error")
            return x + 0.0

    model = keras.Sequential(
        [
            keras.Input((2,)),
            keras.layers.Rescaling(1.0),
            Bomb(),
            keras.layers.Dense(1),
        ]
    )
    model.compile("sgd", "mse", run_eagerly=True)
    x = np.ones((40, 2))
    x[17] = 9.0
    trainer = fdg_keras.Trainer(model, ["rescaling"])
    with pytest.raises(ZeroDivisionError, match="the layer's own") as caught:
        trainer.fit(
            x, x[:, :1], batch_size=4, shuffle=False, verbose=0, epochs=1
        )
    notes = "\n".join(caught.value.__notes__)
    assert "in the forward of stage 1" in notes
    assert "batch 4" in notes
    trainer.fit(np.ones((8, 2)), np.ones((8, 1)), verbose=0)


def test_it_says_what_it_is(capsys):
    train("mlp", "emulate", fit={"verbose": 2})
    assert "Emulating 3 stages" in capsys.readouterr().out


def test_all_stages_are_on_one_device():
    _, trainer, _ = train("mlp", "emulate")
    assert len({stage.device for stage in trainer.plan.stages}) == 1


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("stash", ["current", "replay"])
def test_other_stashes_are_refused(kind, stash):
    with pytest.raises(ValueError, match=f"`{kind}=True` runs the backward"):
        train("mlp", kind, stash=stash)


def test_selective_is_as_exact():
    """Nothing is kept here, and the numbers are the same."""
    assert_same(train("mlp", "emulate", stash="selective"), train("mlp"))


@pytest.mark.parametrize("kind", KINDS)
def test_batch_hooks(kind):
    """One call for each batch."""
    seen = []

    class Count(OnBatchEnd):
        def on_train_batch_end(self, batch, logs=None):
            seen.append((batch, sorted(logs)))

    train("mlp", kind, fit={"callbacks": [Count()]})
    assert [batch for batch, _ in seen] == list(range(12))
    assert all("loss" in keys for _, keys in seen)
