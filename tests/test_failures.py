"""Whatever fails: the original error, where it happened, and nothing left.

Each fault is injected at a known batch. Compiled, `fit` must end within
`LIMIT_S` with the error itself and a note that names the stage or thread and
the batch, must have left no thread behind when it returns (but for a data set
that blocks), and the model must be usable, by a second `fit` too.
"""

import contextlib
import gc
import os
import queue
import signal
import threading
import time

import keras
import numpy as np
import psutil
import pytest
import tensorflow as tf
from conftest import THREAD_PREFIX

import fdg_keras

LIMIT_S = 5.0
BATCH = 8
BAD = 7  # the batch at which things go wrong
FATAL = 100.0  # what sets off a `Bomb`; other inputs are below 1
STAGES = 3


class Bomb(keras.layers.Layer):
    """Passes its input on, and fails where a batch holds `FATAL`."""

    def __init__(self, where, **kwargs):
        super().__init__(**kwargs)
        self.where = where

    def call(self, x):
        fine = tf.less(tf.reduce_max(x), FATAL / 2)

        def checked(tensor, message):
            with tf.control_dependencies(
                [tf.debugging.Assert(fine, [message])]
            ):
                return tf.identity(tensor)

        if self.where == "memory":
            # TensorFlow itself waits ten seconds for memory to be freed.
            y = tf.numpy_function(_allocate, [x], tf.float32)
            y.set_shape(x.shape)
            return x + tf.stop_gradient(y - x)

        if self.where == "forward":
            return checked(x, "bomb in forward")

        @tf.custom_gradient
        def identity(x):
            return tf.identity(x), lambda dy: checked(dy, "bomb in backward")

        return identity(x)


def _allocate(x):
    if x.max() > FATAL / 2:
        raise MemoryError("no more memory")
    return x


class BadOptimizer(keras.optimizers.SGD):
    """Fails on the update after batch `BAD` in the stage of one layer."""

    def __init__(self, layer, **kwargs):
        super().__init__(**kwargs)
        self.layer = layer

    def get_config(self):
        return super().get_config() | {"layer": self.layer}

    def update_step(self, gradient, variable, learning_rate):
        checks = []
        index = self._get_variable_index(variable)
        if f"{self.layer}/" in self._trainable_variables[index].path:
            fine = tf.less(tf.reduce_max(tf.abs(gradient)), 1.0)
            checks = [tf.debugging.Assert(fine, ["bomb in optimizer"])]
        with tf.control_dependencies(checks):
            super().update_step(tf.identity(gradient), variable, learning_rate)


def data(fatal=False):
    random = np.random.RandomState(0)
    x = random.rand(40 * BATCH, 6).astype("float32")
    y = x.copy()
    if fatal:
        x[BAD * BATCH] = FATAL
    return x, y


def build(bomb=None, where="forward", optimizer=None):
    """Three stages of identity layers, a bomb first in stage `bomb`."""
    model = keras.Sequential([keras.Input((6,))])
    for k in range(STAGES):
        # In front of a bomb that is to go off in the backward there must be
        # something that wants a gradient.
        model.add(identity(f"before{k}"))
        if k == bomb:
            model.add(Bomb(where, name=f"bomb{k}"))
        model.add(identity(f"dense{k}"))
    model.compile(optimizer or keras.optimizers.SGD(1e-3), "mse")
    return model


def identity(name):
    return keras.layers.Dense(
        6, use_bias=False, kernel_initializer="identity", name=name
    )


def make_trainer(model, **kwargs):
    return fdg_keras.Trainer(
        model,
        ["dense0", "dense1"],
        [f"CPU:{k}" for k in range(STAGES)],
        **kwargs,
    )


class Clock(keras.callbacks.Callback):
    """Knows when training last began, after everything was compiled.

    Or, where `Blocking` says so, when it came to the batch that is bad.
    """

    started = 0.0

    def on_train_begin(self, logs=None):
        Clock.started = time.perf_counter()


def fit(trainer, x, y=None, callbacks=(), **kwargs):
    return trainer.fit(
        x,
        y,
        batch_size=None if y is None else BATCH,
        shuffle=False,
        verbose=0,
        callbacks=[Clock(), *callbacks],
        **kwargs,
    )


