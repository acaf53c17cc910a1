"""Interrupted and resumed: bit-identical to what was not interrupted.

For models without random layers: Keras saves no seeds of dropout, so that a
model which was loaded draws other masks, here as in `model.fit`.
"""

import os
import signal
import subprocess
import sys
import textwrap
import threading

import keras
import numpy as np
import pytest
from keras import layers
from matching import assert_identical_weights

import fdg_keras

BATCHES, BATCH, EPOCHS = 6, 4, 3
X = np.random.RandomState(0).rand(BATCHES * BATCH - 1, 5).astype("float32")
Y = np.random.RandomState(1).rand(BATCHES * BATCH - 1, 2).astype("float32")


def make_model():
    keras.utils.set_random_seed(4)
    model = keras.Sequential(
        [
            keras.Input((5,), name="in"),
            layers.Dense(6, "tanh", name="one"),
            layers.BatchNormalization(name="norm"),
            layers.Dense(6, "tanh", name="two"),
            layers.Dense(2, name="three"),
        ]
    )
    model.compile(keras.optimizers.Adam(0.01), "mse", metrics=["mae"])
    return model


def fit(model, callbacks=(), splits=3, x=X, y=Y, **arguments):
    return fdg_keras.fit(
        model,
        x,
        y,
        splits=splits,
        batch_size=BATCH,
        verbose=0,
        callbacks=list(callbacks),
        **{"epochs": EPOCHS, "shuffle": False, **arguments},
    )


def assert_same(model, other):
    assert_identical_weights(model, other)
    assert_identical_weights(model.optimizer, other.optimizer)


class Interrupted(Exception):
    """What the test raises."""


class Interrupt(keras.callbacks.Callback):
    """Ends training after a batch, in one of several ways."""

    def __init__(self, epoch, batch, how):
        super().__init__()
        self._at, self._how = (epoch, batch), how

    def on_epoch_begin(self, epoch, logs=None):
        self._epoch = epoch

    def on_train_batch_end(self, batch, logs=None):
        if (self._epoch, batch) == self._at:
            if self._how is Interrupted:
                raise Interrupted("by the test")
            os.kill(os.getpid(), signal.SIGINT)


@pytest.fixture(scope="module")
def whole():
    """Trained without an interruption."""
    model = make_model()
    fit(model)
    return model


@pytest.mark.parametrize(
    ("epoch", "batch", "how"),
    [
        (0, 2, Interrupted),
        (1, 0, KeyboardInterrupt),
        (1, 3, Interrupted),
        (1, BATCHES - 1, KeyboardInterrupt),
        (2, 4, KeyboardInterrupt),
    ],
)
def test_backup_and_restore(tmp_path, whole, epoch, batch, how):
    backup = keras.callbacks.BackupAndRestore(str(tmp_path / "backup"))
    with pytest.raises(how, match=r"by the test|Interrupted in"):
        fit(make_model(), [backup, Interrupt(epoch, batch, how)])
    resumed = make_model()
    if epoch == 0:
        # Nothing was saved yet: it begins anew.
        assert not (tmp_path / "backup").exists()
    backup = keras.callbacks.BackupAndRestore(str(tmp_path / "backup"))
    history = fit(resumed, [backup])
    assert history.epoch == list(range(epoch, EPOCHS))
    assert_same(resumed, whole)


@pytest.mark.parametrize("epoch", [1, 2])
def test_a_saved_model(tmp_path, whole, epoch):
    path = str(tmp_path / "at.keras")
    first = make_model()
    fit(first, [keras.callbacks.ModelCheckpoint(path)], epochs=epoch)
    resumed = keras.models.load_model(path)
    fit(resumed, initial_epoch=epoch)
    assert_same(resumed, whole)


@pytest.mark.parametrize("delay", [0, 2])
@pytest.mark.parametrize("splits", [(3, 2), (2, 4)])
def test_backup_and_restore_in_other_stages(tmp_path, splits, delay):
    """A backup of three stages goes on in two, by a trainer of its own.

    What was not interrupted changes its stages at the end of the same epoch:
    gradients are later in more stages, unless there is no delay.
    """
    first, then = splits
    uninterrupted = make_model()
    fit(uninterrupted, epochs=1, splits=first, delay=delay)
    fit(uninterrupted, initial_epoch=1, splits=then, delay=delay)
    backup = keras.callbacks.BackupAndRestore(str(tmp_path / "backup"))
    with pytest.raises(Interrupted, match="by the test"):
        fit(
            make_model(),
            [backup, Interrupt(1, 3, Interrupted)],
            splits=first,
            delay=delay,
        )
    resumed = make_model()
    backup = keras.callbacks.BackupAndRestore(str(tmp_path / "backup"))
    history = fit(resumed, [backup], splits=then, delay=delay)
    assert history.epoch == list(range(1, EPOCHS))
    assert_same(resumed, uninterrupted)


