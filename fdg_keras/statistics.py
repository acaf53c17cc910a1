"""What stages did with an epoch: times, waiting, norms, staleness."""

import dataclasses
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import tensorflow as tf

from fdg_keras.clocks import offset_of
from fdg_keras.loops import Loop
from fdg_keras.pipeline import Pipeline


@dataclass
class Usage:
    """What a stage did with its time, in seconds, since the epoch began.

    Attributes:
        computed: Running its loop, without the waiting.
        waited_activations: For activations, or for data in stage 0.
        waited_gradients: For gradients.
        idle: For something to be announced.
        ticks: How many.
    """

    computed: float = 0.0
    waited_activations: float = 0.0
    waited_gradients: float = 0.0
    idle: float = 0.0
    ticks: int = 0

    @property
    def total(self) -> float:
        """All of its time."""
        waited = self.waited_activations + self.waited_gradients
        return self.computed + waited + self.idle

    def __add__(self, other: "Usage") -> "Usage":
        mine, others = dataclasses.astuple(self), dataclasses.astuple(other)
        return Usage(*map(operator.add, mine, others))


class Totals:
    """What stages did in the epochs of a `fit`, all in all.

    The first epoch counts only until there is another: it begins with what
    happens once, such as the choice of kernels.

    Attributes:
        usages: Of each stage; empty before the first epoch has ended.
    """

    def __init__(self) -> None:
        self.usages: list[Usage] = []
        self._epochs = 0

    def add(self, usages: Sequence[Usage]) -> None:
        """Adds an epoch."""
        counts = self._epochs > 1
        self.usages = (
            [a + b for a, b in zip(self.usages, usages)]
            if counts
            else list(usages)
        )
        self._epochs += 1


class Pass(NamedTuple):
    """A forward or a backward of one batch, with its waiting.

    Attributes:
        kind: `"F"`, or `"B"` for a backward with its update.
        batch: Of the epoch, from 0.
        waits: When it began to wait, in seconds since 1970 by the clock of
            this machine.
        starts: When it had its inputs, likewise.
        ends: When its results were there, likewise. All as the host sees it,
            which may be before a GPU has computed them.
    """

    kind: str
    batch: int
    waits: float
    starts: float
    ends: float


@dataclass(frozen=True)
class StageStatistics:
    """What one stage did in one epoch.

    What is `None` was not measured: it is if a callback asks for it, as
    `PipelineMonitor` does, and if there is something to measure.

    Attributes:
        stage: k.
        device: Full TensorFlow name.
        usage: Seconds computing and waiting, and ticks.
        staleness: Updates between the forward of a batch and its own.
        learning_rate: At the end of the epoch, corrections included.
        capacity: Batches that fit in a link.
        activations_waiting: Batches in the link of the activations when a tick
            begins, on average.
        gradients_waiting: Likewise of the gradients.
        gradient_norm: Of the gradient that arrives over the link, for all its
            tensors, the mean of one batch in 16.
        transformed_norm: The same after the gradient transformer.
        drift: Distance between the weights of forward and backward, relative
            to the norm of those of the forward; a mean likewise.
        memory_bytes: The device's peak so far, where it tells.
        passes: The latest ones, in the order in which they ended.
    """

    stage: int
    device: str
    usage: Usage
    staleness: int
    learning_rate: float
    capacity: int
    activations_waiting: float | None = None
    gradients_waiting: float | None = None
    gradient_norm: float | None = None
    transformed_norm: float | None = None
    drift: float | None = None
    memory_bytes: int | None = None
    passes: tuple[Pass, ...] = ()

    @property
    def ms_per_tick(self) -> float:
        """Milliseconds, waiting included."""
        return 1e3 * self.usage.total / max(self.usage.ticks, 1)


def collect(
    pipeline: Pipeline, usages: Sequence[Usage]
) -> list[StageStatistics]:
    """Returns the statistics of all stages after an epoch."""
    return [
        StageStatistics(
            stage=stage.index,
            device=stage.device,
            usage=usage,
            staleness=loop.update.staleness,
            learning_rate=loop.update.learning_rate(),
            capacity=pipeline.capacity,
            memory_bytes=_peak_memory(stage.device),
            passes=_passes(loop, stage.device),
            **loop.probe.means(),
        )
        for stage, loop, usage in zip(pipeline.stages, pipeline.loops, usages)
    ]


def _passes(loop: Loop, device: str) -> tuple[Pass, ...]:
    """Returns the latest passes of a stage, by this machine's clock."""
    found = loop.probe.times(*loop.progress)
    offset = offset_of(device) if found else 0.0
    return tuple(
        Pass(kind, batch, *(time - offset for time in times))
        for kind, batch, *times in found
    )


def _peak_memory(device: str) -> int | None:
    if tf.DeviceSpec.from_string(device).device_type == "CPU":
        return None  # It tells of one allocator among several.
    try:
        return int(tf.config.experimental.get_memory_info(device)["peak"])
    except (ValueError, tf.errors.OpError):
        return None
