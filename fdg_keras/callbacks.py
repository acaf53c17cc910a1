"""`PipelineMonitor`: what the stages do, for TensorBoard."""

import contextlib
import gzip
import json
import os
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import keras
import numpy as np
import tensorflow as tf
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.plugins.custom_scalar import summary as custom_scalar

from fdg_keras import records, timelines
from fdg_keras.statistics import StageStatistics


class _Chart(NamedTuple):
    """Where a quantity is shown, and what it is."""

    category: str
    title: str
    description: str


# By the last but one part of the tag.
_CHARTS = {
    "computing": _Chart("Time", "Computing", "Part of the stage's time."),
    "waiting_for_activations": _Chart(
        "Time",
        "Waiting for activations",
        "Part of the stage's time; in stage 0 for data.",
    ),
    "waiting_for_gradients": _Chart(
        "Time", "Waiting for gradients", "Part of the stage's time."
    ),
    "idle": _Chart(
        "Time", "Idle", "Part of the stage's time, with nothing announced."
    ),
    "ms_per_tick": _Chart(
        "Time", "Milliseconds per tick", "All of the stage's time, per batch."
    ),
    "activations_link": _Chart(
        "Links",
        "Activations that wait",
        "Part of the link that is full as a tick begins.",
    ),
    "gradients_link": _Chart(
        "Links",
        "Gradients that wait",
        "Part of the link that is full as a tick begins.",
    ),
    "staleness": _Chart(
        "Delay", "Staleness", "Updates from a batch's forward to its own."
    ),
    "drift": _Chart(
        "Delay",
        "Weight drift",
        "Distance of the weights of forward and backward, as part of their "
        "norm.",
    ),
    "gradient_norm": _Chart(
        "Gradients",
        "Gradient norm, as it arrives",
        "Norm of what arrives over the link.",
    ),
    "transformed_norm": _Chart(
        "Gradients",
        "Gradient norm, transformed",
        "The same after the gradient transformer, shrinking say.",
    ),
    "learning_rate": _Chart(
        "Gradients", "Learning rate", "Corrections included."
    ),
    "memory_mib": _Chart("Memory", "Peak memory", "MiB, of the device."),
}


