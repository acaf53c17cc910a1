"""What is kept of a forward, how many bytes that is, and what it saves."""

import itertools

import keras
import numpy as np
import pytest
import tensorflow as tf
from test_linearize import CPU, MODELS, Stage, linearize

from fdg_keras import recompute
from fdg_keras.crossing import STASHES, Crossing, StashBytes
from fdg_keras.linearize import Linearized, Pure
from trainers import models


def held(tensors):
    """Bytes of the memory behind tensors, whoever shares it."""
    found = {}
    # All at once: what is freed leaves its place to others.
    for tensor in list(itertools.chain.from_iterable(map(elements, tensors))):
        if tensor.dtype == tf.bfloat16:  # NumPy cannot look into it.
            tensor = tf.bitcast(tensor, tf.uint16)
        array = np.asarray(memoryview(tensor))
        found[array.__array_interface__["data"][0]] = array.nbytes
    return sum(found.values())


def elements(tensor):
    """A tensor, or those of the list that it is."""
    if tensor.dtype != tf.variant:
        return [tensor]
    for dtype in (tf.float32, tf.int32):
        try:
            return [
                tf.raw_ops.TensorListStack(
                    input_handle=tensor, element_shape=-1, element_dtype=dtype
                )
            ]
        except tf.errors.InvalidArgumentError:
            continue
    raise AssertionError(tensor)


# -- Bytes --------------------------------------------------------------------


@pytest.mark.parametrize("stash", STASHES)
@pytest.mark.parametrize("name", MODELS)
def test_bytes_are_those_of_a_stash(name, stash):
    stage = Stage.of(name)
    traced = stage.linearize()
    cut = traced.cut([True], [True], stash)
    arguments = [*stage.weights, *stage.state, stage.x]
    *_, made = cut.forward(*arguments)
    found = traced.stash_bytes(stash, len(stage.x))
    # But for shapes that TensorFlow finds to be the same.
    assert found.total(1, 1) == pytest.approx(
        held(cut.stash(arguments, made)), rel=0.01
    )
    kept = [p for p in cut.stash_arguments if p is not None]
    least = held(arguments[p] for p in kept if p < len(stage.weights))
    assert found.weights >= least


def test_bytes_of_a_loop_are_said_to_be_missing():
    """If nobody knows how long it will be."""

    def pure(weights, state, inputs):
        halved = tf.while_loop(
            lambda x: tf.reduce_sum(x) > 1.0,
            lambda x: [tf.sin(x * weights[0]) / 2],
            inputs,
        )
        return Pure(halved, [], [])

    traced = linearize(pure, [tf.TensorSpec((3,))], [])
    traced.cut([True], [True], "exact")
    found = [traced.stash_bytes(stash, 4) for stash in STASHES]
    assert [f.unsized > 0 for f in found] == [True, True, True, False]


def test_total():
    assert StashBytes(100, 10).total(batches=7, updates=6) == 760


def test_without_a_gradient_nothing_is_kept():
    traced = linearize(lambda w, s, x: Pure([x[0] * 2.0], [], []))
    traced.cut([False], [False], "exact")
    assert traced.stash_bytes("exact", 8) == StashBytes(0, 0)


def test_what_training_does_not_change_costs_nothing():
    """State that stays as it is, and a weight without a gradient."""

    def pure(weights, state, inputs):
        y = inputs[0] * tf.stop_gradient(weights[0]) * weights[1]
        return Pure([y * state[0] * state[1]], [], [state[0], state[1] + 1.0])

    three = tf.TensorSpec((3,))
    traced = linearize(pure, [three] * 2, [three] * 2)
    traced.cut([True], [False], "replay")
    assert traced.stash_bytes("replay", 5) == StashBytes(4 * (5 * 3 + 3), 0)
    exact = traced.stash_bytes("exact", 5)
    assert exact.weights == 0  # The input has no gradient.


def test_views_of_one_tensor_count_once():
    def pure(weights, state, inputs):
        y = tf.tanh(inputs[0])
        flat = tf.reshape(tf.identity(y), [-1])
        return Pure([tf.sin(y) * weights[0], tf.square(flat)], [], [])

    traced = linearize(pure, [tf.TensorSpec((3,))])
    traced.cut([True, True], [True], "exact")
    tanh, sine = 4 * 8 * 3, 4 * 8 * 3
    shape = 4 * 2
    assert traced.stash_bytes("exact", 8).batch in (
        tanh + sine,
        tanh + sine + shape,
    )


