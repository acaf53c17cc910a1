"""A pure stage, cut into forward and backward."""

import dataclasses
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

from fdg_keras.crossing import OF_THE_FORWARD, STASHES
from fdg_keras.linearize import Linearized, Pure, is_float

CPU = "/job:localhost/replica:0/task:0/device:CPU:0"
ROWS = tf.TensorSpec((None, 3))


def linearize(pure, weights=(), state=(), inputs=(ROWS,)):
    return Linearized(pure, weights, state, inputs, CPU)


# -- Layers of Keras: the cut backward is the whole graph's gradient -----------


def dense(x):
    h = layers.Dropout(0.4, seed=1)(layers.Dense(5, "tanh")(x))
    return layers.Dense(2)(layers.Dense(4, "relu")(h))


def conv(x):
    h = layers.Conv2D(3, 3, strides=2, padding="same", use_bias=False)(x)
    h = layers.ReLU()(layers.BatchNormalization(momentum=0.7)(h))
    return layers.Conv2D(2, 3, activation="tanh")(h)


def lstm(x):
    """It reads its kernel inside a `while`, and so does its gradient."""
    return layers.LSTM(3)(layers.LSTM(4, return_sequences=True)(x))


def attention(x):
    h = layers.Dense(6)(x)
    h = layers.MultiHeadAttention(2, 3, dropout=0.3, seed=1)(h, h)
    return layers.LayerNormalization()(h)


MODELS = {
    "dense": (dense, (6, 3)),
    "conv": (conv, (4, 6, 6, 2)),
    "lstm": (lstm, (4, 5, 2)),
    "attention": (attention, (3, 5, 4)),
}


@dataclasses.dataclass
class Stage:
    """A model as a pure stage, with values for all its arguments."""

    pure: Callable[..., Pure]
    weights: list[tf.Tensor]
    state: list[tf.Tensor]
    x: tf.Tensor

    @classmethod
    def of(cls, name):
        make, shape = MODELS[name]
        keras.utils.set_random_seed(3)
        inputs = keras.Input(shape[1:])
        model = keras.Model(inputs, make(inputs))

        def pure(weights, state, inputs):
            outputs, new = model.stateless_call(
                weights, state, *inputs, training=True
            )
            return Pure([outputs], [], list(new))

        x = np.random.RandomState(0).standard_normal(shape).astype("float32")
        return cls(
            pure,
            [tf.constant(v.numpy()) for v in model.trainable_variables],
            [tf.constant(v.numpy()) for v in model.non_trainable_variables],
            tf.constant(x),
        )

    def linearize(self):
        def specs(tensors):
            return [tf.TensorSpec(t.shape, t.dtype) for t in tensors]

        x = tf.TensorSpec([None, *self.x.shape[1:]])
        return linearize(self.pure, specs(self.weights), specs(self.state), [x])

    def gradients(self, weights, given):
        """The gradients of the whole, without any cut."""
        with tf.GradientTape() as tape:
            tape.watch([*weights, self.x])
            pure = self.pure(weights, self.state, [self.x])
        sources = [weights, [self.x]]
        return tape.gradient(pure.outputs, sources, output_gradients=given)


def change(weights):
    """Other weights: what a few updates may have made of them."""
    rs = np.random.RandomState(5)
    return [w + 0.3 * rs.standard_normal(w.shape) for w in weights]


def cut_gradients(stage, stash, weights_then, weights_now):
    """The gradients of a forward, after the weights have changed."""
    cut = stage.linearize().cut([True], [True], stash)
    arguments = [*weights_then, *stage.state, stage.x]
    (outputs,), _, _, made = cut.forward(*arguments)
    given = [tf.random.stateless_normal(outputs.shape, [1, 2])]
    kept = cut.stash(arguments, made)
    fed = weights_now if cut.needs_weights else []
    return given, cut.backward(*given, *kept, *fed)


def assert_equal(found, wanted):
    found, wanted = tf.nest.flatten(found), tf.nest.flatten(wanted)
    for a, b in zip(found, wanted, strict=True):
        scale = np.max(np.abs(b))
        np.testing.assert_allclose(a, b, rtol=0, atol=2e-6 * max(scale, 1.0))


