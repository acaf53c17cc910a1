"""The networks of the training scripts: sizes, forms, weight decay."""

import inspect
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf

from trainers import models, resnets
from trainers.layers import Layers


def trainable(model):
    return sum(int(np.prod(w.shape)) for w in model.trainable_weights)


def convolutions(model):
    return [
        layer
        for layer in model.layers
        if isinstance(layer, keras.layers.Conv2D)
    ]


@pytest.mark.parametrize(
    ("name", "shape", "classes", "count"),
    [
        ("resnet20", (32, 32, 3), 10, 269_722),
        ("resnet56", (32, 32, 3), 10, 853_018),
        ("resnet110", (32, 32, 3), 10, 1_727_962),
        ("resnet18", (32, 32, 3), 10, 11_173_962),
        ("resnet50", (32, 32, 3), 10, 23_520_842),
        ("resnet101", (32, 32, 3), 10, 42_512_970),
        ("wrn28_10", (32, 32, 3), 10, 36_479_194),
        ("resnet18", (224, 224, 3), 1000, 11_689_512),
        ("resnet50", (224, 224, 3), 1000, 25_557_032),
        ("resnet101", (224, 224, 3), 1000, 44_549_160),
    ],
)
def test_networks_have_the_published_number_of_weights(
    name, shape, classes, count
):
    model = models.build(name, classes, shape)
    assert trainable(model) == count
    assert model.output_shape == (None, classes)


def test_small_networks_grow_by_the_block():
    """So that ResNet-1202, half a minute to build, has what it should."""
    for name, blocks in (("resnet56", 9), ("resnet1202", 200)):
        assert models.NETWORKS[name].features.keywords == {"blocks": blocks}
    shortest, next_one = (
        trainable(models.build(name)) for name in ("resnet20", "resnet56")
    )
    block = (next_one - shortest) // 6
    assert shortest + (200 - 3) * block == 19_421_274


def test_python_allows_enough_recursion(tmp_path):
    """For a network as much deeper as Python's usual limit is higher."""
    model = models.build("resnet110")
    model.save(tmp_path / "model.keras")
    usual = sys.getrecursionlimit()
    low = len(inspect.stack()) + 350
    sys.setrecursionlimit(low)
    try:
        with pytest.raises(RecursionError, match="maximum recursion depth"):
            keras.saving.load_model(tmp_path / "model.keras")
        models.load(tmp_path / "model.keras")
        models.build("resnet110")
        assert sys.getrecursionlimit() == low
    finally:
        sys.setrecursionlimit(usual)


@pytest.mark.parametrize(
    ("name", "depth"),
    [("resnet20", 20), ("resnet110", 110)],
)
def test_shortcuts_of_small_networks_have_no_weights(name, depth):
    model = models.build(name)
    assert len(convolutions(model)) + 1 == depth
    assert {layer.kernel_size for layer in convolutions(model)} == {(3, 3)}


@pytest.mark.parametrize(
    ("name", "shape", "stem", "last"),
    [
        ("resnet18", (32, 32, 3), (32, 32, 64), (4, 4, 512)),
        ("resnet18", (64, 64, 3), (64, 64, 64), (8, 8, 512)),
        ("resnet18", (224, 224, 3), (56, 56, 64), (7, 7, 512)),
        ("resnet18", (65, 65, 3), (17, 17, 64), (3, 3, 512)),
        ("resnet_digits", (8, 8, 1), (8, 8, 16), (2, 2, 64)),
        ("resnet20", (16, 16, 1), (16, 16, 16), (4, 4, 64)),
    ],
)
def test_the_form_follows_the_size_of_the_image(name, shape, stem, last):
    model = models.build(name, 7, shape)
    assert model.input_shape == (None, *shape)
    assert model.output_shape == (None, 7)
    assert model.get_layer("stem").output.shape == (None, *stem)
    assert model.get_layer("pool").input.shape == (None, *last)


def test_strides_and_shortcuts_see_the_same_pixels():
    """As PyTorch pads: a window of 3 is around the pixel that is kept."""
    inputs = keras.Input((4, 4, 1))
    make = Layers()
    branch = make.conv(inputs, 1, 3, 2, "branch")
    shortcut = make.conv(inputs, 1, 1, 2, "shortcut")
    model = keras.Model(inputs, [branch, shortcut])
    centre = np.zeros((3, 3, 1, 1), "float32")
    centre[1, 1] = 1
    model.get_layer("branch").set_weights([centre])
    model.get_layer("shortcut").set_weights([np.ones((1, 1, 1, 1))])
    image = np.arange(16, dtype="float32").reshape(1, 4, 4, 1)
    branch, shortcut = model(image)
    np.testing.assert_array_equal(branch, image[:, ::2, ::2])
    np.testing.assert_array_equal(shortcut, image[:, ::2, ::2])