@contextlib.contextmanager
def fails(kind, match, *notes, left=()):
    """Expects an error within the limit, with notes that hold `notes`.

    The threads in `left`, and no others, must be there still.
    """
    # Collecting what all tests before have left takes ten seconds at times.
    gc.disable()
    start = time.perf_counter()
    try:
        with pytest.raises(kind, match=match) as caught:
            yield
    finally:
        gc.enable()
    assert threads() == list(left)
    assert time.perf_counter() - max(start, Clock.started) < LIMIT_S
    written = "\n".join(getattr(caught.value, "__notes__", []))
    for note in notes:
        assert note in written


def threads():
    """The names of the library's threads."""
    names = (thread.name for thread in threading.enumerate())
    return sorted(name for name in names if name.startswith(THREAD_PREFIX))


def assert_usable(trainer):
    """The weights are finite, and training goes on as if nothing happened."""
    model = trainer.model
    assert all(np.isfinite(w).all() for w in model.get_weights())
    x, y = data()
    before = model.evaluate(x, y, verbose=0)
    after = fit(trainer, x, y).history["loss"][-1]
    assert np.isfinite(before)
    assert np.isfinite(after)


@pytest.mark.parametrize("stage", range(STAGES))
@pytest.mark.parametrize("where", ["forward", "backward"])
def test_failure_inside_a_stage(stage, where):
    trainer = make_trainer(build(stage, where))
    fit(trainer, *data())  # compiled, so that the limit is about failing
    name = "forward" if where == "forward" else "backward or update"
    with fails(
        tf.errors.InvalidArgumentError,
        f"bomb in {where}",
        f"In stage {stage} (",
        f"'before{stage}' to 'dense{stage}'",
        f"{name} of batch {BAD} ",
    ):
        fit(trainer, *data(fatal=True))
    assert_usable(trainer)


@pytest.mark.parametrize("stage", range(STAGES))
@pytest.mark.parametrize("method", ["evaluate", "predict"])
def test_failure_in_evaluate_and_predict(method, stage):
    trainer = make_trainer(build(stage))
    x, y = data()
    more = (y,) if method == "evaluate" else ()
    run = getattr(trainer, method)
    before = run(x, *more, batch_size=BATCH, verbose=0)
    bad, _ = data(fatal=True)
    with fails(
        tf.errors.InvalidArgumentError,
        "bomb in forward",
        f"In stage {stage} (",
        f"forward of batch {BAD} ",
    ):
        run(bad, *more, batch_size=BATCH, verbose=0)
    after = run(x, *more, batch_size=BATCH, verbose=0)
    np.testing.assert_array_equal(before, after)


@pytest.mark.parametrize("order", ["forward_first", "update_first"])
@pytest.mark.parametrize("delay", [0, 1, 3])
def test_failure_names_the_batch_at_any_delay(delay, order):
    trainer = make_trainer(build(1, "backward"), delay=delay, order=order)
    fit(trainer, *data())
    with fails(
        tf.errors.InvalidArgumentError,
        "bomb in backward",
        "In stage 1 (",
        f"backward or update of batch {BAD} ",
    ):
        fit(trainer, *data(fatal=True))


@pytest.mark.parametrize("stage", range(STAGES))
def test_failure_in_an_optimizer(stage):
    optimizer = BadOptimizer(f"dense{stage}", learning_rate=1e-3)
    trainer = make_trainer(build(optimizer=optimizer))
    fit(trainer, *data())
    with fails(
        tf.errors.InvalidArgumentError,
        "bomb in optimizer",
        f"In stage {stage} (",
        f"backward or update of batch {BAD} ",
    ):
        fit(trainer, *data(fatal=True))
    model = trainer.model
    assert all(np.isfinite(w).all() for w in model.get_weights())
    assert np.isfinite(model.evaluate(*data(), verbose=0))
    # What failed has the weights of the batches before.
    expected = make_trainer(build())
    fit(expected, *data())
    x, y = data(fatal=True)
    fit(expected, x[: BAD * BATCH], y[: BAD * BATCH])
    name = f"dense{stage}"
    np.testing.assert_allclose(
        *(m.get_layer(name).get_weights()[0] for m in (model, expected.model)),
        rtol=1e-6,
        atol=1e-7,
    )
    # The other stages have made their update, and a big one: after it this
    # optimizer would fail at any batch.
    model.set_weights([np.eye(6)] * 2 * STAGES)
    assert_usable(trainer)


