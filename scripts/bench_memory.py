"""What the stages keep in flight: bytes predicted and measured, and the time.

    .venv/bin/python scripts/bench_memory.py --json memory.json  (15 minutes)
    .venv/bin/python scripts/bench_memory.py --network transformer --steps 8

Prints, for each network and stash mode, each in a process of its own:

    planned    MiB that wait in the stashes of all stages between two ticks,
               as `fdg_keras.plan` says before any stage is there
    predicted  the same, by the stages themselves: from the shapes of what
               their backwards read (`Stage.stash_bytes`)
    held       MiB found there: the memory behind the tensors that were
               dequeued, each piece once, without the weights of today
    ratios     planned / held and predicted / held
    at most    MiB predicted for the moment between F and B of a tick
    peak       MiB of all tensors at most, weights and all, as TensorFlow's
               allocator counted them (in another process, with the allocator
               that GPUs have, which counts), all stages at work. On few cores
               they are not at their peaks at once
    sum        of each stage's own peak, counted while they take turns, and as
               the plan says for links as full as they are then; planned / sum
    step       milliseconds per step with all stages busy (median of the rounds)
    expected   the same as a plan says, cut where it is best by its measurement

`--json` has all that for each stage, too. Devices and threads as in
`bench_speed.py`.
"""

import argparse
import contextlib
import json
import math
import multiprocessing
import os
import statistics
import tempfile
import threading
from pathlib import Path

import bench_speed
import keras
import numpy as np
import tensorflow as tf

from fdg_keras import Trainer, delays, plan
from fdg_keras.crossing import STASHES
from fdg_keras.resources import ALLOCATED
from trainers import models

NETWORKS = ("resnet56", "transformer")
MIB = 2**20

# Of the transformer.
LENGTH, WIDTH, HEADS, BLOCKS, WORDS = 64, 128, 4, 4, 1000


def transformer():
    """Returns a language model with dropout."""
    inputs = keras.Input((LENGTH,), dtype="int32")
    h = keras.layers.Embedding(WORDS, WIDTH)(inputs)
    for _ in range(BLOCKS):
        a = keras.layers.LayerNormalization()(h)
        a = keras.layers.MultiHeadAttention(HEADS, WIDTH // HEADS, dropout=0.1)(
            a, a, use_causal_mask=True
        )
        h = keras.layers.Add()([h, a])
        f = keras.layers.LayerNormalization()(h)
        f = keras.layers.Dense(4 * WIDTH, "gelu")(f)
        f = keras.layers.Dropout(0.1)(keras.layers.Dense(WIDTH)(f))
        h = keras.layers.Add()([h, f])
    h = keras.layers.LayerNormalization()(h)
    return keras.Model(inputs, keras.layers.Dense(WORDS)(h))


def build(network: str, batch: int):
    """Returns a compiled model and an endless data set of one batch."""
    keras.utils.set_random_seed(1)
    random = np.random.RandomState(1)
    if network == "transformer":
        model = transformer()
        x = random.randint(0, WORDS, (batch, LENGTH))
        y = random.randint(0, WORDS, (batch, LENGTH))
    else:
        model = models.build(network)
        x = random.randn(batch, *model.input_shape[1:]).astype("float32")
        y = random.randint(0, 10, batch)
    model.compile(
        keras.optimizers.SGD(0.01, momentum=0.9),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        jit_compile=False,
    )
    # Samples put together anew: batches that share no memory.
    data = tf.data.Dataset.from_tensor_slices((x, y)).repeat()
    return model, data.batch(batch, drop_remainder=True)


