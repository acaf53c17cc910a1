"""Bugs that were there once, each with its story."""

import gc

import keras
import numpy as np
import tensorflow as tf

import fdg_keras
from fdg_keras.linearize import Linearized, Pure
from fdg_keras.links import Link
from fdg_keras.slicing import trace_graph

CPU = "/job:localhost/replica:0/task:0/device:CPU:0"


def test_collecting_a_link_leaves_no_operation_in_a_graph():
    """A trainer that was let go broke the next one, now and then.

    A link destroys its queue when it is collected. Links and what was
    compiled with them refer to each other, so it is the garbage collector
    that finds them, at any time: also while another function is being traced.
    Then the operation that destroys was not run but added to that graph, with
    the handle of the old queue among its captures. The queue lived on, and
    the function destroyed it each time it was called.
    """

    @tf.function(autograph=False)
    def traced(x):
        link = Link([tf.TensorSpec(())], 1, CPU, "forgotten")
        link.cycle = link
        del link
        gc.collect()
        return x + 1.0

    graph = traced.get_concrete_function(tf.TensorSpec(())).graph
    types = [operation.type for operation in graph.get_operations()]
    assert "AddV2" in types
    assert "DestroyResourceOp" not in types
    assert not graph.captures


def test_an_operation_of_which_one_output_is_kept_and_another_read():
    """Two LSTMs in one stage raised a `KeyError` when the stage was cut.

    The accumulators of the first LSTM's `while` are kept for its gradient.
    The second LSTM's input is kept as well, and is made of another output of
    that `while`. TensorFlow's `prune` copies what lies upstream of what it is
    fed, although nobody needs it, and there found an output without a source.
    """

    def pure(weights, state, inputs):
        left, right = tf.split(tf.tanh(inputs[0]), 2, axis=-1)
        joined = tf.transpose(tf.reshape(right, [-1, 2]))
        return Pure([left**2, tf.transpose(tf.exp(joined**2))], [], [])

    rows = tf.TensorSpec((None, 4))
    cut = Linearized(pure, [], [], [rows], CPU).cut([True] * 2, [True], "exact")
    x = tf.reshape(tf.range(8.0), [2, 4]) / 8
    outputs, _, _, made = cut.forward(x)
    given = [tf.ones_like(y) for y in outputs]
    _, (found,) = cut.backward(*given, *cut.stash([x], made))
    with tf.GradientTape() as tape:
        tape.watch(x)
        total = sum(tf.reduce_sum(y) for y in pure([], [], [x]).outputs)
    np.testing.assert_allclose(found, tape.gradient(total, x), rtol=1e-6)


def test_nested_models_were_never_inlined():
    """Nothing could be cut within a backbone.

    Keras records a call of a nested model with `mask=None` although nobody
    passed a mask, and a call with arguments beyond tensors stays one node.
    """
    backbone = keras.Sequential(
        [keras.Input((4,)), keras.layers.Dense(3, name="inner")],
        name="backbone",
    )
    model = keras.Sequential([keras.Input((4,)), backbone])
    assert [n.name for n in trace_graph(model).nodes] == ["backbone/inner"]


def test_model_fit_after_fit_in_stages():
    """`model.fit` raised "Unknown variable" after a trainer's `fit`.

    Keras' optimizers know a variable by the storage of its value, and the
    model's optimizer was built while the variables had that of their stages.
    """
    model = keras.Sequential(
        [keras.Input((4,)), keras.layers.Dense(3), keras.layers.Dense(2)]
    )
    model.compile("sgd", "mse")
    x, y = np.ones((8, 4), "float32"), np.ones((8, 2), "float32")
    fdg_keras.fit(model, x, y, batch_size=4, verbose=0)
    model.fit(x, y, batch_size=4, verbose=0)
    assert int(model.optimizer.iterations) == 4


def test_a_variable_that_is_at_home_is_not_moved():
    """All variables were copied, those of the first device to itself.

    TensorFlow lists a device as `/device:CPU:0` and calls it
    `/job:localhost/replica:0/task:0/device:CPU:0` when asked where a variable
    is; the two were compared.
    """
    model = keras.Sequential(
        [keras.Input((4,)), keras.layers.Dense(3), keras.layers.Dense(2)]
    )
    model.compile("sgd", "mse")
    trainer = fdg_keras.Trainer(model, splits=2)
    first, second = (stage.device for stage in trainer.plan.stages)
    assert first == model.layers[0].kernel.value.device == CPU
    assert second != first
