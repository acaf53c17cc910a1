"""Trains a network in stages, by the paper's recipe or another.

The defaults are those of the paper (arXiv 1906.09108) for CIFAR-10: SGD with
learning rate 0.1, momentum 0.9 and weight decay 5e-4, batches of 128, 300
epochs, a tenth of the learning rate after 150, 225 and 275, crops and mirrored
images. `--splits=1` or `--delay=0` is back-propagation.

    python -m trainers.train --smoke
    python -m trainers.train --train_epochs=10 --warmup_epochs=1 \
        --lr_boundaries=5,7,9 --splits=4 --delay=1 \
        --corrections=weight_prediction
    python -m trainers.train --model=resnet20 --shrink=0.2
    python -m trainers.train --model=resnet56 --splits=4 --shrink=0.5
    python -m trainers.train --dataset=cifar100 --model=wrn28_10 --shrink=0.6
    python -m trainers.train --dataset=imagenet2012 --model=resnet50 \
        --batch_size=256 --train_epochs=90 --lr_boundaries=30,60,80 \
        --weight_decay=1e-4 --dtype=bfloat16

CIFAR, MNIST and ImageNet come from tensorflow-datasets: prepared in
`--data_dir`, or fetched with `--download`. What a run leaves in `--model_dir`
is told in `trainers/run_folder.py`; killed at any moment, it goes on with
`--resume`, also in another number of stages.

Expected, on two cores: `--smoke` takes 15 seconds. The second took 31 minutes
beside other programs (2 minutes an epoch without them) and ended at 20.30 %;
emulated it had 20.5 to 21.1 % with three seeds. The others were not run to the
end: at a quarter of a second a step 300 epochs of ResNet-20 are 8 hours, of
ResNet-56 about a day; WRN-28-10 and ImageNet want GPUs. The paper's
test errors on CIFAR-10 with two stages are 7.92 % for ResNet-20 (7.23 % with
`--shrink=0.2`; 7.78 % by back-propagation), and 6.14 % for ResNet-56 in four
stages with `--shrink=0.5`. On CIFAR-100, WRN-28-10 in two stages with
`--shrink=0.6` had 19.08 %.
"""

import dataclasses
import sys
import time

from absl import app, flags, logging

from trainers import recipes, run_flags, runs

FLAGS = flags.FLAGS

run_flags.define_recipe()
flags.adopt_module_key_flags(run_flags)  # `--help` shows them, too
flags.DEFINE_bool(
    "resume", False, "Go on from the latest checkpoint in --model_dir."
)
flags.DEFINE_bool(
    "smoke",
    False,
    "Two epochs on 256 images, of the digits unless --dataset is given: shows "
    "only that it all runs.",
)


def make_smoke(recipe: recipes.Recipe) -> recipes.Recipe:
    """Returns a recipe that takes seconds."""
    return dataclasses.replace(
        recipe,
        train_epochs=2,
        limit=256,
        dataset=FLAGS.dataset if FLAGS["dataset"].present else "digits",
        model=FLAGS.model if FLAGS["model"].present else "resnet_digits",
    )


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"Expected flags only. Received: {argv[1:]}")
    if FLAGS.resume and not FLAGS.model_dir:
        raise app.UsageError("Expected --model_dir with --resume.")
    if not FLAGS["verbosity"].present:
        # Data sets tell of every file they read.
        logging.set_verbosity(logging.WARNING)

    # ---- Settings, data and model ---------------------------------------
    try:
        recipe = run_flags.parse_recipe()
        if FLAGS.smoke:
            recipe = make_smoke(recipe)
        run_flags.make_devices(recipe.splits, FLAGS.virtual_devices)
        run = runs.Run(
            recipe,
            FLAGS.model_dir or time.strftime("runs/train-%Y%m%d-%H%M%S"),
            resume=FLAGS.resume,
            data_dir=FLAGS.data_dir,
            download=FLAGS.download,
            devices=FLAGS.devices,
        )
    except ValueError as error:
        # Says what is wrong with a flag; a traceback would add nothing.
        sys.exit(f"{type(error).__name__}: {error}")
    print(run.trainer.plan)

    # ---- Training -------------------------------------------------------
    if run.first_epoch:
        print(f"\nGoing on after {run.first_epoch} epochs")
    result = run.train()

    # ---- What came of it ------------------------------------------------
    print(f"\nTest error: {result['test_error']:.2f} %")
    print(f"Trained model: {result['model']}")
    print(f"Figures of each epoch: {result['model'].parent / 'history.csv'}")
    print(f"    tensorboard --logdir {result['model'].parent / 'logs'}")


if __name__ == "__main__":
    app.run(main)
