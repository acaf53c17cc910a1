"""Bugs that were there once, each with its story."""

import gc

import tensorflow as tf

from fdg_keras.links import Link

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