@pytest.mark.parametrize("stage", range(STAGES))
def test_out_of_memory(stage):
    trainer = make_trainer(build(stage, "memory"))
    fit(trainer, *data())
    with fails(
        tf.errors.ResourceExhaustedError,
        "no more memory",
        f"In stage {stage} (",
        f"forward of batch {BAD} ",
    ):
        fit(trainer, *data(fatal=True))
    assert_usable(trainer)


@pytest.mark.parametrize(
    ("port", "stage", "where"),
    [
        ("feeds", 0, "in the feeder|In stage 0"),
        ("activations_out", 0, "In stage [01]"),
        ("gradients_in", 0, "In stage [01]"),
        ("activations_in", 1, "In stage [01]"),
        ("activations_out", 1, "In stage [12]"),
        ("gradients_in", 1, "In stage [12]"),
        ("gradients_out", 1, "In stage [01]"),
        ("activations_in", 2, "In stage [12]"),
        ("gradients_out", 2, "In stage [12]"),
        ("targets", 2, "in the feeder|In stage 2"),
    ],
)
def test_a_link_that_breaks(port, stage, where):
    """As it does when the machine at its end is gone."""
    trainer = make_trainer(build())
    fit(trainer, *data())
    pipeline = trainer._deployment._built["train"].pipeline

    class Break(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            if batch == BAD:
                getattr(pipeline.ports[stage], port).close()

    closed = (tf.errors.OutOfRangeError, tf.errors.CancelledError)
    # Whichever end comes to it first says so, and at which batch.
    message = rf"(?s)is closed.*({where}).* batch \d+ of this epoch"
    with fails(closed, message):
        fit(trainer, *data(), callbacks=[Break()])
    assert_usable(trainer)


def test_weights_are_those_of_whole_batches():
    # The bad batch fails in the backward of the last stage, beside gradients
    # that could be applied: none of them is.
    trainer = make_trainer(build(2, "backward"))
    x, y = data(fatal=True)
    with fails(tf.errors.InvalidArgumentError, "bomb in backward"):
        fit(trainer, x, y)
    found = trainer.model.get_layer("dense2").get_weights()[0]
    other = make_trainer(build(2, "backward"))
    fit(other, x[: BAD * BATCH], y[: BAD * BATCH])
    expected = other.model.get_layer("dense2").get_weights()[0]
    np.testing.assert_allclose(found, expected, rtol=1e-6)


@pytest.mark.parametrize("kind", [RuntimeError, TimeoutError, queue.Empty])
def test_failure_in_the_data_set(kind):
    """Also of a kind that waiting for a queue has of its own."""
    trainer = make_trainer(build())
    x, y = data()
    fit(trainer, x, y)

    def check(i):
        if i == BAD:
            raise kind("the disk is gone")

    note = f"in the feeder, drawing batch {BAD} of this epoch"
    with fails(kind, "the disk is gone", note):
        fit(trainer, batches(check))
    assert_usable(trainer)


def test_an_exit_in_the_data_set():
    trainer = make_trainer(build())

    def check(i):
        if i == BAD:
            raise SystemExit("enough")

    with fails(SystemExit, "enough", "in the feeder"):
        fit(trainer, batches(check))
    assert_usable(trainer)


def test_failure_in_a_map_of_the_data_set():
    trainer = make_trainer(build())
    x, y = data()
    x[BAD * BATCH] = FATAL

    def check(x, y):
        fine = tf.reduce_max(x) < FATAL / 2
        with tf.control_dependencies([tf.debugging.Assert(fine, ["no disk"])]):
            return tf.identity(x), y

    batches = tf.data.Dataset.from_tensor_slices((x, y)).batch(BATCH)
    note = f"in the feeder, drawing batch {BAD} of this epoch"
    with fails(tf.errors.InvalidArgumentError, "no disk", note):
        fit(trainer, batches.map(check))
    assert_usable(trainer)


class Blocking:
    """A data set that blocks in front of batch `BAD + 1`.

    Attributes:
        came: Is set when it does.
    """

    def __init__(self, x=None):
        self._x = x
        self._go_on = threading.Event()
        self.came = threading.Event()

    def __enter__(self):
        return batches(self._check, self._x)

    def __exit__(self, *details):
        self._go_on.set()
        for thread in threading.enumerate():
            if thread.name == "fdg-feeder":
                thread.join(60.0)

    def _check(self, i):
        if i == BAD + 1:
            Clock.started = time.perf_counter()
            self.came.set()
            self._go_on.wait(60)


# Who listens to batches has them announced one by one.
LISTENER = keras.callbacks.LambdaCallback(
    on_train_batch_end=lambda batch, logs: None
)
LISTENER.drain_every = None
LEFT = pytest.warns(UserWarning, match="fdg-feeder is in code")


class Hold(keras.layers.Layer):
    """Keeps the batch that is `FATAL` until an event, and a bit longer."""

    event = threading.Event()

    def call(self, x):
        def hold(x):
            if x.max() > FATAL / 2:
                self.event.wait(60)
                time.sleep(0.5)
            return x

        y = tf.numpy_function(hold, [x], tf.float32)
        y.set_shape(x.shape)
        return y


def test_a_failure_while_the_data_set_blocks():
    # What blocks in Python cannot be ended: its thread is left behind.
    hold = Hold()
    model = keras.Sequential([keras.Input((6,)), hold, *build(1).layers])
    model.compile("sgd", "mse")
    trainer = make_trainer(model)
    fit(trainer, *data())
    blocking = Blocking(data(fatal=True)[0])
    hold.event = blocking.came
    with blocking as batches_that_block:
        failure = tf.errors.InvalidArgumentError
        with LEFT, fails(failure, "bomb in forward", left=["fdg-feeder"]):
            fit(trainer, batches_that_block, callbacks=[LISTENER])
        assert_usable(trainer)


@pytest.mark.filterwarnings("error::UserWarning")
def test_a_failure_where_warnings_are_errors():
    trainer = make_trainer(build(1))
    with (
        Blocking(data(fatal=True)[0]) as blocking,
        fails(
            tf.errors.InvalidArgumentError,
            "bomb in forward",
            "In stage 1",
            left=["fdg-feeder"],
        ),
    ):
        fit(trainer, blocking, callbacks=[LISTENER])


def test_a_stop_while_the_data_set_blocks():
    trainer = make_trainer(build())
    x, _ = data()
    x[BAD * BATCH] = np.nan
    with Blocking(x) as blocking:
        start = time.perf_counter()
        with LEFT:
            history = fit(
                trainer,
                blocking,
                callbacks=[keras.callbacks.TerminateOnNaN()],
            )
        assert time.perf_counter() - max(start, Clock.started) < LIMIT_S
        assert len(history.history["loss"]) == 1
        weights = trainer.model.get_weights()
        trainer.model.set_weights([np.eye(6)] * len(weights))
        assert_usable(trainer)


def batches(check, x=None):
    """A generator of batches that calls `check` before each."""
    if x is None:
        x, _ = data()
    for i in range(40):
        check(i)
        rows = slice(i * BATCH, (i + 1) * BATCH)
        yield x[rows], x[rows]


@pytest.mark.parametrize(
    "hook",
    [
        "on_predict_begin",
        "on_predict_batch_begin",
        "on_predict_batch_end",
        "on_predict_end",
    ],
)
def test_failure_in_a_callback_of_predict(hook):
    trainer = make_trainer(build())
    x, _ = data()
    expected = trainer.predict(x, BATCH, verbose=0)

    def bad(*args, **kwargs):
        raise RuntimeError("bad callback")

    callback = keras.callbacks.Callback()
    setattr(callback, hook, bad)
    Clock.started = time.perf_counter()
    with fails(RuntimeError, "bad callback"):
        trainer.predict(x, BATCH, verbose=0, callbacks=[callback])
    found = trainer.predict(x, BATCH, verbose=0)
    np.testing.assert_array_equal(found, expected)
    assert_usable(trainer)


def test_failure_in_the_feeder(monkeypatch):
    trainer = make_trainer(build())
    fit(trainer, *data())
    pipeline = trainer._deployment._built["train"].pipeline
    feed = pipeline.feed
    calls = []

    def bad_feed(iterator, count):
        calls.append(count)
        if len(calls) == 3:
            raise OSError("no more memory")
        return feed(iterator, count)

    bad_feed.moved, bad_feed.batch_bytes = lambda: 0, 1
    monkeypatch.setattr(pipeline, "feed", bad_feed)
    with fails(OSError, "no more memory", "in the feeder, drawing batch"):
        fit(trainer, *data())
    assert_usable(trainer)


@pytest.mark.parametrize(
    "hook",
    [
        "on_train_begin",
        "on_epoch_begin",
        "on_train_batch_begin",
        "on_train_batch_end",
        "on_test_begin",
        "on_test_batch_begin",
        "on_test_batch_end",
        "on_test_end",
        "on_epoch_end",
        "on_train_end",
    ],
)
def test_failure_in_a_callback(hook):
    trainer = make_trainer(build())
    x, y = data()
    fit(trainer, x, y, validation_data=(x, y))
    seen = []

    def bad(*args, **kwargs):
        seen.append(args)
        if len(seen) == BAD or "batch" not in hook:
            raise KeyError("callback failed")

    class Bad(keras.callbacks.Callback):
        pass

    callback = Bad()
    setattr(callback, hook, bad)
    notes = [f"in a callback's `{hook}`"]
    if "batch" in hook:
        notes = ["in a callback", f"batch {BAD - 1} of the epoch"]
    notes.append("The callback is a Bad.")
    with fails(KeyError, "callback failed", *notes):
        fit(trainer, x, y, validation_data=(x, y), callbacks=[callback])
    assert_usable(trainer)


@pytest.mark.parametrize("after_s", [0.3, 1.0])
def test_interrupt_in_steady_state(after_s):
    trainer = make_trainer(build())
    fit(trainer, *data())
    timer = threading.Timer(after_s, os.kill, (os.getpid(), signal.SIGINT))
    start = time.perf_counter()
    timer.start()
    # In a stage, a callback, or Python between two batches.
    with pytest.raises(KeyboardInterrupt, match=r"in epoch \d+ of 1000000"):
        fit(trainer, *data(), epochs=10**6)
    assert not threads()
    assert time.perf_counter() - start < after_s + LIMIT_S
    timer.join()
    assert_usable(trainer)


def test_an_alarm_in_steady_state():
    """A time limit that raises what a wait for a queue could raise, too."""
    trainer = make_trainer(build())
    fit(trainer, *data())

    def ring(*_):
        raise TimeoutError("time is up")

    before = signal.signal(signal.SIGALRM, ring)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.3)
        with pytest.raises(TimeoutError, match="time is up"):
            fit(trainer, *data(), epochs=10**6)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert not threads()
    assert_usable(trainer)