class Stages(bench_speed.Linked):
    """The stages as they train, looked into before they drain."""

    def __init__(self, network, batch, splits, delay, stash):
        self._model, self._data = build(network, batch)
        devices = [f"CPU:{k}" for k in range(splits)]
        self.trainer = Trainer(self._model, splits, devices, delay, stash=stash)
        self._late = delays.stage_delay(0, splits, delay)
        self._delay, self._stash = delay, stash
        self.usage = []
        self.looks = None
        self._look = Looked
        with super().pipeline() as (pipeline, _):
            self.stages = pipeline.stages

    @contextlib.contextmanager
    def pipeline(self):
        """Opens the trainer's pipeline, with its variables in place."""
        with super().pipeline() as (pipeline, batches):
            loops = pipeline.loops
            pipeline.loops = self.looks = [self._look(loop) for loop in loops]
            try:
                yield pipeline, batches
            finally:
                pipeline.loops = loops

    def plan(self, batch, **arguments):
        """Plans as many stages."""
        return plan(
            self._model,
            len(self.stages),
            batch,
            [stage.device for stage in self.stages],
            self._delay,
            self._stash,
            **arguments,
        )

    def expected(self, batch):
        """Seconds per step that a plan says, with all layers measured anew."""
        with tempfile.TemporaryDirectory() as fresh:
            return self.plan(batch, cache_dir=fresh).step_s

    def planned(self, batch):
        """Yields a plan's bytes of stages.

        Between two ticks, at most, and at most with links that hold no more
        than they do when stages take turns.
        """
        # Cut as the stages are.
        found = self.plan(batch, measure=False)
        for stage, sized in zip(self.stages, found.stages):
            # A plan counts the batch that is between F and B, too.
            last = stage.stash_bytes(self._stash, batch).batch
            at_most = sized.peak_bytes
            links = sized.bytes.links - self._delay * sized.bytes.returned
            yield (
                sized.stash_bytes - last,
                at_most,
                at_most - int(ALLOCATED * links),
            )

    def sum_of_peaks(self, steps):
        """Returns what the stages hold, and by how much each rises at most."""
        turns = Turns(len(self.stages))
        self._look = lambda loop: InTurn(loop, turns)
        self.run(steps)
        return turns.resting + sum(loop.rise for loop in self.looks)


class Turns:
    """Lets stages run tick by tick, one after the other, until they drain."""

    def __init__(self, count):
        self._count = count
        self._next = 0
        self._changed = threading.Condition()
        #: Whether some stage drains, and all run as they can.
        self.over = False
        #: Bytes between two rounds at most.
        self.resting = 0

    @contextlib.contextmanager
    def of(self, k):
        """Waits for the turn of stage k."""
        with self._changed:
            self._changed.wait_for(lambda: self.over or self._next == k)
        yield
        if k == self._count - 1 and not self.over:
            self.resting = max(self.resting, _counted()["current"])
        with self._changed:
            self._next = (k + 1) % self._count
            self._changed.notify_all()

    def end(self):
        """Lets all run."""
        with self._changed:
            self.over = True
            self._changed.notify_all()


class InTurn:
    """A loop that takes turns, and finds what its ticks add to memory."""

    def __init__(self, loop, turns):
        self._loop, self._turns = loop, turns
        self.rise = 0

    def __call__(self, fill, steady, drain, learning_rate):
        if drain:
            self._turns.end()
        report = None
        for tick in [(1, 0, 0)] * fill + [(0, 1, 0)] * steady:
            with self._turns.of(self._loop._stage.index):
                before = _counted()["current"]
                tf.config.experimental.reset_memory_stats("CPU:0")
                report = self._loop(*tick, learning_rate)
                rise = _counted()["peak"] - before
                if not self._turns.over:
                    self.rise = max(self.rise, rise)
        return self._loop(0, 0, drain, learning_rate) if drain else report

    def __getattr__(self, name):
        return getattr(self._loop, name)


def _counted():
    # All logical CPUs have one allocator.
    return tf.config.experimental.get_memory_info("CPU:0")


class Looked:
    """A loop that looks at what it has stashed before it drains."""

    def __init__(self, loop):
        self._loop = loop
        self.held = 0

    def __call__(self, fill, steady, drain, learning_rate):
        report = self._loop(fill, steady, 0, learning_rate)
        if drain:
            self.held = self._look()
            self._loop(0, 0, drain, learning_rate)
        return report

    def __getattr__(self, name):
        return getattr(self._loop, name)

    def _look(self):
        stash = self._loop._stash
        batches = [stash.dequeue() for _ in range(self._loop.late)]
        for batch in batches:
            stash.enqueue(batch)
        today = dict(map(memory, self._loop.update.weights()))
        pieces = dict(memory(t) for batch in batches for t in batch)
        return sum(size for at, size in pieces.items() if at not in today)


def memory(tensor):
    """Returns where a tensor is in memory, and how many bytes it takes."""
    if tensor.dtype == tf.bfloat16:  # NumPy cannot look into it.
        tensor = tf.bitcast(tensor, tf.uint16)
    array = np.asarray(memoryview(tensor))
    return array.__array_interface__["data"][0], array.nbytes


def measure(network, batch, splits, delay, stash, steps, rounds):
    """Measures one mode; returns an entry of the JSON file."""
    configure(splits)
    stages = Stages(network, batch, splits, delay, stash)
    stages.run(steps)  # the first run initializes kernels
    times = [1e3 * stages.run(steps) for _ in range(rounds)]
    found = [
        _stage(
            stage.stash_bytes(stash, batch),
            look.late,
            delays.in_flight(k, splits, delay, "forward_first"),
            look.held,
            *planned,
        )
        for k, (stage, look, planned) in enumerate(
            zip(stages.stages, stages.looks, stages.planned(batch))
        )
    ]
    return {
        "network": network,
        "batch": batch,
        "K": splits,
        "delay": delay,
        "stash": stash,
        **{
            key: sum(stage[key] for stage in found)
            for key in (
                "planned_bytes",
                "predicted_bytes",
                "held_bytes",
                "at_most_bytes",
                "planned_peak_bytes",
                "planned_sum_bytes",
            )
        },
        "step_ms": statistics.median(times),
        "expected_ms": 1e3 * stages.expected(batch),
        "rounds_ms": times,
        "stages": found,
    }


