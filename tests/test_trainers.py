"""The training scripts: their models, and the main job from the outside."""

import os
import pathlib
import re
import subprocess
import sys

import keras
import numpy as np
import pytest

from trainers import models

ROOT = pathlib.Path(__file__).parents[1]


def run_digits(*flags: str) -> subprocess.CompletedProcess[str]:
    """Runs the script as a user does, with its own TensorFlow."""
    return subprocess.run(
        [sys.executable, "-m", "trainers.digits", *flags],
        cwd=ROOT,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "-1"},
        capture_output=True,
        text=True,
        timeout=240,
    )


def convolution_parameters(blocks: int) -> int:
    """Weights of a CIFAR network, counted from the paper's table."""
    widths = (16, 32, 64)
    total = 9 * 3 * widths[0]
    before = widths[0]
    for width in widths:
        total += 9 * before * width + (2 * blocks - 1) * 9 * width * width
        before = width
    return total


@pytest.mark.parametrize(
    ("name", "blocks", "depth", "millions"),
    [
        ("resnet20", 3, 20, 0.27),
        ("resnet56", 9, 56, 0.85),
        ("resnet110", 18, 110, 1.7),
    ],
)
def test_cifar_networks_have_the_papers_size(name, blocks, depth, millions):
    model = models.build(name)
    convolutions = [
        layer
        for layer in model.layers
        if isinstance(layer, keras.layers.Conv2D)
    ]
    assert len(convolutions) + 1 == depth
    assert sum(
        layer.count_params() for layer in convolutions
    ) == convolution_parameters(blocks)
    # Shortcuts have no parameters: the rest is normalization and the head.
    normalizations = 2 * sum(layer.filters for layer in convolutions)
    trainable = sum(np.prod(w.shape) for w in model.trainable_weights)
    assert (
        trainable
        == convolution_parameters(blocks) + normalizations + 64 * 10 + 10
    )
    assert trainable / 1e6 == pytest.approx(millions, rel=0.03)


def test_shapes_follow_the_arguments():
    model = models.build("resnet20", num_classes=7, input_shape=(16, 16, 1))
    assert model.input_shape == (None, 16, 16, 1)
    assert model.output_shape == (None, 7)
    assert model.get_layer("block4").output.shape == (None, 8, 8, 32)
    assert model.get_layer("block9").output.shape == (None, 4, 4, 64)


def test_shortcut_subsamples_and_pads_channels():
    inputs = keras.Input((4, 4, 3))
    model = keras.Model(inputs, models._shortcut(inputs, 6, 2))
    image = np.arange(48, dtype="float32").reshape(1, 4, 4, 3)
    expected = np.zeros((1, 2, 2, 6), "float32")
    expected[..., 1:4] = image[:, ::2, ::2]
    np.testing.assert_array_equal(model(image), expected)


def test_saved_model_loads_without_custom_objects(tmp_path):
    model = models.build("resnet_digits")
    images = np.random.default_rng(0).normal(size=(3, 8, 8, 1))
    expected = model.predict(images, verbose=0)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    np.testing.assert_allclose(
        loaded.predict(images, verbose=0), expected, rtol=1e-6
    )


def test_unknown_name_is_an_error():
    with pytest.raises(ValueError, match=r"resnet110.*Received: name='vgg'"):
        models.build("vgg")


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags",
    [
        ("--splits=2",),
        (
            "--splits=block1,block2",
            "--shrink=0.5",
            "--delay=1",
            "--order=update_first",
            "--stash=current",
        ),
    ],
    ids=["two stages", "named cuts"],
)
def test_digits_smoke(tmp_path, flags):
    result = run_digits("--smoke", f"--model_dir={tmp_path}", *flags)
    assert result.returncode == 0, result.stdout + result.stderr
    out = result.stdout
    # Which layers are where, the progress bars, both accuracies, the logs.
    assert re.search(r"^ *0 +CPU:0 +stem_conv1 ", out, re.MULTILINE)
    assert re.search(r"^ *1 +CPU:1 +block2_", out, re.MULTILINE)
    assert len(re.findall(r"Epoch 2/2", out)) == 2
    for name in ("fdg_keras.Trainer", "keras.Model"):
        assert re.search(rf"^{name} +\d+\.\d\d%", out, re.MULTILINE)
    assert f"tensorboard --logdir {tmp_path}" in out
    keras.saving.load_model(tmp_path / "model.keras")
    for run in ("fdg_keras", "model_fit"):
        assert list((tmp_path / run).rglob("events.out.tfevents.*"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--delay=-1", "delay"),
        ("--splits=no_such_layer", "no_such_layer"),
        ("stray", "Received: ['stray']"),
    ],
)
def test_bad_flags_are_explained(tmp_path, flag, message):
    result = run_digits("--smoke", f"--model_dir={tmp_path}", flag)
    assert result.returncode != 0
    assert message in result.stdout + result.stderr
    assert "Traceback" not in result.stderr
