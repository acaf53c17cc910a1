"""The compiled loop of one stage: no Python for each tick."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import tensorflow as tf

from fdg_keras import _keras, transforms
from fdg_keras.delays import Order
from fdg_keras.links import Link, Ports
from fdg_keras.objective import Objective
from fdg_keras.placement import host_of
from fdg_keras.probes import Probe, Wait
from fdg_keras.stages import Stage
from fdg_keras.transforms import GradientTransformer
from fdg_keras.updates import Update


@dataclass
class Report:
    """What one call of a stage's loop returns.

    Attributes:
        waited_activations: Seconds waited for activations or data.
        waited_gradients: Seconds waited for gradients.
        metrics: Metric values at the end, last stage only.
    """

    waited_activations: tf.Tensor
    waited_gradients: tf.Tensor
    metrics: dict[str, tf.Tensor] = field(default_factory=dict)


class Loop:
    """The compiled loop of a stage.

    Runs `fill` ticks of a forward, `steady` ticks of a forward and a backward,
    `drain` ticks of a backward, as `delays.turns` counts them. Within a tick
    things happen in sequence, so that a stage that is stopped at a link has
    finished all it did before.

    Args:
        stage: What to run. Its variables are on its device.
        ports: The stage's links.
        update: Makes the stage's updates.
        objective: The loss and metrics, for the last stage.
        transform: Applied to gradients that arrive over a link.
        late: d_k, the delay of the stage in batches.
        order: Whether F or B comes first in a tick.
        probe: What measures the loop; by default nothing does.
    """

    def __init__(
        self,
        stage: Stage,
        ports: Ports,
        update: Update,
        objective: Objective | None = None,
        transform: GradientTransformer | None = None,
        late: int = 0,
        order: Order = "forward_first",
        probe: Probe | None = None,
    ):
        self._stage = stage
        self._cut = cut = stage.pair
        self._ports = ports
        self._objective = objective
        self.update = update
        self._transform = transform
        self.probe = probe or Probe()
        self._late = late if stage.has_backward else 0
        self._update_first = order == "update_first" and self._late > 0
        if self._late and cut.calls_back:
            raise ValueError(
                f"Stage {stage.index} ({stage.span}) differentiates a "
                "`tf.py_function`, which remembers one forward only, and its "
                "backward comes several batches later. Use TensorFlow "
                "operations, `tf.numpy_function` in a `tf.custom_gradient`, "
                "`delay=0` or `emulate=True`, or cut so that the layer is in "
                "the last stage."
            )
        self._host = host_of(stage.device)
        self._state = [_keras.get_storage(v) for v in stage.state]
        with tf.device(self._host):
            self._forwards = tf.Variable(0, dtype=tf.int64, trainable=False)
            self._backwards = tf.Variable(0, dtype=tf.int64, trainable=False)
        self._first = self._forwards_due = 0
        self._stash = None
        if self._late:
            # Producer and consumer: this stage. `late` batches wait in it,
            # and one more between F and B of one tick. On the device.
            self._stash = Link(
                cut.stash_specs + update.kept_specs,
                self._late + 1,
                stage.device,
                f"stash_{stage.index}",
            )
        self._function = self._trace()

    def __call__(
        self, fill: int, steady: int, drain: int, learning_rate: float
    ) -> Report:
        """Runs some ticks. Blocks; call it from the stage's own thread."""
        self._forwards_due += fill + steady
        return Report(
            *self._function(
                tf.constant(fill),
                tf.constant(steady),
                tf.constant(drain),
                tf.constant(learning_rate, tf.float64),
            )
        )

    @property
    def links(self) -> list[Link]:
        """All links this loop may wait for."""
        stash = [] if self._stash is None else [self._stash]
        return self._ports.all() + stash

    @property
    def progress(self) -> tuple[int, int, int]:
        """The first batch of this stream, and its forwards and backwards."""
        return self._first, int(self._forwards), int(self._backwards)

    @property
    def late(self) -> int:
        """How many batches B follows F by, in this loop."""
        return self._late

    def reset(self, first: int = 0) -> None:
        """Starts a new stream; `position` counts its batches from `first`."""
        self._first = first
        self._forwards_due = 0
        self._forwards.assign(0)
        self._backwards.assign(0)

    def position(self) -> str:
        """Says which batch is in progress, and in which pass."""
        first, forwards, backwards = self.progress
        # Between F and B of a tick there is one more batch in the stage than
        # between ticks; once there is no F left, there is only B.
        between = self._late - self._update_first
        backward = forwards - backwards > between or (
            forwards == self._forwards_due > backwards
        )
        if backward and self._stage.has_backward:
            return f"backward or update of batch {first + backwards}"
        return f"forward of batch {first + forwards}"

    # -- Tracing --------------------------------------------------------------

    def _trace(self) -> Callable[..., Any]:
        def run(
            fill: Any, steady: Any, drain: Any, learning_rate: Any
        ) -> tuple:
            with tf.device(self._host):
                # Arguments are where the caller is, and a loop that reads them
                # there sends a message for each tick if that is far away.
                fill, steady, drain = map(tf.identity, (fill, steady, drain))
            with tf.device(self._stage.device):
                self.update.set_learning_rate(learning_rate)
                waited = [self._no_time()] * 2
                if self._late:
                    waited = self._repeat(fill, waited, self._forward_only)
                waited = self._repeat(steady, waited, self._steady)
                if self._late:
                    waited = self._repeat(drain, waited, self._backward_only)
                metrics = self._objective.results() if self._objective else {}
            return *waited, metrics

        count = tf.TensorSpec((), tf.int32)
        function = tf.function(run, autograph=False)
        return function.get_concrete_function(
            count, count, count, tf.TensorSpec((), tf.float64)
        )

    def _repeat(
        self, count: tf.Tensor, waited: list, tick: Callable[[], list]
    ) -> list:
        def body(i: Any, for_activations: Any, for_gradients: Any) -> list:
            a, g = tick()
            with tf.device(self._host):
                return [i + 1, for_activations + a, for_gradients + g]

        _, *waited = tf.while_loop(
            lambda i, *_: i < count,
            body,
            [tf.constant(0), *waited],
            # The next tick starts when this one has ended, updates and all.
            parallel_iterations=1,
        )
        return waited

    def _forward_only(self) -> list:
        waited, _, done = self._forward()
        with tf.control_dependencies(done):
            return [waited, self._no_time()]

    def _backward_only(self) -> list:
        return [self._no_time(), self._backward()]

    def _steady(self) -> list:
        if self._update_first:
            for_gradients = self._backward()
            with tf.control_dependencies([for_gradients]):
                for_activations, _, _ = self._forward()
            return [for_activations, for_gradients]
        for_activations, kept, done = self._forward()
        if not self._stage.has_backward:
            return [for_activations, self._no_time()]
        return [for_activations, self._backward(kept, done)]

    def _forward(self) -> tuple[tf.Tensor, tuple, list[tf.Operation]]:
        """Traces F.

        Returns:
            Seconds waited; what B needs if it follows in the same tick (the
            stash and the gradients of the loss); operations to wait for.
        """
        stage, ports = self._stage, self._ports
        sources = [ports.feeds, ports.activations_in, ports.targets]
        wait, (feeds, received, targets) = self._wait_for(
            sources, self.probe.tick()
        )
        own_loss = []
        if stage.incoming.has_loss:
            *received, loss = received
            own_loss = [loss]
        weights = self.update.forward_weights(self._forwards)
        state = [s.read_value() for s in self._state]
        arguments = [*weights, *state, *feeds, *received]
        outputs, own, new_state, made = self._cut.forward(*arguments)
        outputs = _ends(outputs)
        own_loss = [tf.add_n([*own_loss, *own])] if own_loss or own else []
        with tf.control_dependencies(outputs):
            done = [
                self._state[i].assign(value, read_value=False)
                for i, value in zip(self._cut.changed_state, new_state)
            ]
        if ports.activations_out is not None:
            done += ports.activations_out.enqueue([*outputs, *own_loss])
        gradients: list[tf.Tensor | None] = []
        if self._objective is not None:
            gradients = self._objective.update(
                stage.outgoing,
                outputs,
                own_loss[0] if own_loss else None,
                targets,
                stage.training,
            )
        stash = self._cut.stash(arguments, made)
        if self.update.kept_specs:
            stash += weights
        if self._stash is not None:
            done += self._stash.enqueue(stash)
        ends = done + outputs
        if self.update.is_corrected:
            # They are made of what the update changes: made before it.
            ends += weights
        ends += self.probe.forward(self._forwards, wait, weights, ends)
        with tf.device(self._host), tf.control_dependencies(ends):
            done.append(self._forwards.assign_add(1, read_value=False))
        of_loss = [g for g in gradients if g is not None]
        return wait.seconds, (stash, of_loss), done

    def _backward(
        self, kept: tuple[list, list] = ([], []), after: Sequence = ()
    ) -> tf.Tensor:
        """Traces B and the update.

        Args:
            kept: What `_forward` returned if B follows F of the same batch in
                the same tick.
            after: Operations that must have ended before it waits.

        Returns:
            Seconds waited, known when the update has been made.
        """
        ports = self._ports
        wait, (gradients,) = self._wait_for([ports.gradients_in], after)
        received = gradients
        if gradients and self._transform is not None:
            gradients = transforms.apply(self._transform, gradients)
        seen = self.probe.gradients(
            self._backwards, received, gradients, self.update.weights
        )
        # Where F comes before B in a tick, B waits for all of F.
        stash, of_loss = kept
        with tf.control_dependencies([wait.ended]):
            if of_loss:
                of_loss = [tf.identity(g) for g in of_loss]
            else:
                stash = [tf.identity(t) for t in stash]
        if self._stash is not None:
            stash = self._stash.dequeue()
        count = len(self._cut.stash_specs)
        stash, then = stash[:count], stash[count:]
        gradients += of_loss
        anew = self.update.weights() if self._cut.needs_weights else []
        assert self._cut.backward is not None
        by_weights, by_inputs = self._cut.backward(*gradients, *stash, *anew)
        by_weights, by_inputs = _ends(by_weights), _ends(by_inputs)
        if ports.gradients_out is not None:
            ports.gradients_out.enqueue(by_inputs)
        # All or nothing: no weight is updated if a gradient fails. And all
        # gradients by the same weights: what reads a weight is not reliably
        # ordered before its update by TensorFlow's automatic dependencies
        # (with `stash="current"` some backwards saw their own update), so
        # whatever must come first is waited for by its result.
        ends = tf.nest.flatten([by_weights, by_inputs], expand_composites=True)
        with tf.control_dependencies([*ends, *seen]):
            rest = iter(by_weights)
            gradients = [
                next(rest) if has else None
                for has in self._cut.weight_has_gradient
            ]
            updated = self.update(gradients, then)
        ends = [updated]
        ends += self.probe.backward(self._backwards, wait, ends)
        with tf.device(self._host), tf.control_dependencies(ends):
            self._backwards.assign_add(1, read_value=False)
            return tf.identity(wait.seconds)

    def _wait_for(
        self, links: Sequence[Link | None], after: Sequence
    ) -> tuple[Wait, list[list[tf.Tensor]]]:
        """Traces a dequeue from each link, and how long that waits.

        Returns:
            When, and for each link its tensors (none for no link).
        """
        if not any(links):
            with tf.device(self._host), tf.control_dependencies(after):
                now = tf.timestamp()
            return Wait(now, now), [[] for _ in links]
        with tf.device(self._host), tf.control_dependencies(after):
            start = tf.timestamp()
        with tf.control_dependencies([start]):
            found = [link.dequeue() if link else [] for link in links]
        tensors = [t for group in found for t in group]
        with tf.device(self._host), tf.control_dependencies(tensors):
            wait = Wait(start, tf.timestamp())
        return wait, [self.probe.start(wait.ended, group) for group in found]

    def _no_time(self) -> tf.Tensor:
        with tf.device(self._host):
            return tf.zeros((), tf.float64)


def _ends(results: Sequence) -> list:
    """Returns results of a function as tensors that can be waited for.

    Once a function is inlined, a control edge from its call waits for nothing
    in it; one from what it returns does.
    """
    return [
        tf.nest.map_structure(tf.identity, result, expand_composites=True)
        for result in results
    ]
