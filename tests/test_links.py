"""Bounded queues between stages."""

import gc
import threading

import numpy as np
import pytest
import tensorflow as tf

from fdg_keras.links import Link
from fdg_keras.threads import Crew

HERE = "/job:localhost/replica:0/task:0/device:CPU:0"
THERE = "/job:localhost/replica:0/task:0/device:CPU:1"
GPU = "/job:localhost/replica:0/task:0/device:GPU:0"

SCALAR = tf.TensorSpec(())
ROWS = tf.TensorSpec((None, 2))


def make_link(specs=(SCALAR,), capacity=4, device=HERE):
    return Link(specs, capacity, device, "test")


def values(link, count):
    """The next `count` scalars."""
    return [float(link.dequeue()[0]) for _ in range(count)]


def blocked(crew, name, target):
    """Starts `target`, and returns an event that says when it has ended."""
    ended = threading.Event()

    def work():
        try:
            target()
        finally:
            ended.set()

    crew.start(f"fdg-{name}", work)
    return ended


# -- First in, first out ------------------------------------------------------


def test_order():
    link = make_link()
    for value in (1.0, 2.0, 3.0):
        link.enqueue([tf.constant(value)])
    assert values(link, 3) == [1.0, 2.0, 3.0]


def test_order_when_traced():
    """Producer and consumer in compiled loops, in threads of their own."""
    link = make_link(capacity=2)
    count = tf.constant(50)

    @tf.function(autograph=False)
    def produce():
        def body(i):
            with tf.control_dependencies(link.enqueue([tf.cast(i, "float32")])):
                return i + 1

        return tf.while_loop(
            lambda i: i < count, body, [0], parallel_iterations=1
        )

    @tf.function(autograph=False)
    def consume():
        def body(i, found):
            (value,) = link.dequeue()
            return i + 1, found.write(i, value)

        found = tf.TensorArray("float32", size=count)
        _, found = tf.while_loop(
            lambda i, _: i < count, body, [0, found], parallel_iterations=1
        )
        return found.stack()

    with Crew(link.close) as crew:
        crew.start("fdg-produces", produce)
        found = consume()
    np.testing.assert_array_equal(found, np.arange(50))


def test_a_tuple_keeps_its_order_shapes_and_dtypes():
    tensors = [
        tf.constant([[1.0, 2.0]]),
        tf.constant([3], tf.int32),
        tf.constant([True]),
        tf.constant([4.0], tf.bfloat16),
        tf.constant(5, tf.int64),
        tf.constant("text"),
    ]
    link = make_link([tf.TensorSpec(None, t.dtype) for t in tensors])
    link.enqueue(tensors)
    for found, wanted in zip(link.dequeue(), tensors, strict=True):
        assert found.dtype == wanted.dtype
        np.testing.assert_array_equal(found.numpy(), wanted.numpy())


def test_a_link_carries_the_state_of_recurrent_layers():
    """A `while` keeps what its gradient needs in a list, a `variant`."""
    handle = tf.raw_ops.TensorListFromTensor(
        tensor=tf.constant([[1.0], [2.0]]), element_shape=[1]
    )
    link = make_link([tf.TensorSpec((), tf.variant)])
    link.enqueue([handle])
    (found,) = link.dequeue()
    stacked = tf.raw_ops.TensorListStack(
        input_handle=found, element_shape=[1], element_dtype=tf.float32
    )
    np.testing.assert_array_equal(stacked, [[1.0], [2.0]])


def test_a_tuple_of_nothing_is_still_waited_for():
    link = make_link([])
    assert link.enqueue([]) is not None
    assert link.size() == 1
    assert link.dequeue() == []
    assert link.size() == 0


def test_batches_may_differ_in_size():
    link = make_link([ROWS])
    for rows in (3, 1):
        link.enqueue([tf.ones((rows, 2))])
    assert [link.dequeue()[0].shape[0] for _ in range(2)] == [3, 1]


def test_traced_tensors_know_their_shape():
    link = make_link([ROWS, SCALAR])

    @tf.function
    def shapes():
        found.extend(t.shape.as_list() for t in link.dequeue())

    found = []
    shapes.get_concrete_function()
    assert found == [[None, 2], []]


# -- Capacity and closing -----------------------------------------------------


def test_a_full_link_blocks_its_producer():
    link = make_link(capacity=2)
    with Crew(link.close) as crew:
        for value in (1.0, 2.0):
            link.enqueue([tf.constant(value)])
        third = [tf.constant(3.0)]
        ended = blocked(crew, "produces", lambda: link.enqueue(third))
        assert not ended.wait(0.1)
        assert link.size() == 2
        assert values(link, 1) == [1.0]
        assert ended.wait(10)
        assert values(link, 2) == [2.0, 3.0]


def test_an_empty_link_blocks_its_consumer():
    link = make_link()
    with Crew(link.close) as crew:
        ended = blocked(crew, "consumes", link.dequeue)
        assert not ended.wait(0.1)
        link.enqueue([tf.constant(1.0)])
        assert ended.wait(10)


