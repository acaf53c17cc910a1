"""The residual networks of He et al. (arXiv 1512.03385).

Those for small images (section 4.2) have a 3x3 convolution, three groups of n
basic blocks with 16, 32 and 64 channels, and are 6n + 2 layers deep. Shortcuts
are the paper's option A, which has no parameters: where a block halves the
image, its shortcut takes every second pixel and pads the new channels with
zeros.

Those for ImageNet (table 1) have four groups with 64, 128, 256 and 512
channels, and shortcuts of option B: where the shape changes, a 1x1 convolution
and a normalization. A bottleneck halves the image in its 3x3 convolution, as
PyTorch's does, and has four times as many channels at its end. For images of
up to 64 pixels they have a 3x3 stem and no pooling, in the common form for
CIFAR.
"""

from collections.abc import Sequence

import keras
from keras import KerasTensor

from trainers.layers import Layers, relu

#: Images that are larger than this, in pixels, get the stem for ImageNet.
SMALL = 64


def small(make: Layers, x: KerasTensor, blocks: int) -> KerasTensor:
    """Returns the features of a network for small images.

    Args:
        make: Makes the layers.
        x: The images, `[B, H, W, C]`.
        blocks: n, the blocks in each group.

    Returns:
        A tensor `[B, H / 4, W / 4, 64]`.
    """
    x = relu(make.conv_norm(x, 16, 3, 1, "stem_conv1"), "stem")
    for index in range(3 * blocks):
        group = index // blocks
        strides = 2 if group and index % blocks == 0 else 1
        name = f"block{index + 1}"
        filters = 16 * 2**group
        x = _basic(make, x, subsample(x, filters, strides), strides, name)
    return x


def large(
    make: Layers, x: KerasTensor, blocks: Sequence[int], bottleneck: bool
) -> KerasTensor:
    """Returns the features of a network for ImageNet, or its form for CIFAR.

    Args:
        make: Makes the layers.
        x: The images, `[B, H, W, C]`.
        blocks: The blocks in each of the four groups.
        bottleneck: Whether blocks are bottlenecks.

    Returns:
        A tensor `[B, H / 32, W / 32, F]`, or `[B, H / 8, W / 8, F]` for small
        images; F is 512, or 2048 with bottlenecks.
    """
    if max(x.shape[1:3]) > SMALL:
        x = relu(make.conv_norm(x, 64, 7, 2, "stem_conv1"), "stem_relu")
        # Nothing is below zero here, so zeros never are the maximum.
        x = keras.layers.ZeroPadding2D(1, name="stem_pad")(x)
        x = keras.layers.MaxPooling2D(3, 2, name="stem")(x)
    else:
        x = relu(make.conv_norm(x, 64, 3, 1, "stem_conv1"), "stem")
    block = 0
    for group, count in enumerate(blocks):
        width = 64 * 2**group
        for index in range(count):
            block += 1
            strides = 2 if group and index == 0 else 1
            name = f"block{block}"
            filters = 4 * width if bottleneck else width
            shortcut = x
            if strides > 1 or x.shape[-1] != filters:
                shortcut = make.conv_norm(
                    x, filters, 1, strides, f"{name}_conv0"
                )
            block_of = _bottleneck if bottleneck else _basic
            x = block_of(make, x, shortcut, strides, name)
    return x


def subsample(x: KerasTensor, filters: int, strides: int) -> KerasTensor:
    """Returns a shortcut of option A: channels are padded on both sides."""
    if strides > 1:
        x = x[:, ::strides, ::strides, :]
    missing = filters - x.shape[-1]
    if missing:
        before = missing // 2
        x = keras.ops.pad(
            x, [[0, 0], [0, 0], [0, 0], [before, missing - before]]
        )
    return x


def _basic(
    make: Layers, x: KerasTensor, shortcut: KerasTensor, strides: int, name: str
) -> KerasTensor:
    filters = shortcut.shape[-1]
    y = make.conv_norm(x, filters, 3, strides, f"{name}_conv1")
    y = relu(y, f"{name}_relu")
    y = make.conv_norm(y, filters, 3, 1, f"{name}_conv2")
    return _join(y, shortcut, name)


def _bottleneck(
    make: Layers, x: KerasTensor, shortcut: KerasTensor, strides: int, name: str
) -> KerasTensor:
    filters = shortcut.shape[-1]
    y = make.conv_norm(x, filters // 4, 1, 1, f"{name}_conv1")
    y = relu(y, f"{name}_relu1")
    y = make.conv_norm(y, filters // 4, 3, strides, f"{name}_conv2")
    y = relu(y, f"{name}_relu2")
    y = make.conv_norm(y, filters, 1, 1, f"{name}_conv3")
    return _join(y, shortcut, name)


def _join(y: KerasTensor, shortcut: KerasTensor, name: str) -> KerasTensor:
    return relu(keras.layers.Add(name=f"{name}_add")([y, shortcut]), name)