def peaks(network, batch, splits, delay, stash, steps):
    """Returns the most bytes that tensors had: of all stages, and of each."""
    configure(splits)
    stages = Stages(network, batch, splits, delay, stash)
    stages.run(steps)
    tf.config.experimental.reset_memory_stats("CPU:0")
    stages.run(steps)
    peak = _counted()["peak"]
    return {"peak_bytes": peak, "sum_bytes": stages.sum_of_peaks(steps)}


def _stage(size, late, in_flight, held, planned, planned_peak, planned_sum):
    return {
        "planned_bytes": planned,
        "planned_peak_bytes": planned_peak,
        "planned_sum_bytes": planned_sum,
        "predicted_bytes": size.total(late, late),
        "held_bytes": held,
        "at_most_bytes": size.total(in_flight, late),
        "batch_bytes": size.batch,
        "weights_bytes": size.weights,
    }


def configure(splits):
    """Makes logical CPUs of one thread each."""
    tf.config.threading.set_intra_op_parallelism_threads(1)
    tf.config.set_visible_devices([], "GPU")
    tf.config.set_logical_device_configuration(
        tf.config.list_physical_devices("CPU")[0],
        [tf.config.LogicalDeviceConfiguration()] * splits,
    )


def _row(case):
    mib = {k: v / MIB for k, v in case.items() if k.endswith("_bytes")}
    # One stage holds nothing between two ticks.
    held = case["held_bytes"] or math.nan
    planned, predicted = (
        case[key] / held for key in ("planned_bytes", "predicted_bytes")
    )
    return (
        f"{case['network']:<12}{case['stash']:<10}"
        f"{mib['planned_bytes']:>10.1f}{mib['predicted_bytes']:>10.1f}"
        f"{mib['held_bytes']:>10.1f}{planned:>8.3f}{predicted:>7.3f}"
        f"{mib['at_most_bytes']:>10.1f}"
        f"{mib['peak_bytes']:>10.1f}"
        f"{mib['sum_bytes']:>10.1f}{mib['planned_sum_bytes']:>10.1f}"
        f"{case['planned_sum_bytes'] / case['sum_bytes']:>7.3f}"
        f"{case['step_ms']:>10.1f}{case['expected_ms']:>10.1f}"
    )


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="also write the figures here")
    parser.add_argument("--network", choices=NETWORKS)
    parser.add_argument("--stash", choices=STASHES)
    parser.add_argument("--batch", type=int, default=32, help="default 32")
    parser.add_argument("--splits", type=int, default=4, help="K, default 4")
    parser.add_argument("--delay", type=int, default=2, help="default 2")
    parser.add_argument("--steps", type=int, default=24, help="default 24")
    parser.add_argument("--rounds", type=int, default=3, help="default 3")
    args = parser.parse_args()
    result = {"machine": bench_speed._machine(), "cases": []}
    print(", ".join(f"{k} {v}" for k, v in result["machine"].items()))
    print(f"batch {args.batch}, K={args.splits}, delay={args.delay}")
    print(
        f"{'network':<12}{'stash':<10}{'planned':>10}{'predicted':>10}"
        f"{'held':>10}{'ratios':>15}{'at most':>10}{'peak':>10}"
        f"{'sum':>10}{'planned':>10}{'ratio':>7}{'step':>10}{'expected':>10}"
    )
    sizes = (args.batch, args.splits, args.delay)
    # A process for each case: memory that was freed may stay with it.
    spawn = multiprocessing.get_context("spawn")
    for network in [args.network] if args.network else NETWORKS:
        for stash in [args.stash] if args.stash else STASHES:
            settings = (network, *sizes, stash, args.steps)
            with spawn.Pool(1) as pool:
                case = pool.apply(measure, (*settings, args.rounds))
            os.environ["TF_CPU_ALLOCATOR_USE_BFC"] = "1"
            with spawn.Pool(1) as pool:
                case |= pool.apply(peaks, settings)
            del os.environ["TF_CPU_ALLOCATOR_USE_BFC"]
            result["cases"].append(case)
            print(_row(case), flush=True)
            if args.json:
                args.json.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