# -- Shapes -------------------------------------------------------------------


def test_no_tensor_is_kept_for_its_shape():
    """The gradient of a mean asks for the shape of what it is the mean of."""

    def pure(weights, state, inputs):
        return Pure([tf.reduce_mean(tf.sin(inputs[0]), 0) * weights[0]], [], [])

    cut = linearize(pure, [tf.TensorSpec((3,))]).cut([True], [True], "exact")
    kept = [(spec.dtype, spec.shape.as_list()) for spec in cut.stash_specs]
    assert (tf.int32, [2]) in kept
    assert [shape for _, shape in kept].count([None, 3]) == 1  # The input.


# -- Selective ----------------------------------------------------------------


def resnet20():
    model = models.build("resnet20")

    def pure(weights, state, inputs):
        outputs, new = model.stateless_call(
            weights, state, *inputs, training=True
        )
        return Pure([outputs], [], list(new))

    def specs(variables):
        return [tf.TensorSpec(v.shape, v.dtype) for v in variables]

    return Linearized(
        pure,
        specs(model.trainable_variables),
        specs(model.non_trainable_variables),
        [tf.TensorSpec((None, 32, 32, 3))],
        CPU,
    )


@pytest.fixture(scope="module")
def residual():
    """ResNet-20, cut for selective recomputation."""
    traced = resnet20()
    return traced, traced.cut([True], [False], "selective")


def test_a_residual_network_keeps_half(residual):
    traced, _ = residual
    exact, selective = (
        traced.stash_bytes(stash, 128) for stash in ("exact", "selective")
    )
    # The outputs of its convolutions, and not those of its activations.
    assert selective.batch < 0.52 * exact.batch
    assert selective.weights <= 1.01 * exact.weights


def test_nothing_expensive_is_run_again(residual):
    _, cut = residual
    types = [op.type for op in cut.backward.graph.get_operations()]
    assert "Conv2D" not in types
    assert "Conv2DBackpropInput" in types
    # And what is cheap is.
    assert types.count("Relu") == 19
    assert types.count("Mean") <= 19


def cut_anew(name, stash):
    """Returns a model traced and cut, with the same names each time."""
    keras.utils.clear_session()
    traced = resnet20() if name == "residual" else Stage.of(name).linearize()
    return traced, traced.cut([True], [True], stash)


@pytest.mark.parametrize("name", ["residual", *MODELS])
def test_running_again_pays(name):
    """At most `MOVED_PER_BYTE` bytes pass for each one that is not kept."""
    # What depends on constants alone is computed in any backward.
    _, cut = cut_anew(name, "exact")
    anyway = {op.name for op in cut.backward.graph.get_operations()}
    traced, cut = cut_anew(name, "selective")
    exact, selective = (
        traced.stash_bytes(stash, 32) for stash in ("exact", "selective")
    )
    saved = exact.total(1, 1) - selective.total(1, 1)
    assert saved >= 0
    assert selective.unsized <= exact.unsized
    passed = 0.0
    for op in cut.backward.graph.get_operations():
        # Operations have the names they had in the forward.
        new = op.name.startswith("forward/") and op.name not in anyway
        if new and op.type in recompute.CHEAP:
            for tensor in [*op.inputs, *op.outputs]:
                shape = [d or 32 for d in tensor.shape.as_list()]
                passed += tensor.dtype.size * np.prod(shape)
    assert passed <= recompute.MOVED_PER_BYTE * saved


