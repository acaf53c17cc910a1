"""How good plans are: the cuts, the times they promise, and what they gain.

    .venv/bin/python scripts/bench_plan.py --json plan.json     (1 hour)
    .venv/bin/python scripts/bench_plan.py --models resnet20    (5 minutes)
    .venv/bin/python scripts/bench_plan.py --deep               (5 minutes)

Measures each network with `fdg_keras.plan`, cuts it into K = 2, 3, 4 and 8
stages, and prints

    plan s     seconds that measuring took, nothing being known before
    best       the slowest stage of the best cuts there are, over that of the
               plan's, both by the measured costs of layers: 1.00 is perfect.
               Found in another way than the plan's: for K = 2 and 3 by trying
               all cuts, for more by halving the range in which it must lie
    predicted  milliseconds of a tick of the plan's slowest stage
    measured   the same, its loop running alone
    ratio      measured over predicted

where layers are measured again in each round, shortly before the stage is: the
machine may be faster or slower at another time. All three are medians. For
K = 2 follow the milliseconds of a step end to end, with the plan's cut, with
the cut by estimated operations that `splits=2` stands for, and with the cut
that halves the parameters, taking turns (medians of rounds).

`--deep` only plans, and prints how many seconds that takes, with nothing known
before, of ResNet-110 and ResNet-1202 in 8 stages: measured, and again held to a
memory limit that cannot be met, so that it is refused with what would fit. It
should be below one minute and below five.

Logical CPUs stand in for devices, with one thread for each operation
(`intra_op_parallelism_threads=1`). While layers are measured, and while a stage
runs alone, the process is held on one core: a whole stage has operations that
could run side by side on two, single layers have none, and of a GPU there is
one as well. End to end all cores are used.
"""

import argparse
import contextlib
import gc
import itertools
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import bench_speed
import keras
import numpy as np
import tensorflow as tf
from keras import layers

import fdg_keras
from fdg_keras.slicing import trace_graph
from trainers import models

# Name and batch size: a step takes up to two seconds.
CASES = {
    "resnet20": 128,
    "resnet56": 32,
    "resnet110": 32,
    "wrn28_10": 2,
    "mobilenet_v2": 16,
    "efficientnet_b0": 16,
    "unet": 8,
    "transformer": 16,
}
SPLITS = (2, 3, 4, 8)

# Name, and the seconds that planning should take at most.
DEEP = {"resnet110": 60, "resnet1202": 300}


def unet():
    """Three levels of two convolutions, down and up again."""
    inputs = h = keras.Input((64, 64, 3))
    skips = []
    for width in (16, 32, 64):
        h = _convolutions(h, width)
        skips.append(h)
        h = layers.MaxPooling2D()(h)
    h = _convolutions(h, 128)
    for width, skip in zip((64, 32, 16), reversed(skips)):
        h = layers.UpSampling2D()(h)
        h = layers.Concatenate()([h, skip])
        h = _convolutions(h, width)
    h = layers.GlobalAveragePooling2D()(h)
    return keras.Model(inputs, layers.Dense(10)(h))


def _convolutions(h, width):
    for _ in range(2):
        h = layers.Conv2D(width, 3, padding="same", use_bias=False)(h)
        h = layers.BatchNormalization()(h)
        h = layers.ReLU()(h)
    return h


def transformer():
    """Four blocks of attention and feed-forward, 64 tokens of width 128."""
    inputs = keras.Input((64, 128))
    h = inputs
    for _ in range(4):
        attended = layers.LayerNormalization()(h)
        attended = layers.MultiHeadAttention(4, 32)(attended, attended)
        h = layers.Add()([h, attended])
        fed = layers.LayerNormalization()(h)
        fed = layers.Dense(512, "gelu")(fed)
        h = layers.Add()([h, layers.Dense(128)(fed)])
    h = layers.GlobalAveragePooling1D()(h)
    return keras.Model(inputs, layers.Dense(10)(h))


BUILDERS = {
    "unet": unet,
    "transformer": transformer,
    "mobilenet_v2": lambda: keras.applications.MobileNetV2(
        (96, 96, 3), weights=None, classes=10, classifier_activation=None
    ),
    "efficientnet_b0": lambda: keras.applications.EfficientNetB0(
        input_shape=(96, 96, 3),
        weights=None,
        classes=10,
        classifier_activation=None,
    ),
}


def build(name, batch):
    """Returns a compiled model and an endless data set of one batch."""
    keras.utils.set_random_seed(1)
    model = BUILDERS[name]() if name in BUILDERS else models.build(name)
    model.compile(
        keras.optimizers.SGD(0.01, momentum=0.9),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        jit_compile=False,
    )
    random = np.random.RandomState(1)
    x = random.randn(batch, *model.input_shape[1:]).astype("float32")
    y = random.randint(0, 10, batch)
    return model, tf.data.Dataset.from_tensors((x, y)).repeat()