class Signal(keras.layers.Layer):
    """Passes its input on, and sends Ctrl-C in one of its passes.

    Attributes:
        at: At which forward or backward, counted from 1, and of which kind.
        forwards: How many there were.
        backwards: How many there were.
    """

    def __init__(self, at, where="backwards"):
        super().__init__()
        self.at, self.where = at, where
        self.forwards = self.backwards = 0

    def call(self, x):
        def counted(tensor, where):
            def count(tensor):
                found = getattr(self, where) + 1
                setattr(self, where, found)
                if (found, where) == (self.at, self.where):
                    # Sent while the caller is about to wait for its queue,
                    # Python hears of it only when that has something.
                    time.sleep(0.1)
                    os.kill(os.getpid(), signal.SIGINT)
                    time.sleep(0.5)
                return tensor

            passed = tf.numpy_function(count, [tensor], tf.float32)
            passed.set_shape(tensor.shape)
            return passed

        @tf.custom_gradient
        def identity(x):
            return counted(x, "forwards"), lambda dy: counted(dy, "backwards")

        return identity(x)


def signals_first(signaling):
    """A trainer whose stage 0 has `signaling`, after something to train."""
    model = keras.Sequential(
        [
            keras.Input((6,)),
            identity("early"),
            signaling,
            *build().layers,
        ]
    )
    model.compile("sgd", "mse")
    return make_trainer(model)


