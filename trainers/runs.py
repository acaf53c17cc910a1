"""One run: a recipe, trained in a folder of its own.

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
from trainers import datasets, local_losses, models
from trainers.callbacks import EpochTimer, Keep
from trainers.recipes import POLICIES, Recipe, learning_rate
from trainers.run_folder import RunFolder


class Run:
    """One run in its folder: begun, or gone on with.

    Args:
        recipe: What to do.
        model_dir: Its folder, see `run_folder`.
        resume: Whether to go on from the latest checkpoint, if there is one.
            The rest of the run then is the same, to the bit, as without an
            interruption; emulated, or by one stage, as far as TensorFlow
            rounds alike.
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
        recipe.check()
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
        else:
            # A quarter of the time at the highest rate: a choice of ours.
            first = min(recipe.boundaries, default=recipe.train_epochs)
            steps = max(first * steps_per_epoch / 4, 1)
            found.append(fdg_keras.LearningRateRescheduling(steps))
    return found


def _versions() -> dict[str, str]:
    return {
        "python": platform.python_version(),
        "fdg_keras": fdg_keras.__version__,
        "keras": keras.__version__,
        "tensorflow": tf.__version__,
        "tensorflow_datasets": tfds.__version__,
    }
