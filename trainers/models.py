"""The networks of the training scripts, by name.

Everything in them is a built-in layer or operation, so that a saved model loads
without these files.
"""

import contextlib
import dataclasses
import functools
import pathlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

import keras

from trainers import resnets, wide_resnets
from trainers.layers import Layers


@dataclasses.dataclass(frozen=True)
class Network:
    """What tells one network from another.

    Attributes:
        features: From `Layers` and images to the features of the head.
        input_shape: Default shape of one image, `(height, width, channels)`.
        layers: How its layers are made; `weight_decay` is replaced.
    """

    features: Callable[[Layers, Any], Any]
    input_shape: tuple[int, int, int] = (32, 32, 3)
    layers: Layers = dataclasses.field(default_factory=Layers)


def _small(blocks: int) -> Callable:
    return functools.partial(resnets.small, blocks=blocks)


def _large(*blocks: int, bottleneck: bool = True) -> Callable:
    return functools.partial(
        resnets.large, blocks=blocks, bottleneck=bottleneck
    )


NETWORKS = {
    # Made before the others, with what Keras does by default: the figures of
    # `digits.py` are those of this network.
    "resnet_digits": Network(
        _small(1), (8, 8, 1), Layers(0.0, 0.99, 1e-3, symmetric=False)
    ),
    "resnet20": Network(_small(3)),
    "resnet56": Network(_small(9)),
    "resnet110": Network(_small(18)),
    "resnet1202": Network(_small(200)),
    "resnet18": Network(_large(2, 2, 2, 2, bottleneck=False)),
    "resnet50": Network(_large(3, 4, 6, 3)),
    "resnet101": Network(_large(3, 4, 23, 3)),
    "wrn28_10": Network(
        functools.partial(wide_resnets.wide, blocks=4, factor=10)
    ),
}


def build(
    name: str,
    num_classes: int = 10,
    input_shape: tuple[int, int, int] | None = None,
    weight_decay: float = 0.0,
) -> keras.Model:
    """Builds a network.

    The last layer of the i-th block, counted from 1, is called `block<i>`:
    a good place to cut.

    Args:
        name: A name in `NETWORKS`: `"resnet20"`, `"resnet56"`, `"resnet110"`
            and `"resnet1202"` for small images; `"resnet18"`, `"resnet50"` and
            `"resnet101"`, whose stem is that for ImageNet if the image has
            more than 64 pixels a side, and that for CIFAR otherwise;
            `"wrn28_10"`; or `"resnet_digits"`.
        num_classes: Number of classes.
        input_shape: Shape of one image, `(height, width, channels)`. `None`
            takes the network's own: `(8, 8, 1)` for `"resnet_digits"`,
            `(32, 32, 3)` for all others.
        weight_decay: `lambda` of PyTorch's SGD, by a penalty on all trainable
            weights: `g + lambda * w` is what the optimizer sees. See `Layers`.

    Returns:
        A Functional model from float images `[B, height, width, channels]` to
        float32 logits `[B, num_classes]`.

    Raises:
        ValueError: If `name` is not known.
    """
    if name not in NETWORKS:
        raise ValueError(
            f"Expected `name` to be one of {sorted(NETWORKS)}. "
            f"Received: name={name!r}"
        )
    network = NETWORKS[name]
    make = dataclasses.replace(network.layers, weight_decay=weight_decay)
    inputs = keras.Input(input_shape or network.input_shape, name="image")
    outputs = make.head(network.features(make, inputs), num_classes)
    with deep_recursion():
        return keras.Model(inputs, outputs, name=name)


def load(path: pathlib.Path) -> keras.Model:
    """Loads a saved network, however deep.

    Args:
        path: A file `*.keras`.

    Returns:
        The model, compiled as it was, with its optimizer's state.
    """
    with deep_recursion():
        return keras.saving.load_model(path)


@contextlib.contextmanager
def deep_recursion() -> Iterator[None]:
    """Lets Keras walk through thousands of layers.

    It follows a model from the outputs to the inputs by recursion, a frame or
    more for each layer; Python allows 1,000. ResNet-1202 has 4,206.
    """
    before = sys.getrecursionlimit()
    sys.setrecursionlimit(max(before, 50_000))
    try:
        yield
    finally:
        sys.setrecursionlimit(before)
