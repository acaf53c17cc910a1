"""Callbacks of the training scripts."""

import time
from typing import Any

import keras

from trainers.run_folder import RunFolder


class EpochTimer(keras.callbacks.Callback):
    """Measures the epochs.

    Attributes:
        seconds: Of each epoch, with its validation.
        train_seconds: Of each epoch, without.
    """

    def __init__(self) -> None:
        super().__init__()
        self.seconds: list[float] = []
        self.train_seconds: list[float] = []

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        self._begin = time.perf_counter()
        self._trained: float | None = None

    def on_test_begin(self, logs: Any = None) -> None:
        self._trained = time.perf_counter()

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        end = time.perf_counter()
        self.seconds.append(end - self._begin)
        self.train_seconds.append((self._trained or end) - self._begin)


class Keep(keras.callbacks.Callback):
    """Keeps each epoch's figures and model, for good once it returns.

    Args:
        folder: Where.
        timer: Stands before this in the list of callbacks.
    """

    def __init__(self, folder: RunFolder, timer: EpochTimer):
        super().__init__()
        self._folder, self._timer = folder, timer

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        seconds = self._timer.train_seconds[-1]
        row = {"epoch": epoch + 1, **logs, "train_seconds": seconds}
        self._folder.keep(self.model, row)
