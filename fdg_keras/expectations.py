"""What a plan promises, and what it had to assume."""

import dataclasses
import math
import os
from collections.abc import Sequence
from typing import Any

import numpy as np

from fdg_keras.plans import Plan
from fdg_keras.threads import warn

#: Seconds of a tick beyond what its layers compute: links and loop. About what
#: `scripts/bench_speed.py` finds on CPUs, as overhead per stage.
TICK_S = 1e-4

# A plan that promises less than this says that splitting will hardly pay.
_PAYS = 1.1


def assumptions(
    open_: Sequence[Any], uncounted: Sequence[int], compiled: bool
) -> tuple[str, ...]:
    """Returns what a reader should know of what is not known.

    Args:
        open_: Symbols of the model that leave sizes open, beyond the batch's.
        uncounted: Stages of which not all bytes are counted.
        compiled: Whether the model has an optimizer.
    """
    notes = []
    if not compiled:
        notes.append(
            "The model is not compiled, so an optimizer's updates and slots "
            "are not counted: compile it before you plan."
        )
    if open_:
        note = (
            "Sizes that the model leaves open were taken for 1, of "
            f"{open_[0].name!r}, {tuple(open_[0].shape)}, first: times and "
            "bytes are too small. To plan, give the model static shapes, such "
            "as `keras.Input((100, 64))`."
        )
        warn(note)
        notes.append(note)
    if uncounted:
        stages = ", ".join(map(str, uncounted))
        notes.append(
            f"More than the bytes that are shown is needed by stage {stages}: "
            "tensors of unknown size are not counted, such as what a loop of "
            "unknown length keeps for its gradient."
        )
    return tuple(notes)


def expected(found: Plan, processor_s: float, shared: bool) -> Plan:
    """Adds how long a step takes, and says so if it hardly pays.

    Args:
        found: A plan whose stages have times.
        processor_s: Seconds of all cores together that the model takes, by
            back-propagation.
        shared: Whether all devices are the cores of this machine.
    """
    load: dict[str, float] = {}
    for stage in found.stages:
        load[stage.device] = load.get(stage.device, 0.0) + (stage.tick_s or 0.0)
    count = len(found.stages)
    cores = len(os.sched_getaffinity(0))
    step_s = max(load.values())
    if found.delay == 0:
        # A batch has passed all stages, and come back, before the next begins.
        step_s = sum(load.values())
    # Some core at least was busy all the time. With other programs beside it
    # all takes longer, but not more of the cores' time.
    processor_s = max(processor_s, found.whole_s or 0.0)
    if found.stash in ("selective", "replay"):
        again_s = sum(stage.again_s or 0.0 for stage in found.stages)
        processor_s *= 1 + again_s / (found.whole_s or math.inf)
    if shared and count > 1:
        step_s = max(step_s, (processor_s + count * TICK_S) / cores)
    found = dataclasses.replace(found, step_s=step_s)
    # The time of the longest tick, were there a device and cores for each.
    bound = max(stage.tick_s or 0.0 for stage in found.stages)
    if count == 1 or (found.speed_up or 0.0) >= _PAYS:
        return found
    note = (
        f"Splitting will hardly pay: {found.speed_up:.2f} times the speed of "
        f"one device is expected, because "
        f"{_reason(found, bound, cores if shared else None)}."
    )
    warn(note)
    return dataclasses.replace(found, notes=(*found.notes, note))


def _reason(found: Plan, bound: float, cores: int | None) -> str:
    """Returns why splitting does not pay.

    Args:
        found: The plan.
        bound: Seconds of the longest tick of a stage by itself.
        cores: That all devices share, if they do.
    """
    whole_s, step_s = found.whole_s or 0.0, found.step_s or 0.0
    if found.delay == 0:
        return "with `delay=0` one stage works at a time"
    if whole_s < 10 * TICK_S:
        return (
            f"a batch takes only {1e3 * whole_s:.2g} ms on one device, and "
            f"each stage adds about {1e3 * TICK_S:.1g} ms of its own to it"
        )
    if step_s > 1.01 * bound:
        if cores is None:
            return "there are fewer devices than stages"
        return (
            f"all devices share the {cores} cores of one machine, and one "
            "device alone keeps most of them busy"
        )
    k = max(range(len(found.stages)), key=lambda k: found.stages[k].tick_s or 0)
    stage = found.stages[k]
    longest = int(np.argmax(stage.costs))
    if stage.costs[longest] > 0.5 * bound:
        return (
            f"{stage.layers[longest]!r} alone takes "
            f"{100 * stage.costs[longest] / whole_s:.0f} % of the time, and a "
            "layer is not divided"
        )
    if stage.sends_s or stage.returns_s:
        return f"stage {k} also waits while tensors go from device to device"
    return "the fastest device alone is nearly as fast as all together"
