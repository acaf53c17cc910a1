"""What a run leaves in its folder, whole at any moment.

    config.json             settings, devices and versions of each part of it
    history.csv             figures of each epoch, counted from 1
    checkpoint-0003.keras   model and optimizer after so many epochs
    model.keras             the same when the run has ended
    logs/                   for TensorBoard

A file is written beside its place and moved there: one that is there is whole,
whenever the process is killed. An epoch's figures are written before its
checkpoint, and those that no checkpoint covers are dropped when a run goes on.
"""

import csv
import json
import os
import pathlib
from collections.abc import Callable
from typing import Any

import keras

from trainers import models

#: Settings that may be others when a run goes on: how it is spread over
#: devices, and how long it lasts. The others are in its model and optimizer,
#: or are what makes it go on as it would have gone on.
MAY_CHANGE = (
    "splits",
    "delay",
    "shrink",
    "stash",
    "order",
    "corrections",
    "emulate",
    "train_epochs",
    "lr_boundaries",
)


class RunFolder:
    """A folder of one run.

    Args:
        path: The folder; made when something is written.
        settings: Of the run, by name.
        resume: Whether to go on from what it holds.

    Raises:
        ValueError: If it holds something and `resume` is not set, or if a
            setting has changed that must not.
    """

    def __init__(
        self, path: pathlib.Path, settings: dict, resume: bool = False
    ):
        self.path = path
        self._config = path / "config.json"
        # As it is read again.
        self._settings = json.loads(json.dumps(settings))
        if not resume and path.exists() and any(path.iterdir()):
            raise ValueError(
                "Expected a folder that is empty or not there yet. Add "
                "--resume to go on with the run it holds, or name another "
                f"one, or remove it. Received: --model_dir={path}"
            )
        self._parts = []
        if self.epochs:
            self._parts = json.loads(self._config.read_text(encoding="utf-8"))
            _check_same(self._parts[-1]["settings"], self._settings)

    @property
    def logs(self) -> pathlib.Path:
        """Where TensorBoard's logs are."""
        return self.path / "logs"

    @property
    def epochs(self) -> int:
        """How many epochs the latest checkpoint has seen; 0 without one."""
        found = self._checkpoints()
        return max(found) if found else 0

    def load(self) -> keras.Model:
        """Returns the model of the latest checkpoint, compiled."""
        return models.load(self._checkpoint(self.epochs))

    def begin(self, devices: list[str], versions: dict[str, str]) -> None:
        """Writes down with which settings the run begins, or goes on.

        Args:
            devices: Of the stages.
            versions: Of the packages, by name.
        """
        part = {
            "after_epochs": self.epochs,
            "settings": self._settings,
            "devices": devices,
            "versions": versions,
        }
        text = json.dumps([*self._parts, part], indent=2) + "\n"
        self._put(
            self._config, lambda new: new.write_text(text, encoding="utf-8")
        )

    def keep(self, model: keras.Model, row: dict[str, Any]) -> None:
        """Keeps an epoch: its figures, then its model.

        Args:
            model: The model, with the state of its optimizer.
            row: The figures, by name; `"epoch"` is how many there were.
        """
        rows = [*self.history(row["epoch"] - 1), row]
        self._put(self.path / "history.csv", lambda new: _write(new, rows))
        latest = self._checkpoint(row["epoch"])
        self._put(latest, model.save)
        for path in self._checkpoints().values():
            if path != latest:
                path.unlink()

    def finish(self, model: keras.Model) -> pathlib.Path:
        """Keeps the trained model; returns where."""
        path = self.path / "model.keras"
        self._put(path, model.save)
        return path

    def history(self, epochs: int | None = None) -> list[dict[str, Any]]:
        """Returns the figures of the first epochs.

        Args:
            epochs: How many. Default: those the latest checkpoint has seen.
        """
        if epochs is None:
            epochs = self.epochs
        path = self.path / "history.csv"
        if not epochs or not path.exists():
            return []
        with path.open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))[:epochs]
        return [
            {
                **{k: float(v) for k, v in row.items()},
                "epoch": int(row["epoch"]),
            }
            for row in rows
        ]

    def _checkpoint(self, epochs: int) -> pathlib.Path:
        return self.path / f"checkpoint-{epochs:04}.keras"

    def _checkpoints(self) -> dict[int, pathlib.Path]:
        return {
            int(path.stem.partition("-")[2]): path
            for path in self.path.glob("checkpoint-*.keras")
        }

    def _put(
        self, path: pathlib.Path, write: Callable[[pathlib.Path], Any]
    ) -> None:
        self.path.mkdir(parents=True, exist_ok=True)
        # Keras looks at the suffix.
        new = path.with_name(f"unfinished-{path.name}")
        write(new)
        os.replace(new, path)


def _write(path: pathlib.Path, rows: list[dict[str, Any]]) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[-1]))
        writer.writeheader()
        writer.writerows(rows)


def _check_same(before: dict, now: dict) -> None:
    changed = [
        f"{name}={now[name]!r} (was {before.get(name)!r})"
        for name in now
        if name not in MAY_CHANGE and now[name] != before.get(name)
    ]
    if changed:
        raise ValueError(
            "Expected the settings that the run began with; only "
            f"{', '.join(MAY_CHANGE)} and the devices may be others when it "
            f"goes on. Received: {', '.join(changed)}"
        )
