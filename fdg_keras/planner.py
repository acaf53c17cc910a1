"""`plan`: measures a model, cuts it where it is best, says what that costs."""

import dataclasses
import itertools
import numbers
import os
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from fdg_keras.crossing import Stash, StashBytes
from fdg_keras.delays import stage_delay
from fdg_keras.memory import Ledger, Room
from fdg_keras.optimizers import check_optimizer
from fdg_keras.placement import host_of, resolve_devices
from fdg_keras.planning import balance, estimates, legal_ends, make_plan
from fdg_keras.plans import Plan, StagePlan
from fdg_keras.profiles import Profile
from fdg_keras.profiling import description, profile
from fdg_keras.rates import UpdateRate, transfer_rate, update_rate
from fdg_keras.slicing import cut_graph, trace_graph
from fdg_keras.stashes import traced_stashes
from fdg_keras.threads import warn
from fdg_keras.validation import check_settings

# Seconds of a tick beyond what its layers compute: links and loop. About what
# `scripts/bench_speed.py` finds on CPUs, as overhead per stage.
_TICK_S = 1e-4

# A plan that promises less than this says that splitting will hardly pay.
_PAYS = 1.1


def plan(
    model: keras.Model,
    splits: int = 2,
    batch_size: int = 32,
    devices: Sequence[str] | None = None,
    delay: int = 2,
    stash: Stash = "exact",
    measure: bool = True,
    memory_limit: int | Sequence[int] | None = None,
    cache_dir: str | os.PathLike | None = None,
) -> Plan:
    """Finds the best cuts of a model, and tells what they cost.

    Forward and backward of each layer are measured on the devices, layers that
    compute the same once, and the cuts are chosen that minimize the time of
    the slowest stage, handing over included: of all cuts the best, by dynamic
    programming. Give the plan to `fit` or `Trainer` as `splits`. Print it to
    see the table.

    Args:
        model: A Functional or Sequential model. If it is compiled, its
            optimizer counts for the time of updates and the memory of slots.
        splits: Number of stages K.
        batch_size: Samples in a batch.
        devices: As for `Trainer`. They may differ in speed.
        delay: Batches of delay per hop, for the memory of what is in flight.
        stash: The stash mode, likewise, and for the time of its backward.
            What `"selective"` keeps is known of whole stages only: cuts are
            chosen, and held to `memory_limit`, as for `"exact"`, which holds
            more; the bytes of the plan are its own. The time that it spends on
            running operations again is not counted.
        measure: Whether to measure. If not, cuts balance operation counts, as
            those of `Trainer(splits=K)` do, and no times are known.
        memory_limit: Bytes that a stage may hold, or one such number for each
            stage. Default: no limit.
        cache_dir: Where measurements are kept. Default: the folder that the
            environment's `FDG_KERAS_CACHE` names, or else `fdg_keras` in the
            user's folder for caches.

    Returns:
        A `Plan`; all of its fields are known if it was measured.

    Raises:
        ValueError: If an argument is out of range, the model cannot be cut so
            often, or a stage does not fit in memory; then it names the stage,
            by how much it is too large, and what would fit.
    """
    _check(splits, batch_size)
    check_settings(delay, stash, order="forward_first")
    graph = trace_graph(model)
    ends = legal_ends(graph, splits)
    names = resolve_devices(devices, splits)
    optimizer = getattr(model, "optimizer", None)
    if optimizer is not None:
        check_optimizer(optimizer)

    # ---- What nodes and cuts cost ---------------------------------------
    jit_compile = model.jit_compile is True
    kinds = {
        description(name): _Kind(
            profile(graph, batch_size, name, jit_compile, measure, cache_dir),
            update_rate(optimizer, name, measure) if optimizer else None,
        )
        for name in names
    }
    kind_of = [kinds[description(name)] for name in names]
    ledger = Ledger(
        graph, kind_of[0].profiles, batch_size, delay, stash, kind_of[0].slots
    )
    if measure:
        times = np.array([kind.seconds(ledger, stash) for kind in kind_of])
        nodes, paid = times.sum(-1), _handing_over(names, ledger)
    else:
        times = None
        nodes, paid = estimates(graph, splits)

    # ---- The best cuts that fit -----------------------------------------
    room = Room(ledger, ends, splits, memory_limit)
    cuts = balance(ends, nodes, paid, room.excess)
    if cuts is None:
        raise ValueError(room.refusal())

    # ---- What they come to ----------------------------------------------
    slices = cut_graph(graph, cuts)
    bare = make_plan(graph, slices, names)
    edges = list(
        itertools.pairwise([0, *(p + 1 for p in cuts), len(graph.nodes)])
    )
    stages = [
        ledger.sized(stage, a, b, k, splits)
        for k, (stage, (a, b)) in enumerate(zip(bare.stages, edges))
    ]
    if stash == "selective":
        kept = traced_stashes(graph, slices, names[0], batch_size, stash)
        stages = [
            _resized(stage, stage_delay(k, splits, delay), size)
            for k, (stage, size) in enumerate(zip(stages, kept))
        ]
    found = Plan(tuple(stages), batch_size, delay, stash)
    if times is None:
        return found
    timed = [
        _timed(stage, times[k, a:b], paid[k], a, b)
        for k, (stage, (a, b)) in enumerate(zip(stages, edges))
    ]
    whole_s = float(times[0].sum())
    processor_s = sum(p.processor_s for p in kind_of[0].profiles)
    return _expected(
        dataclasses.replace(found, stages=tuple(timed), whole_s=whole_s),
        processor_s,
    )


