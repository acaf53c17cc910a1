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
        self._moved.assign(0)
        fed, size = loop(iterator, tf.constant(count))
        if self.batch_bytes is None and int(fed):
            self.batch_bytes = int(size)
        return int(fed)

    def moved(self) -> int:
        """Returns how many batches the last call has moved, done or not."""
        return 0 if self._moved is None else int(self._moved)

    def _trace(
        self, iterator: Any, device: str | None
    ) -> tuple[tf.Variable, Any]:
        with tf.device(device):
            moved = tf.Variable(0, dtype=tf.int64, trainable=False)

        def move(iterator: Any, count: tf.Tensor) -> list[tf.Tensor]:
            with tf.device(device):
                return self._move(iterator, tf.identity(count), moved)

        # Traced by hand: TensorFlow's own way warns of many trainers.
        function = tf.function(move, autograph=False)
        count = tf.TensorSpec((), tf.int32)
        return moved, function.get_concrete_function(iterator, count)

    def _move(
        self, iterator: Any, count: tf.Tensor, total: tf.Variable
    ) -> list[tf.Tensor]:
        """Returns how many batches there were, and the bytes of the last."""
        # Rows are there, at no cost for each batch; else bytes are counted.
        row = _row_bytes(iterator.element_spec)
        nothing = tf.experimental.Optional.empty(iterator.element_spec)

        def draw(fed: tf.Tensor) -> Any:
            return tf.cond(
                fed < count, iterator.get_next_as_optional, lambda: nothing
            )

        def body(
            fed: tf.Tensor, _: tf.Tensor, drawn: Any
        ) -> tuple[tf.Tensor, tf.Tensor, Any]:
            element = drawn.get_value()
            size = element[1][-1] if row is not None else _bytes(element)
            with tf.control_dependencies([self._push(element, total)]):
                fed = fed + 1
                return fed, tf.cast(size, tf.int64), draw(fed)

        # What is drawn is there before the loop asks whether to go on, so that
        # links on other machines are asked once for each batch.
        fed, size, _ = tf.while_loop(
            lambda fed, size, drawn: drawn.has_value(),
            body,
            [tf.constant(0), tf.constant(0, tf.int64), draw(tf.constant(0))],
            parallel_iterations=1,
        )
        return [fed, size if row is None else size * row]

    def _push(self, element: Any, total: tf.Variable) -> tf.Operation:
        inputs, targets = element
        done = [
            operation
            for link, positions in self._feeds
            for operation in link.enqueue([inputs[i] for i in positions])
        ]
        if self._targets is not None:
            done += self._targets.enqueue(list(targets))
        with tf.control_dependencies(done):
            return total.assign_add(1, read_value=False)


def _row_bytes(element_spec: Any) -> int | None:
    """Returns the bytes of a row, `None` if other sizes than rows are open."""
    shapes = [
        (spec.shape[1:], spec.dtype.size)
        for spec in tf.nest.flatten(element_spec)
        if spec.shape.rank != 0 and spec.dtype != tf.string
    ]
    if not all(shape.is_fully_defined() for shape, _ in shapes):
        return None
    return sum(shape.num_elements() * size for shape, size in shapes)


def _bytes(element: Any) -> tf.Tensor:
    sizes = [
        tf.size(tensor, tf.int64) * tensor.dtype.size
        for tensor in tf.nest.flatten(element)
        if tensor.dtype != tf.string
    ]
    return tf.add_n(sizes)
