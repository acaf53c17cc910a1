"""The layers that all networks are made of, each kind made in one way."""

import dataclasses

import keras
from keras import KerasTensor


@dataclasses.dataclass(frozen=True)
class Layers:
    """Makes layers, by default as PyTorch has them, which the paper used.

    Symbols: `w` are the weights, `g` their gradient, `v` the momentum buffer,
    `mu` the momentum, `lr` the learning rate, `lambda` the weight decay.
    PyTorch's SGD decays through the momentum,

        v = mu * v + g + lambda * w
        w = w - lr * v

    while `weight_decay` of a Keras optimizer takes `lr * lambda * w` off the
    weights and leaves `v` alone. So the decay is made a penalty here, whose
    gradient is `lambda * w`: `keras.regularizers.L2(lambda / 2)` on all that
    PyTorch decays: kernels, biases, and both weights of batch normalization.
    It counts in the loss that is reported.

    Deviation: Keras' SGD keeps `lr * v`. When the learning rate changes, what
    the momentum holds from before counts with the rate of its day.

    Attributes:
        weight_decay: `lambda`. 0, the default, adds nothing to the model.
        momentum: Share of its statistics that batch normalization keeps at
            each batch (Keras' default is 0.99).
        epsilon: What it adds to the variance (Keras' default is 0.001).
        symmetric: Whether a convolution with strides pads an image on both
            sides. `"same"` pads one of even size on one side only, and so
            shifts it by a pixel against a shortcut that takes every second.
    """

    weight_decay: float = 0.0
    momentum: float = 0.9
    epsilon: float = 1e-5
    symmetric: bool = True

    def _penalties(self, *weights: str) -> dict:
        if not self.weight_decay:
            return {}
        return {
            f"{name}_regularizer": keras.regularizers.L2(self.weight_decay / 2)
            for name in weights
        }

    def conv(
        self, x: KerasTensor, filters: int, size: int, strides: int, name: str
    ) -> KerasTensor:
        """Returns a convolution without a bias: normalization undoes one."""
        padding = "same"
        if self.symmetric and strides > 1:
            padding = "valid"
            if size > 1:
                x = keras.layers.ZeroPadding2D(size // 2, name=f"{name}_pad")(x)
        return keras.layers.Conv2D(
            filters,
            size,
            strides=strides,
            padding=padding,
            use_bias=False,
            kernel_initializer="he_normal",
            name=name,
            **self._penalties("kernel"),
        )(x)

    def norm(self, x: KerasTensor, name: str) -> KerasTensor:
        """Returns a batch normalization."""
        return keras.layers.BatchNormalization(
            momentum=self.momentum,
            epsilon=self.epsilon,
            name=name,
            **self._penalties("gamma", "beta"),
        )(x)

    def conv_norm(
        self, x: KerasTensor, filters: int, size: int, strides: int, name: str
    ) -> KerasTensor:
        """Returns a convolution and its normalization: `*_conv1`, `*_norm1`."""
        x = self.conv(x, filters, size, strides, name)
        return self.norm(x, name.replace("conv", "norm"))

    def head(self, x: KerasTensor, num_classes: int) -> KerasTensor:
        """Returns logits `[B, num_classes]`, float32 whatever the policy."""
        x = keras.layers.GlobalAveragePooling2D(name="pool", dtype="float32")(x)
        return keras.layers.Dense(
            num_classes,
            name="logits",
            dtype="float32",
            **self._penalties("kernel", "bias"),
        )(x)


def relu(x: KerasTensor, name: str) -> KerasTensor:
    """Returns a rectification."""
    return keras.layers.ReLU(name=name)(x)
