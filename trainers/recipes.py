"""What is trained, and how: a network, its data, stages, rates.

The defaults are the recipe of the paper (arXiv 1906.09108, section V), for
CIFAR-10: SGD with momentum 0.9 and weight decay 5e-4, batches of 128, 300
epochs, a learning rate of 0.1 that falls to a tenth after epochs 150, 225 and
275, crops and mirrored images.
"""

import dataclasses
from collections.abc import Collection, Sequence

import fdg_keras
from fdg_keras.crossing import STASHES, Stash
from fdg_keras.delays import ORDERS, Order
from trainers import datasets, models

TRAININGS = ("delayed_gradients", "local_losses", "data_parallel")
OPTIMIZERS = ("sgd", "adam", "adamw")
CORRECTIONS = ("weight_prediction", "delay_compensation", "lr_rescheduling")
POLICIES = {"float32": "float32", "bfloat16": "mixed_bfloat16"}

# What a setting, or each part of it, must be one of.
_CHOICES: dict[str, Collection[str]] = {
    "dataset": datasets.DATASETS,
    "model": models.NETWORKS,
    "training": TRAININGS,
    "stash": STASHES,
    "order": ORDERS,
    "corrections": CORRECTIONS,
    "optimizer": OPTIMIZERS,
    "dtype": POLICIES,
}

# What a setting must not be below.
_LEAST = {
    "batch_size": 1,
    "train_epochs": 1,
    "splits": 1,
    "delay": 0,
    "learning_rate": 0,
    "momentum": 0,
    "accumulate": 1,
    "weight_decay": 0,
    "warmup_epochs": 0,
    "limit": 1,
}


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
            `None` takes 1/2, 3/4 and 11/12 of all epochs, rounded down, but 1
            at least.
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
        return [
            max(self.train_epochs * epoch // 300, 1)
            for epoch in (150, 225, 275)
        ]

    def check(self) -> None:
        """Checks what can be known without the data and the network.

        Raises:
            ValueError: If a setting is none of its choices or out of its range.
        """
        for name, choices in _CHOICES.items():
            found = getattr(self, name)
            for value in (found,) if isinstance(found, str) else found:
                if value not in choices:
                    raise ValueError(
                        f"Expected `{name}` to be one of {sorted(choices)}. "
                        f"Received: {value!r}"
                    )
        for name, least in _LEAST.items():
            value = getattr(self, name)
            if isinstance(value, (int, float)) and not value >= least:
                raise ValueError(
                    f"Expected `{name}` to be {least} or more. "
                    f"Received: {value!r}"
                )
        fdg_keras.GradientShrinking(self.shrink)  # It looks at its factor.


def learning_rate(recipe: Recipe, epoch: int) -> float:
    """Returns the learning rate of an epoch, counted from 0.

    A tenth of it for each boundary that is past, and another tenth during the
    warm-up.
    """
    past = sum(epoch >= boundary for boundary in recipe.boundaries)
    past += epoch < recipe.warmup_epochs
    return recipe.learning_rate / 10**past
