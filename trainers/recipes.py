"""One run: a network, its data, and how it is trained in stages.

The defaults are the recipe of the paper (arXiv 1906.09108, section V), for
CIFAR-10: SGD with momentum 0.9 and weight decay 5e-4, batches of 128, 300
epochs, a learning rate of 0.1 that falls to a tenth after epochs 150, 225 and
275, crops and mirrored images.

    run = Run(Recipe(model="resnet56", splits=4, shrink=0.5), "runs/resnet56")
    run.train()["test_error"]
"""

import dataclasses
import os
import pathlib
import platform
from collections.abc import Sequence
from typing import Any

import keras
import tensorflow as tf
import tensorflow_datasets as tfds

import fdg_keras
from fdg_keras.crossing import Stash
from fdg_keras.delays import Order
from trainers import datasets, local_losses, models
from trainers.callbacks import EpochTimer, Keep
from trainers.run_folder import RunFolder

TRAININGS = ("delayed_gradients", "local_losses", "data_parallel")
OPTIMIZERS = ("sgd", "adam", "adamw")
CORRECTIONS = ("weight_prediction", "delay_compensation", "lr_rescheduling")
POLICIES = {"float32": "float32", "bfloat16": "mixed_bfloat16"}


@dataclasses.dataclass(frozen=True)
class Recipe:
    """All that the result of a run depends on.

    Attributes:
        dataset: A name in `datasets.DATASETS`.
        model: A name in `models.NETWORKS`.
        batch_size: Images in a batch.
        train_epochs: Epochs.
        training: One of `TRAININGS`: by delayed gradients; by a loss for each
            stage, see `local_losses`; or by `keras.Model.fit`, each batch
            divided among devices.
        splits: Number of stages, or names of layers to cut after. 1 is
            back-propagation. With `"data_parallel"`, the number of devices.
        delay: Batches of delay per hop; 0 is back-propagation.
        shrink: Factor for a gradient at each hop, in (0, 1].
        stash: See `fdg_keras.Trainer`.
        order: See `fdg_keras.Trainer`.
        corrections: Names in `CORRECTIONS`.
        emulate: See `fdg_keras.Trainer`.
        optimizer: One of `OPTIMIZERS`.
        learning_rate: See `learning_rate`.
        momentum: Of SGD.
        accumulate: Batches whose gradients are averaged for one update.
            Default: 1.
        weight_decay: PyTorch's, that is, a part of the gradient with SGD and
            Adam (see `layers.Layers`), and apart from it with AdamW.
        warmup_epochs: Epochs at a tenth of the learning rate, at the start.
        lr_boundaries: Epochs after which the learning rate falls to a tenth.
            `None` takes 1/2, 3/4 and 11/12 of all epochs, rounded down.
        dtype: What stages compute in, a name in `POLICIES`; weights are
            float32 in any case.
        seed: Of weights, shuffling and augmentation.
        limit: Images of each split to use at most. Default: all.
    """

    dataset: str = "cifar10"
    model: str = "resnet20"
    batch_size: int = 128
    train_epochs: int = 300
    training: str = "delayed_gradients"
    splits: int | Sequence[str] = 2
    delay: int = 2
    shrink: float = 1.0
    stash: Stash = "exact"
    order: Order = "forward_first"
    corrections: Sequence[str] = ()
    emulate: bool = False
    optimizer: str = "sgd"
    learning_rate: float = 0.1
    momentum: float = 0.9
    accumulate: int | None = None
    weight_decay: float = 5e-4
    warmup_epochs: int = 0
    lr_boundaries: Sequence[int] | None = None
    dtype: str = "float32"
    seed: int = 0
    limit: int | None = None

    @property
    def boundaries(self) -> Sequence[int]:
        """The epochs after which the learning rate falls."""
        if self.lr_boundaries is not None:
            return self.lr_boundaries
        return [self.train_epochs * e // 300 for e in (150, 225, 275)]


def learning_rate(recipe: Recipe, epoch: int) -> float:
    """Returns the learning rate of an epoch, counted from 0.

    A tenth of it for each boundary that is past, and another tenth during the
    warm-up.
    """
    past = sum(epoch >= boundary for boundary in recipe.boundaries)
    past += epoch < recipe.warmup_epochs
    return recipe.learning_rate / 10**past


class Run:
    """One run in its folder: begun, or gone on with.

    Args:
        recipe: What to do.
        model_dir: Its folder, see `run_folder`.
        resume: Whether to go on from the latest checkpoint, if there is one.
            The rest of the run then is the same, to the bit, as without an
            interruption.
        data_dir: See `datasets.load`.
        download: See `datasets.load`.
        devices: See `fdg_keras.Trainer`.

    Attributes:
        trainer: The `fdg_keras.Trainer`; the model if data parallel.
        first_epoch: The epoch it begins with, counted from 0.

    Raises:
        ValueError: If a setting is out of range, the data set is not prepared,
            or the folder holds another run.
    """

    def __init__(
        self,
        recipe: Recipe,
        model_dir: str | os.PathLike,
        resume: bool = False,
        data_dir: str | None = None,
        download: bool = False,
        devices: Sequence[str] | None = None,
    ):
        self.recipe = recipe
        self._folder = RunFolder(
            pathlib.Path(model_dir), dataclasses.asdict(recipe), resume
        )
        self._data = datasets.load(
            recipe.dataset,
            recipe.batch_size,
            recipe.seed,
            data_dir,
            download,
            recipe.limit,
        )
        self.first_epoch = self._folder.epochs
        if recipe.training == "data_parallel":
            strategy = _strategy(recipe, devices)
            with strategy.scope():
                self.trainer: Any = self._model()
            devices = list(strategy.extended.worker_devices)
        else:
            self.trainer = self._in_stages(self._model(), devices)
            devices = [stage.device for stage in self.trainer.plan.stages]
        self._folder.begin(devices, _versions())

    def _model(self) -> keras.Model:
        if self.first_epoch:
            return self._folder.load()
        return _build(self.recipe, self._data.description)

    def _in_stages(
        self, model: keras.Model, devices: Sequence[str] | None
    ) -> fdg_keras.Trainer:
        recipe, splits = self.recipe, self.recipe.splits
        if recipe.training == "local_losses":
            splits = local_losses.cuts(model)
        return fdg_keras.Trainer(
            model,
            splits=splits,
            devices=devices,
            delay=recipe.delay,
            shrink=recipe.shrink,
            stash=recipe.stash,
            order=recipe.order,
            corrections=_corrections(recipe, self._data.steps_per_epoch),
            emulate=recipe.emulate,
        )

    def train(
        self,
        verbose: Any = "auto",
        callbacks: Sequence[keras.callbacks.Callback] = (),
    ) -> dict[str, Any]:
        """Trains up to the last epoch, testing and saving after each.

        Args:
            verbose: As `keras.Model.fit` takes it.
            callbacks: More of them. They are called before an epoch is saved.

        Returns:
            `"test_error"` after the last epoch, in %; `"history"`, a list with
            the figures of each epoch, by name; `"model"`, the path of the
            trained model.
        """
        recipe = self.recipe
        timer = EpochTimer()
        training = self._data.training(self.first_epoch, recipe.train_epochs)
        test = self._data.test
        if recipe.training == "local_losses":
            training = local_losses.with_labels(training)
            test = local_losses.with_labels(test)
        if self.first_epoch < recipe.train_epochs:
            self.trainer.fit(
                training,
                epochs=recipe.train_epochs,
                initial_epoch=self.first_epoch,
                steps_per_epoch=self._data.steps_per_epoch,
                validation_data=test,
                shuffle=False,  # the data set does
                verbose=verbose,
                callbacks=[
                    keras.callbacks.LearningRateScheduler(
                        lambda epoch, _: learning_rate(recipe, epoch)
                    ),
                    timer,
                    keras.callbacks.TensorBoard(self._folder.logs),
                    *self._monitors(),
                    *callbacks,
                    Keep(self._folder, timer),
                ],
            )
        model = getattr(self.trainer, "model", self.trainer)
        if recipe.training == "local_losses":
            model = local_losses.remove(model)
        history = self._folder.history()
        return {
            "test_error": 100 * (1 - history[-1]["val_accuracy"]),
            "history": history,
            "model": self._folder.finish(model),
        }

    def _monitors(self) -> list[keras.callbacks.Callback]:
        """Returns what watches the stages, if there are any."""
        if not isinstance(self.trainer, fdg_keras.Trainer):
            return []
        return [fdg_keras.callbacks.PipelineMonitor(self._folder.logs)]


def _strategy(
    recipe: Recipe, devices: Sequence[str] | None
) -> tf.distribute.Strategy:
    """Returns what has the variables on all devices."""
    gpus = tf.config.list_logical_devices("GPU")
    found = devices or [
        device.name for device in gpus or tf.config.list_logical_devices("CPU")
    ]
    if not isinstance(recipe.splits, int) or recipe.splits > len(found):
        raise ValueError(
            "Expected `splits` to be the number of devices to train on, at "
            f"most {len(found)}. Received: splits={recipe.splits!r}"
        )
    # Its own choice, collective operations, fails between CPUs once batch
    # normalization has averages to share: "Shape mismatch in the collective".
    reduction = None if gpus else tf.distribute.ReductionToOneDevice()
    return tf.distribute.MirroredStrategy(found[: recipe.splits], reduction)


def _build(recipe: Recipe, data: datasets.Description) -> keras.Model:
    """Returns the network, compiled; the same weights for one seed."""
    for name, value, known in (
        ("training", recipe.training, TRAININGS),
        ("optimizer", recipe.optimizer, OPTIMIZERS),
        ("dtype", recipe.dtype, tuple(POLICIES)),
    ):
        if value not in known:
            raise ValueError(
                f"Expected `{name}` to be one of {known}. Received: {value!r}"
            )
    decoupled = recipe.optimizer == "adamw"
    keras.utils.set_random_seed(recipe.seed)
    policy = keras.config.dtype_policy()
    keras.config.set_dtype_policy(POLICIES[recipe.dtype])
    try:
        model = models.build(
            recipe.model,
            data.num_classes,
            data.image_shape,
            0.0 if decoupled else recipe.weight_decay,
        )
        if recipe.training == "local_losses":
            model = local_losses.add(model, recipe.splits)
    finally:
        keras.config.set_dtype_policy(policy)
    settings: dict[str, Any] = {
        "learning_rate": recipe.learning_rate,
        "gradient_accumulation_steps": recipe.accumulate,
    }
    if recipe.optimizer == "sgd":
        optimizer = keras.optimizers.SGD(momentum=recipe.momentum, **settings)
    elif decoupled:
        optimizer = keras.optimizers.AdamW(
            weight_decay=recipe.weight_decay, **settings
        )
    else:
        optimizer = keras.optimizers.Adam(**settings)
    model.compile(
        optimizer,
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    return model


def _corrections(
    recipe: Recipe, steps_per_epoch: int
) -> list[fdg_keras.Correction]:
    """Returns the corrections by name, with what they need."""
    found: list[fdg_keras.Correction] = []
    for name in recipe.corrections:
        if name == "weight_prediction":
            found.append(fdg_keras.WeightPrediction())
        elif name == "delay_compensation":
            found.append(fdg_keras.DelayCompensation())
        elif name == "lr_rescheduling":
            # A quarter of the time at the highest rate: a choice of ours.
            first = min(recipe.boundaries, default=recipe.train_epochs)
            steps = max(first * steps_per_epoch / 4, 1)
            found.append(fdg_keras.LearningRateRescheduling(steps))
        else:
            raise ValueError(
                f"Expected `corrections` to be some of {CORRECTIONS}. "
                f"Received: {name!r}"
            )
    return found


def _versions() -> dict[str, str]:
    return {
        "python": platform.python_version(),
        "fdg_keras": fdg_keras.__version__,
        "keras": keras.__version__,
        "tensorflow": tf.__version__,
        "tensorflow_datasets": tfds.__version__,
    }
