"""Gradient transformers."""

import numpy as np
import pytest
import tensorflow as tf

import fdg_keras
from fdg_keras import transforms

GRADIENTS = [
    tf.constant([[1.0, -2.0], [0.5, 4.0]]),
    tf.constant([3.0], tf.float64),
    tf.constant([8.0], tf.bfloat16),
]


@pytest.mark.parametrize("beta", [0.5, 0.25, np.float32(0.5), 1e-6])
def test_shrinking_multiplies(beta):
    shrunk = fdg_keras.GradientShrinking(beta)(GRADIENTS)
    for before, after in zip(GRADIENTS, shrunk, strict=True):
        assert after.dtype == before.dtype
        wanted = before.numpy().astype("float64") * float(beta)
        rtol = 1e-2 if before.dtype == tf.bfloat16 else 1e-6
        np.testing.assert_allclose(
            after.numpy().astype("float64"), wanted, rtol=rtol
        )


def test_factors_accumulate_hop_by_hop():
    shrink = fdg_keras.GradientShrinking(0.5)
    gradients = [tf.constant([8.0])]
    for _ in range(3):
        gradients = shrink(gradients)
    assert gradients[0].numpy() == [1.0]  # beta ** 3


@pytest.mark.parametrize("beta", [1, 1.0, np.float32(1)])
def test_one_leaves_gradients_alone(beta):
    shrunk = fdg_keras.GradientShrinking(beta)(GRADIENTS)
    assert all(a is b for a, b in zip(shrunk, GRADIENTS, strict=True))


def test_it_is_made_of_tensorflow_operations():
    shrink = fdg_keras.GradientShrinking(0.5)
    traced = tf.function(lambda gradient: shrink([gradient]))
    assert traced(tf.constant([2.0]))[0].numpy() == [1.0]


def test_no_gradients_are_fine():
    assert list(fdg_keras.GradientShrinking(0.5)([])) == []


@pytest.mark.parametrize(
    "beta",
    [0, 0.0, -0.5, 1.5, float("nan"), float("inf"), True, None, "0.5", [0.5]],
    ids=str,
)
def test_factor_outside_the_range(beta):
    with pytest.raises(
        ValueError, match=r"`shrink` must be a number in \(0, 1\].*Received: "
    ):
        fdg_keras.GradientShrinking(beta)


def test_a_complex_factor_is_no_number_in_the_range():
    with pytest.raises(ValueError, match=r"Received: \(0\.5\+0j\)"):
        fdg_keras.GradientShrinking(0.5 + 0j)


def test_beta_can_be_read():
    assert fdg_keras.GradientShrinking(0.25).beta == 0.25
    assert repr(fdg_keras.GradientShrinking(0.25)) == (
        "GradientShrinking(beta=0.25)"
    )


# -- What may stand for `shrink` ----------------------------------------------


def test_a_number_stands_for_shrinking():
    found = transforms.get(0.25)
    assert isinstance(found, fdg_keras.GradientShrinking)
    assert found.beta == 0.25


def test_a_transformer_stands_for_itself():
    shrink = fdg_keras.GradientShrinking(0.5)
    assert transforms.get(shrink) is shrink


def test_any_callable_is_a_transformer():
    def clip(gradients):
        return [tf.clip_by_norm(g, 1.0) for g in gradients]

    assert transforms.get(clip) is clip
    assert isinstance(clip, fdg_keras.GradientTransformer)
    assert not isinstance(0.5, fdg_keras.GradientTransformer)


@pytest.mark.parametrize("shrink", [0, 2, None, "half"])
def test_anything_else_is_an_error(shrink):
    with pytest.raises(ValueError, match="or a gradient transformer"):
        transforms.get(shrink)


# -- What a transformer returns -----------------------------------------------


def test_what_fits_is_returned():
    found = transforms.apply(lambda gs: tuple(g + g for g in gs), GRADIENTS)
    assert isinstance(found, list)
    for a, b in zip(found, GRADIENTS, strict=True):
        np.testing.assert_array_equal(a, b + b)


@pytest.mark.parametrize(
    "transform",
    [
        lambda gradients: gradients[1:],
        lambda gradients: [g[tf.newaxis] for g in gradients],
        lambda gradients: [tf.cast(g, tf.float16) for g in gradients],
    ],
    ids=["count", "shape", "dtype"],
)
def test_what_does_not_fit(transform):
    message = "to return as many gradients as it is given.*Received from"
    with pytest.raises(ValueError, match=message):
        transforms.apply(transform, GRADIENTS)
