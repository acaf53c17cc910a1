"""What `test_equivalence.py` combines: models, data, callbacks.

Each table maps a name to a function that makes the thing anew, the same at
every call. All data kinds give a model the same samples in the same order,
three batches of which the last is short.
"""

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf
import zoo
from keras import callbacks, layers, ops

BATCH, BATCHES, SAMPLES = 8, 3, 22


def rows_of(arrays: Any, start: int, stop: int) -> Any:
    """Samples of nested arrays."""
    return keras.tree.map_structure(lambda a: a[start:stop], arrays)


# -- Models -------------------------------------------------------------------


def _floats(*shape: int, seed: int = 0) -> np.ndarray:
    random = np.random.RandomState(seed)
    return random.standard_normal((SAMPLES, *shape)).astype("float32")


def _regression(inputs: Any, outputs: Any, cuts: list[str], x: Any) -> zoo.Case:
    """A case with two targets; `cuts` are the names for K=3, or for K=2."""
    y = np.tanh(_floats(2, seed=4))
    model = keras.Model(inputs, outputs)
    loss = keras.losses.MeanSquaredError()
    return zoo.Case(model, {2: cuts[:1], 3: cuts}, x, y, loss, ["mae"])


def gru() -> zoo.Case:
    """A mask that comes from the inputs' zeros."""
    inputs = keras.Input((3, 3))
    h = layers.Masking(name="mask")(inputs)
    h = layers.GRU(3, name="gru")(h)
    outputs = layers.Dense(2, name="two")(h)
    x = _floats(3, 3)
    x[::3, 2:] = 0
    return _regression(inputs, outputs, ["mask", "gru"], x)


def frozen() -> zoo.Case:
    """A first stage with a BatchNorm, all of it frozen."""
    inputs = keras.Input((6,))
    h = layers.Dense(7, "tanh", trainable=False, name="one")(inputs)
    h = layers.BatchNormalization(trainable=False, name="norm")(h)
    h = layers.Dense(5, "tanh", name="two")(h)
    h = layers.Dropout(0.2, name="drop")(h)
    outputs = layers.Dense(2, name="three")(h)
    return _regression(inputs, outputs, ["norm", "two"], _floats(6))


def frozen_end() -> zoo.Case:
    """The last stage is frozen, and passes gradients on all the same."""
    inputs = keras.Input((6,))
    h = layers.Dense(7, "tanh", name="one")(inputs)
    h = layers.Dense(5, "tanh", name="two")(h)
    outputs = layers.Dense(2, trainable=False, name="three")(h)
    return _regression(inputs, outputs, ["two"], _floats(6))


class Centre(layers.Layer):
    """A gain under a constraint, a running mean, a loss and a metric."""

    def __init__(self, **arguments: Any):
        super().__init__(**arguments)
        self.mean = keras.metrics.Mean(name="size")

    def build(self, shape: tuple) -> None:
        self.gain = self.add_weight(
            shape=shape[-1:],
            initializer="ones",
            constraint=keras.constraints.MinMaxNorm(0.5, 0.9, axis=0),
            name="gain",
        )
        self.centre = self.add_weight(
            shape=shape[-1:], trainable=False, name="centre"
        )

    def call(self, x: Any, training: bool = False) -> Any:
        if training:
            mean = ops.mean(x, axis=0)
            self.centre.assign(0.9 * self.centre + 0.1 * mean)
        self.mean.update_state(ops.mean(ops.square(x)))
        self.add_loss(0.1 * ops.mean(ops.square(x)))
        return self.gain * (x - self.centre)


def custom() -> zoo.Case:
    inputs = keras.Input((6,))
    h = layers.Dense(5, "tanh", name="one")(inputs)
    h = Centre(name="centre")(h)
    h = layers.Dense(4, "tanh", kernel_constraint="max_norm", name="two")(h)
    outputs = layers.Dense(2, name="three")(h)
    return _regression(inputs, outputs, ["one", "two"], _floats(6))


def named() -> zoo.Case:
    """Inputs, outputs, losses and metrics by name."""
    a, b = keras.Input((5,), name="a"), keras.Input((4,), name="b")
    h = layers.Dense(6, "tanh", name="one")(a)
    early = layers.Dense(3, name="early")(h)
    h = layers.Concatenate(name="join")([h, b])
    h = layers.Dense(5, "tanh", name="two")(h)
    late = layers.Dense(2, name="late")(h)
    model = keras.Model({"b": b, "a": a}, {"late": late, "early": early})
    return zoo.Case(
        model,
        {2: ["join"], 3: ["one", "two"]},
        {"a": _floats(5), "b": _floats(4, seed=1)},
        {"early": np.arange(SAMPLES) % 3, "late": _floats(2, seed=2)},
        {
            "late": "mse",
            "early": keras.losses.SparseCategoricalCrossentropy(True),
        },
        {"early": ["accuracy"], "late": ["mae", "cosine_similarity"]},
    )