def differ(found, wanted):
    """Whether some gradient is far off."""
    pairs = zip(tf.nest.flatten(found), tf.nest.flatten(wanted), strict=True)
    return any(np.max(np.abs(a - b)) > 0.01 for a, b in pairs)


@pytest.mark.parametrize("stash", OF_THE_FORWARD)
@pytest.mark.parametrize("name", MODELS)
def test_exact_is_the_gradient_at_the_weights_of_the_forward(name, stash):
    stage = Stage.of(name)
    then, now = stage.weights, change(stage.weights)
    given, found = cut_gradients(stage, stash, then, now)
    assert_equal(found, stage.gradients(then, given))
    # The weights do matter, or this would show nothing.
    assert differ(found, stage.gradients(now, given))


@pytest.mark.parametrize("name", MODELS)
def test_replay_is_the_gradient_at_the_weights_of_today(name):
    """With the masks of then: a seed is part of the stash."""
    stage = Stage.of(name)
    then, now = stage.weights, change(stage.weights)
    given, found = cut_gradients(stage, "replay", then, now)
    assert_equal(found, stage.gradients(now, given))


@pytest.mark.parametrize("name", MODELS)
def test_current_is_the_gradient_while_the_weights_stay(name):
    stage = Stage.of(name)
    given, found = cut_gradients(stage, "current", stage.weights, stage.weights)
    assert_equal(found, stage.gradients(stage.weights, given))


def test_current_takes_activations_of_then_and_weights_of_today():
    """x -> a = tanh(x U) -> y = a V, by hand."""

    def pure(weights, state, inputs):
        u, v = weights
        return Pure([tf.tanh(inputs[0] @ u) @ v], [], [])

    def random(*shape):
        return tf.random.stateless_normal(shape, [sum(shape), 1])

    x, u, v, given = random(4, 3), random(3, 5), random(5, 2), random(4, 2)
    u_now, v_now = change([u, v])
    weights = [tf.TensorSpec(w.shape) for w in (u, v)]
    cut = linearize(pure, weights).cut([True], [True], "current")
    _, _, _, made = cut.forward(u, v, x)
    kept = cut.stash([u, v, x], made)
    found = cut.backward(given, *kept, u_now, v_now)
    a = tf.tanh(x @ u)
    through = (given @ tf.transpose(v_now)) * (1 - a**2)
    by_u, by_v = tf.transpose(x) @ through, tf.transpose(a) @ given
    assert_equal(found, [[by_u, by_v], [through @ tf.transpose(u_now)]])


@pytest.mark.parametrize("name", ["dense", "conv"])
def test_forward_returns_the_new_state(name):
    stage = Stage.of(name)
    cut = stage.linearize().cut([True], [True], "exact")
    outputs, own_loss, new_state, _ = cut.forward(
        *stage.weights, *stage.state, stage.x
    )
    wanted = stage.pure(stage.weights, stage.state, [stage.x])
    assert_equal(outputs, wanted.outputs)
    assert own_loss == []
    assert cut.changed_state == list(range(len(stage.state)))
    for a, b in zip(new_state, wanted.new_state, strict=True):
        np.testing.assert_allclose(
            a.numpy().astype("float64"), b.numpy().astype("float64"), rtol=1e-6
        )


@pytest.mark.parametrize("rows", [1, 6])
def test_batches_of_any_size(rows):
    stage = Stage.of("dense")
    stage.x = stage.x[:rows]
    given, found = cut_gradients(stage, "exact", stage.weights, stage.weights)
    assert_equal(found, stage.gradients(stage.weights, given))


# -- What is kept -------------------------------------------------------------


def two_products(weights, state, inputs):
    u, v = weights
    return Pure([tf.tanh(inputs[0] @ u) @ v], [], list(state))


PRODUCTS = [tf.TensorSpec((3, 5)), tf.TensorSpec((5, 2))]


def kept(stash, wanted=True):
    cut = linearize(two_products, PRODUCTS).cut([True], [wanted], stash)
    return {
        "arguments": {p for p in cut.stash_arguments if p is not None},
        "made": cut.stash_arguments.count(None),
        "needs_weights": cut.needs_weights,
    }