class PipelineMonitor(keras.callbacks.Callback):
    """Shows in TensorBoard what the stages do, and who waits for whom.

    Pass it to `fdg_keras.fit` or `Trainer.fit`, then run `tensorboard --logdir
    LOG_DIR`. It writes, after each epoch:

    - scalars `stages/QUANTITY/stage_K`, a run for each stage: the parts of its
      time that it computes, waits for activations, waits for gradients and is
      idle; milliseconds per tick; how full its links are; staleness in updates
      and what it does, the drift of the weights; the norm of the gradient
      before and after the transformer; the learning rate; memory, where the
      device tells. The custom scalars have a chart for each quantity, with all
      stages.
    - an image, a timeline of a few ticks.
    - `timeline.trace.json.gz`, the latest passes of all stages, for Perfetto or
      `chrome://tracing`.
    - `pipeline.json`, all of this as plain numbers, and what the callbacks got
      as `logs`; `python -m trainers.report LOG_DIR` makes a page of it.

    And once, as a text, the plan.

    While it watches, stages measure themselves within their compiled loops,
    and each keeps a copy of its weights (of one batch in 16, for the drift).
    Emulated stages have no times: of these it writes the plan, and says so.

    Args:
        log_dir: Folder to write to; made if it is not there.

    Raises:
        ValueError: If `log_dir` is no path; and as training begins, if that is
            not by this library.
    """

    #: Has the stages measure themselves, see `hooks.ask_for_probes`.
    probes = True

    def __init__(self, log_dir: str | os.PathLike):
        super().__init__()
        if not isinstance(log_dir, (str, os.PathLike)) or not log_dir:
            raise ValueError(
                "Expected `log_dir` to be the path of a folder, a string or a "
                f"`pathlib.Path`. Received: {log_dir!r}"
            )
        self._log_dir = pathlib.Path(log_dir)
        self._trainer: Any = None
        self._writers: dict[str, Any] = {}
        self._plan: list[dict[str, Any]] = []
        self._epochs: list[dict[str, Any]] = []
        self._has_layout = False

    def set_trainer(self, trainer: Any) -> None:
        """Called by `Trainer.fit` with itself, and with `None` as it ends."""
        self._trainer = trainer
        if trainer is None:
            for writer in self._writers.values():
                writer.close()
            self._writers = {}

    def on_train_begin(self, logs: Any = None) -> None:
        """Writes the plan."""
        if self._trainer is None:
            raise ValueError(
                "`PipelineMonitor` shows the stages of `fdg_keras`. Expected "
                "to be among the `callbacks` of `fdg_keras.fit` or "
                "`fdg_keras.Trainer.fit`. Received: a call of "
                "`keras.Model.fit`"
            )
        self._log_dir.mkdir(parents=True, exist_ok=True)
        self._plan = records.plan_record(self._trainer.plan)
        self._epochs = _read_epochs(self._log_dir / "pipeline.json")
        self._has_layout = False
        with self._writing(0):
            tf.summary.text("plan", _table(self._plan))

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        """Writes what the stages did in the epoch."""
        stages = self._trainer.statistics
        if stages:
            self._write_scalars(epoch, stages)
            self._write_timeline(epoch, stages)
        else:
            with self._writing(epoch):
                tf.summary.text("emulated", _EMULATED)
        # What was written before training was interrupted stays.
        self._epochs = [e for e in self._epochs if e["epoch"] < epoch]
        self._epochs.append(
            {
                "epoch": epoch,
                "logs": dict(logs or {}),
                "stages": [records.stage_record(one) for one in stages],
            }
        )
        run = {
            "emulated": not stages,
            "plan": self._plan,
            "settings": records.settings_record(
                self.model, self._trainer.settings, self.params
            ),
            "versions": records.versions(),
            "epochs": self._epochs,
            "passes": [one.passes for one in stages],
        }
        records.write(self._log_dir / "pipeline.json", records.to_json(run))

    @contextlib.contextmanager
    def _writing(self, epoch: int, run: str = "") -> Iterator[None]:
        """Within, summaries are of a run: the folder or one in it."""
        if run not in self._writers:
            folder = str(self._log_dir / run)
            self._writers[run] = tf.summary.create_file_writer(folder)
        with self._writers[run].as_default(step=epoch):
            yield
        self._writers[run].flush()

    def _write_scalars(
        self, epoch: int, stages: Sequence[StageStatistics]
    ) -> None:
        shown = set()
        for one in stages:
            # TensorBoard has a colour for each run.
            with self._writing(epoch, f"stage_{one.stage}"):
                for name, value in records.quantities(one).items():
                    if value is not None:
                        shown.add(name)
                        tf.summary.scalar(
                            f"stages/{name}/stage_{one.stage}",
                            value,
                            description=_CHARTS[name].description,
                        )
        if not self._has_layout:
            layout = custom_scalar.pb(_layout(shown)).SerializeToString()
            with self._writing(epoch):
                tf.summary.experimental.write_raw_pb(layout)
            self._has_layout = True

    def _write_timeline(
        self, epoch: int, stages: Sequence[StageStatistics]
    ) -> None:
        passes = [one.passes for one in stages]
        trace = timelines.trace(passes, [one.device for one in stages])
        records.write(
            self._log_dir / "timeline.trace.json.gz",
            gzip.compress(records.to_json(trace)),
        )
        window = timelines.steady_window(passes)
        if window is None:
            return
        names = [
            f"{plan['device']}, {one.staleness} updates late"
            for plan, one in zip(self._plan, stages)
        ]
        title = f"Epoch {epoch + 1}, {window.length:.3g} ms of it"
        image = np.asarray(timelines.draw(window, names, title))
        with self._writing(epoch):
            tf.summary.image(
                "timeline",
                image[None],
                description="What each stage ran when. Tick `Show actual image "
                "size` to read it.",
            )


_EMULATED = (
    "This run was emulated: one device ran all stages, one after the other. "
    "So no stage has times of its own, and nothing waited for anything."
)


def _layout(shown: set[str]) -> layout_pb2.Layout:
    """Returns a chart for each quantity, with all stages in it."""
    charts: dict[str, list[layout_pb2.Chart]] = {}
    for name, chart in _CHARTS.items():
        if name in shown:
            lines = layout_pb2.MultilineChartContent(
                tag=[rf"^stages/{name}/stage_\d+$"]
            )
            charts.setdefault(chart.category, []).append(
                layout_pb2.Chart(title=chart.title, multiline=lines)
            )
    return layout_pb2.Layout(
        category=[
            layout_pb2.Category(title=category, chart=of_it)
            for category, of_it in charts.items()
        ]
    )


def _table(plan: Sequence[dict[str, Any]]) -> str:
    """Returns a plan as a table in Markdown."""

    def code(text: str) -> str:
        return "`" + text.replace("|", "\\|") + "`"

    rows = [
        "| stage | device | from | to | layers | parameters | work | sends |",
        "|--:|:--|:--|:--|--:|--:|--:|--:|",
    ]
    for stage in plan:
        is_last = stage is plan[-1]
        cells = [
            str(stage["stage"]),
            code(stage["device"]),
            code(stage["from"]),
            code(stage["to"]),
            str(len(stage["layers"])),
            f"{stage['parameters']:,}",
            f"{stage['work']:.0%}",
            "-" if is_last else f"{stage['sends']:,}",
        ]
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


def _read_epochs(path: pathlib.Path) -> list[dict[str, Any]]:
    """Returns the epochs that a file of an earlier run tells of."""
    if not path.exists():
        return []
    return json.loads(path.read_text(encoding="utf-8"))["epochs"]