def loaded() -> zoo.Case:
    """A model that was trained, saved with its optimizer, and loaded."""
    case = zoo.plain_mlp()
    case.model.compile("adam", case.loss)
    case.model.fit(case.x, case.y, batch_size=64, verbose=0)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.keras"
        case.model.save(path)
        case.model = keras.saving.load_model(path)
    return case


def cloned() -> zoo.Case:
    case = zoo.mlp()
    case.model = keras.models.clone_model(case.model)
    return case


def bfloat16() -> zoo.Case:
    keras.config.set_dtype_policy("mixed_bfloat16")
    case = zoo.plain_mlp()
    keras.config.set_dtype_policy("float32")
    return case


OWN = [gru, frozen, frozen_end, custom, named, loaded, cloned, bfloat16]
MODELS = {build.__name__: build for build in OWN}


def make_case(name: str) -> zoo.Case:
    """A case of these or of the zoo, with its first samples."""
    keras.utils.set_random_seed(7)
    case = (MODELS | zoo.ZOO)[name]()
    case.x, case.y = rows_of((case.x, case.y), 0, SAMPLES)
    return case


# -- Data: what `fit` is given ------------------------------------------------

WEIGHTS = np.linspace(0.2, 2, SAMPLES).astype("float32")


def _pair(case: zoo.Case) -> tuple:
    """Inputs and targets, in tuples: TensorFlow takes lists for tensors."""
    return tuple(
        tuple(a) if isinstance(a, list) else a for a in (case.x, case.y)
    )


def _dataset(case: zoo.Case) -> tf.data.Dataset:
    return tf.data.Dataset.from_tensor_slices(_pair(case)).batch(BATCH)


class Sequence(keras.utils.PyDataset):
    """Reverses its batches at the end of each epoch if told to."""

    def __init__(self, case: zoo.Case, turns: bool = False, **arguments: Any):
        super().__init__(**arguments)
        self.pair, self.turns = _pair(case), turns
        self.order = list(range(BATCHES))

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, index: int) -> tuple:
        start = BATCH * self.order[index]
        return rows_of(self.pair, start, start + BATCH)

    def on_epoch_end(self) -> None:
        if self.turns:
            self.order.reverse()


def _endless(case: zoo.Case) -> Iterator[tuple]:
    while True:
        yield from (Sequence(case)[i] for i in range(BATCHES))


def _torch(case: zoo.Case) -> Any:
    torch = pytest.importorskip("torch")
    tensors = torch.from_numpy(case.x), torch.from_numpy(case.y)
    data = torch.utils.data.TensorDataset(*tensors)
    return torch.utils.data.DataLoader(data, batch_size=BATCH)


def _arrays(case: zoo.Case, **more: Any) -> dict:
    given = {"x": case.x, "y": case.y, "batch_size": BATCH, "shuffle": False}
    return given | more


def _validated(
    case: zoo.Case, start: int, stop: int, *weights: Any, **more: Any
) -> dict:
    data = rows_of((case.x, case.y), start, stop)
    return _arrays(case, validation_data=(*data, *weights), **more)


def _overflow(case: zoo.Case) -> dict:
    """The loss of the second batch is infinite; gradients are not."""
    y = case.y.copy()
    y[BATCH + 1] = 1e30
    return _arrays(case, y=y)


