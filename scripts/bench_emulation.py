"""What it costs to emulate stages on one device.

    .venv/bin/python scripts/bench_emulation.py --json emulation.json  (7 min)

Prints, for ResNet-20 and each number of stages K, milliseconds per step
(medians of rounds in which all take turns):

    Keras     `model.fit`, an epoch after its first
    emulated  `fdg_keras.fit(..., emulate=True)` with delay=2, likewise
    ratio     emulated / Keras (median of the ratios within a round), and the
              lowest and the highest of them

All threads of the process are pinned to one core, so that neither gains from a
second one.
"""

import argparse
import json
import os
import statistics
import time
from pathlib import Path

import bench_speed
import keras
import tensorflow as tf

from fdg_keras import Trainer

# Batch size, steps of an epoch.
CASES = [(128, 8), (32, 24)]
STAGES = (1, 2, 4)


class Clock(keras.callbacks.Callback):
    """Takes the time of an epoch, from its first batch to its last."""

    seconds = 0.0

    def on_epoch_begin(self, epoch, logs=None):
        self._start = time.perf_counter()

    def on_epoch_end(self, epoch, logs=None):
        self.seconds = time.perf_counter() - self._start


class Epochs:
    """A model that trains an epoch whenever it is asked to.

    Args:
        batch: Samples in a batch.
        steps: Of an epoch.
        splits: Number of stages to emulate; `None` trains by Keras alone.
    """

    def __init__(self, batch, steps, splits=None):
        self._fit, data = self._build(batch, splits)
        self._data, self._steps = data.take(steps), steps
        self.run()  # The first compiles.

    @staticmethod
    def _build(batch, splits):
        model, data = bench_speed.build("resnet20", 0, batch)
        if splits is None:
            return model.fit, data
        return Trainer(model, splits, emulate=True).fit, data

    def run(self):
        """Returns milliseconds per step."""
        clock = Clock()
        self._fit(
            self._data, epochs=2, verbose=0, shuffle=False, callbacks=[clock]
        )
        return 1e3 * clock.seconds / self._steps


def measure(batch, steps, rounds):
    """Measures one batch size; returns entries of the JSON file."""
    variants = {None: Epochs(batch, steps)}
    variants |= {splits: Epochs(batch, steps, splits) for splits in STAGES}
    times: dict[int | None, list[float]] = {key: [] for key in variants}
    for turn in range(rounds):
        # Who comes first has no advantage of it.
        for key in list(variants)[:: 1 if turn % 2 else -1]:
            times[key].append(variants[key].run())
    for splits in STAGES:
        ratios = [e / k for e, k in zip(times[splits], times[None])]
        yield {
            "model": "resnet20",
            "batch": batch,
            "K": splits,
            "keras_ms": statistics.median(times[None]),
            "emulated_ms": statistics.median(times[splits]),
            "ratio": statistics.median(ratios),
            "ratios": ratios,
        }


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="also write the figures here")
    parser.add_argument("--rounds", type=int, default=7, help="default 7")
    args = parser.parse_args()
    tf.config.set_visible_devices([], "GPU")
    result = {"machine": bench_speed._machine(), "cases": []}
    bench_speed._pin({min(os.sched_getaffinity(0))})
    print(", ".join(f"{k} {v}" for k, v in result["machine"].items()))
    print(
        f"{'network':<10}{'batch':>5}{'K':>3}{'Keras':>10}{'emulated':>10}"
        f"{'ratio':>8}{'lowest':>8}{'highest':>8}"
    )
    for batch, steps in CASES:
        for case in measure(batch, steps, args.rounds):
            result["cases"].append(case)
            print(
                f"{case['model']:<10}{batch:>5}{case['K']:>3}"
                f"{case['keras_ms']:>10.2f}{case['emulated_ms']:>10.2f}"
                f"{case['ratio']:>8.3f}{min(case['ratios']):>8.3f}"
                f"{max(case['ratios']):>8.3f}",
                flush=True,
            )
        if args.json:
            args.json.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
