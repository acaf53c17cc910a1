"""What a stage measures about itself, within its compiled loop.

A loop is compiled with a `Recorder` where somebody asks for it (see
`callbacks`), and else with a `Probe`, which adds nothing to it.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import tensorflow as tf

from fdg_keras.links import Link

#: Of how many of the latest batches the times of all passes are kept.
KEPT = 32
# One batch in so many has its gradients and weights compared, so that what
# that costs is lost in what training costs.
_SAMPLED = 16


class Wait(NamedTuple):
    """When a pass began to wait for its inputs, and when it had them.

    Float64 scalars, in seconds on the clock of the stage's machine.
    """

    began: tf.Tensor
    ended: tf.Tensor

    @property
    def seconds(self) -> tf.Tensor:
        """How long it waited. The clock may be set back meanwhile."""
        return tf.maximum(self.ended - self.began, 0.0)


class Probe:
    """The interface of a probe, and the one that measures nothing.

    Its methods are traced into a loop. They return what the loop waits for
    before it goes on.
    """

    def tick(self) -> Sequence[Any]:
        """Called before a forward waits for its inputs."""
        return []

    def start(self, at: tf.Tensor, inputs: list[tf.Tensor]) -> list[tf.Tensor]:
        """Called where a pass has its inputs.

        Args:
            at: When that was.
            inputs: The tensors it has waited for.

        Returns:
            The same, to go on with.
        """
        return inputs

    def forward(
        self,
        batch: tf.Tensor,
        wait: Wait,
        weights: Sequence[tf.Tensor],
        after: Sequence[Any],
    ) -> Sequence[Any]:
        """Called where a forward ends.

        Args:
            batch: Its number.
            wait: What it waited for its inputs.
            weights: What it ran with.
            after: What must have ended.
        """
        return []

    def gradients(
        self,
        batch: tf.Tensor,
        received: Sequence[tf.Tensor],
        transformed: Sequence[tf.Tensor],
        weights: Callable[[], Sequence[tf.Tensor]],
    ) -> Sequence[Any]:
        """Called before an update.

        Args:
            batch: That of the backward.
            received: Gradients as they came over the link.
            transformed: The same as the transformer left them.
            weights: Returns today's.
        """
        return []

    def backward(
        self, batch: tf.Tensor, wait: Wait, after: Sequence[Any]
    ) -> Sequence[Any]:
        """Called where a backward and its update end."""
        return []

    def reset(self) -> None:
        """Forgets what was measured."""

    def means(self) -> dict[str, Any]:
        """Returns what was measured since."""
        return {}

    def times(self, first: int, forwards: int, backwards: int) -> list[tuple]:
        """Returns when the latest passes were run."""
        return []


class Recorder(Probe):
    """A probe that remembers what it sees, until it is reset.

    Args:
        host: The CPU that keeps the numbers.
        device: The stage's, which keeps a copy of its weights.
        variables: The stage's trainable TensorFlow variables.
        activations: The link they come over, if any.
        gradients: Likewise.
        late: d_k, the delay of the stage in batches.
    """

    def __init__(
        self,
        host: str,
        device: str,
        variables: Sequence[tf.Variable],
        activations: Link | None,
        gradients: Link | None,
        late: int = 0,
    ):
        self._host = host
        self._links = [activations, gradients]
        # A sample must have had its backward before the next one's forward.
        self._every = _SAMPLED * (late // _SAMPLED + 1)
        with tf.device(host):
            # When each pass began to wait, had its inputs, and ended.
            self._forwards = _zeros([KEPT, 3])
            self._backwards = _zeros([KEPT, 3])
            # How many ticks there were, and sums over them: how many batches
            # were in each link.
            self._ticks = _zeros([3])
            # How many samples there were, and sums over them: the norm of the
            # gradients before and after, and the drift of the weights.
            self._samples = _zeros([4])
        with tf.device(device):
            self._then = [
                tf.Variable(v, trainable=False, dtype=v.dtype)
                for v in variables
            ]

    # -- Within the loop ------------------------------------------------------

    def tick(self) -> Sequence[Any]:
        """Counts what waits in the links."""
        zero = tf.zeros((), tf.float64)
        with tf.device(self._host):
            sizes = [
                zero if link is None else tf.cast(link.size(), tf.float64)
                for link in self._links
            ]
            added = tf.stack([tf.ones_like(zero), *sizes])
            return [self._ticks.assign_add(added, read_value=False)]

    def start(self, at: tf.Tensor, inputs: list[tf.Tensor]) -> list[tf.Tensor]:
        """Has the pass begin after the clock was read, not meanwhile."""
        with tf.control_dependencies([at]):
            return [tf.identity(t) for t in inputs]

    def forward(
        self,
        batch: tf.Tensor,
        wait: Wait,
        weights: Sequence[tf.Tensor],
        after: Sequence[Any],
    ) -> Sequence[Any]:
        """Keeps the times, and of a sample the weights."""

        def keep() -> tf.Tensor:
            kept = [
                then.assign(tf.cast(w, then.dtype), read_value=False)
                for then, w in zip(self._then, weights)
            ]
            with tf.control_dependencies(kept):
                return tf.constant(True)

        kept = [
            tf.cond(self._is_sample(batch), keep, lambda: tf.constant(False))
        ]
        return [*self._keep(self._forwards, batch, wait, after), *kept]

    def gradients(
        self,
        batch: tf.Tensor,
        received: Sequence[tf.Tensor],
        transformed: Sequence[tf.Tensor],
        weights: Callable[[], Sequence[tf.Tensor]],
    ) -> Sequence[Any]:
        """Adds up norms, and the drift of the weights since the forward."""
        now = weights()

        def measure() -> tf.Tensor:
            moved = [
                tf.cast(w, then.dtype) - then
                for then, w in zip(self._then, now)
            ]
            drift = tf.math.divide_no_nan(_norm(moved), _norm(self._then))
            found = [1.0, _norm(received), _norm(transformed), drift]
            with tf.device(self._host):
                added = tf.cast(tf.stack(found), tf.float64)
                done = self._samples.assign_add(added, read_value=False)
            with tf.control_dependencies([done]):
                return tf.constant(True)

        is_sample = self._is_sample(batch)
        return [tf.cond(is_sample, measure, lambda: tf.constant(False))]

    def backward(
        self, batch: tf.Tensor, wait: Wait, after: Sequence[Any]
    ) -> Sequence[Any]:
        """Keeps the times."""
        return self._keep(self._backwards, batch, wait, after)

    def _keep(
        self,
        times: tf.Variable,
        batch: tf.Tensor,
        wait: Wait,
        after: Sequence[Any],
    ) -> list[Any]:
        with tf.device(self._host), tf.control_dependencies(after):
            ended = tf.timestamp()
            row = tf.stack([wait.began, wait.ended, ended])
            at = tf.convert_to_tensor(batch) % KEPT
            slices = tf.IndexedSlices(row[None], at[None])
            return [times.scatter_update(slices)]

    def _is_sample(self, batch: tf.Tensor) -> tf.Tensor:
        return tf.equal(batch % self._every, 0)

    # -- Outside of it --------------------------------------------------------

    def reset(self) -> None:
        """Forgets all sums."""
        for sums in (self._ticks, self._samples):
            sums.assign(tf.zeros_like(sums))

    def means(self) -> dict[str, Any]:
        """Returns means since the last reset; empty before the first tick.

        `activations_waiting` and `gradients_waiting` are batches in a link as
        a tick begins; `gradient_norm`, `transformed_norm` and `drift` of one
        batch in 16, or fewer in a stage that is more than 15 batches late.
        What is about a link is not there without one.
        """
        ticks, *waiting = self._ticks.numpy().tolist()
        samples, *sums = self._samples.numpy().tolist()
        activations, gradients = self._links
        counts = {
            "activations_waiting": ticks if activations else 0,
            "gradients_waiting": ticks if gradients else 0,
            "gradient_norm": samples if gradients else 0,
            "transformed_norm": samples if gradients else 0,
            "drift": samples,
        }
        return {
            name: total / count
            for (name, count), total in zip(counts.items(), waiting + sums)
            if count
        }

    def times(self, first: int, forwards: int, backwards: int) -> list[tuple]:
        """Returns when the latest passes were run.

        Args:
            first: The first batch since the stages drained.
            forwards: How many forwards there were since then.
            backwards: Likewise.

        Returns:
            Tuples of `"F"` or `"B"`, the batch, and the seconds at which the
            pass began to wait, had its inputs, and ended; in the order in
            which they ended.
        """
        found: list[tuple] = []
        for kind, times, count in (
            ("F", self._forwards.numpy(), forwards),
            ("B", self._backwards.numpy(), backwards),
        ):
            found += [
                (kind, first + batch, *times[batch % KEPT].tolist())
                for batch in range(max(count - KEPT, 0), count)
            ]
        return sorted(found, key=lambda one: one[-1])


def _zeros(shape: list[int]) -> tf.Variable:
    return tf.Variable(tf.zeros(shape, tf.float64), trainable=False)


def _norm(tensors: Sequence[Any]) -> tf.Tensor:
    """Returns the Euclidean norm of all entries, in float32."""
    total = tf.zeros((), tf.float32)
    for tensor in tensors:
        # Half precision would overflow.
        total += tf.reduce_sum(tf.square(tf.cast(tensor, tf.float32)))
    return tf.sqrt(total)
