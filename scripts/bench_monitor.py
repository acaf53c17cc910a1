"""What it costs to watch the stages.

    .venv/bin/python scripts/bench_monitor.py --json monitor.json  (6 minutes)
    .venv/bin/python scripts/bench_monitor.py --model mlp          (1 minute)

Prints, for each network, batch size and two stages, milliseconds per step with
all stages busy (medians of rounds in which both variants take turns):

    plain      the stages as they train
    watched    the same stages measuring themselves, as they do for
               `fdg_keras.callbacks.PipelineMonitor`
    ratio      watched / plain (median of the ratios within a round), and the
               lowest and the highest of them
    processor  the same ratio of processor time, which other processes on the
               machine disturb less
    epoch      what the callback itself takes at the end of an epoch, to write
               it all

Devices and threads as in `bench_speed.py`.
"""

import argparse
import contextlib
import json
import statistics
import tempfile
import time
from pathlib import Path

import bench_speed
import tensorflow as tf

from fdg_keras.callbacks import PipelineMonitor
from fdg_keras.data import Batches

# Name, hidden layers (of the MLP), batch size.
CASES = [("resnet20", 0, 128), ("resnet20", 0, 32), ("mlp", 3, 32)]
SPLITS = 2


class Watched(bench_speed.Linked):
    """The stages as they train, measuring themselves."""

    @contextlib.contextmanager
    def pipeline(self):
        """Opens the trainer's pipeline, with its variables in place."""
        trainer = self.trainer
        batches = Batches(trainer._graph, x=self._data)
        with trainer._deployment as deployment:
            built = deployment.build("train", batches.spec, probed=True)
            yield built.pipeline, batches


class Timed(PipelineMonitor):
    """Measures what it takes to write an epoch, in milliseconds."""

    def on_epoch_end(self, epoch, logs=None):
        start = time.perf_counter()
        super().on_epoch_end(epoch, logs)
        self.milliseconds = 1e3 * (time.perf_counter() - start)


def measure(name, hidden, batch, rounds):
    """Measures one case; returns an entry of the JSON file."""
    variants = {
        key: kind(bench_speed.build(name, hidden, batch), SPLITS, delay=2)
        for key, kind in (("plain", bench_speed.Linked), ("watched", Watched))
    }
    for variant in variants.values():
        variant.run(8)  # the first run initializes kernels
    wanted = bench_speed.ROUND_S / variants["plain"].run(8)
    steps = int(min(max(wanted, bench_speed.LEAST_STEPS), 20000))
    times: dict[str, list[float]] = {key: [] for key in variants}
    processor: dict[str, list[float]] = {key: [] for key in variants}
    for turn in range(rounds):
        # Who comes first has no advantage of it.
        for key in list(variants)[:: 1 if turn % 2 else -1]:
            before = time.process_time()
            times[key].append(1e3 * variants[key].run(steps))
            processor[key].append(time.process_time() - before)
    ratios = _ratios(times)
    return {
        "model": name,
        "layers": hidden or None,
        "batch": batch,
        "K": SPLITS,
        **{f"{k}_ms": statistics.median(v) for k, v in times.items()},
        "ratio": statistics.median(ratios),
        "ratios": ratios,
        "processor_ratio": statistics.median(_ratios(processor)),
        "epoch_ms": measure_writing(variants["watched"]),
        "rounds_ms": times,
        "rounds_processor_s": processor,
    }


def _ratios(values):
    return [w / p for w, p in zip(values["watched"], values["plain"])]


def measure_writing(watched):
    """Returns milliseconds that the callback takes after its second epoch."""
    with tempfile.TemporaryDirectory() as folder:
        monitor = Timed(folder)
        watched.trainer.fit(
            watched._data,
            steps_per_epoch=40,
            epochs=2,
            verbose=0,
            callbacks=[monitor],
        )
        return monitor.milliseconds


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="also write the figures here")
    parser.add_argument("--model", choices=["resnet20", "mlp"])
    parser.add_argument("--rounds", type=int, default=11, help="default 11")
    args = parser.parse_args()
    tf.config.threading.set_intra_op_parallelism_threads(1)
    tf.config.set_visible_devices([], "GPU")
    tf.config.set_logical_device_configuration(
        tf.config.list_physical_devices("CPU")[0],
        [tf.config.LogicalDeviceConfiguration()] * SPLITS,
    )
    result = {"machine": bench_speed._machine(), "cases": []}
    print(", ".join(f"{k} {v}" for k, v in result["machine"].items()))
    print(
        f"{'network':<10}{'batch':>5}{'K':>3}{'plain':>10}{'watched':>10}"
        f"{'ratio':>8}{'lowest':>8}{'highest':>8}{'processor':>10}{'epoch':>8}"
    )
    for name, hidden, batch in CASES:
        if args.model not in (None, name):
            continue
        case = measure(name, hidden, batch, args.rounds)
        result["cases"].append(case)
        print(
            f"{name + (f' ({hidden})' if hidden else ''):<10}{batch:>5}"
            f"{SPLITS:>3}{case['plain_ms']:>10.3f}{case['watched_ms']:>10.3f}"
            f"{case['ratio']:>8.3f}{min(case['ratios']):>8.3f}"
            f"{max(case['ratios']):>8.3f}{case['processor_ratio']:>10.3f}"
            f"{case['epoch_ms']:>8.1f}",
            flush=True,
        )
        if args.json:
            args.json.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