# Arguments: 0 and 1 are the weights, 2 is the input.
def test_exact_keeps_activations_and_the_weights_it_needs():
    assert kept("exact") == {
        "arguments": {0, 1, 2},
        "made": 1,  # tanh
        "needs_weights": False,
    }


def test_exact_keeps_no_weights_it_does_not_need():
    """The first product's weights only go into the input's gradient."""
    assert kept("exact", wanted=False)["arguments"] == {1, 2}


def test_current_keeps_no_weights():
    assert kept("current") == {
        "arguments": {2},
        "made": 1,
        "needs_weights": True,
    }


def test_replay_keeps_only_inputs_and_state():
    assert kept("replay") == {
        "arguments": {2},
        "made": 0,
        "needs_weights": True,
    }


def test_what_is_derived_from_weights_alone_is_not_kept_in_current():
    def pure(weights, state, inputs):
        u = tf.reshape(tf.cast(weights[0], tf.bfloat16), [3, 5])
        x = tf.cast(inputs[0], tf.bfloat16)
        return Pure([tf.cast(x @ u, tf.float32)], [], [])

    traced = linearize(pure, [tf.TensorSpec((15,))])
    cut = traced.cut([True], [True], "current")
    assert [s.shape.as_list() for s in cut.stash_specs] == [[None, 3]]
    assert cut.needs_weights


def test_stash_specs_describe_the_stash():
    stage = Stage.of("lstm")
    cut = stage.linearize().cut([True], [True], "exact")
    arguments = [*stage.weights, *stage.state, stage.x]
    _, _, _, made = cut.forward(*arguments)
    stash = cut.stash(arguments, made)
    for tensor, spec in zip(stash, cut.stash_specs, strict=True):
        assert tensor.dtype == spec.dtype
        assert spec.shape.is_compatible_with(tensor.shape)
    # What TensorFlow keeps of a loop for its gradient.
    assert tf.variant in [spec.dtype for spec in cut.stash_specs]


@pytest.mark.parametrize("stash", STASHES)
def test_random_numbers_are_drawn_once(stash):
    """An operation with a state of its own must not run again backwards."""

    def pure(weights, state, inputs):
        (x,) = inputs
        mask = tf.random.stateless_uniform(tf.shape(x), state[0])
        return Pure([x * weights[0] * mask], [], [state[0] + 1])

    specs = [tf.TensorSpec((3,))], [tf.TensorSpec((2,), tf.int32)]
    cut = linearize(pure, *specs).cut([True], [True], stash)
    x, w, seed = tf.ones((4, 3)), tf.ones((3,)), tf.constant([1, 2])
    (y,), _, (new_seed,), made = cut.forward(w, seed, x)
    fed = [w] if cut.needs_weights else []
    _, (by_x,) = cut.backward(
        tf.ones_like(y), *cut.stash([w, seed, x], made), *fed
    )
    np.testing.assert_allclose(by_x, y, rtol=1e-6)
    np.testing.assert_array_equal(new_seed, [2, 3])


# -- Sparse gradients ---------------------------------------------------------


def test_the_gradient_of_an_embedding_is_sparse():
    def pure(weights, state, inputs):
        return Pure([tf.gather(weights[0], inputs[0]) * 2.0], [], [])

    ids = tf.constant([[1, 4], [1, 0]])
    specs = [tf.TensorSpec((6, 3))], (), [tf.TensorSpec((None, 2), tf.int32)]
    cut = linearize(pure, *specs).cut([True], [True], "exact")
    table = tf.random.stateless_normal((6, 3), [1, 2])
    (rows,), _, _, made = cut.forward(table, ids)
    stash = cut.stash([table, ids], made)
    (gradient,), by_inputs = cut.backward(tf.ones_like(rows), *stash)
    assert isinstance(gradient, tf.IndexedSlices)
    wanted = np.zeros((6, 3))
    np.add.at(wanted, ids.numpy(), 2.0)
    np.testing.assert_array_equal(tf.convert_to_tensor(gradient), wanted)
    # Integers have no gradient, wanted or not.
    assert by_inputs == []
    assert cut.input_has_gradient == [False]


# -- Losses of its own --------------------------------------------------------


