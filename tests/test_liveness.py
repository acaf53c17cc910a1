"""Bytes that are alive at once: by hand, and by an allocator that counts."""

import pytest
import tensorflow as tf

from fdg_keras.liveness import most_alive

UNIT = 4 * 1000


def traced(function, *shapes):
    """A function's arguments and results, as tensors of a graph."""
    arguments = []

    def call(*given):
        arguments.extend(given)
        return function(*given)

    specs = [tf.TensorSpec(shape, tf.float32) for shape in shapes]
    graph = tf.function(call, autograph=False).get_concrete_function(*specs)
    return arguments, tf.nest.flatten(graph.structured_outputs)


def bytes_of(fetches):
    operations = fetches[0].graph.get_operations()
    return {
        t.name: t.shape.num_elements() * t.dtype.size
        for op in operations
        for t in op.outputs
    }


def alive(function, *shapes, uncounted=()):
    given, fetches = traced(function, *shapes)
    names = {fetches[i].op.inputs[0].name for i in uncounted}
    return most_alive(fetches, given, (), bytes_of(fetches), names)


def chain(x):
    for _ in range(5):
        x = tf.tanh(x)
    return x


def branches(x):
    parts = [tf.exp(x), tf.tanh(x), tf.sin(x)]
    return tf.add_n(parts)


def views(x):
    return tf.reshape(tf.tanh(tf.reshape(tf.exp(x), [10, 100])), [1000])


def grows(x):
    return tf.reduce_sum(tf.tile(x, [8]))


@pytest.mark.parametrize(
    ("function", "units"),
    [
        (chain, 3),  # what is given, and two neighbours
        (branches, 5),  # what is given, three parts, their sum
        (views, 3),
        (grows, 9),
    ],
)
def test_by_hand(function, units):
    assert alive(function, [1000]) == pytest.approx(units * UNIT, abs=200)


def test_what_nobody_reads_lives_as_long_as_its_operation():
    def first(x):
        return tf.split(tf.tanh(x), 4)[0] + 1.0

    assert alive(first, [1000]) == pytest.approx(3 * UNIT, abs=200)


def test_what_is_counted_elsewhere_takes_nothing():
    def two(x):
        return tf.tanh(x), tf.exp(x)

    assert alive(two, [1000]) == 3 * UNIT
    assert alive(two, [1000], uncounted=[0]) == 2 * UNIT


def test_what_is_there_before_is_not_made():
    given, fetches = traced(lambda x: tf.sin(tf.tanh(tf.tile(x, [8]))), [1000])
    sizes = bytes_of(fetches)
    tile = fetches[0].op.inputs[0].op.inputs[0].op.inputs[0]
    assert tile.op.type == "Tile"
    found = most_alive(fetches, given, {tile.name}, sizes, ())
    assert found == (1 + 8 + 8) * UNIT


def test_unknown_sizes_take_none():
    given, fetches = traced(chain, [1000])
    sizes = dict.fromkeys(bytes_of(fetches))
    assert most_alive(fetches, given, (), sizes, ()) == 0
