"""How fast decoupled stages are, and how far from the limit of the machine.

    .venv/bin/python scripts/bench_speed.py --json speed.json  (15 minutes)
    .venv/bin/python scripts/bench_speed.py --quick            (2 minutes)

Prints, for each network, batch size and number of stages K, milliseconds per
step (medians of rounds in which all variants take turns):

    one core   a training step of the whole model by Keras, in a compiled loop,
               all threads of the process pinned to one core
    locked     the K stages with delay=0: back-propagation, one stage at a time
    FDG        the K stages with delay=2
    unlinked   the same stage loops side by side, fed constants instead of
               links: they contend for the machine but never wait for each
               other. The limit, but for how they happen to contend.

and from them

    FDG/unl    the cost of being linked, 1.00 is perfect (median of the ratios
               within a round)
    overhead   (cores in use * FDG - one core) / K: all processor time of a
               tick beyond what the computation takes, per stage
    shares     what each stage does with its time under FDG: computing, waiting
               for activations, waiting for gradients (medians of the rounds;
               filling and draining included)

and last how long it takes until ResNet-110 in two stages has trained its first
batch of 128.

Logical CPUs stand in for devices, one thread for each operation
(`intra_op_parallelism_threads=1`), so that a stage is worth about one core.
"""

import argparse
import contextlib
import json
import os
import platform
import statistics
import sys
import threading
import time
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import keras
import numpy as np
import tensorflow as tf

from fdg_keras import Trainer, delays
from fdg_keras.conductor import Conductor
from fdg_keras.data import Batches
from fdg_keras.feeding import Pace
from fdg_keras.links import Link, Ports
from trainers import models

# Name, hidden layers (of the MLP), batch size, K.
CASES = [
    ("resnet20", 0, 128, 2),
    ("resnet20", 0, 128, 4),
    ("resnet20", 0, 32, 2),
    ("resnet20", 0, 32, 4),
    ("mlp", 3, 32, 2),
    ("mlp", 3, 32, 4),
    ("mlp", 8, 32, 2),
    ("mlp", 8, 32, 8),
]
QUICK = [("resnet20", 0, 32, 2), ("mlp", 3, 32, 2)]
# One round of one variant lasts about this many seconds, or so many steps.
ROUND_S = 2.0
LEAST_STEPS = 8


class Constants(Link):
    """A link that is never waited for: what is sent is dropped.

    It hands out constants, and sends what it is given to itself: one enqueue
    and one dequeue for each pair of them in a real link.
    """

    def __init__(self, link: Link, batch: int):
        super().__init__(link.specs, 2, link.device, "constants")
        with tf.device(link.device):
            self._constants = [
                _constant([batch if d is None else d for d in s.shape], s.dtype)
                for s in link.specs
            ]

    def enqueue(self, tensors):
        done = super().enqueue(tensors)
        with tf.control_dependencies(done):
            return [t.op for t in super().dequeue()]

    def dequeue(self):
        return [tf.identity(t) for t in self._constants]


def _constant(shape, dtype):
    if dtype.is_floating:
        return tf.random.normal(shape, stddev=1e-3, dtype=dtype, seed=1)
    return tf.ones(shape, dtype)


def build(name: str, hidden: int, batch: int):
    """Returns a compiled model and an endless data set of one batch."""
    keras.utils.set_random_seed(1)
    random = np.random.RandomState(1)
    if name == "mlp":
        model = keras.Sequential([keras.Input((64,))])
        for _ in range(hidden):
            model.add(keras.layers.Dense(64))
            model.add(keras.layers.ReLU())
        model.add(keras.layers.Dense(10))
    else:
        model = models.build(name)
    model.compile(
        keras.optimizers.SGD(0.01, momentum=0.9),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        jit_compile=False,
    )
    x = random.randn(batch, *model.input_shape[1:]).astype("float32")
    y = random.randint(0, 10, batch)
    return model, tf.data.Dataset.from_tensors((x, y)).repeat()