def best_bottleneck(costs, ends, splits):
    """Returns the cost of the slowest stage of the best cuts."""
    done = np.concatenate([[0.0], np.cumsum(costs)])[np.array([0, *ends])]
    pieces = np.diff(done)
    if splits <= 3:
        return min(
            max(done[b] - done[a] for a, b in itertools.pairwise(edges))
            for edges in (
                [0, *inner, len(pieces)]
                for inner in itertools.combinations(
                    range(1, len(pieces)), splits - 1
                )
            )
        )
    low, high = pieces.max(), done[-1]
    while high - low > 1e-6 * high:
        middle = (low + high) / 2
        if _stages_below(pieces, middle) <= splits:
            high = middle
        else:
            low = middle
    return high


def _stages_below(pieces, limit):
    count, held = 1, 0.0
    for piece in pieces:
        if held + piece > limit:
            count, held = count + 1, 0.0
        held += piece
    return count


def by_parameters(model):
    """Returns the name of the layer after which half the parameters lie."""
    graph = trace_graph(model)
    counts = np.cumsum(
        [sum(int(np.prod(v.shape)) for v in n.variables) for n in graph.nodes]
    )
    legal = graph.legal_cuts()
    cut = min(legal, key=lambda p: abs(counts[p] - counts[-1] / 2))
    return [graph.nodes[cut].name]


@contextlib.contextmanager
def one_core():
    """Holds all threads of this process, also those to come, on one core."""
    cores = os.sched_getaffinity(0)
    _hold_on({max(cores)})
    try:
        yield
    finally:
        _hold_on(cores)


def _hold_on(cores):
    for thread in os.listdir("/proc/self/task"):
        # A thread may have ended since.
        with contextlib.suppress(ProcessLookupError):
            os.sched_setaffinity(int(thread), cores)


def plan_anew(model, count, batch):
    """Returns a plan, nothing being known before."""
    devices = [f"CPU:{k}" for k in range(count)]
    with tempfile.TemporaryDirectory() as fresh:
        return fdg_keras.plan(model, count, batch, devices, cache_dir=fresh)


def alone(built, plan, rounds):
    """Returns seconds of ticks of the slowest stage, predicted and measured.

    Args:
        built: The model and its data.
        plan: Of the model.
        rounds: How often both are measured, in turns.

    Returns:
        Arrays `[rounds]`, of the stage's layers by the costs of each round, and
        of its loop while nothing else runs.
    """
    linked = bench_speed.Linked(built, plan, 2)
    unlinked = bench_speed.Unlinked(linked, plan.batch_size)
    slowest = max(range(len(plan.stages)), key=lambda k: plan.stages[k].tick_s)
    stage, loop = plan.stages[slowest], unlinked.loops[slowest]
    begin = [0, *plan.cuts][slowest]
    ticks = max(int(0.5 / stage.tick_s), 2)
    predicted, measured = [], []
    with linked.pipeline():
        loop(loop.late, 2, 0, 0.01)
        for _ in range(rounds):
            again = plan_anew(built[0], len(plan.stages), plan.batch_size)
            costs = [cost for one in again.stages for cost in one.costs]
            layers_s = sum(costs[begin : begin + len(stage.layers)])
            predicted.append(stage.tick_s - sum(stage.costs) + layers_s)
            start = time.perf_counter()
            loop(0, ticks, 0, 0.01)
            measured.append((time.perf_counter() - start) / ticks)
        loop(0, 0, loop.late, 0.01)
    return np.array(predicted), np.array(measured)


def end_to_end(name, batch, plan, rounds):
    """Returns milliseconds of a step with three ways to cut in two."""
    built = build(name, batch)
    variants = {
        "plan": bench_speed.Linked(built, plan, 2),
        "operations": bench_speed.Linked(build(name, batch), 2, 2),
        "parameters": bench_speed.Linked(
            build(name, batch),
            fdg_keras.Trainer(
                built[0], by_parameters(built[0]), ["CPU:0", "CPU:1"]
            ).plan,
            2,
        ),
    }
    times = {key: [] for key in variants}
    steps = {}
    for key, variant in variants.items():
        variant.run(4)
        steps[key] = int(min(max(2.0 / variant.run(4), 8), 1000))
    for _ in range(rounds):
        for key, variant in variants.items():
            times[key].append(1e3 * variant.run(steps[key]))
    found = {key: statistics.median(values) for key, values in times.items()}
    ratios = [p / o for p, o in zip(times["parameters"], times["plan"])]
    return {**found, "gain": statistics.median(ratios), "rounds_ms": times}