def test_another_number_of_stages(tmp_path):
    """What was trained in three stages goes on in two."""
    path = str(tmp_path / "at.keras")
    uninterrupted, first = make_model(), make_model()
    for model in (uninterrupted, first):
        fit(model, epochs=1, splits=3)
    first.save(path)
    resumed = keras.models.load_model(path)
    for model in (uninterrupted, resumed):
        fit(model, initial_epoch=1, splits=2, delay=1)
    assert_same(resumed, uninterrupted)
    # And by Keras alone.
    for model in (uninterrupted, resumed):
        model.fit(X, Y, batch_size=BATCH, shuffle=False, verbose=0)
    assert_same(resumed, uninterrupted)


@pytest.mark.parametrize("every", [2, 4])
def test_a_model_saved_within_an_epoch(tmp_path, every):
    path = str(tmp_path / "{batch}.keras")
    whole = make_model()
    saves = keras.callbacks.ModelCheckpoint(path, save_freq=every)
    fit(whole, [saves], epochs=1)
    for batch in range(every, BATCHES, every):
        resumed = keras.models.load_model(path.format(batch=batch))
        again = str(tmp_path / "again.keras")
        saves = keras.callbacks.ModelCheckpoint(again, save_freq=every)
        rest = slice(batch * BATCH, None)
        fit(resumed, [saves], x=X[rest], y=Y[rest], epochs=1)
        assert_same(resumed, whole)


SCRIPT = """
import os, signal, sys
sys.path[:0] = {paths!r}
import keras, tensorflow as tf
tf.config.set_logical_device_configuration(
    tf.config.list_physical_devices("CPU")[0],
    [tf.config.LogicalDeviceConfiguration()] * 3,
)
import test_resume

class Kill(keras.callbacks.Callback):
    def on_epoch_begin(self, epoch, logs=None):
        self.epoch = epoch
    def on_train_batch_end(self, batch, logs=None):
        if (self.epoch, batch) == (2, 3):
            os.kill(os.getpid(), signal.SIGKILL)

backup = keras.callbacks.BackupAndRestore(sys.argv[1])
test_resume.fit(test_resume.make_model(), [backup, Kill()])
"""


def test_kill(tmp_path, whole):
    """From the last end of an epoch on, in another process."""
    tests = os.path.dirname(__file__)
    script = SCRIPT.format(paths=[tests, os.path.dirname(tests)])
    directory = str(tmp_path / "backup")
    killed = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), directory],
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "-1"},
        capture_output=True,
        text=True,
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    resumed = make_model()
    history = fit(resumed, [keras.callbacks.BackupAndRestore(directory)])
    assert history.epoch == [2]
    assert_same(resumed, whole)


class WholeBackup(keras.callbacks.BackupAndRestore):
    """An interrupt waits while Keras writes.

    It writes weights first and the number of the epoch then, each in place, so
    that an interrupt between breaks a backup, here as in `model.fit`.
    """

    def _save_model(self):
        came = []
        before = signal.signal(signal.SIGINT, lambda *_: came.append(True))
        try:
            super()._save_model()
        finally:
            signal.signal(signal.SIGINT, before)
        if came:
            raise KeyboardInterrupt


def test_an_interrupt_at_any_time(tmp_path, whole):
    """Also while stages start, fill or drain: whatever was saved is whole."""
    resumed = make_model()
    interrupted = 0
    for after_s in (0.02, 0.1, 0.25, 0.5):
        backup = WholeBackup(str(tmp_path / "backup"), delete_checkpoint=False)
        timer = threading.Timer(after_s, os.kill, (os.getpid(), signal.SIGINT))

        class Start(keras.callbacks.Callback):
            def on_train_begin(self, logs=None, timer=timer):
                timer.start()

        try:
            fit(make_model(), [backup, Start()])
            timer.join()
        except KeyboardInterrupt:
            interrupted += 1
    assert interrupted
    backup = keras.callbacks.BackupAndRestore(str(tmp_path / "backup"))
    fit(resumed, [backup])
    assert_same(resumed, whole)
