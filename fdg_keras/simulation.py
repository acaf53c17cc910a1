"""A simulation of the stages: how fast, who waits for whom, what memory.

Answers what so many devices with such links would do, before there are any. It
moves times, not tensors; what stages cost goes in.

What is simulated: each stage runs the passes of its schedule one after the
other. A pass starts when its input has come over the link and a processor is
free. What it makes is then put into the link to the neighbour, which has room
for a bounded number of units; the stage is held up if it is full. Transfers go
on beside the passes, one at a time in each direction of a cut.

What is not: failures, the end of an epoch, operations that run on several
processors, and passes that slow each other down otherwise than by waiting.
"""

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fdg_keras.network import Network, Stage, Wire, connect
from fdg_keras.resources import (
    Cable,
    Cost,
    Stash,
    check_number,
    peak_bytes,
)
from fdg_keras.schedules import Delayed, Schedule, check_whole


@dataclass(frozen=True)
class StageResult:
    """What a stage did with its time, in parts of it that sum up to 1.

    Attributes:
        computing: Running passes.
        waiting_activations: For its input.
        waiting_gradients: Likewise.
        waiting_processor: For one of its device.
        blocked: Sending, by a link that was full.
        peak_bytes: At most in use, see `peak_bytes`.
    """

    computing: float
    waiting_activations: float
    waiting_gradients: float
    waiting_processor: float
    blocked: float
    peak_bytes: float


@dataclass(frozen=True)
class Result:
    """What came of a simulation, with all stages busy.

    Attributes:
        seconds_per_step: From batch to batch.
        stages: In order.
        passes: How many were simulated.
    """

    seconds_per_step: float
    stages: tuple[StageResult, ...]
    passes: int

    @property
    def steps_per_s(self) -> float:
        """Batches in a second; infinite if nothing takes time."""
        seconds = self.seconds_per_step
        return 1.0 / seconds if seconds else math.inf


def simulate(
    costs: Sequence[Cost],
    cables: Cable | Sequence[Cable] = Cable(),  # noqa: B008 (immutable)
    schedule: Schedule = Delayed(),  # noqa: B008
    *,
    stash: Stash = "exact",
    overhead_s: float = 0.0,
    jitter: float = 0.0,
    seed: int = 0,
    devices: int | None = None,
    cores: int = 1,
    capacity: int | None = None,
    batches: int = 400,
) -> Result:
    """Simulates stages between filling and draining.

    Deterministic: the same arguments give the same result.

    Args:
        costs: One for each stage.
        cables: One for each cut, or one for all. A cut between stages of the
            same device costs nothing.
        schedule: Who runs what in which order; FDG by default.
        stash: With `"replay"` a backward runs the forward again; memory
            depends on it otherwise.
        overhead_s: Seconds that each pass of a unit takes beyond its part of
            the batch's.
        jitter: Standard deviation of the time of a pass, as a part of it.
            Times are then log-normal, each drawn on its own.
        seed: Of the jitter.
        devices: How many; stages are dealt to them in turn. Default: one for
            each stage.
        cores: Processors of a device. Each runs one pass at a time, first
            come, first served.
        capacity: Of links, in units. Default: what the schedule needs.
        batches: How many are measured. Before them, the pipeline fills, and
            what it holds goes around once.

    Returns:
        Times and memory.

    Raises:
        ValueError: If an argument is out of range, or stages wait for each
            other in a circle, because links are too small.
    """
    cables = _check(costs, cables, schedule)
    overhead_s = check_number("overhead_s", overhead_s, "seconds, 0 or more")
    jitter = check_number(
        "jitter", jitter, "a part of the time of a pass, 0 or more"
    )
    check_whole("seed", seed, "that of the jitter", 0)
    if devices is None:
        devices = len(costs)
    if capacity is None:
        capacity = schedule.capacity
    check_whole("batches", batches, "how many to measure", 1)
    check_whole("devices", devices, "how many there are", 1)
    check_whole("cores", cores, "the processors of a device", 1)
    needed = peak_bytes(costs, schedule, stash, capacity)

    units = [_unit(cost, schedule, stash, overhead_s) for cost in costs]
    hosts = [[0.0] * cores for _ in range(devices)]
    stages = [Stage(k, hosts[k % devices]) for k in range(len(costs))]
    for stage, unit in zip(stages, units):
        factors = _factors(jitter, seed, stage.index)
        stage.passes = _passes(
            stage, unit, schedule, len(costs), factors, batches
        )
    if devices > 1:
        _connect(stages, units, cables, capacity)
    else:
        _connect(stages, units, [Cable()] * len(cables), capacity)
    Network(stages, shared=devices < len(costs)).run()
    _check_finished(stages, capacity)
    return Result(
        # While it filled, gradients may have piled up before a stage. Until
        # they are used up it is faster than those that set the pace.
        seconds_per_step=max(s.measured_s for s in stages) / batches,
        stages=tuple(_result(s, b) for s, b in zip(stages, needed)),
        passes=sum(stage.started for stage in stages),
    )


