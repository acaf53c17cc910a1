"""One run in a process of its own.

So memory stays flat over many runs, and one that crashes ends no other.
"""

import dataclasses
import json
import multiprocessing
import os
import pathlib
import signal
import sys
import threading
from collections.abc import Sequence
from typing import Any

import keras

from fdg_keras.records import write
from trainers.recipes import Recipe
from trainers.run_flags import make_devices
from trainers.runs import Run


class Utilisation(keras.callbacks.Callback):
    """Writes down what part of each epoch each stage was computing.

    Emulated stages have no times: then there is nothing to write.

    Args:
        path: A JSON file, to which each epoch, counted from 1, is added.
    """

    def __init__(self, path: pathlib.Path):
        super().__init__()
        self._path = path
        self._trainer: Any = None

    def set_trainer(self, trainer: Any) -> None:
        self._trainer = trainer

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        statistics = self._trainer.statistics if self._trainer else []
        if statistics:
            found = read_utilisation(self._path)
            found[epoch + 1] = [
                one.usage.computed / one.usage.total for one in statistics
            ]
            write(self._path, json.dumps(found).encode())


def read_utilisation(path: pathlib.Path) -> dict[int, list[float]]:
    """Returns the parts by epoch, each of all stages; empty without a file."""
    if not path.exists():
        return {}
    found = json.loads(path.read_text(encoding="utf-8"))
    return {int(epoch): parts for epoch, parts in found.items()}


def read_result(folder: pathlib.Path) -> dict[str, Any] | None:
    """Returns what came of a run, or `None` if it has not ended.

    Returns:
        `"settings"` and `"devices"`; `"versions"` of each part of the run;
        `"test_error"` after each epoch, in %; `"seconds"` of each epoch,
        without its test; and `"utilisation"`, for each epoch the parts of its
        time that each stage was computing, empty if stages had no times.
    """
    path = folder / "result.json"
    if not path.exists():
        return None
    return json.loads(path.read_text(encoding="utf-8"))


def check_same(folder: pathlib.Path, recipe: Recipe) -> None:
    """Checks that a folder holds no other run.

    Raises:
        ValueError: If it does.
    """
    path = folder / "config.json"
    if not path.exists():
        return
    before = json.loads(path.read_text(encoding="utf-8"))[-1]["settings"]
    now = json.loads(json.dumps(dataclasses.asdict(recipe)))
    changed = [
        f"{name}={now[name]!r} (was {before.get(name)!r})"
        for name in now
        if now[name] != before.get(name)
    ]
    if changed:
        raise ValueError(
            "Expected the settings that the runs were begun with; name another "
            f"--model_dir for others. Received: {', '.join(changed)} in "
            f"{folder}"
        )


def train(
    recipe: Recipe,
    folder: pathlib.Path,
    data_dir: str | None,
    download: bool,
    devices: Sequence[str] | None,
    virtual_devices: int | None,
) -> None:
    """Trains to the end, from where the run in the folder had stopped.

    If that fails, it has been printed why, and there is no result. Call it in
    the main thread.

    Args:
        recipe: What to do.
        folder: See `run_folder`; the result is in its `result.json`.
        data_dir: See `datasets.load`.
        download: See `datasets.load`.
        devices: See `fdg_keras.Trainer`.
        virtual_devices: See `run_flags.make_devices`.
    """
    # Not forked: TensorFlow does not survive that.
    process = multiprocessing.get_context("spawn").Process(
        target=_train,
        args=(recipe, folder, data_dir, download, devices, virtual_devices),
    )
    # Ctrl-C is for this process, which ends the other: it can at any moment.
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        process.start()
    finally:
        signal.signal(signal.SIGINT, before)
    try:
        process.join()
    except KeyboardInterrupt:
        process.kill()
        process.join()
        raise


def _train(
    recipe: Recipe,
    folder: pathlib.Path,
    data_dir: str | None,
    download: bool,
    devices: Sequence[str] | None,
    virtual_devices: int | None,
) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    make_devices(recipe.splits, virtual_devices)
    try:
        run = Run(recipe, folder, True, data_dir, download, devices)
    except ValueError as error:
        # Says what is wrong with a setting; a traceback would add nothing.
        sys.exit(f"{type(error).__name__}: {error}")
    path = folder / "utilisation.json"
    history = run.train(verbose=2, callbacks=[Utilisation(path)])["history"]
    parts = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    utilisation = read_utilisation(path)
    result = {
        "settings": parts[-1]["settings"],
        "devices": parts[-1]["devices"],
        "versions": [part["versions"] for part in parts],
        "test_error": [100 * (1 - row["val_accuracy"]) for row in history],
        "seconds": [row["train_seconds"] for row in history],
        "utilisation": [utilisation[e] for e in sorted(utilisation)],
    }
    write(folder / "result.json", json.dumps(result, indent=2).encode())


def _end_with_parent() -> None:
    """Ends this process with its parent, however that ended.

    Whoever goes on with a run finds no one else at it.
    """
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