def test_interrupt_in_warm_up():
    """While the first stage makes the forwards it is ahead by."""
    signaling = Signal(2, "forwards")
    trainer = signals_first(signaling)
    seen = []

    class Count(keras.callbacks.Callback):
        drain_every = None

        def on_train_batch_end(self, batch, logs=None):
            seen.append(batch)

    with fails(
        KeyboardInterrupt,
        "Interrupted in this epoch",
        "stage 0 at forward of batch 1;",
    ):
        fit(trainer, *data(), callbacks=[Count()])
    # The stage was four batches late, and is stopped before it has filled.
    assert signaling.forwards in range(2, 5)
    assert signaling.backwards == 0
    assert max(seen, default=0) <= 1
    signaling.at = 0
    assert_usable(trainer)


@pytest.mark.parametrize("forward", [1, BAD])
@pytest.mark.parametrize("method", ["evaluate", "predict"])
def test_interrupt_in_evaluate_and_predict(method, forward):
    signaling = Signal(0, "forwards")
    trainer = signals_first(signaling)
    x, y = data()
    more = (y,) if method == "evaluate" else ()
    run = getattr(trainer, method)
    before = run(x, *more, batch_size=BATCH, verbose=0)
    signaling.at = signaling.forwards + forward
    with fails(
        KeyboardInterrupt,
        "Interrupted in this epoch",
        f"stage 0 at forward of batch {forward - 1};",
    ):
        run(x, *more, batch_size=BATCH, verbose=0)
    after = run(x, *more, batch_size=BATCH, verbose=0)
    np.testing.assert_array_equal(before, after)
    assert_usable(trainer)