def _unit(
    cost: Cost, schedule: Schedule, stash: Stash, overhead_s: float
) -> Cost:
    """Returns what a unit costs: seconds, and bytes that are sent."""
    part = 1 / schedule.micro_batches
    backward_s = cost.backward_s
    if stash == "replay":
        again_s = cost.again_s
        backward_s += cost.forward_s if again_s is None else again_s
    return Cost(
        forward_s=part * cost.forward_s + overhead_s,
        backward_s=part * backward_s + overhead_s,
        sends=part * cost.sends,
        gradient_sends=part * cost.gradient_sends,
    )


def _connect(
    stages: Sequence[Stage],
    units: Sequence[Cost],
    cables: Sequence[Cable],
    capacity: int,
) -> None:
    for k, cable in enumerate(cables):
        sizes = units[k].sends, units[k + 1].gradient_sends
        activations, gradients = (
            Wire(size / cable.bytes_per_s, cable.latency_s, capacity)
            for size in sizes
        )
        connect(stages[k], stages[k + 1], activations, gradients)


def _passes(
    stage: Stage,
    unit: Cost,
    schedule: Schedule,
    splits: int,
    factors: Iterator[float],
    batches: int,
) -> Iterator[tuple[str, float]]:
    """Yields kind and seconds of each pass; has the stage measure the last."""
    seconds = {"F": unit.forward_s, "B": unit.backward_s}
    first = 2 * schedule.fill(splits) + 1
    for tick in range(first + batches):
        if tick == first:
            stage.measure()
        for kind, _ in schedule.tick(stage.index, splits, tick):
            yield kind, seconds[kind] * next(factors)


def _factors(jitter: float, seed: int, stage: int) -> Iterator[float]:
    """Returns log-normal factors of mean 1 and standard deviation `jitter`."""
    if not jitter:
        return itertools.repeat(1.0)
    variance = math.log1p(jitter**2)  # of the logarithm
    mean, deviation = -variance / 2, math.sqrt(variance)
    random = np.random.default_rng([seed, stage])
    return itertools.chain.from_iterable(
        random.lognormal(mean, deviation, 256).tolist()
        for _ in itertools.count()
    )


def _result(stage: Stage, needed: float) -> StageResult:
    total = stage.measured_s or 1.0
    return StageResult(
        computing=stage.computed / total,
        waiting_activations=stage.waited["F"] / total,
        waiting_gradients=stage.waited["B"] / total,
        waiting_processor=stage.queued / total,
        blocked=stage.blocked / total,
        peak_bytes=needed,
    )


# -- Bad input -----------------------------------------------------------------


def _check(costs: Any, cables: Any, schedule: Any) -> Sequence[Cable]:
    """Checks arguments of `simulate`; returns a cable for each cut."""
    if not _is_list_of(costs, Cost) or not costs:
        raise ValueError(
            "Expected `costs` to have a `Cost` for each stage, one or more. "
            f"Received: costs={costs!r}"
        )
    if isinstance(cables, Cable):
        cables = [cables] * (len(costs) - 1)
    if not _is_list_of(cables, Cable):
        raise ValueError(
            "Expected `cables` to be one `Cable` for all cuts, or a list of "
            f"one for each. Received: cables={cables!r}"
        )
    if isinstance(schedule, type) or not isinstance(schedule, Schedule):
        raise ValueError(
            "Expected `schedule` to be one such as `Delayed(2)` or "
            f"`Flushed(8)`. Received: schedule={schedule!r}"
        )
    if len(cables) != len(costs) - 1:
        raise ValueError(
            "Expected `cables` to be one `Cable` for all cuts, or one for "
            f"each of the {len(costs) - 1} cuts between {len(costs)} stages. "
            f"Received: {len(cables)} of them"
        )
    return cables


def _is_list_of(values: Any, kind: type) -> bool:
    return isinstance(values, Sequence) and all(
        isinstance(value, kind) for value in values
    )


def _check_finished(stages: Sequence[Stage], capacity: int) -> None:
    # The first stage ends last. Others may be left with what they cannot send
    # to it then, if links are smaller than they need to be.
    if next(stages[0].passes, None) is not None:
        raise ValueError(
            "Expected links with enough room for the schedule; by default "
            "they have it. With less, stages wait for each other in a circle. "
            f"Received: capacity={capacity}"
        )
