"""Trains a small residual network on scikit-learn's digits, split in stages.

The same network is trained twice from the same initial weights, with the same
seed and epochs: once by `keras.Model.fit` on one device, and once by
`fdg_keras.Trainer`, one stage on each device. Then both are tested on images
that neither has seen. Nothing is downloaded: the 1,797 images of 8x8 pixels
come with scikit-learn.

    python -m trainers.digits
    python -m trainers.digits --splits=4 --shrink=0.5
    python -m trainers.digits --splits=block1,block2 --delay=1

Without GPUs, logical CPUs stand in for them. `scripts/cluster.sh` runs the
stages on workers, processes of their own, as if each were another machine.

Expected: about one minute on two cores; test accuracy between 97.5 % and 99 %
for both, with two to four stages. Seed 0 on one machine, the others round
differently: 98.33 % by `Model.fit`, 98.06 % in two stages, 97.78 % in four, and
98.06 % in four with `--shrink=0.5`.
"""

import math
import pathlib
import statistics
import sys
import time

import keras
import sklearn.datasets
import sklearn.model_selection
from absl import app, flags

import fdg_keras
from trainers import models, run_flags
from trainers.callbacks import EpochTimer

FLAGS = flags.FLAGS

run_flags.define_stages()
run_flags.define_training(batch_size=32, train_epochs=15)
flags.adopt_module_key_flags(run_flags)  # `--help` shows them, too
flags.DEFINE_float(
    "learning_rate",
    0.05,
    "Learning rate at the start; falls to zero along a cosine.",
    lower_bound=0.0,
)
flags.DEFINE_bool(
    "cluster",
    False,
    "Run the stages on the devices of the workers that TF_CONFIG names.",
)
flags.DEFINE_bool(
    "smoke", False, "Two epochs on 256 images: shows only that it all runs."
)


def load_data():
    """Returns `(x_train, y_train), (x_test, y_test)`, one fifth for testing.

    Images are float32 `[B, 8, 8, 1]` in [0, 1], labels are integers `[B]`.
    """
    images, labels = sklearn.datasets.load_digits(return_X_y=True)
    images = (images / 16.0).astype("float32").reshape(-1, 8, 8, 1)
    x_train, x_test, y_train, y_test = sklearn.model_selection.train_test_split(
        images,
        labels,
        test_size=0.2,
        stratify=labels,
        random_state=FLAGS.seed,
    )
    if FLAGS.smoke:
        x_train, y_train = x_train[:256], y_train[:256]
    return (x_train, y_train), (x_test, y_test)


def make_model(steps: int) -> keras.Model:
    """Returns a compiled model; the same weights at every call."""
    keras.utils.set_random_seed(FLAGS.seed)
    model = models.build("resnet_digits")
    model.compile(
        optimizer=keras.optimizers.SGD(
            keras.optimizers.schedules.CosineDecay(FLAGS.learning_rate, steps),
            momentum=0.9,
        ),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    return model


def train(trained, data, epochs: int, log_dir: pathlib.Path):
    """Trains a model or trainer, then tests it.

    Returns:
        Test accuracy, and a list of the seconds of each epoch.
    """
    # Again, so that both runs shuffle alike.
    keras.utils.set_random_seed(FLAGS.seed)
    (x_train, y_train), test = data
    timer = EpochTimer()
    trained.fit(
        x_train,
        y_train,
        batch_size=FLAGS.batch_size,
        epochs=epochs,
        validation_data=test,
        callbacks=[timer, keras.callbacks.TensorBoard(log_dir)],
    )
    result = trained.evaluate(*test, verbose=0, return_dict=True)
    return result["accuracy"], timer.seconds


def main(argv):
    if len(argv) > 1:
        raise app.UsageError(f"Expected flags only. Received: {argv[1:]}")

    # ---- Devices and data -----------------------------------------------
    splits = run_flags.parse_splits(FLAGS.splits)
    devices = FLAGS.devices
    if FLAGS.cluster:
        try:
            devices = fdg_keras.connect_to_cluster()
        except (ValueError, ConnectionError) as error:
            sys.exit(f"{type(error).__name__}: {error}")
    else:
        run_flags.make_devices(splits, FLAGS.virtual_devices)
    data = load_data()
    epochs = 2 if FLAGS.smoke else FLAGS.train_epochs
    steps = epochs * math.ceil(len(data[0][0]) / FLAGS.batch_size)
    model_dir = pathlib.Path(
        FLAGS.model_dir or time.strftime("runs/digits-%Y%m%d-%H%M%S")
    )
    results = {}

    # ---- In stages ------------------------------------------------------
    model = make_model(steps)
    try:
        trainer = fdg_keras.Trainer(
            model,
            splits=splits,
            devices=devices,
            delay=FLAGS.delay,
            shrink=FLAGS.shrink,
            stash=FLAGS.stash,
            order=FLAGS.order,
        )
    except ValueError as error:
        # Says what is wrong with a flag; a traceback would add nothing.
        sys.exit(f"{type(error).__name__}: {error}")
    print(trainer.plan)
    print(f"\nfdg_keras.Trainer.fit, {epochs} epochs")
    results["fdg_keras.Trainer"] = train(
        trainer, data, epochs, model_dir / "fdg_keras"
    )
    model.save(model_dir / "model.keras")

    # ---- Ordinarily -----------------------------------------------------
    print(f"\nkeras.Model.fit, {epochs} epochs")
    results["keras.Model"] = train(
        make_model(steps), data, epochs, model_dir / "model_fit"
    )

    # ---- Side by side ---------------------------------------------------
    print(f"\n{'':20}{'test accuracy':>13}{'first epoch':>15}{'others':>12}")
    for name, (accuracy, seconds) in results.items():
        others = statistics.median(seconds[1:] or seconds)
        print(f"{name:20}{accuracy:13.2%}{seconds[0]:13.2f} s{others:10.2f} s")
    print("Time is of an epoch with its validation; the first also compiles.")
    print(f"\nTrained model: {model_dir / 'model.keras'}")
    print(f"TensorBoard logs: {model_dir}")
    print(f"    tensorboard --logdir {model_dir}")


if __name__ == "__main__":
    app.run(main)
