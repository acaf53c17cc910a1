"""What only a GPU can show; run with `--gpu` on a machine that has one."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import fdg_keras
from fdg_keras.links import Link

pytestmark = pytest.mark.gpu


def test_a_link_keeps_its_tensors_on_the_gpu():
    link = Link([tf.TensorSpec((None, 3))], 2, "/device:GPU:0", "gpu")
    with tf.device("/device:GPU:0"):
        link.enqueue([tf.ones((2, 3))])
    (found,) = link.dequeue()
    assert "GPU" in found.backing_device
    np.testing.assert_array_equal(found, np.ones((2, 3)))


def test_training_on_a_gpu_and_a_cpu_equals_model_fit():
    def build():
        keras.utils.set_random_seed(1)
        model = keras.Sequential(
            [
                keras.Input((8, 8, 3)),
                keras.layers.Conv2D(4, 3, name="conv"),
                keras.layers.BatchNormalization(),
                keras.layers.Flatten(),
                keras.layers.Dense(2),
            ]
        )
        model.compile("sgd", "mse", jit_compile=False)
        return model

    x, y = np.random.rand(40, 8, 8, 3), np.random.rand(40, 2)
    model, expected = build(), build()
    expected.fit(x, y, shuffle=False, verbose=0)
    trainer = fdg_keras.Trainer(model, ["conv"], ["GPU:0", "CPU:0"], delay=0)
    trainer.fit(x, y, shuffle=False, verbose=0)
    for a, b in zip(model.get_weights(), expected.get_weights()):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4)
