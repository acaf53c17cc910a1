"""`plan`: measures a model, cuts it where it is best, says what that costs."""

import dataclasses
import itertools
import numbers
import os
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np

from fdg_keras import durations
from fdg_keras.crossing import Stash
from fdg_keras.cutting import Cutter
from fdg_keras.expectations import assumptions, expected
from fdg_keras.loss_bytes import loss_bytes
from fdg_keras.memory import Ledger
from fdg_keras.placement import is_here, resolve_devices
from fdg_keras.planning import estimates, legal_ends
from fdg_keras.plans import Plan
from fdg_keras.profiling import description
from fdg_keras.room import check_limit
from fdg_keras.slicing import Graph, trace_graph
from fdg_keras.threads import warn
from fdg_keras.validation import check_model, check_settings
from fdg_keras.watch import Watch


def plan(
    model: keras.Model,
    splits: int = 4,
    batch_size: int = 128,
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

    Sizes that the model leaves open, beyond the batch's, are taken for 1: then
    times and bytes are too small, and a note of the plan says so. Give the
    model static shapes, `keras.Input((100, 64))` for sequences of 100 vectors,
    to plan it. What loops of unknown length keep is not counted; of which
    stages, a note says as well.

    Args:
        model: A Functional or Sequential model. If it is compiled, its
            optimizer counts for the time of updates and the memory of slots.
        splits: Number of stages K, 4 by default.
        batch_size: Samples in a batch, 128 by default.
        devices: As for `Trainer`. They may differ in speed. Where stages share
            one, the cuts are still those of the fastest slowest stage; the
            pace that is expected is that of the device with most to do.
        delay: Batches of delay per hop, for the memory of what is in flight;
            with 0, stages take turns, and the pace is that of all together.
        stash: The stash mode, likewise, and for the time of its backward.
            What `"selective"` keeps is known of whole stages only: cuts are
            held to `memory_limit` by a count of layers, which may be somewhat
            more; the bytes of the plan are its own. Of the time that it spends
            on running operations again, that of layers is counted of which all
            are cheap; not, say, of the activation of a dense layer.
        measure: Whether to measure. If not, cuts balance operation counts, as
            those of `Trainer(splits=K)` do, and no times are known.
        memory_limit: Bytes that a device may hold, with what waits there of a
            model that was made on it and is trained elsewhere. If the best
            cuts of all do not fit, stages that share a device get equal parts
            of them. Or a list with a number for each stage. Default: no limit.
        cache_dir: Where measurements are kept. Default: the folder that the
            environment's `FDG_KERAS_CACHE` names, or else `fdg_keras` in the
            user's folder for caches.

    Returns:
        A `Plan`; all of its fields are known if it was measured.

    Raises:
        ValueError: If an argument is out of range, the model cannot be cut so
            often or was compiled with what cannot be done in stages, or a
            stage does not fit in memory; then it names the stage, by how much
            it is too large, and what would fit, before layers are measured.
            Or a layer is too large to be measured at all, or does not take
            the batch that is made up, of floats from 0 to 1 and else zeros;
            then it is named. Or TensorFlow does not allow to read the clock
            (`enable_op_determinism`), for which `measure=False` has no need.
        ConnectionError: If a worker is lost meanwhile.
    """
    splits, batch_size = _checked(splits, batch_size)
    check_settings(delay, stash, order="forward_first")
    graph = trace_graph(model)
    _check_batch(graph, batch_size)
    ends = legal_ends(graph, splits)
    names = resolve_devices(devices, splits)
    check_limit(memory_limit, names)
    if getattr(model, "optimizer", None) is not None:
        check_model(model)
    settings = (batch_size, model.jit_compile is True, measure, cache_dir)
    with Watch(names):  # Workers may be lost while they measure.
        return _plan(
            graph,
            model,
            ends,
            names,
            int(delay),
            stash,
            memory_limit,
            settings,
        )


def _plan(
    graph: Graph,
    model: keras.Model,
    ends: np.ndarray,
    names: Sequence[str],
    delay: int,
    stash: Stash,
    memory_limit: Any,
    settings: tuple,
) -> Plan:
    """Makes a plan of what has been checked; `settings` as of `Kind`."""
    batch_size, _, measure, _ = settings
    optimizer = getattr(model, "optimizer", None)

    # ---- What is known without running -----------------------------------
    kinds = _kinds(graph, optimizer, names, settings)
    first = kinds[0]
    outputs = [first.profiler.specs[value] for value in graph.outputs]
    of_loss = loss_bytes(model, outputs) / batch_size
    ledger = Ledger(first.profiler, delay, stash, first.slots, of_loss)
    cutter = Cutter(graph, ledger, ends, names, memory_limit)
    costs = estimates(graph, len(names))

    # ---- What nodes and cuts take ----------------------------------------
    if measure:
        cutter.cuts(costs)  # What does not fit is refused before it is run.
        for kind in dict.fromkeys(kinds):
            kind.measure()
        handing_over = durations.handing_over(names, ledger)
        times = durations.Times(kinds, ledger, handing_over)
        costs = times.nodes, times.paid

    # ---- The best cuts, and what they come to ----------------------------
    stages = cutter.stages(costs)
    found = Plan(tuple(stages), batch_size, delay, stash)
    edges = list(itertools.pairwise([0, *found.cuts, len(graph.nodes)]))
    uncounted = [k for k, edge in enumerate(edges) if ledger.unsized(*edge)]
    notes = assumptions(
        first.profiler.open_symbols, uncounted, optimizer is not None
    )
    if memory_limit is not None:
        for note in notes:
            warn(f"{note} The memory limit is not sure to hold.")
    found = dataclasses.replace(found, notes=notes)
    if not measure:
        return found
    timed = [
        times.of(stage, k, *edge)
        for k, (stage, edge) in enumerate(zip(stages, edges))
    ]
    return expected(
        dataclasses.replace(found, stages=tuple(timed), whole_s=times.whole_s),
        sum(p.processor_s for p in first.profiles),
        all(is_here(n) and durations.share_memory(names[0], n) for n in names),
    )


def _kinds(
    graph: Graph,
    optimizer: keras.optimizers.Optimizer | None,
    names: Sequence[str],
    settings: tuple,
) -> list[durations.Kind]:
    """Returns what is found of the device of each stage, of like ones once."""
    found: dict[str, durations.Kind] = {}
    for name in names:
        kind = description(name)
        if kind not in found:
            found[kind] = durations.Kind(graph, optimizer, name, *settings)
    return [found[description(name)] for name in names]


def _checked(splits: Any, batch_size: Any) -> tuple[int, int]:
    """Returns both as Python's own numbers, of which JSON can be made."""
    for name, value in ("splits", splits), ("batch_size", batch_size):
        whole = isinstance(value, numbers.Integral)
        # TensorFlow counts samples in 32 bits here and there.
        if not whole or isinstance(value, bool) or not 1 <= value < 2**31:
            raise ValueError(
                f"Expected `{name}` to be a whole number from 1 to 2**31 - 1. "
                f"Received: {value!r}"
            )
    return int(splits), int(batch_size)


def _check_batch(graph: Graph, batch_size: int) -> None:
    for value in graph.inputs:
        shape = graph.symbols[value].shape
        if shape and shape[0] not in (None, batch_size):
            raise ValueError(
                "Expected `batch_size` to be that of the model's inputs, "
                f"{shape[0]}. Or make them without: `keras.Input(shape)` "
                f"instead of `batch_shape`. Received: batch_size={batch_size}"
            )