class OneCore:
    """Keras' own training step, in its compiled loop, pinned to one core."""

    def __init__(self, name, hidden, batch):
        self._model, data = build(name, hidden, batch)
        self._iterator = iter(data)

    def run(self, steps: int) -> float:
        """Returns seconds per step."""
        model = self._model
        model.steps_per_execution = steps
        model.make_train_function(force=True)
        cores = os.sched_getaffinity(0)
        _pin({min(cores)})
        try:
            model.train_function(self._iterator)  # traces
            start = time.perf_counter()
            model.train_function(self._iterator)
            return (time.perf_counter() - start) / steps
        finally:
            _pin(cores)


class Linked:
    """The stages as they train: `delay=0` is locked, `delay=2` FDG."""

    def __init__(self, built, splits, delay):
        self._model, self._data = built
        count = splits if isinstance(splits, int) else len(splits.stages)
        devices = [f"CPU:{k}" for k in range(count)]
        self.trainer = Trainer(self._model, splits, devices, delay)
        self._late = delays.stage_delay(0, count, delay)
        self.usage: list[list[dict]] = []

    def run(self, steps: int) -> float:
        """Returns seconds per step, with all stages busy."""
        with self.pipeline() as (pipeline, batches):
            with batches.epoch() as epoch:
                window = max(steps // 8, 1)
                ends: list[tuple[int, float]] = []

                def end(batch, _):
                    ends.append((batch + 1, time.perf_counter()))
                    return False

                # Measure between fill and drain. While it fills, stage 0 gets
                # ahead by all that the links hold: first let that wear off.
                fill = window + 3 * (self._late + len(pipeline.stages))
                epoch.limit = fill + steps + window + 2 * self._late
                conductor = Conductor(pipeline, Pace(window))
                conductor.run(epoch, lambda: 0.01, end=end)
            ends = [e for e in ends if fill <= e[0] <= fill + window + steps]
            (first, start), (last, stop) = ends[0], ends[-1]
            self.usage.append([_shares(usage) for usage in conductor.usage])
            return (stop - start) / (last - first)

    @contextlib.contextmanager
    def pipeline(self):
        """Opens the trainer's pipeline, with its variables in place."""
        trainer = self.trainer
        batches = Batches(trainer._graph, x=self._data)
        with trainer._deployment as deployment:
            built = deployment.build("train", batches.spec)
            yield built.pipeline, batches


class Unlinked:
    """The same stage loops side by side, fed constants."""

    def __init__(self, linked: Linked, batch: int):
        self._linked = linked
        with linked.pipeline() as (pipeline, _):
            self.loops = []
            for stage, ports in zip(pipeline.stages, pipeline.ports):
                constants = {
                    name: None if link is None else Constants(link, batch)
                    for name, link in vars(ports).items()
                }
                loop = pipeline.make_loop(stage, Ports(**constants))
                self.loops.append(loop)

    def run(self, steps: int) -> float:
        """Returns seconds per step of the slowest loop."""
        with self._linked.pipeline():
            for loop in self.loops:
                loop(loop.late, 2, 0, 0.01)
            threads = [
                threading.Thread(target=loop, args=(0, steps, 0, 0.01))
                for loop in self.loops
            ]
            start = time.perf_counter()
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            seconds = (time.perf_counter() - start) / steps
            for loop in self.loops:
                loop(0, 0, loop.late, 0.01)
            return seconds


def measure(name, hidden, batch, splits, rounds):
    """Measures one case; returns an entry of the JSON file."""
    linked = Linked(build(name, hidden, batch), splits, delay=2)
    variants = {
        "one_core": OneCore(name, hidden, batch),
        "locked": Linked(build(name, hidden, batch), splits, delay=0),
        "fdg": linked,
        "unlinked": Unlinked(linked, batch),
    }
    steps = {}
    for key, variant in variants.items():
        variant.run(8)  # the first run initializes kernels
        wanted = ROUND_S / variant.run(8)
        steps[key] = int(min(max(wanted, LEAST_STEPS), 20000))
    linked.usage.clear()
    times: dict[str, list[float]] = {key: [] for key in variants}
    for _ in range(rounds):
        for key, variant in variants.items():
            times[key].append(1e3 * variant.run(steps[key]))
    found = {key: statistics.median(values) for key, values in times.items()}
    ratios = [f / u for f, u in zip(times["fdg"], times["unlinked"])]
    cores = min(splits, len(os.sched_getaffinity(0)))
    return {
        "model": name,
        "layers": hidden or None,
        "batch": batch,
        "K": splits,
        **{f"{key}_ms": value for key, value in found.items()},
        "fdg_over_unlinked": statistics.median(ratios),
        "overhead_ms_per_stage": (cores * found["fdg"] - found["one_core"])
        / splits,
        "stages": [
            {
                key: statistics.median(r[k][key] for r in linked.usage)
                for key in shares
            }
            for k, shares in enumerate(linked.usage[0])
        ],
        "rounds_ms": times,
    }


def measure_start():
    """Returns seconds from a compiled ResNet-110 to its first batch."""
    model, data = build("resnet110", 0, 128)
    ended = []
    first = keras.callbacks.LambdaCallback(
        on_train_batch_end=lambda batch, logs: ended.append(time.perf_counter())
    )
    first.drain_every = None  # It looks at the clock only.
    start = time.perf_counter()
    trainer = Trainer(model, 2, ["CPU:0", "CPU:1"])
    trainer.fit(data, steps_per_epoch=1, verbose=0, callbacks=[first])
    return ended[0] - start


def _shares(usage):
    total = (
        usage.computed
        + usage.waited_activations
        + usage.waited_gradients
        + usage.idle
    )
    return {
        "computes": usage.computed / total,
        "waits_for_activations": usage.waited_activations / total,
        "waits_for_gradients": usage.waited_gradients / total,
        "idle": usage.idle / total,
    }


def _pin(cores):
    for thread in os.listdir("/proc/self/task"):
        # A thread may have ended since.
        with contextlib.suppress(ProcessLookupError):
            os.sched_setaffinity(int(thread), cores)


def _machine():
    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                name = line.partition(":")[2].strip()
                break
    return {
        "processor": name,
        "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        "tensorflow": tf.__version__,
        "keras": keras.__version__,
    }


def _row(case):
    name = case["model"] + (f" ({case['layers']})" if case["layers"] else "")
    shares = "  ".join(
        "/".join(
            f"{100 * stage[key]:.1f}"
            for key in (
                "computes",
                "waits_for_activations",
                "waits_for_gradients",
            )
        )
        for stage in case["stages"]
    )
    return (
        f"{name:<10}{case['batch']:>5}{case['K']:>3}"
        f"{case['one_core_ms']:>10.3f}{case['locked_ms']:>10.3f}"
        f"{case['fdg_ms']:>10.3f}{case['unlinked_ms']:>10.3f}"
        f"{case['fdg_over_unlinked']:>9.3f}"
        f"{case['one_core_ms'] / case['fdg_ms']:>9.2f}"
        f"{case['overhead_ms_per_stage']:>10.3f}  {shares}"
    )


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="also write the figures here")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--model", choices=["resnet20", "mlp", "resnet110"])
    parser.add_argument("--rounds", type=int, help="default 5, --quick 3")
    args = parser.parse_args()
    tf.config.threading.set_intra_op_parallelism_threads(1)
    tf.config.set_visible_devices([], "GPU")
    tf.config.set_logical_device_configuration(
        tf.config.list_physical_devices("CPU")[0],
        [tf.config.LogicalDeviceConfiguration()] * 8,
    )
    result = {"machine": _machine(), "cases": []}
    print(", ".join(f"{k} {v}" for k, v in result["machine"].items()))
    print(
        f"{'network':<10}{'batch':>5}{'K':>3}{'one core':>10}{'locked':>10}"
        f"{'FDG':>10}{'unlinked':>10}{'FDG/unl':>9}{'speed-up':>9}"
        f"{'overhead':>10}  computes/waits for activations/gradients, %"
    )
    rounds = args.rounds or (3 if args.quick else 5)
    for name, hidden, batch, splits in QUICK if args.quick else CASES:
        if args.model in (None, name):
            case = measure(name, hidden, batch, splits, rounds)
            result["cases"].append(case)
            print(_row(case), flush=True)
            if args.json:
                args.json.write_text(json.dumps(result, indent=1))
    if args.model in (None, "resnet110") and not args.quick:
        result["resnet110_start_s"] = measure_start()
        print(f"ResNet-110 starts in {result['resnet110_start_s']:.1f} s")
        if args.json:
            args.json.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
