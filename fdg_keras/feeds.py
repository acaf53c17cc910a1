"""The compiled loop that moves batches from an iterator into links."""

from collections.abc import Sequence
from typing import Any

import tensorflow as tf

from fdg_keras.links import Link


class Feed:
    """Moves batches from an iterator to links, by a compiled loop.

    Args:
        feeds: Links, and the positions of the inputs each one carries.
        targets: The link that carries the targets, if any.
    """

    def __init__(
        self,
        feeds: Sequence[tuple[Link, Sequence[int]]],
        targets: Link | None,
    ):
        self._feeds = feeds
        self._targets = targets
        with tf.device("CPU:0"):
            self._moved = tf.Variable(0, dtype=tf.int64, trainable=False)
        self._function: Any = None

    def __call__(self, iterator: Any, count: int) -> int:
        """Moves up to `count` batches; returns how many there were."""
        self._moved.assign(0)
        if self._function is None:
            # Traced by hand: TensorFlow's own way warns of many trainers.
            self._function = tf.function(
                self._move, autograph=False
            ).get_concrete_function(iterator, tf.TensorSpec((), tf.int32))
        return int(self._function(iterator, tf.constant(count)))

    def moved(self) -> int:
        """Returns how many batches the last call has moved, done or not."""
        return int(self._moved)

    def _move(self, iterator: Any, count: tf.Tensor) -> tf.Tensor:
        def body(fed: tf.Tensor, _: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
            element = iterator.get_next_as_optional()
            more = element.has_value()
            moved = tf.cond(
                more,
                lambda: self._push(element.get_value()),
                lambda: tf.constant(0),
            )
            return fed + moved, more

        fed, _ = tf.while_loop(
            lambda fed, more: tf.logical_and(fed < count, more),
            body,
            [tf.constant(0), tf.constant(True)],
            parallel_iterations=1,
        )
        return fed

    def _push(self, element: Any) -> tf.Tensor:
        inputs, targets = element
        done = [
            operation
            for link, positions in self._feeds
            for operation in link.enqueue([inputs[i] for i in positions])
        ]
        if self._targets is not None:
            done += self._targets.enqueue(list(targets))
        with tf.control_dependencies(done):
            done = [self._moved.assign_add(1, read_value=False)]
        with tf.control_dependencies(done):
            return tf.constant(1)
