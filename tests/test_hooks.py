"""Callbacks: who listens to batches, when to validate, how many epochs."""

import keras
import pytest
from keras import callbacks

from fdg_keras.hooks import Hooks, as_floats, capped_epochs, validates


def make_hooks(*added, verbose=0, **compiled):
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    model.compile("sgd", "mse", **compiled)
    return Hooks(model, list(added), verbose, epochs=1, steps=None)


class OnBatchEnd(callbacks.Callback):
    def on_batch_end(self, batch, logs=None):
        pass


class Saving(callbacks.ModelCheckpoint):
    """A user's, with a batch hook of its own."""

    def on_train_batch_end(self, batch, logs=None):
        super().on_train_batch_end(batch, logs)


class OnTestBatchBegin(callbacks.Callback):
    def on_test_batch_begin(self, batch, logs=None):
        pass


@pytest.mark.parametrize(
    "make",
    [
        lambda path: callbacks.EarlyStopping(),
        lambda path: callbacks.ReduceLROnPlateau(),
        lambda path: callbacks.LearningRateScheduler(lambda epoch: 0.1),
        lambda path: callbacks.CSVLogger(path),
        lambda path: callbacks.ModelCheckpoint(path + ".keras"),
        lambda path: callbacks.BackupAndRestore(path),
        lambda path: callbacks.TensorBoard(path),
        lambda path: callbacks.LambdaCallback(on_epoch_end=lambda *_: None),
        lambda path: OnTestBatchBegin(),
    ],
)
def test_windows_may_grow_if_nobody_listens_to_batches(tmp_path, make):
    pace = make_hooks(make(str(tmp_path / "at")), verbose=1).pace("train")
    assert (pace.window, pace.asked) == (1, None)


@pytest.mark.parametrize(
    "make",
    [
        lambda path: OnBatchEnd(),
        lambda path: callbacks.TerminateOnNaN(),
        lambda path: callbacks.ModelCheckpoint(path + ".keras", save_freq=3),
        lambda path: callbacks.BackupAndRestore(path, save_freq=3),
        lambda path: callbacks.TensorBoard(path, update_freq="batch"),
        lambda path: callbacks.TensorBoard(path, update_freq=3),
        lambda path: callbacks.TensorBoard(path, profile_batch=2),
        lambda path: Saving(path + ".keras"),
        lambda path: callbacks.LambdaCallback(
            on_train_batch_end=lambda *_: None
        ),
    ],
)
def test_a_window_is_a_batch_for_those_who_listen(tmp_path, make):
    pace = make_hooks(make(str(tmp_path / "at"))).pace("train")
    assert pace.asked == pace.window == 1


def test_listeners_are_asked_for_each_mode():
    hooks = make_hooks(OnTestBatchBegin())
    assert hooks.pace("test").asked
    assert hooks.pace("train").asked is None
    assert hooks.pace("predict").asked is None


def test_steps_per_execution_is_the_window():
    pace = make_hooks(OnBatchEnd(), steps_per_execution=8).pace("train")
    assert pace.asked == pace.window == 8


def test_windows_go_on_growing_over_epochs():
    hooks = make_hooks()
    assert hooks.pace("train") is hooks.pace("train")
    assert hooks.pace("train") is not hooks.pace("test")


def test_a_callback_list_is_taken_as_it_is():
    given = callbacks.CallbackList([OnBatchEnd()])
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    assert Hooks(model, given, 1, epochs=1, steps=None).callbacks is given


@pytest.mark.parametrize(
    ("frequency", "epochs"),
    [(1, [0, 1, 2, 3]), (2, [1, 3]), (5, []), ([1, 3], [0, 2]), ({4}, [3])],
)
def test_when_to_validate(frequency, epochs):
    assert [e for e in range(4) if validates(e, frequency)] == epochs


def test_epochs_are_capped_by_keras_config():
    assert capped_epochs(7) == 7
    keras.config.set_max_epochs(3)
    try:
        with pytest.warns(UserWarning, match="Limiting epochs to 3"):
            assert capped_epochs(7) == 3
        assert capped_epochs(2) == 2
    finally:
        keras.config.set_max_epochs(None)


def test_metrics_as_python_floats():
    found = as_floats({"a": keras.ops.convert_to_tensor(1.5), "b": 2})
    assert found == {"a": 1.5, "b": 2.0}
    assert all(type(value) is float for value in found.values())


def pauses(hooks, batches):
    """The batches of an epoch after which the stages drain."""
    hooks.start_epoch()
    hooks.callbacks.on_epoch_begin(0)
    found, position = [], 0
    while position < batches:
        until = hooks.until_pause()
        stop = min(position + (until or batches), batches)
        if until and stop == position + until:
            found.append(stop)
        window = hooks.pace("train").window
        while position < stop:
            position = min(position + window, stop)
            hooks.end("train", position - 1, {})
    return found


class Counting(callbacks.ModelCheckpoint):
    """Counts the batches at which it saves."""

    def __init__(self, *args, **kwargs):
        super().__init__("never.keras", *args, **kwargs)
        self.saved = []

    def _save_model(self, epoch, batch, logs):
        self.saved.append(batch + 1)


@pytest.mark.parametrize(
    ("window", "frequency", "expected"),
    [
        (1, 3, [[3, 6], [2, 5], [1, 4, 7]]),
        (1, 20, [[], [], [6]]),
        (2, 3, [None] * 4),
    ],
)
def test_stages_drain_where_a_model_is_saved(window, frequency, expected):
    counting = Counting(save_freq=frequency)
    hooks = make_hooks(counting, steps_per_execution=window)
    for epoch in expected:
        counting.saved.clear()
        found = pauses(hooks, 7)
        # At the end of an epoch, where the last window may be short, the
        # stages drain anyway.
        saved = [min(batch, 7) for batch in counting.saved]
        assert {*found, 7} == {*saved, 7}
        assert counting.saved == epoch or window > 1


def test_stages_drain_for_those_who_ask():
    callback = OnBatchEnd()
    callback.drain_every = 3
    assert pauses(make_hooks(callback), 7) == [3, 6]
    assert pauses(make_hooks(callback, steps_per_execution=2), 7) == [4]


def test_stages_do_not_drain_for_others():
    assert pauses(make_hooks(OnBatchEnd(), Counting()), 7) == []


def test_who_has_stages_drain_has_windows_of_a_batch():
    """Or they would drain where the machine's speed would have it."""
    callback = callbacks.Callback()
    callback.drain_every = 3
    hooks = make_hooks(callback)
    assert hooks.pace("train").asked == 1
    assert hooks.pace("test").asked is None
