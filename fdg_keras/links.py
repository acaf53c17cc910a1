"""Bounded, typed queues that carry tensors from one stage to another.

A link lives on its consumer's device. On a GPU it keeps its tensors there:
TensorFlow's FIFO queue may be placed on a GPU, and then enqueue and dequeue
move references, not bytes. Tensors that TensorFlow keeps in host memory
whatever the device (`int32`, strings, `variant` handles) travel in a second
lane, a queue on the host of the same machine.
"""

import itertools
import uuid
from collections.abc import Sequence
from dataclasses import dataclass

import tensorflow as tf

# What TensorFlow's GPU kernels expect in host memory.
_HOST_TYPES = (tf.int32, tf.string, tf.variant, tf.resource)
# Queues are found by their names, and a worker may still hold those of another
# chief, which was killed.
_PROCESS = uuid.uuid4().hex
_names = itertools.count()


class Link:
    """A bounded first-in first-out queue of tuples of tensors.

    Producer and consumer are one loop each. Both `enqueue` and `dequeue` are
    TensorFlow operations: they may be called eagerly or traced. A blocked
    `dequeue` costs no thread.

    After `close` a blocked or later `dequeue` raises
    `tf.errors.OutOfRangeError`, an `enqueue` `tf.errors.CancelledError`, until
    `reopen`.

    Args:
        specs: Shapes (dimensions may be unknown) and dtypes of the tensors.
        capacity: How many tuples it holds before `enqueue` blocks.
        device: The consumer's device.
        name: Shown in profiles and error messages.
    """

    def __init__(
        self,
        specs: Sequence[tf.TensorSpec],
        capacity: int,
        device: str,
        name: str,
    ):
        self.specs = list(specs)
        self.capacity = capacity
        self.device = device
        self.name = name
        placed = tf.DeviceSpec.from_string(device)
        host = placed.replace(device_type="CPU", device_index=0).to_string()
        on_gpu = placed.device_type == "GPU"
        lanes: dict[str, list[int]] = {}
        for i, spec in enumerate(self.specs):
            on_host = on_gpu and spec.dtype in _HOST_TYPES
            lanes.setdefault(host if on_host else device, []).append(i)
        # A tuple of no tensors is still a token to wait for.
        self._lanes = [
            _Lane(place, members, [self.specs[i].dtype for i in members], self)
            for place, members in (lanes or {device: []}).items()
        ]

    def enqueue(self, tensors: Sequence[tf.Tensor]) -> list[tf.Operation]:
        """Appends a tuple; blocks while the link is full.

        Returns:
            Operations to wait for when traced.
        """
        return [
            lane.enqueue([tensors[i] for i in lane.members])
            for lane in self._lanes
        ]

    def dequeue(self) -> list[tf.Tensor]:
        """Removes and returns the oldest tuple; blocks while it is empty."""
        found: dict[int, tf.Tensor] = {}
        for lane in self._lanes:
            found.update(zip(lane.members, lane.dequeue()))
        tensors = [found[i] for i in range(len(self.specs))]
        for tensor, spec in zip(tensors, self.specs):
            if not tf.executing_eagerly():
                tensor.set_shape(spec.shape)
        return tensors

    def size(self) -> tf.Tensor:
        """Returns how many tuples wait in the link, an `int32` scalar."""
        return self._lanes[0].size()

    def close(self) -> None:
        """Closes the link, empties it and wakes all who wait for it."""
        for lane in self._lanes:
            lane.close()

    def reopen(self) -> None:
        """Makes a closed link a new, empty one, for compiled loops, too.

        To be called when nobody waits for it any more.
        """
        for lane in self._lanes:
            lane.reopen()


@dataclass
class Ports:
    """The links of one stage; `None` where there is none.

    Every link lives on its consumer's device (on a GPU, with its tensors), but
    for the outputs of `predict`: they stay on the device that made them.
    Shapes are `[B, ...]`, dtypes those of the model; `Link.specs` has them.

    Attributes:
        feeds: The model inputs this stage uses. Producer: the feeder.
            Capacity: none; the feeder waits by itself, see `feeding`.
        targets: Targets, sample weights and batch size, for the last stage,
            see `Objective`. Producer and capacity: as `feeds`.
        activations_in: What `Boundary` says. Producer: the stage before.
            Capacity: `delay + 1` batches. Delay added: none.
        activations_out: The same of the stage after; for `predict` the
            model's outputs, taken by the caller.
        gradients_in: Gradients of the loss by the sent values that have one.
            Producer: the stage after. Capacity: `delay + 1` batches. Delay
            added: `delay` batches, because a stage runs B(t - d_k) at tick t.
        gradients_out: The same of the stage before.
    """

    feeds: Link | None = None
    targets: Link | None = None
    activations_in: Link | None = None
    activations_out: Link | None = None
    gradients_in: Link | None = None
    gradients_out: Link | None = None

    def all(self) -> list[Link]:
        """Returns the links there are."""
        return [link for link in vars(self).values() if link is not None]


class _Lane:
    """One queue: the members of a link that share a place."""

    def __init__(
        self,
        place: str,
        members: list[int],
        dtypes: list[tf.DType],
        link: Link,
    ):
        self.members = members
        self._place = place
        self._dtypes = dtypes or [tf.bool]
        self._empty = not dtypes
        self._capacity = link.capacity
        self._name = f"fdg_{link.name}_{_PROCESS}_{next(_names)}"
        self._handle = self._make()

    def _make(self) -> tf.Tensor:
        """Makes the queue; returns a handle, which is little but its name."""
        with tf.init_scope(), tf.device(self._place):
            return tf.raw_ops.FIFOQueueV2(
                component_types=self._dtypes,
                capacity=self._capacity,
                shared_name=self._name,
                name=self._name,
            )

    def enqueue(self, tensors: list[tf.Tensor]) -> tf.Operation:
        with tf.device(self._place):
            return tf.raw_ops.QueueEnqueueV2(
                handle=self._handle,
                components=tensors if not self._empty else [tf.constant(True)],
            )

    def dequeue(self) -> list[tf.Tensor]:
        with tf.device(self._place):
            tensors = tf.raw_ops.QueueDequeueV2(
                handle=self._handle, component_types=self._dtypes
            )
        return [] if self._empty else list(tensors)

    def size(self) -> tf.Tensor:
        with tf.device(self._place):
            return tf.raw_ops.QueueSizeV2(handle=self._handle)

    def close(self) -> None:
        # Without cancelling, closing would wait for a blocked enqueue.
        tf.raw_ops.QueueCloseV2(
            handle=self._handle, cancel_pending_enqueues=True
        )
        # What waits in a closed queue would still come out of it.
        try:
            while True:
                self.dequeue()
        except tf.errors.OutOfRangeError:
            pass

    def reopen(self) -> None:
        self._destroy()
        # Under the name it had, so that the old handle is one of the new queue.
        self._make()

    def _destroy(self) -> None:
        tf.raw_ops.DestroyResourceOp(
            resource=self._handle, ignore_lookup_error=True
        )

    def __del__(self) -> None:
        # A named queue lives in TensorFlow's resource manager until told. The
        # garbage collector may come here while a graph is being traced, and
        # must not leave an operation in it: hence the scope.
        try:
            with tf.init_scope():
                self._destroy()
        except Exception:  # The interpreter or the runtime may be gone.
            pass