def test_shortcut_subsamples_and_pads_channels():
    inputs = keras.Input((4, 4, 3))
    model = keras.Model(inputs, resnets.subsample(inputs, 6, 2))
    image = np.arange(48, dtype="float32").reshape(1, 4, 4, 3)
    expected = np.zeros((1, 2, 2, 6), "float32")
    expected[..., 1:4] = image[:, ::2, ::2]
    np.testing.assert_array_equal(model(image), expected)


def test_a_wide_block_shares_its_normalization_with_the_shortcut():
    model = models.build("wrn28_10")
    used = model.get_layer("block1_relu0").output
    assert model.get_layer("block1_conv0").input is used
    assert model.get_layer("block1_conv1").input is used
    # Where the shape stays, the shortcut is the input itself.
    assert "block2_conv0" not in [layer.name for layer in model.layers]
    joined = [id(x) for x in model.get_layer("block2").input]
    assert id(model.get_layer("block1").output) in joined
    assert model.get_layer("pool").input.shape == (None, 8, 8, 640)


@pytest.mark.parametrize(
    ("name", "momentum", "epsilon"),
    [("resnet20", 0.9, 1e-5), ("resnet_digits", 0.99, 1e-3)],
)
def test_batch_normalization(name, momentum, epsilon):
    model = models.build(name)
    norms = [
        layer
        for layer in model.layers
        if isinstance(layer, keras.layers.BatchNormalization)
    ]
    assert norms
    assert {layer.momentum for layer in norms} == {momentum}
    assert {layer.epsilon for layer in norms} == {epsilon}


def test_saved_model_loads_without_custom_objects(tmp_path):
    model = models.build("resnet_digits", weight_decay=0.01)
    images = np.random.default_rng(0).normal(size=(3, 8, 8, 1))
    expected = model.predict(images, verbose=0)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    np.testing.assert_allclose(
        loaded.predict(images, verbose=0), expected, rtol=1e-6
    )
    assert len(loaded.losses) == len(model.trainable_weights)


def test_unknown_name_is_an_error():
    with pytest.raises(ValueError, match=r"resnet110.*Received: name='vgg'"):
        models.build("vgg")


def test_the_head_is_exact_in_mixed_precision():
    keras.config.set_dtype_policy("mixed_bfloat16")
    model = models.build("resnet_digits")
    assert model.get_layer("block3").output.dtype == "bfloat16"
    assert model.output.dtype == "float32"


@pytest.mark.parametrize("name", ["resnet_digits", "resnet20"])
def test_no_decay_adds_nothing_and_decay_counts_all_weights(name):
    assert not models.build(name).losses
    model = models.build(name, weight_decay=0.5)
    squares = sum(float(tf.reduce_sum(w**2)) for w in model.trainable_weights)
    assert float(sum(model.losses)) == pytest.approx(0.25 * squares, rel=1e-4)


def test_weight_decay_is_that_of_pytorch():
    """v = mu v + (g + lambda w); w = w - lr v, with NumPy."""
    lr, mu, decay = 0.1, 0.9, 0.05
    images = np.random.default_rng(0).normal(size=(3, 8, 8, 8, 1))
    labels = np.arange(24).reshape(3, 8) % 10
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)

    model = models.build("resnet_digits", weight_decay=decay)
    plain = models.build("resnet_digits")
    plain.set_weights(model.get_weights())
    model.compile(keras.optimizers.SGD(lr, momentum=mu), loss)
    model.fit(
        images.reshape(24, 8, 8, 1),
        labels.reshape(24),
        batch_size=8,
        shuffle=False,
        verbose=0,
    )

    weights = [w.numpy() for w in plain.trainable_weights]
    buffers = [np.zeros_like(w) for w in weights]
    for x, y in zip(images, labels):
        with tf.GradientTape() as tape:
            error = loss(y, plain(x, training=True))
        gradients = tape.gradient(
            error, [w.value for w in plain.trainable_weights]
        )
        for i, g in enumerate(gradients):
            buffers[i] = mu * buffers[i] + g.numpy() + decay * weights[i]
            weights[i] = weights[i] - lr * buffers[i]
            plain.trainable_weights[i].assign(weights[i])

    for found, expected in zip(model.trainable_weights, weights):
        np.testing.assert_allclose(
            found.numpy(), expected, rtol=1e-3, atol=1e-5, err_msg=found.path
        )
