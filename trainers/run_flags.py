"""The flags that the training scripts share, and what they stand for."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import tensorflow as tf
from absl import flags

from fdg_keras.crossing import STASHES
from fdg_keras.delays import ORDERS
from trainers import datasets, models, recipes

FLAGS = flags.FLAGS


def define_stages() -> None:
    """Defines how a network is cut into stages, and where they run."""
    flags.DEFINE_string(
        "splits",
        "2",
        "Number of stages, or names of the layers to cut after, with commas.",
    )
    flags.DEFINE_integer(
        "delay", 2, "Batches of delay per hop between stages.", lower_bound=0
    )
    flags.DEFINE_float(
        "shrink",
        1.0,
        "Factor a gradient is multiplied by at each hop, in (0, 1].",
        lower_bound=0.0,
        upper_bound=1.0,
    )
    flags.DEFINE_enum(
        "stash",
        "exact",
        list(STASHES),
        "What a stage keeps of a forward until its backward: all it needs; "
        "what of that is expensive to compute; activations, but no weights; "
        "inputs.",
    )
    flags.DEFINE_enum(
        "order",
        "forward_first",
        list(ORDERS),
        "What a stage does first at each tick.",
    )
    flags.DEFINE_list(
        "devices",
        None,
        "Devices of the stages, for example GPU:0,GPU:1. Default: all GPUs, "
        "else all logical CPUs.",
    )
    flags.DEFINE_integer(
        "virtual_devices",
        None,
        "Logical CPUs to make when there is no GPU. Default: one for each "
        "stage.",
        lower_bound=1,
    )


def define_training(batch_size: int, train_epochs: int) -> None:
    """Defines how long to train, on how much at a time, and where it is kept.

    Args:
        batch_size: The default.
        train_epochs: The default.
    """
    flags.DEFINE_integer(
        "batch_size", batch_size, "Images in a batch.", lower_bound=1
    )
    flags.DEFINE_integer("train_epochs", train_epochs, "Epochs.", lower_bound=1)
    flags.DEFINE_integer("seed", 0, "Seed of all that is random.")
    flags.DEFINE_string(
        "model_dir",
        None,
        "Folder for TensorBoard logs and the trained model. Default: a fresh "
        "one under ./runs.",
    )


def define_recipe() -> None:
    """Defines the flags of a `Recipe`, by its names and with its defaults."""
    default = recipes.Recipe()
    define_stages()
    define_training(default.batch_size, default.train_epochs)
    flags.DEFINE_enum(
        "dataset", default.dataset, sorted(datasets.DATASETS), "Data set."
    )
    flags.DEFINE_string(
        "data_dir",
        None,
        "Folder of prepared data sets. Default: the environment variable "
        "TFDS_DATA_DIR, or ~/tensorflow_datasets.",
    )
    flags.DEFINE_bool(
        "download", False, "Fetch and prepare a data set that is not there."
    )
    flags.DEFINE_enum(
        "model", default.model, sorted(models.NETWORKS), "Network."
    )
    flags.DEFINE_list(
        "corrections",
        [],
        f"Corrections for staleness, some of {','.join(recipes.CORRECTIONS)}.",
    )
    flags.DEFINE_bool(
        "emulate", False, "Train on one device as the stages would."
    )
    flags.DEFINE_enum(
        "optimizer", default.optimizer, recipes.OPTIMIZERS, "Optimizer."
    )
    flags.DEFINE_enum(
        "dtype",
        default.dtype,
        list(recipes.POLICIES),
        "What stages compute in; weights are float32 in any case.",
    )
    _define_learning_rate(default)


def _define_learning_rate(default: recipes.Recipe) -> None:
    flags.DEFINE_float(
        "learning_rate",
        default.learning_rate,
        "Learning rate at the start, after the warm-up.",
        lower_bound=0.0,
    )
    flags.DEFINE_float(
        "momentum",
        default.momentum,
        "Momentum of SGD.",
        lower_bound=0.0,
        upper_bound=1.0,
    )
    flags.DEFINE_float(
        "weight_decay",
        default.weight_decay,
        "Weight decay, PyTorch's: a part of the gradient with SGD and Adam.",
        lower_bound=0.0,
    )
    flags.DEFINE_integer(
        "warmup_epochs",
        default.warmup_epochs,
        "Epochs at a tenth of the learning rate, at the start.",
        lower_bound=0,
    )
    flags.DEFINE_list(
        "lr_boundaries",
        None,
        "Epochs after which the learning rate falls to a tenth. Default: "
        "150,225,275 of 300, and in proportion.",
    )


def parse_recipe() -> recipes.Recipe:
    """Returns the recipe that the flags give.

    Raises:
        ValueError: If `--lr_boundaries` are no numbers.
    """
    names = [field.name for field in dataclasses.fields(recipes.Recipe)]
    values: dict[str, Any] = {
        name: FLAGS[name].value for name in names if name in FLAGS
    }
    values["splits"] = parse_splits(FLAGS.splits)
    if FLAGS.lr_boundaries is not None:
        try:
            boundaries = [int(epoch) for epoch in FLAGS.lr_boundaries]
        except ValueError:
            raise ValueError(
                "Expected --lr_boundaries to be epochs, for example 150,225. "
                f"Received: {','.join(FLAGS.lr_boundaries)}"
            ) from None
        values["lr_boundaries"] = boundaries
    return recipes.Recipe(**values)


def parse_splits(text: str) -> int | list[str]:
    """Returns a number of stages or the names of the layers to cut after."""
    names = [name.strip() for name in text.split(",")]
    if len(names) == 1 and names[0].lstrip("-").isdigit():
        return int(names[0])
    return names


def make_devices(
    splits: int | Sequence[str], virtual_devices: int | None
) -> None:
    """Makes the logical CPUs, before anything else wakes TensorFlow.

    Args:
        splits: As `parse_splits` returns it.
        virtual_devices: How many to make. Default: one for each stage.
    """
    if tf.config.list_physical_devices("GPU"):
        return
    stages = splits if isinstance(splits, int) else len(splits) + 1
    count = virtual_devices or max(stages, 1)
    tf.config.set_logical_device_configuration(
        tf.config.list_physical_devices("CPU")[0],
        [tf.config.LogicalDeviceConfiguration()] * count,
    )