def with_own_losses(weights, state, inputs):
    (w,), (x,) = weights, inputs
    losses = [tf.reduce_sum(w**2), 3.0 * tf.reduce_sum(x)]
    return Pure([x * w], losses, [])


def test_own_losses_count_with_weight_one():
    traced = linearize(with_own_losses, [tf.TensorSpec((3,))])
    assert traced.has_own_loss
    cut = traced.cut([True], [True], "exact")
    w, x = tf.constant([1.0, 2.0, 3.0]), tf.ones((2, 3))
    (y,), (own_loss,), _, made = cut.forward(w, x)
    assert float(own_loss) == 14.0 + 18.0
    stash = cut.stash([w, x], made)
    # Whatever factor the gradient that arrives was shrunk by.
    (by_w,), (by_x,) = cut.backward(0.5 * tf.ones_like(y), *stash)
    np.testing.assert_allclose(by_w, 0.5 * 2 + 2 * w)
    np.testing.assert_allclose(by_x, 0.5 * np.tile(w, (2, 1)) + 3)


def test_own_losses_alone_are_reason_for_a_backward():
    traced = linearize(with_own_losses, [tf.TensorSpec((3,))])
    cut = traced.cut([False], [False], "exact")
    w, x = tf.constant([1.0, 2.0, 3.0]), tf.ones((2, 3))
    _, _, _, made = cut.forward(w, x)
    (by_w,), by_inputs = cut.backward(*cut.stash([w, x], made))
    np.testing.assert_allclose(by_w, 2 * w)
    assert by_inputs == []


def test_without_losses_there_is_none():
    traced = linearize(two_products, PRODUCTS)
    assert not traced.has_own_loss


# -- What has no gradient -----------------------------------------------------


def test_without_any_gradient_there_is_no_backward():
    cut = linearize(two_products, PRODUCTS).cut([False], [False], "exact")
    assert cut.backward is None
    assert cut.stash_specs == []


def test_forward_only():
    cut = linearize(two_products, PRODUCTS).forward_only()
    u, v = tf.ones((3, 5)), tf.ones((5, 2))
    (y,), own_loss, new_state, made = cut.forward(u, v, tf.zeros((1, 3)))
    np.testing.assert_array_equal(y, [[0, 0]])
    assert (own_loss, new_state, made) == ([], [], [])
    assert cut.backward is None


def test_weights_and_inputs_without_a_gradient_are_told():
    def pure(weights, state, inputs):
        used, _ = weights
        x, _, z = inputs
        return Pure([x * used, tf.stop_gradient(z)], [], [])

    three = tf.TensorSpec((3,))
    cut = linearize(pure, [three, three], (), [ROWS, ROWS, ROWS]).cut(
        [True, True], [True, True, True], "exact"
    )
    assert cut.weight_has_gradient == [True, False]
    assert cut.input_has_gradient == [True, False, False]


def test_an_input_nobody_asks_for():
    def pure(weights, state, inputs):
        return Pure([inputs[0] * inputs[1] * weights[0]], [], [])

    cut = linearize(pure, [tf.TensorSpec((3,))], (), [ROWS, ROWS]).cut(
        [True], [False, True], "exact"
    )
    assert cut.input_has_gradient == [False, True]


def test_an_output_without_a_gradient_takes_none():
    def pure(weights, state, inputs):
        y = inputs[0] * weights[0]
        return Pure([y, tf.cast(y, tf.int32), y > 0], [], [])

    cut = linearize(pure, [tf.TensorSpec((3,))]).cut(
        [True, False, False], [True], "exact"
    )
    w, x = tf.constant([1.0, 2.0, 3.0]), tf.ones((2, 3))
    (y, rounded, positive), _, _, made = cut.forward(w, x)
    assert (rounded.dtype, positive.dtype) == (tf.int32, tf.bool)
    _, (by_x,) = cut.backward(tf.ones_like(y), *cut.stash([w, x], made))
    np.testing.assert_array_equal(by_x, np.tile(w, (2, 1)))


# -- Pass-throughs and other corners ------------------------------------------