def test_closing_wakes_a_blocked_consumer():
    link = make_link()
    with Crew(lambda: None) as crew:
        ended = blocked(crew, "consumes", lambda: raises_when_closed(link))
        assert not ended.wait(0.1)
        link.close()
        assert ended.wait(10)


def raises_when_closed(link):
    with pytest.raises(tf.errors.OutOfRangeError, match="is closed"):
        link.dequeue()


def test_closing_wakes_a_blocked_producer():
    """And does not wait for it, as closing a queue of TensorFlow's would."""
    link = make_link(capacity=1)
    link.enqueue([tf.constant(1.0)])
    errors = []

    def produce():
        try:
            link.enqueue([tf.constant(2.0)])
        except tf.errors.CancelledError as error:
            errors.append(error)

    with Crew(lambda: None) as crew:
        ended = blocked(crew, "produces", produce)
        assert not ended.wait(0.1)
        link.close()
        assert ended.wait(10)
    assert len(errors) == 1


def test_a_closed_link_is_empty_and_takes_nothing():
    link = make_link()
    link.enqueue([tf.constant(1.0)])
    link.close()
    assert link.size() == 0
    with pytest.raises(tf.errors.OutOfRangeError, match="is closed"):
        link.dequeue()
    with pytest.raises(tf.errors.CancelledError, match="is closed"):
        link.enqueue([tf.constant(2.0)])


def test_a_reopened_link_is_a_new_one_for_compiled_functions_too():
    link = make_link(capacity=2)

    @tf.function
    def put(x):
        link.enqueue([x])

    get = tf.function(lambda: link.dequeue()[0])
    for i in range(3):
        put(tf.constant(float(i)))
        put(tf.constant(i + 0.5))
        assert link.size() == 2
        assert float(get()) == i
        link.close()
        with pytest.raises(tf.errors.CancelledError, match="is closed"):
            put(tf.constant(0.0))
        link.reopen()
        assert link.size() == 0


def test_closing_twice_is_fine():
    link = make_link()
    link.close()
    link.close()
    assert link.size() == 0


def test_links_of_one_name_are_separate():
    one, other = make_link(), make_link()
    one.enqueue([tf.constant(1.0)])
    assert (one.size(), other.size()) == (1, 0)


def test_a_collected_link_frees_its_queue():
    """What waits in it may be large, and on a GPU."""
    link = make_link()
    (lane,) = link._lanes
    handle = lane._handle
    del link, lane
    gc.collect()
    with pytest.raises(tf.errors.NotFoundError, match="does not exist"):
        tf.raw_ops.QueueSizeV2(handle=handle)


# -- Devices ------------------------------------------------------------------


def queue_devices(link):
    """The device of each enqueue and dequeue that `link` traces to."""

    @tf.function
    def both():
        link.enqueue(
            [tf.zeros([1] * len(s.shape), s.dtype) for s in link.specs]
        )
        link.dequeue()

    devices = {}
    for operation in both.get_concrete_function().graph.get_operations():
        dtypes = {
            "QueueEnqueueV2": "Tcomponents",
            "QueueDequeueV2": "component_types",
        }.get(operation.type)
        for dtype in operation.get_attr(dtypes) if dtypes else ():
            devices.setdefault(dtype, set()).add(operation.device)
    return devices


def test_a_link_lives_on_the_device_of_its_consumer():
    link = make_link([SCALAR, tf.TensorSpec((), tf.int32)], device=THERE)
    with tf.device(HERE):
        assert queue_devices(link) == {
            tf.float32: {THERE},
            tf.int32: {THERE},
        }


def test_what_a_gpu_keeps_in_host_memory_has_a_lane_on_the_host():
    """No GPU here: TensorFlow falls back to the CPU, the names stay."""
    link = make_link(
        [
            ROWS,
            tf.TensorSpec((), tf.int32),
            tf.TensorSpec((), tf.int64),
            tf.TensorSpec((), tf.string),
            tf.TensorSpec((), tf.bool),
        ],
        device=GPU,
    )
    assert queue_devices(link) == {
        tf.float32: {GPU},
        tf.int64: {GPU},
        tf.bool: {GPU},
        tf.int32: {HERE},
        tf.string: {HERE},
    }


def test_lanes_put_a_tuple_together_again():
    specs = [tf.TensorSpec((), tf.int32), SCALAR, tf.TensorSpec((), tf.int32)]
    link = make_link(specs, device=GPU)
    for i in range(3):
        link.enqueue([tf.constant(i), tf.constant(0.5), tf.constant(-i)])
    assert link.size() == 3
    for i in range(3):
        found = [t.numpy() for t in link.dequeue()]
        assert found == [i, 0.5, -i]


def test_lanes_close_together():
    link = make_link([SCALAR, tf.TensorSpec((), tf.int32)], device=GPU)
    link.enqueue([tf.constant(1.0), tf.constant(1)])
    link.close()
    assert link.size() == 0
    raises_when_closed(link)