DATA: dict[str, Callable[[zoo.Case], dict]] = {
    "arrays": _arrays,
    "shuffled": lambda case: _arrays(case, shuffle=True),
    "tensors": lambda case: _arrays(
        case,
        **keras.tree.map_structure(tf.constant, {"x": case.x, "y": case.y}),
    ),
    "weights": lambda case: _arrays(
        case, sample_weight=keras.tree.map_structure(lambda _: WEIGHTS, case.y)
    ),
    "classes": lambda case: _arrays(case, class_weight={0: 1, 1: 3, 2: 0.5}),
    "overflow": _overflow,
    "later": lambda case: _arrays(case, initial_epoch=1, epochs=3),
    "dataset": lambda case: {"x": _dataset(case)},
    "unknown": lambda case: {"x": _dataset(case).filter(lambda *_: True)},
    # Two steps of three batches: the second epoch begins in the middle.
    "steps": lambda case: {"x": _dataset(case).repeat(), "steps_per_epoch": 2},
    "sequence": lambda case: {"x": Sequence(case), "shuffle": False},
    "workers": lambda case: {
        "x": Sequence(case, workers=2),
        "shuffle": False,
    },
    "turning": lambda case: {"x": Sequence(case, True), "shuffle": False},
    "generator": lambda case: {"x": _endless(case), "steps_per_epoch": 2},
    "torch": lambda case: {"x": _torch(case)},
    "split": lambda case: _arrays(case, validation_split=0.3),
    "split-w": lambda case: _arrays(
        case, validation_split=0.3, sample_weight=WEIGHTS
    ),
    "val": lambda case: _validated(case, 2, 13, validation_batch_size=4),
    "val-freq": lambda case: _validated(
        case, 0, 9, WEIGHTS[:9], validation_freq=2, epochs=3
    ),
    "val-list": lambda case: _arrays(
        case, validation_data=Sequence(case, True), validation_freq=[2]
    ),
    "val-steps": lambda case: {
        "x": _dataset(case),
        "validation_data": _dataset(case).repeat(),
        "validation_steps": 2,
    },
}

# -- Callbacks, each with a folder to write to --------------------------------


class Shrink(callbacks.Callback):
    """Changes weights at the end of each epoch."""

    def on_epoch_end(self, epoch: int, logs: dict | None = None) -> None:
        for weight in self.model.trainable_weights:
            weight.assign(0.9 * weight)


class Step(callbacks.Callback):
    """Reads weights after each batch, and changes them before each."""

    def on_train_batch_begin(self, batch: int, logs: dict | None = None):
        Shrink.on_epoch_end(self, 0)

    def on_train_batch_end(self, batch: int, logs: dict | None = None):
        weights = self.model.trainable_weights
        logs["size"] = sum(float(np.abs(w.numpy()).sum()) for w in weights)


class WarmUp(callbacks.Callback):
    """Sets the learning rate before and after each batch."""

    def on_train_batch_begin(self, batch: int, logs: dict | None = None):
        self.model.optimizer.learning_rate = 0.02 * (batch + 1)

    def on_train_batch_end(self, batch: int, logs: dict | None = None):
        logs["rate"] = float(self.model.optimizer.learning_rate)


class Predict(callbacks.Callback):
    """Has the model predict at the end of each epoch."""

    def on_epoch_end(self, epoch: int, logs: dict | None = None) -> None:
        x = np.ones((3, *self.model.input_shape[1:]))
        logs["mean"] = float(np.mean(self.model.predict(x, verbose=0)))


CALLBACKS: dict[str, Callable[[Path], callbacks.Callback]] = {
    "none": lambda path: callbacks.Callback(),
    "checkpoint": lambda path: callbacks.ModelCheckpoint(
        path / "{epoch}-{loss:.3f}.weights.h5", save_weights_only=True
    ),
    "best": lambda path: callbacks.ModelCheckpoint(
        path / "best.keras", "loss", save_best_only=True
    ),
    "batches": lambda path: callbacks.ModelCheckpoint(
        path / "{epoch}-{batch}.weights.h5", save_weights_only=True, save_freq=2
    ),
    "backup": lambda path: callbacks.BackupAndRestore(
        path / "backup", delete_checkpoint=False
    ),
    "stopping": lambda path: callbacks.EarlyStopping(
        "loss", mode="max", restore_best_weights=True
    ),
    "scheduler": lambda path: callbacks.LearningRateScheduler(
        lambda epoch, rate: 0.5 * rate
    ),
    "plateau": lambda path: callbacks.ReduceLROnPlateau(
        "loss", factor=0.1, patience=0, min_delta=10.0
    ),
    "board": lambda path: callbacks.TensorBoard(path, histogram_freq=1),
    "board-b": lambda path: callbacks.TensorBoard(path, update_freq="batch"),
    "nan": lambda path: callbacks.TerminateOnNaN(),
    "csv": lambda path: callbacks.CSVLogger(path / "log.csv"),
    "swap": lambda path: callbacks.SwapEMAWeights(),
    "swap-e": lambda path: callbacks.SwapEMAWeights(swap_on_epoch=True),
    "lambda": lambda path: callbacks.LambdaCallback(
        on_epoch_begin=lambda epoch, logs: logs.update(mine=epoch),
        on_train_batch_end=lambda batch, logs: logs.update(mine=batch),
    ),
    "shrink": lambda path: Shrink(),
    "warm-up": lambda path: WarmUp(),
    "step": lambda path: Step(),
    "predict": lambda path: Predict(),
}
