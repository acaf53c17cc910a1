"""Residual networks for small images.

The CIFAR networks of He et al., "Deep Residual Learning for Image
Recognition" (arXiv 1512.03385, section 4.2): a 3x3 convolution, three groups
of n basic blocks with 16, 32 and 64 channels, global average pooling and a
dense layer, that is 6n + 2 layers with weights. Shortcuts are the paper's
option A, which has no parameters: where a block halves the image, its shortcut
takes every second pixel and pads the new channels with zeros.

Everything is a built-in layer or operation, so that a saved model loads
without this file.
"""

import dataclasses

import keras


@dataclasses.dataclass(frozen=True)
class Architecture:
    """What tells one residual network of this family from another.

    Attributes:
        blocks: Basic blocks in each group.
        widths: Channels of each group. Every group but the first begins by
            halving the image.
        input_shape: Default shape of one image, `(height, width, channels)`.
    """

    blocks: int
    widths: tuple[int, ...]
    input_shape: tuple[int, int, int]


ARCHITECTURES = {
    "resnet_digits": Architecture(1, (16, 32, 64), (8, 8, 1)),
    "resnet20": Architecture(3, (16, 32, 64), (32, 32, 3)),
    "resnet56": Architecture(9, (16, 32, 64), (32, 32, 3)),
    "resnet110": Architecture(18, (16, 32, 64), (32, 32, 3)),
}


def _conv_norm(x, filters: int, strides: int, prefix: str, index: int):
    # Batch normalization subtracts the mean, so a bias would do nothing.
    x = keras.layers.Conv2D(
        filters,
        3,
        strides=strides,
        padding="same",
        use_bias=False,
        kernel_initializer="he_normal",
        name=f"{prefix}_conv{index}",
    )(x)
    return keras.layers.BatchNormalization(name=f"{prefix}_norm{index}")(x)


def _shortcut(x, filters: int, strides: int):
    """Option A: subsamples the image, pads the channels on both sides."""
    if strides > 1:
        x = x[:, ::strides, ::strides, :]
    missing = filters - x.shape[-1]
    if missing:
        before = missing // 2
        x = keras.ops.pad(
            x, [[0, 0], [0, 0], [0, 0], [before, missing - before]]
        )
    return x


def _basic_block(x, filters: int, strides: int, name: str):
    y = _conv_norm(x, filters, strides, name, 1)
    y = keras.layers.ReLU(name=f"{name}_relu")(y)
    y = _conv_norm(y, filters, 1, name, 2)
    y = keras.layers.Add(name=f"{name}_add")(
        [y, _shortcut(x, filters, strides)]
    )
    return keras.layers.ReLU(name=name)(y)


def build(
    name: str,
    num_classes: int = 10,
    input_shape: tuple[int, int, int] | None = None,
) -> keras.Model:
    """Builds a residual network.

    The last layer of the i-th block, counted from 1, is called `block<i>`:
    a good place to cut.

    Args:
        name: One of `"resnet_digits"`, `"resnet20"`, `"resnet56"` and
            `"resnet110"`.
        num_classes: Number of classes.
        input_shape: Shape of one image, `(height, width, channels)`. `None`
            takes the architecture's own.

    Returns:
        A Functional model from float images `[B, height, width, channels]` to
        logits `[B, num_classes]`.

    Raises:
        ValueError: If `name` is not known.
    """
    if name not in ARCHITECTURES:
        raise ValueError(
            f"Expected `name` to be one of {sorted(ARCHITECTURES)}. "
            f"Received: name={name!r}"
        )
    architecture = ARCHITECTURES[name]
    inputs = keras.Input(input_shape or architecture.input_shape, name="image")
    x = _conv_norm(inputs, architecture.widths[0], 1, "stem", 1)
    x = keras.layers.ReLU(name="stem")(x)
    block = 0
    for group, width in enumerate(architecture.widths):
        for index in range(architecture.blocks):
            block += 1
            strides = 2 if group > 0 and index == 0 else 1
            x = _basic_block(x, width, strides, f"block{block}")
    x = keras.layers.GlobalAveragePooling2D(name="pool")(x)
    outputs = keras.layers.Dense(num_classes, name="logits")(x)
    return keras.Model(inputs, outputs, name=name)