@dataclasses.dataclass(frozen=True)
class _Kind:
    """What was found of devices that are alike."""

    profiles: list[Profile]
    update: UpdateRate | None

    @property
    def slots(self) -> float:
        return self.update.slots if self.update else 0.0

    def seconds(self, ledger: Ledger, stash: Stash) -> np.ndarray:
        """Returns seconds `[nodes, 2]` of each forward and backward."""
        forward = np.array([p.forward_s for p in self.profiles])
        backward = np.array([p.backward_s for p in self.profiles])
        if stash == "replay":
            backward = backward + forward * (backward > 0)
        if self.update:
            backward = backward + self.update.seconds * ledger.weights
        return np.stack([forward, backward], -1)


def _handing_over(names: Sequence[str], ledger: Ledger) -> np.ndarray:
    """Returns seconds `[K, nodes]` that a stage pays for a cut."""
    paid = np.zeros([len(names), len(ledger.sent)])
    for k, (here, there) in enumerate(itertools.pairwise(names)):
        if here == there or _share_memory(here, there):
            continue
        latency, for_a_byte = transfer_rate(here, there)
        # Who sends waits for it: stage k for the activations of the cut after
        # it, stage k + 1 for the gradients of the cut before it. What is
        # charged on either side is the larger of the two.
        bytes_ = np.maximum(ledger.sent, ledger.returned)
        paid[k] = np.maximum(paid[k], latency + for_a_byte * bytes_)
        paid[k + 1] = latency + for_a_byte * bytes_
    paid[:, -1] = 0.0  # After the last node there is no cut.
    return paid


def _share_memory(a: str, b: str) -> bool:
    """Whether a tensor goes from one device to the other as it is."""
    return host_of(a) == a and host_of(b) == b and _task(a) == _task(b)


def _task(device: str) -> tuple:
    spec = tf.DeviceSpec.from_string(device)
    return spec.job, spec.replica, spec.task


def _resized(stage: StagePlan, late: int, size: StashBytes) -> StagePlan:
    """Returns a stage with another stash, and its peak changed by as much."""
    if not late:  # Its backward follows its forward: nothing is saved.
        return stage
    stash_bytes = size.total(late + 1, late)
    saved = (stage.stash_bytes or 0) - stash_bytes
    return dataclasses.replace(
        stage,
        stash_bytes=stash_bytes,
        peak_bytes=(stage.peak_bytes or 0) - saved,
    )


def _timed(
    stage: StagePlan, times: np.ndarray, paid: np.ndarray, a: int, b: int
) -> StagePlan:
    forward, backward = times.sum(0)
    forward += paid[b - 1] + _TICK_S / 2
    backward += (paid[a - 1] if a else 0.0) + _TICK_S / 2
    return dataclasses.replace(
        stage,
        costs=tuple(map(float, times.sum(-1))),
        forward_s=float(forward),
        backward_s=float(backward),
    )


def _expected(found: Plan, processor_s: float) -> Plan:
    """Adds how long a step takes, and says so if it hardly pays."""
    load: dict[str, float] = {}
    for stage in found.stages:
        load[stage.device] = load.get(stage.device, 0.0) + (stage.tick_s or 0.0)
    step_s = max(load.values())
    names = [stage.device for stage in found.stages]
    shared = len(names) > 1 and all(_share_memory(names[0], n) for n in names)
    cores = len(os.sched_getaffinity(0))
    if shared:
        # All of these devices compute on the same cores.
        step_s = max(step_s, (processor_s + len(names) * _TICK_S) / cores)
    found = dataclasses.replace(found, step_s=step_s)
    # The time of the longest tick, were there a device and cores for each.
    bound = max(stage.tick_s or 0.0 for stage in found.stages)
    if len(names) == 1 or (found.speed_up or 0.0) >= _PAYS:
        return found
    note = (
        f"Splitting will hardly pay: {found.speed_up:.2f} times the speed of "
        f"one device is expected, because "
        f"{_reason(found, bound, cores if shared else None)}."
    )
    warn(note)
    return dataclasses.replace(found, notes=(note,))


def _reason(found: Plan, bound: float, cores: int | None) -> str:
    """Returns why splitting does not pay.

    Args:
        found: The plan.
        bound: Seconds of the longest tick of a stage by itself.
        cores: That all devices share, if they do.
    """
    whole_s, step_s = found.whole_s or 0.0, found.step_s or 0.0
    if whole_s < 10 * _TICK_S:
        return (
            f"a batch takes only {1e3 * whole_s:.2g} ms on one device, and "
            f"each stage adds about {1e3 * _TICK_S:.1g} ms of its own to it"
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
    return f"stage {k} also waits while tensors go from device to device"


def _check(splits: Any, batch_size: Any) -> None:
    for name, value in ("splits", splits), ("batch_size", batch_size):
        whole = isinstance(value, numbers.Integral)
        if not whole or isinstance(value, bool) or value < 1:
            raise ValueError(
                f"Expected `{name}` to be a whole number of at least 1. "
                f"Received: {value!r}"
            )