@pytest.mark.parametrize("stash", STASHES)
def test_a_skip_that_only_passes_through(stash):
    def pure(weights, state, inputs):
        h, skip = inputs
        return Pure([h * weights[0], skip], [], [])

    cut = linearize(pure, [tf.TensorSpec((3,))], (), [ROWS, ROWS]).cut(
        [True, True], [True, True], stash
    )
    w, h, skip = tf.constant([2.0, 3.0, 4.0]), tf.ones((1, 3)), tf.zeros((1, 3))
    outputs, _, _, made = cut.forward(w, h, skip)
    np.testing.assert_array_equal(outputs[1], skip)
    given = [tf.ones((1, 3)), 7 * tf.ones((1, 3))]
    fed = [w] if cut.needs_weights else []
    found = cut.backward(*given, *cut.stash([w, h, skip], made), *fed)
    assert_equal(found, [[tf.ones(3)], [w[tf.newaxis], skip + 7]])


def test_state_that_does_not_change_is_not_returned():
    def pure(weights, state, inputs):
        frozen, count = state
        y = inputs[0] * weights[0] + frozen
        return Pure([y], [], [frozen, count + 1.0])

    three = tf.TensorSpec((3,))
    cut = linearize(pure, [three], [three, tf.TensorSpec(())]).cut(
        [True], [True], "exact"
    )
    _, _, new_state, _ = cut.forward(
        tf.ones(3), tf.ones(3), tf.constant(4.0), tf.ones((1, 3))
    )
    assert cut.changed_state == [1]
    assert [float(s) for s in new_state] == [5.0]


def test_output_specs_are_known_before_the_cut():
    traced = linearize(two_products, PRODUCTS)
    (spec,) = traced.output_specs
    assert spec.shape.as_list() == [None, 2]
    assert spec.dtype == tf.float32


@pytest.mark.parametrize("stash", STASHES)
def test_constants_from_outside(stash):
    """A layer may hold a tensor that is no variable, such as a table."""
    table = tf.random.stateless_normal((200, 3), [1, 2])

    def pure(weights, state, inputs):
        return Pure([inputs[0] * weights[0] * table[7]], [], [])

    cut = linearize(pure, [tf.TensorSpec((3,))]).cut([True], [True], stash)
    w, x = tf.ones((3,)), tf.ones((2, 3))
    (y,), _, _, made = cut.forward(w, x)
    np.testing.assert_array_equal(y, [table[7], table[7]])
    fed = [w] if cut.needs_weights else []
    _, (by_x,) = cut.backward(tf.ones((2, 3)), *cut.stash([w, x], made), *fed)
    np.testing.assert_array_equal(by_x, [table[7], table[7]])


@pytest.mark.parametrize("stash", STASHES)
def test_checks_are_made_by_the_forward_alone(stash):
    def pure(weights, state, inputs):
        (x,) = inputs
        check = tf.debugging.assert_positive(x, "negative input")
        with tf.control_dependencies([check]):
            return Pure([tf.tanh(x) * weights[0]], [], [])

    cut = linearize(pure, [tf.TensorSpec((3,))]).cut([True], [True], stash)
    w, x = tf.ones((3,)), tf.ones((2, 3))
    (y,), _, _, made = cut.forward(w, x)
    fed = [w] if cut.needs_weights else []
    (by_w,), _ = cut.backward(y, *cut.stash([w, x], made), *fed)
    np.testing.assert_allclose(by_w, tf.reduce_sum(y**2, 0), rtol=1e-6)
    operations = cut.backward.graph.get_operations()
    assert not any("assert" in op.name.lower() for op in operations)
    with pytest.raises(tf.errors.InvalidArgumentError, match="negative input"):
        cut.forward(w, -x)


def test_operations_are_on_the_device():
    device = "/job:localhost/replica:0/task:0/device:CPU:3"
    traced = Linearized(two_products, PRODUCTS, (), [ROWS], device)
    cut = traced.cut([True], [True], "exact")
    for function in (cut.forward, cut.backward):
        placed = {
            op.device
            for op in function.graph.get_operations()
            if op.type == "MatMul"
        }
        assert placed == {device}


@pytest.mark.parametrize("dtype", [tf.float32, tf.bfloat16, tf.complex64])
def test_what_can_have_a_gradient(dtype: Any):
    assert is_float(tf.zeros((), dtype))
    assert not is_float(tf.zeros((), tf.int32))
    assert not is_float(tf.zeros((), tf.bool))