def test_a_random_mask_is_kept_as_bits():
    """Not the random numbers, nor what was left of the activations."""

    def pure(weights, state, inputs):
        h = inputs[0] @ weights[0]
        noise = tf.random.stateless_uniform(tf.shape(h), state[0])
        return Pure([tf.where(noise > 0.5, tf.exp(h), 0.0)], [], list(state))

    traced = linearize(
        pure, [tf.TensorSpec((3, 7))], [tf.TensorSpec((2,), tf.int32)]
    )
    cut = traced.cut([True], [True], "selective")
    made = [
        spec.dtype
        for spec, position in zip(cut.stash_specs, cut.stash_arguments)
        if position is None and spec.dtype != tf.int32
    ]
    assert sorted(made, key=str) == [tf.bool, tf.float32]
    assert "StatelessRandomUniformV2" not in {
        op.type for op in cut.backward.graph.get_operations()
    }


def test_a_loop_is_not_run_again():
    cut = Stage.of("lstm").linearize().cut([True], [True], "selective")
    loops = [
        op.name
        for op in cut.backward.graph.get_operations()
        if "While" in op.type
    ]
    assert loops
    assert not any(name.startswith("forward/") for name in loops)


def test_the_other_output_of_a_normalization():
    """`FusedBatchNormV3` has outputs of unknown shape for its gradient."""

    def pure(weights, state, inputs):
        h = tf.nn.conv2d(inputs[0], weights[0], 1, "SAME")
        h, *_ = tf.raw_ops.FusedBatchNormV3(
            x=h,
            scale=weights[1],
            offset=weights[2],
            mean=tf.zeros(0),
            variance=tf.zeros(0),
        )
        h = tf.nn.relu(h)
        return Pure([tf.nn.conv2d(h, weights[0], 1, "SAME")], [], [])

    specs = [tf.TensorSpec(s) for s in ((3, 3, 4, 4), (4,), (4,))]
    image = tf.TensorSpec((None, 6, 6, 4))
    random = [
        tf.random.stateless_normal([d or 5 for d in spec.shape], [1, i])
        for i, spec in enumerate([*specs, image])
    ]
    given = tf.random.stateless_normal((5, 6, 6, 4), [2, 2])
    found, sizes = [], []
    for stash in ("exact", "selective"):
        traced = linearize(pure, specs, (), [image])
        cut = traced.cut([True], [True], stash)
        *_, made = cut.forward(*random)
        found.append(cut.backward(given, *cut.stash(random, made)))
        sizes.append(traced.stash_bytes(stash, 5))
    for a, b in zip(*map(tf.nest.flatten, found), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)
    activation = 4 * 5 * 6 * 6 * 4
    assert sizes[0].batch - sizes[1].batch >= activation


def test_control_dependencies_stay_with_the_forward():
    def pure(weights, state, inputs):
        h = inputs[0] @ weights[0]
        check = tf.debugging.assert_less(h, 100.0, "too large")
        with tf.control_dependencies([check]):
            y = tf.sin(h)
        return Pure([y * h], [], [])

    cut = linearize(pure, [tf.TensorSpec((3, 3))]).cut(
        [True], [True], "selective"
    )
    types = {op.type for op in cut.backward.graph.get_operations()}
    assert "Sin" in types
    assert "Assert" not in types


def test_weights_are_those_of_the_forward():
    traced = linearize(
        lambda w, s, x: Pure([tf.tanh(x[0] * w[0])], [], []),
        [tf.TensorSpec((3,))],
    )
    cut = traced.cut([True], [True], "selective")
    assert not cut.needs_weights
    assert 0 in cut.stash_arguments


def test_stop_gradient_is_a_view():
    with tf.Graph().as_default():
        x = tf.compat.v1.placeholder(tf.float32, (None, 3))
        y = tf.sin(x)
        view = tf.reshape(tf.stop_gradient(tf.identity(y)), [-1])
        assert recompute.owner(view).name == y.name
        _, second = tf.identity_n([x, y])
        assert recompute.owner(second).name == y.name
        assert recompute.owner(tf.cast(y, tf.bfloat16)).op.type == "Cast"


def test_crossing_needs_no_inputs():
    """A stage may be fed by nothing but what it holds."""
    with tf.Graph().as_default() as graph:
        crossing = Crossing(graph, [], [], [], [], [[], []], [], [])
        assert [crossing.kept(stash) for stash in STASHES] == [[]] * 4


def test_every_operation_that_is_cheap_exists():
    for name in recompute.CHEAP | recompute.VIEWS | recompute.SMALL:
        assert hasattr(tf.raw_ops, name), name
