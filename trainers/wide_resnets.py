"""The wide residual networks of Zagoruyko and Komodakis (arXiv 1605.07146).

A 3x3 convolution, three groups of n blocks with 16k, 32k and 64k channels, and
a last normalization; 6n + 4 layers deep. Blocks normalize before they convolve.
Where the shape changes, the shortcut is a 1x1 convolution of what the block has
normalized. There is no dropout.
"""

import keras
from keras import KerasTensor

from trainers.layers import Layers, relu


def wide(make: Layers, x: KerasTensor, blocks: int, factor: int) -> KerasTensor:
    """Returns the features of a wide residual network.

    Args:
        make: Makes the layers.
        x: The images, `[B, H, W, C]`.
        blocks: n, the blocks in each group.
        factor: k, how many times as wide as a plain one it is.

    Returns:
        A tensor `[B, H / 4, W / 4, 64 * factor]`.
    """
    x = make.conv(x, 16, 3, 1, "stem")
    for index in range(3 * blocks):
        group = index // blocks
        strides = 2 if group and index % blocks == 0 else 1
        filters = 16 * 2**group * factor
        x = _block(make, x, filters, strides, f"block{index + 1}")
    return relu(make.norm(x, "last_norm"), "last_relu")


def _block(
    make: Layers, x: KerasTensor, filters: int, strides: int, name: str
) -> KerasTensor:
    y = relu(make.norm(x, f"{name}_norm0"), f"{name}_relu0")
    if x.shape[-1] != filters:
        x = make.conv(y, filters, 1, strides, f"{name}_conv0")
    y = make.conv_norm(y, filters, 3, strides, f"{name}_conv1")
    y = make.conv(relu(y, f"{name}_relu1"), filters, 3, 1, f"{name}_conv2")
    return keras.layers.Add(name=name)([y, x])
