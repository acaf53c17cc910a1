"""What a network of more than a thousand layers takes in four stages.

    .venv/bin/python scripts/bench_deep.py --data_dir DIR     (6 minutes)
    .venv/bin/python scripts/bench_deep.py --data_dir DIR --model resnet56
                                                              (15 seconds)

Trains ResNet-1202 on CIFAR-10 by SGD with momentum for 20 batches of 16, each
stage on a logical CPU, and prints seconds until the model is there, until it is
in stages and the first batch has been trained, and for each batch after that;
and the most memory that the process had.
"""

import argparse
import json
import os
import resource
import statistics
import sys
import time
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import bench_speed
import keras
import tensorflow as tf

import fdg_keras
from trainers import datasets, models

SPLITS, BATCH, STEPS = 4, 16, 20


class Clock(keras.callbacks.Callback):
    """Notes when batches have ended in the last stage."""

    drain_every = None  # It looks at no weights.

    def __init__(self):
        super().__init__()
        self.times, self.losses = [], []

    def on_train_batch_end(self, batch, logs=None):
        self.times.append(time.perf_counter())
        self.losses.append(logs["loss"])


def measure(name, dataset, data_dir):
    """Trains; returns what is written to the JSON file."""
    data = datasets.load(dataset, BATCH, 0, data_dir, limit=BATCH * STEPS)
    start = time.perf_counter()
    model = models.build(name)
    model.compile(
        # The paper's rate to warm up with. In so few batches the loss of
        # ResNet-1202 rises nevertheless.
        keras.optimizers.SGD(0.01, momentum=0.9),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        jit_compile=False,
    )
    built = time.perf_counter()
    devices = [f"CPU:{k}" for k in range(SPLITS)]
    clock = Clock()
    trainer = fdg_keras.Trainer(model, SPLITS, devices)
    trainer.fit(
        data.training(0, 1),
        steps_per_epoch=STEPS,
        shuffle=False,
        verbose=0,
        callbacks=[clock],
    )
    ended = time.perf_counter()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # KiB
    between = [b - a for a, b in zip(clock.times, clock.times[1:])]
    return {
        "machine": bench_speed._machine(),
        "model": name,
        "K": SPLITS,
        "batch": BATCH,
        "batches": len(clock.times),
        "build_s": built - start,
        "first_step_s": clock.times[0] - built,
        "step_s": statistics.median(between),
        "drain_s": ended - clock.times[-1],
        "peak_gib": peak / 2**20,
        "losses": clock.losses,  # means since the first batch
    }


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--model", default="resnet1202")
    parser.add_argument("--data_dir", help="of tensorflow-datasets")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    args = parser.parse_args()
    tf.config.set_visible_devices([], "GPU")
    tf.config.set_logical_device_configuration(
        tf.config.list_physical_devices("CPU")[0],
        [tf.config.LogicalDeviceConfiguration()] * SPLITS,
    )
    found = measure(args.model, "cifar10", args.data_dir)
    print(", ".join(f"{k} {v}" for k, v in found["machine"].items()))
    print(
        f"{found['model']}, {SPLITS} stages, {found['batches']} batches of "
        f"{BATCH}: built in {found['build_s']:.1f} s, first step after another "
        f"{found['first_step_s']:.1f} s, then {found['step_s']:.2f} s each, "
        f"drained in {found['drain_s']:.1f} s; {found['peak_gib']:.1f} GiB; "
        f"loss {found['losses'][0]:.2f}, mean {found['losses'][-1]:.2f}"
    )
    if args.json:
        args.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