class SignalWhenTraced(keras.layers.Layer):
    """Sends Ctrl-C when Python runs it, if it is armed."""

    armed = False

    def call(self, x):
        if self.armed:
            self.armed = False
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.1)
        return x + 0.0


@pytest.mark.parametrize("method", ["fit", "evaluate", "predict"])
@pytest.mark.parametrize("stage", range(STAGES))
def test_interrupt_while_stages_compile(stage, method):
    signaling = SignalWhenTraced()
    parts = build().layers
    parts.insert(2 * stage + 1, signaling)
    model = keras.Sequential([keras.Input((6,)), *parts])
    model.compile("sgd", "mse")
    trainer = make_trainer(model)
    x, y = data()
    more = () if method == "predict" else (y,)
    homes = [v.value.device for v in model.variables]
    signaling.armed = True
    with fails(KeyboardInterrupt, "^$"):
        getattr(trainer, method)(x, *more, batch_size=BATCH, verbose=0)
    assert not signaling.armed
    assert [v.value.device for v in model.variables] == homes
    for weight in model.get_weights():
        np.testing.assert_array_equal(weight, np.eye(6))
    assert_usable(trainer)


@pytest.mark.parametrize(
    ("backward", "batches"),
    [(1, 4), (20, 17), (37, 35), (40, 35)],
    ids=["first", "steady", "in drain", "last"],
)
def test_interrupt_in_a_backward(backward, batches):
    """The first stage is four batches late: its last four are the drain."""
    signaling = Signal(backward)
    trainer = signals_first(signaling)
    with fails(
        KeyboardInterrupt,
        "Interrupted in this epoch",
        f"stage 0 at backward or update of batch {backward - 1}",
    ):
        fit(trainer, *data())
    assert signaling.backwards in range(backward, batches + 8)
    signaling.at = 0
    assert_usable(trainer)


@pytest.mark.parametrize("every", [5, 4])
def test_batches_are_counted_on_after_a_pause(every, tmp_path):
    trainer = make_trainer(build(1))
    save = keras.callbacks.ModelCheckpoint(
        str(tmp_path / "at.weights.h5"),
        save_freq=every,
        save_weights_only=True,
    )
    with fails(
        tf.errors.InvalidArgumentError,
        "bomb in forward",
        "In stage 1 (layers 'before1' to 'dense1'",
        f"forward of batch {BAD} of this epoch",
    ):
        fit(trainer, *data(fatal=True), callbacks=[save])


@pytest.mark.parametrize("batch", [0, 1, 20, 39])
def test_interrupt_at_a_batch(batch):
    trainer = make_trainer(build())
    fit(trainer, *data())

    class Interrupt(keras.callbacks.Callback):
        def on_train_batch_end(self, index, logs=None):
            if index == batch:
                os.kill(os.getpid(), signal.SIGINT)

    with fails(KeyboardInterrupt, "Interrupted in this epoch", "stage 2 at"):
        fit(trainer, *data(), callbacks=[Interrupt()])
    assert_usable(trainer)


