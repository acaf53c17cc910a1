"""Keras' callbacks, called as Keras calls them."""

import warnings
from typing import Any

import keras
import numpy as np

from fdg_keras import _keras
from fdg_keras.feeding import Pace
from fdg_keras.threads import noting


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
        """Calls a hook of all callbacks, one that is not about batches."""
        with noting(f"in a callback's `{name}`"):
            getattr(self.callbacks, name)(*args, **kwargs)

    def introduce(self, trainer: Any) -> None:
        """Tells the trainer to callbacks that have a `set_trainer`.

        Args:
            trainer: `None` when `fit` has ended, as it may have.
        """
        for callback in self.callbacks.callbacks:
            if hasattr(callback, "set_trainer"):
                callback.set_trainer(trainer)

    def start_epoch(self) -> None:
        """Starts counting batches from 0."""
        self._trained = 0

    def begin(self, mode: str, batch: int) -> None:
        """Tells callbacks that a window begins, by its first batch."""
        getattr(self.callbacks, f"on_{mode}_batch_begin")(batch)

    def end(self, mode: str, batch: int, logs: dict) -> None:
        """Tells callbacks that a window has ended, by its last batch."""
        self._trained = batch + 1
        asked = self.pace(mode).asked
        if asked:
            # Keras counts windows: a short last one has the index of a whole.
            batch = -(-self._trained // asked) * asked - 1
        getattr(self.callbacks, f"on_{mode}_batch_end")(batch, logs)

    def pace(self, mode: str) -> Pace:
        """Returns how long windows are, the same object every time.

        As long as `steps_per_execution` says; if that is 1 and nobody listens
        to batches or has stages drain, as long as suits the machine.
        """
        if mode not in self._paces:
            asked = getattr(self._model, "steps_per_execution", 1) or 1
            fixed = asked > 1 or self._listens_to_batches(mode)
            self._paces[mode] = Pace(asked if fixed else None)
        return self._paces[mode]

    def until_pause(self) -> int | None:
        """Returns after how many more batches the stages are to drain.

        Where `ModelCheckpoint` or `BackupAndRestore` save within an epoch
        (`save_freq`), and every `drain_every` batches if a callback has such
        an attribute.
        """
        window = self.pace("train").window
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
        names = [f"on_{mode}_batch_begin", f"on_{mode}_batch_end"]
        if mode == "train":
            names += ["on_batch_begin", "on_batch_end"]
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

    As `keras.Model.fit` does.
    """
    found = {}
    for name, value in metrics.items():
        array = np.asarray(value)
        found[name] = array if array.shape else float(array)
    return found


def capped_epochs(epochs: int) -> int:
    """Returns `epochs`, limited by `keras.config.max_epochs()`."""
    most = keras.config.max_epochs()
    if most and most < epochs:
        warnings.warn(f"Limiting epochs to {most}", stacklevel=3)
        return most
    return epochs


def validates(epoch: int, validation_freq: Any) -> bool:
    """Returns whether `fit` validates after `epoch`, counted from 0."""
    if isinstance(validation_freq, int):
        return (epoch + 1) % validation_freq == 0
    return (epoch + 1) in validation_freq


def _overrides(callback: keras.callbacks.Callback, name: str) -> bool:
    method = getattr(callback, name)
    default = getattr(keras.callbacks.Callback, name)
    return getattr(method, "__func__", method) is not default


def _acts_on_epochs_only(callback: keras.callbacks.Callback) -> bool:
    """Whether a callback of Keras' overrides batch hooks without need."""
    if isinstance(callback, keras.callbacks.ProgbarLogger):
        return True
    if isinstance(callback, _keras.SAVING):
        return callback.save_freq == "epoch"
    if isinstance(callback, keras.callbacks.TensorBoard):
        return callback.update_freq == "epoch" and not _keras.profiles(callback)
    return False