def measure(name, splits, rounds):
    """Measures one network; yields entries of the JSON file."""
    batch = CASES[name]
    for count in splits:
        built = build(name, batch)
        with one_core():
            start = time.perf_counter()
            plan = plan_anew(built[0], count, batch)
            seconds = time.perf_counter() - start
            predicted, measured = alone(built, plan, rounds)
        graph = trace_graph(built[0])
        costs = np.concatenate([stage.costs for stage in plan.stages])
        ends = [*(p + 1 for p in graph.legal_cuts()), len(costs)]
        slowest = max(sum(stage.costs) for stage in plan.stages)
        entry = {
            "model": name,
            "batch": batch,
            "K": count,
            "plan_s": seconds,
            "best": best_bottleneck(costs, ends, count) / slowest,
            "predicted_ms": 1e3 * np.median(predicted),
            "measured_ms": 1e3 * np.median(measured),
            "ratio": np.median(measured / predicted),
            "ratios": list(measured / predicted),
        }
        if count == 2:
            entry["end_to_end_ms"] = end_to_end(name, batch, plan, rounds)
        yield entry
        keras.backend.clear_session()
        gc.collect()


def plan_deep(name, splits=8, batch=32):
    """Plans a deep network; returns an entry of the JSON file."""
    model = build(name, batch)[0]
    devices = [f"CPU:{k}" for k in range(splits)]
    with tempfile.TemporaryDirectory() as fresh:
        settings = (model, splits, batch, devices)
        start = time.perf_counter()
        fdg_keras.plan(*settings, cache_dir=fresh)
        planned = time.perf_counter()
        # Nothing is left to measure.
        with contextlib.suppress(ValueError):
            fdg_keras.plan(*settings, cache_dir=fresh, memory_limit=2**20)
        refused = time.perf_counter()
    return {
        "model": name,
        "batch": batch,
        "K": splits,
        "plan_s": planned - start,
        "refused_s": refused - planned,
        "at_most_s": DEEP[name],
    }


def _row_of_deep(entry):
    return (
        f"{entry['model']:<16}{entry['batch']:>6}{entry['K']:>3}"
        f"{entry['plan_s']:>8.1f}{entry['refused_s']:>9.1f}"
        f"{entry['at_most_s']:>9}"
    )


def _run_deep(result, path):
    print(
        f"{'network':<16}{'batch':>6}{'K':>3}{'plan s':>8}{'refused':>9}"
        f"{'at most':>9}"
    )
    for name in DEEP:
        entry = plan_deep(name)
        result["cases"].append(entry)
        print(_row_of_deep(entry), flush=True)
        if path:
            path.write_text(json.dumps(result, indent=1))


def _row(entry):
    text = (
        f"{entry['model']:<16}{entry['batch']:>6}{entry['K']:>3}"
        f"{entry['plan_s']:>8.1f}{entry['best']:>7.3f}"
        f"{entry['predicted_ms']:>11.1f}{entry['measured_ms']:>10.1f}"
        f"{entry['ratio']:>7.2f}"
    )
    if "end_to_end_ms" in entry:
        ways = entry["end_to_end_ms"]
        text += (
            f"  {ways['plan']:>9.1f}{ways['operations']:>11.1f}"
            f"{ways['parameters']:>11.1f}{ways['gain']:>6.2f}"
        )
    return text


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="also write the figures here")
    parser.add_argument("--models", nargs="+", choices=CASES, default=[*CASES])
    parser.add_argument("--splits", nargs="+", type=int, default=SPLITS)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--deep", action="store_true", help="only plan")
    args = parser.parse_args()
    tf.config.threading.set_intra_op_parallelism_threads(1)
    tf.config.set_visible_devices([], "GPU")
    tf.config.set_logical_device_configuration(
        tf.config.list_physical_devices("CPU")[0],
        [tf.config.LogicalDeviceConfiguration()] * max(*args.splits, 8),
    )
    sys.setrecursionlimit(20000)
    result = {"machine": bench_speed._machine(), "cases": []}
    print(", ".join(f"{k} {v}" for k, v in result["machine"].items()))
    if args.deep:
        _run_deep(result, args.json)
        return
    print(
        f"{'network':<16}{'batch':>6}{'K':>3}{'plan s':>8}{'best':>7}"
        f"{'predicted':>11}{'measured':>10}{'ratio':>7}"
        f"  {'step plan':>9}{'operations':>11}{'parameters':>11}{'gain':>6}"
    )
    for name in args.models:
        for entry in measure(name, args.splits, args.rounds):
            result["cases"].append(entry)
            print(_row(entry), flush=True)
            if args.json:
                args.json.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