def interrupted_twice():
    """Returns a trainer, and the threads there were when `fit` had ended."""
    model = build()
    x = keras.layers.Dense(6, name="last")(Slow(0.5)(model.outputs[0]))
    slow = keras.Model(model.inputs, x)
    slow.compile("sgd", "mse")
    trainer = make_trainer(slow)

    class Interrupt(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            for after_s in (0.1, 0.2):
                kill = (os.getpid(), signal.SIGINT)
                threading.Timer(after_s, os.kill, kill).start()
            time.sleep(5)

    start = time.perf_counter()
    with pytest.raises(KeyboardInterrupt, match="Interrupted in this epoch"):
        fit(trainer, *data(), callbacks=[Interrupt()])
    left = threads()
    assert time.perf_counter() - max(start, Clock.started) < LIMIT_S
    # So that the next test finds none, whatever this one finds.
    deadline = time.perf_counter() + LIMIT_S
    while threads() and time.perf_counter() < deadline:
        time.sleep(0.05)
    return trainer, left


def test_impatience():
    """A second Ctrl-C changes nothing: a stage ends within its tick."""
    trainer, _ = interrupted_twice()
    x, y = data()
    fit(trainer, x[: 2 * BATCH], y[: 2 * BATCH])


def test_impatience_leaves_no_thread():
    _, left = interrupted_twice()
    assert not left


def test_nan_ends_training_with_terminate_on_nan():
    trainer = make_trainer(build())
    x, y = data()
    x[BAD * BATCH] = np.nan
    batches = []

    class Count(keras.callbacks.Callback):
        def on_train_batch_end(self, index, logs=None):
            batches.append(index)

    history = fit(
        trainer,
        x,
        y,
        epochs=3,
        callbacks=[keras.callbacks.TerminateOnNaN(), Count()],
    )
    assert batches == list(range(BAD + 1))
    assert len(history.history["loss"]) == 1


def test_a_hundred_failures_compile_nothing_anew():
    trainer = make_trainer(build(1))
    fit(trainer, *data())
    built = trainer._deployment._built["train"]
    threads = threading.active_count()
    for _ in range(100):
        with fails(tf.errors.InvalidArgumentError, "bomb"):
            fit(trainer, *data(fatal=True))
    assert threading.active_count() == threads
    assert_usable(trainer)
    assert trainer._deployment._built["train"] is built


@pytest.mark.parametrize("steps_per_execution", [1, 2000])
def test_memory_in_flight_is_bounded_by_a_slow_last_stage(steps_per_execution):
    # Every batch is 1 MiB, and so are activations, gradients and stashes:
    # 2,000 of any of them waiting would be 2 GiB.
    size = 2**18
    inputs = keras.Input((size,))
    x = Gain(name="first")(inputs)
    x = Gain(name="second")(x)
    x = keras.ops.mean(x, axis=1, keepdims=True)
    outputs = keras.layers.Dense(1, name="last")(Slow(0.002)(x))
    model = keras.Model(inputs, outputs)
    sgd = keras.optimizers.SGD(1e-9)
    model.compile(sgd, "mse", steps_per_execution=steps_per_execution)
    process = psutil.Process()
    used = []

    def watch(i):
        # Looked at from the data set: it is what would run ahead.
        if i % 50 == 0:
            used.append(process.memory_info().rss)
        return i

    def make(i):
        i = tf.numpy_function(watch, [i], tf.int64)
        x = tf.fill((1, size), tf.cast(i, tf.float32))
        return tf.ensure_shape(x, (1, size)), tf.zeros((1, 1))

    fdg_keras.fit(
        model,
        tf.data.Dataset.range(2000).map(make),
        splits=["first", "second"],
        devices=["CPU:0", "CPU:1", "CPU:2"],
        verbose=0,
    )
    assert len(used) == 40
    assert max(used[10:]) - min(used[4:10]) < 200 * 2**20


class Gain(keras.layers.Layer):
    """Multiplies by a weight, whose gradient needs the input."""

    def build(self, shape):
        self.gain = self.add_weight(shape=(), initializer="ones")

    def call(self, x):
        return self.gain * x


class Slow(keras.layers.Layer):
    """Takes so many seconds for each batch."""

    def __init__(self, seconds, **kwargs):
        super().__init__(**kwargs)
        self.seconds = seconds

    def call(self, x):
        def wait(x):
            time.sleep(self.seconds)
            return x

        y = tf.numpy_function(wait, [x], tf.float32)
        y.set_shape(x.shape)
        return x + tf.stop_gradient(y - x)

    def compute_output_shape(self, input_shape):
        return input_shape
