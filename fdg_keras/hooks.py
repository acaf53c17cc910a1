"""Keras' callbacks, called as Keras calls them."""

import contextlib
import numbers
import traceback
from collections.abc import Iterator
from typing import Any

import keras
import numpy as np

from fdg_keras import _keras
from fdg_keras.feeding import Pace
from fdg_keras.threads import noting, warn

_TRAIN_HOOKS = (
    "on_train_batch_begin",
    "on_train_batch_end",
    "on_batch_begin",
    "on_batch_end",
)
_BATCH_HOOKS = (
    *_TRAIN_HOOKS,
    "on_test_batch_begin",
    "on_test_batch_end",
    "on_predict_batch_begin",
    "on_predict_batch_end",
)


class Hooks:
    """The callbacks of one `fit`, `evaluate` or `predict`.

    Args:
        model: The model they are about.
        callbacks: As `keras.Model.fit` takes them.
        verbose: Likewise.
        epochs: For the progress bar.
        steps: Batches of an epoch, `None` if not known yet.
        history: Whether to add a `History`.
    """

    def __init__(
        self,
        model: keras.Model,
        callbacks: Any,
        verbose: Any,
        epochs: int,
        steps: int | None,
        history: bool = False,
    ):
        self._model = model
        self._paces: dict[str, Pace] = {}
        self._trained = 0
        if not isinstance(callbacks, keras.callbacks.CallbackList):
            callbacks = keras.callbacks.CallbackList(
                callbacks,
                add_history=history,
                add_progbar=verbose != 0,
                verbose=verbose,
                epochs=epochs,
                steps=steps,
                model=model,
            )
        self.callbacks = callbacks

    def call(self, name: str, *args: Any, **kwargs: Any) -> None:
        """Calls a hook of all callbacks."""
        with noting(f"in a callback's `{name}`"), _naming():
            getattr(self.callbacks, name)(*args, **kwargs)

    @contextlib.contextmanager
    def introduced(self, trainer: Any) -> Iterator[None]:
        """Within, callbacks that have a `set_trainer` know the trainer.

        Afterwards, however it ends, they are told `None`.
        """
        found = self.callbacks.callbacks
        curious = [c for c in found if hasattr(c, "set_trainer")]
        for callback in curious:
            callback.set_trainer(trainer)
        try:
            yield
        finally:
            for callback in curious:
                callback.set_trainer(None)

    def warn_of_motion(self, delay: int) -> None:
        """Warns of hooks that may look at weights that are in motion.

        Args:
            delay: Batches of delay per hop, 1 or more.
        """
        for callback in self.callbacks.callbacks:
            listens = any(_overrides(callback, name) for name in _TRAIN_HOOKS)
            known = _acts_on_epochs_only(callback) or isinstance(
                callback, _keras.SAVING
            )
            says = hasattr(callback, "drain_every")
            if listens and not known and not says and _is_users(callback):
                warn(
                    f"{type(callback).__name__} has hooks that are called at "
                    f"batches, while stages are at others (delay={delay}): "
                    "weights that it reads or sets there are in motion, and "
                    "runs with one seed may differ. If it does, give it an "
                    "attribute `drain_every = 1`, and all stages drain first, "
                    "which takes time; if it looks at logs and the learning "
                    "rate only, `drain_every = None`."
                )

    def start_epoch(self) -> None:
        """Starts counting batches from 0."""
        self._trained = 0

    def begin(self, mode: str, batch: int) -> None:
        """Tells callbacks that a window begins, by its first batch."""
        self.call(f"on_{mode}_batch_begin", batch)

    def end(self, mode: str, batch: int, logs: dict) -> None:
        """Tells callbacks that a window has ended, by its last batch."""
        self._trained = batch + 1
        asked = self.pace(mode).asked
        if asked:
            # Keras counts windows: a short last one has the index of a whole.
            batch = -(-self._trained // asked) * asked - 1
        self.call(f"on_{mode}_batch_end", batch, logs)

    def pace(self, mode: str) -> Pace:
        """Returns how long windows are, the same object every time.

        As long as `steps_per_execution` says; if that is 1 and nobody listens
        to batches or has stages drain, as long as suits the machine. Eagerly
        one batch, whose step a layer may look at.
        """
        if mode not in self._paces:
            asked = getattr(self._model, "steps_per_execution", 1) or 1
            fixed = asked > 1 or self._model.run_eagerly
            fixed = fixed or self._listens_to_batches(mode)
            self._paces[mode] = Pace(asked if fixed else None)
        return self._paces[mode]

    def until_pause(self) -> int | None:
        """Returns after how many more batches the stages are to drain.

        Where `ModelCheckpoint` or `BackupAndRestore` save within an epoch
        (`save_freq`), and every `drain_every` batches if a callback has such
        an attribute. As soon as can be if training is to stop, which Keras
        looks at when a batch has ended.
        """
        pace = self.pace("train")
        if self._model.stop_training:
            return pace.asked or 1
        window = pace.window
        found = []
        for callback in self.callbacks.callbacks:
            found.append(
                _keras.batches_until_save(callback, self._trained, window)
            )
            every = getattr(callback, "drain_every", None)
            if every:
                # At the end of a window.
                every = -(-every // window) * window
                found.append(every - self._trained % every)
        return min((n for n in found if n is not None), default=None)

    def _listens_to_batches(self, mode: str) -> bool:
        names: tuple[str, ...] = _TRAIN_HOOKS
        if mode != "train":
            names = (f"on_{mode}_batch_begin", f"on_{mode}_batch_end")
        found = self.callbacks.callbacks
        if mode == "train" and any(getattr(c, "drain_every", 0) for c in found):
            return True
        return any(
            _overrides(callback, name)
            for callback in found
            if not _acts_on_epochs_only(callback)
            for name in names
        )


def ask_for_probes(callbacks: Any) -> bool:
    """Whether a callback has `probes` set, as `PipelineMonitor` does.

    Args:
        callbacks: As `keras.Model.fit` takes them.
    """
    if isinstance(callbacks, keras.callbacks.CallbackList):
        callbacks = callbacks.callbacks
    found = keras.tree.flatten(callbacks)
    return any(getattr(callback, "probes", False) for callback in found)


def as_floats(metrics: dict) -> dict[str, Any]:
    """Returns metric results as Python floats, or arrays if they have a shape.

    As `keras.Model.fit` does; a metric may have several values by name.
    """
    found: dict[str, Any] = {}
    for name, value in metrics.items():
        if isinstance(value, dict):
            found |= as_floats(value)
            continue
        if getattr(value, "dtype", None) == "bfloat16":
            # NumPy cannot take a tensor of it.
            value = keras.ops.cast(value, "float32")
        array = np.asarray(value)
        found[name] = array if array.shape else float(array)
    return found


def capped_epochs(epochs: int) -> int:
    """Returns `epochs`, limited by `keras.config.max_epochs()`."""
    most = keras.config.max_epochs()
    if most and most < epochs:
        warn(f"Limiting epochs to {most}")
        return most
    return epochs


def validates(epoch: int, validation_freq: Any) -> bool:
    """Returns whether `fit` validates after `epoch`, counted from 0."""
    if isinstance(validation_freq, numbers.Integral):
        return (epoch + 1) % validation_freq == 0
    return (epoch + 1) in validation_freq


@contextlib.contextmanager
def _naming() -> Iterator[None]:
    """Says of which class the callback is that raises."""
    try:
        yield
    except BaseException as error:
        # Keras' list calls one after the other, in the last frame of its own.
        called = None
        for frame, _ in traceback.walk_tb(error.__traceback__):
            known = frame.f_locals
            if isinstance(known.get("self"), keras.callbacks.CallbackList):
                called = known.get("callback", called)
        if called is not None:
            error.add_note(f"The callback is a {type(called).__name__}.")
        raise


def _is_users(callback: keras.callbacks.Callback) -> bool:
    """Whether what a callback does is not known: it is not of Keras."""
    if isinstance(callback, keras.callbacks.LambdaCallback):
        return True
    return not type(callback).__module__.startswith("keras.")


def _overrides(callback: keras.callbacks.Callback, name: str) -> bool:
    method = getattr(callback, name)
    default = getattr(keras.callbacks.Callback, name)
    return getattr(method, "__func__", method) is not default


def _acts_on_epochs_only(callback: keras.callbacks.Callback) -> bool:
    """Whether a callback of Keras' overrides batch hooks without need.

    One that a user has made of it, with batch hooks of its own, does not.
    """
    hooks = (getattr(callback, name) for name in _BATCH_HOOKS)
    if any(not str(hook.__module__).startswith("keras.") for hook in hooks):
        return False
    if isinstance(callback, keras.callbacks.ProgbarLogger):
        return True
    if isinstance(callback, _keras.SAVING):
        return callback.save_freq == "epoch"
    if isinstance(callback, keras.callbacks.TensorBoard):
        return callback.update_freq == "epoch" and not _keras.profiles(callback)
    return False
