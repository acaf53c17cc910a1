"""Small deterministic models, one for each thing that slicing could break.

Every builder returns a fresh, uncompiled `Case`, with the same weights and
data at each call. Names are explicit, because the cuts refer to them. All
have 91 samples: twelve batches of eight, the last with three.

Parameters whose true gradient is zero (a bias before BatchNorm, the bias of an
attention key) are avoided: Adam turns the rounding noise of such a gradient
into full steps, and two correct trainings then differ.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
from keras import layers, ops, regularizers

BATCH_SIZE = 8
SAMPLES = 91
CLASSES = 3


@dataclasses.dataclass
class Case:
    """A model to train.

    Attributes:
        model: Built, not compiled.
        cuts: For K = 2, 3, 4 the names of the layers to cut after.
        x: Inputs, an array or a list of arrays.
        y: Targets, an array or a list of arrays.
        loss: As `model.compile` takes it: a `Loss`, or a list for outputs.
        metrics: As `model.compile` takes it.
    """

    model: keras.Model
    cuts: dict[int, list[str]]
    x: Any
    y: Any
    loss: Any
    metrics: Any


ZOO: dict[str, Callable[[], Case]] = {}


def _case(build: Callable[[], Case]) -> Callable[[], Case]:
    """Registers a builder and makes what it builds repeatable."""

    def seeded() -> Case:
        keras.utils.set_random_seed(7)
        return build()

    ZOO[build.__name__] = seeded
    return seeded


def _floats(*shape: int, seed: int = 0) -> np.ndarray:
    rs = np.random.RandomState(seed)
    return rs.standard_normal((SAMPLES, *shape)).astype("float32")


def _integers(high: int, *shape: int, seed: int = 0) -> np.ndarray:
    rs = np.random.RandomState(seed)
    return rs.randint(0, high, (SAMPLES, *shape)).astype("int32")


def _labels() -> np.ndarray:
    return _integers(CLASSES, seed=1)


def _classifier(inputs: Any, logits: Any, cuts: list[str], x: Any) -> Case:
    """A case with class labels; `cuts` are the three names for K=4.

    K=2 takes the middle one, K=3 the outer two.
    """
    return Case(
        model=keras.Model(inputs, logits),
        cuts={2: cuts[1:2], 3: [cuts[0], cuts[2]], 4: cuts},
        x=x,
        y=_labels(),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )


@_case
def mlp() -> Case:
    """Dense layers with L2 and dropout."""
    inputs = keras.Input((6,))
    h = layers.Dense(8, "relu", kernel_regularizer="l2", name="one")(inputs)
    h = layers.Dropout(0.3, name="drop_one")(h)
    h = layers.Dense(7, "tanh", name="two")(h)
    h = layers.Dense(6, "relu", kernel_regularizer="l2", name="three")(h)
    h = layers.Dropout(0.2, name="drop_three")(h)
    logits = layers.Dense(CLASSES, name="four")(h)
    return _classifier(inputs, logits, ["one", "two", "three"], _floats(6))


@_case
def plain_mlp() -> Case:
    """A Sequential of nothing but dense layers."""
    model = keras.Sequential(
        [
            keras.Input((6,)),
            layers.Dense(8, "relu", name="one"),
            layers.Dense(7, "tanh", kernel_regularizer="l2", name="two"),
            layers.Dense(6, "relu", name="three"),
            layers.Dense(5, "tanh", name="four"),
            layers.Dense(CLASSES, name="five"),
        ]
    )
    return Case(
        model=model,
        cuts={2: ["two"], 3: ["one", "three"], 4: ["one", "three", "four"]},
        x=_floats(6),
        y=_labels(),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )


@_case
def conv() -> Case:
    """Convolutions with BatchNorm; a cut between the two as well."""

    def block(h: Any, filters: int, strides: int, name: str) -> Any:
        h = layers.Conv2D(
            filters, 3, strides, "same", use_bias=False, name=f"conv_{name}"
        )(h)
        h = layers.BatchNormalization(momentum=0.8, name=f"norm_{name}")(h)
        return layers.ReLU(name=f"relu_{name}")(h)

    inputs = keras.Input((8, 8, 2))
    h = block(inputs, 4, 1, "a")
    h = block(h, 5, 2, "b")
    h = block(h, 6, 2, "c")
    h = layers.GlobalAveragePooling2D(name="pool")(h)
    logits = layers.Dense(CLASSES, name="head")(h)
    cuts = ["relu_a", "conv_b", "relu_c"]
    return _classifier(inputs, logits, cuts, _floats(8, 8, 2))


@_case
def lstm() -> Case:
    """A mask that crosses cuts, kernels that are read inside a while loop."""
    inputs = keras.Input((4,), dtype="int32")
    h = layers.Embedding(11, 5, mask_zero=True, name="embed")(inputs)
    h = layers.LSTM(6, return_sequences=True, name="first")(h)
    h = layers.LSTM(5, name="second")(h)
    h = layers.Dense(6, "tanh", name="hidden")(h)
    logits = layers.Dense(CLASSES, name="head")(h)
    x = _integers(11, 4)
    for row, length in enumerate(_integers(4, seed=2)):
        x[row, length + 1 :] = 0  # the padding that is masked
    return _classifier(inputs, logits, ["embed", "first", "second"], x)


@_case
def attention() -> Case:
    """A transformer block: residual skips, LayerNorm, two kinds of dropout."""
    inputs = keras.Input((5, 4))
    h = layers.Dense(6, name="embed")(inputs)
    normed = layers.LayerNormalization(name="norm_a")(h)
    attended = layers.MultiHeadAttention(
        2, 3, dropout=0.2, use_bias=False, name="attention"
    )(normed, normed)
    h = layers.Add(name="add_a")([h, attended])
    normed = layers.LayerNormalization(name="norm_b")(h)
    wide = layers.Dense(8, "gelu", name="wide")(normed)
    narrow = layers.Dense(6, name="narrow")(wide)
    narrow = layers.Dropout(0.1, name="drop")(narrow)
    h = layers.Add(name="add_b")([h, narrow])
    h = layers.GlobalAveragePooling1D(name="pool")(h)
    logits = layers.Dense(CLASSES, name="head")(h)
    # After "attention" and "wide" a residual skip crosses too.
    return _classifier(
        inputs, logits, ["embed", "attention", "wide"], _floats(5, 4)
    )


@_case
def unet() -> Case:
    """Skips that pass through whole stages."""

    def conv(h: Any, filters: int, name: str, strides: int = 1) -> Any:
        return layers.Conv2D(
            filters, 3, strides, "same", activation="relu", name=name
        )(h)

    inputs = keras.Input((8, 8, 1))
    skip_a = conv(inputs, 3, "down_a")
    skip_b = conv(skip_a, 4, "down_b", strides=2)
    h = conv(skip_b, 5, "bottom", strides=2)
    h = layers.UpSampling2D(name="up_b")(h)
    h = layers.Concatenate(name="join_b")([h, skip_b])
    h = conv(h, 4, "wide_b")
    h = layers.UpSampling2D(name="up_a")(h)
    h = layers.Concatenate(name="join_a")([h, skip_a])
    outputs = layers.Conv2D(1, 1, name="head")(h)
    x = _floats(8, 8, 1)
    return Case(
        model=keras.Model(inputs, outputs),
        # skip_a crosses all of them, skip_b those in the middle.
        cuts={
            2: ["bottom"],
            3: ["down_b", "wide_b"],
            4: ["down_b", "bottom", "wide_b"],
        },
        x=x,
        y=np.tanh(np.roll(x, 1, axis=1)),
        loss=keras.losses.MeanSquaredError(),
        metrics=["mae"],
    )


@_case
def two_inputs() -> Case:
    """An input that enters late, an output that leaves early."""
    a = keras.Input((5,), name="a")
    b = keras.Input((4,), name="b")
    h = layers.Dense(7, "tanh", name="one")(a)
    h = layers.Dense(6, "tanh", name="two")(h)
    early = layers.Dense(CLASSES, name="early")(h)
    h = layers.Dense(6, "relu", name="three")(h)
    late = layers.Dense(5, "tanh", name="late")(b)
    h = layers.Concatenate(name="join")([h, late])
    h = layers.Dense(6, "tanh", name="four")(h)
    last = layers.Dense(2, name="last")(h)
    return Case(
        model=keras.Model([a, b], [early, last]),
        cuts={
            2: ["three"],
            3: ["two", "join"],
            4: ["one", "three", "four"],
        },
        x=[_floats(5), _floats(4, seed=3)],
        y=[_labels(), np.tanh(_floats(2, seed=4))],
        loss=[
            keras.losses.SparseCategoricalCrossentropy(from_logits=True),
            keras.losses.MeanSquaredError(),
        ],
        metrics=[["accuracy"], ["mae"]],
    )


@_case
def nested() -> Case:
    """Models within a model, cut inside; one layer in there is frozen."""
    block = keras.Sequential(
        [
            keras.Input((7,)),
            layers.Dense(8, use_bias=False, name="wide"),
            layers.BatchNormalization(momentum=0.8, name="norm"),
            layers.ReLU(name="relu"),
        ],
        name="block",
    )
    inner = keras.Input((6,))
    h = layers.Dense(7, "tanh", name="one")(inner)
    frozen = layers.Dense(8, trainable=False, name="frozen")(h)
    h = layers.Add(name="add")([block(h), frozen])
    backbone = keras.Model(inner, h, name="backbone")
    model = keras.Sequential(
        [
            keras.Input((6,)),
            backbone,
            layers.Dense(6, "tanh", name="hidden"),
            layers.Dense(CLASSES, name="head"),
        ]
    )
    return Case(
        model=model,
        cuts={
            2: ["backbone/block/norm"],
            3: ["backbone/one", "backbone/add"],
            4: ["backbone/one", "backbone/block/norm", "hidden"],
        },
        x=_floats(6),
        y=_labels(),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )


@_case
def shared() -> Case:
    """One layer on two branches, another one twice in a row."""
    left = keras.Input((5,), name="left")
    right = keras.Input((5,), name="right")
    encoder = layers.Dense(6, "tanh", name="encoder")
    again = layers.Dense(6, "tanh", kernel_regularizer="l2", name="again")
    h = layers.Subtract(name="join")([encoder(left), encoder(right)])
    h = layers.Dense(6, "relu", name="hidden")(h)
    h = again(again(h))
    h = layers.LayerNormalization(name="norm")(h)
    logits = layers.Dense(CLASSES, name="head")(h)
    return _classifier(
        [left, right],
        logits,
        ["join", "hidden", "norm"],
        [_floats(5), _floats(5, seed=3)],
    )


@_case
def raw_operations() -> Case:
    """Operations that are no layers, some of them with a skip."""
    inputs = keras.Input((6,))
    first = layers.Dense(8, "tanh", name="one")(inputs)
    h = first[:, 1:] * 1.5 + first[:, :-1]
    h = layers.Dense(7, "tanh", name="two")(h)
    h = ops.concatenate([h, ops.abs(first)], axis=-1) - 0.25
    # No batch has 5 samples: in Keras 3.15 `[n, n] + [n, 1]` of known shapes
    # adds along the wrong axis.
    h = layers.Dense(5, "tanh", name="three")(h)
    h = h + ops.mean(first, axis=-1, keepdims=True)
    logits = layers.Dense(CLASSES, name="four")(h)
    return _classifier(inputs, logits, ["one", "two", "three"], _floats(6))


@_case
def integers() -> Case:
    """Integer and boolean tensors that are made early and used late too."""
    inputs = keras.Input((6,))
    # Used at once and again behind the cuts, or the graph would make them late.
    bins = ops.cast(ops.clip(ops.floor(inputs * 2) + 4, 0, 8), "int32")
    positive = inputs > 0
    h = layers.Embedding(9, 3, name="early")(bins)
    h = layers.Flatten(name="flat")(h)
    h = layers.Dense(6, "tanh", name="one")(h)
    h = ops.where(positive, h, 0.5 * h)
    h = layers.Dense(6, "tanh", name="two")(h)
    late = layers.Embedding(9, 1, name="late")(bins)
    h = h + ops.squeeze(late, -1)
    h = layers.Dense(6, "tanh", name="three")(h)
    h = ops.where(positive, h, -h)
    logits = layers.Dense(CLASSES, name="four")(h)
    return _classifier(inputs, logits, ["one", "two", "three"], _floats(6))


class MeanSquare(layers.Layer):
    """Passes its input on and adds its mean square to the loss."""

    def call(self, inputs: Any) -> Any:
        self.add_loss(0.1 * ops.mean(ops.square(inputs)))
        return inputs


@_case
def activity() -> Case:
    """Losses of a stage's own, on weights and on activations."""
    l2 = regularizers.L2(0.05)
    inputs = keras.Input((6,))
    h = layers.Dense(8, "tanh", kernel_regularizer=l2, name="one")(inputs)
    h = layers.Dense(7, "tanh", activity_regularizer=l2, name="two")(h)
    h = layers.Dense(6, "tanh", kernel_regularizer=l2, name="three")(h)
    h = MeanSquare(name="square")(h)
    h = layers.Dense(
        CLASSES, kernel_regularizer=l2, activity_regularizer=l2, name="four"
    )(h)
    return _classifier(inputs, h, ["one", "two", "three"], _floats(6))


@_case
def weightless() -> Case:
    """A first stage and one in the middle that have nothing to train."""
    inputs = keras.Input((6,))
    h = layers.Rescaling(1.5, offset=0.1, name="scale")(inputs)
    h = layers.Dense(8, "tanh", name="one")(h)
    h = layers.Dropout(0.2, name="drop")(h)
    h = layers.Dense(6, "tanh", name="two")(h)
    logits = layers.Dense(CLASSES, name="three")(h)
    case = _classifier(inputs, logits, ["one", "drop", "two"], _floats(6))
    case.cuts[2] = ["scale"]
    case.cuts[3] = ["scale", "drop"]
    return case
