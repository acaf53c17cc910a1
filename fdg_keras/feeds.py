"""The compiled loop that moves batches from an iterator into links."""

from collections.abc import Sequence
from typing import Any

import tensorflow as tf

from fdg_keras import _keras
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
        # For each device that iterators are on.
        self._loops: dict[str | None, tuple[tf.Variable, Any]] = {}
        self._moved: tf.Variable | None = None
        #: Bytes of a batch; `None` before the first one.
        self.batch_bytes: int | None = None

    def __call__(self, iterator: Any, count: int) -> int:
        """Moves up to `count` batches; returns how many there were.

        The loop runs where the iterator is, which may be another machine.
        """
        device = _keras.device_of(iterator)
        if device not in self._loops:
            self._loops[device] = self._trace(iterator, device)
        self._moved, loop = self._loops[device]
        self._moved.assign([0, 0])
        found = int(loop(iterator, tf.constant(count)))
        if found and self.batch_bytes is None:
            self.batch_bytes = int(self._moved[1]) // found
        return found

    def moved(self) -> int:
        """Returns how many batches the last call has moved, done or not."""
        return 0 if self._moved is None else int(self._moved[0])

    def _trace(
        self, iterator: Any, device: str | None
    ) -> tuple[tf.Variable, Any]:
        with tf.device(device):
            # Batches, and their bytes.
            moved = tf.Variable([0, 0], dtype=tf.int64, trainable=False)

        def move(iterator: Any, count: tf.Tensor) -> tf.Tensor:
            with tf.device(device):
                return self._move(iterator, tf.identity(count), moved)

        # Traced by hand: TensorFlow's own way warns of many trainers.
        function = tf.function(move, autograph=False)
        count = tf.TensorSpec((), tf.int32)
        return moved, function.get_concrete_function(iterator, count)

    def _move(
        self, iterator: Any, count: tf.Tensor, total: tf.Variable
    ) -> tf.Tensor:
        def body(fed: tf.Tensor, _: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
            element = iterator.get_next_as_optional()
            more = element.has_value()
            moved = tf.cond(
                more,
                lambda: self._push(element.get_value(), total),
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

    def _push(self, element: Any, total: tf.Variable) -> tf.Tensor:
        inputs, targets = element
        done = [
            operation
            for link, positions in self._feeds
            for operation in link.enqueue([inputs[i] for i in positions])
        ]
        if self._targets is not None:
            done += self._targets.enqueue(list(targets))
        with tf.control_dependencies(done):
            size = sum(map(_bytes, tf.nest.flatten(element)))
            done = [total.assign_add([1, size], read_value=False)]
        with tf.control_dependencies(done):
            return tf.constant(1)


def _bytes(tensor: tf.Tensor) -> Any:
    if tensor.dtype == tf.string:
        return 0  # They are no tensors' memory.
    return tf.size(tensor, tf.int64) * tensor.dtype.size
