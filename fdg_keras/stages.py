"""One stage: its functions, its optimizer, its compiled loop.

A stage is built in three steps, because shapes flow forward and gradients
flow back: `Stage.trace` runs from the first stage to the last, `Stage.cut`
from the last to the first, and `Stage.compile` when all links are there.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import keras
import tensorflow as tf

from fdg_keras import _keras
from fdg_keras.delays import Order
from fdg_keras.linearize import Cut, Linearized, Pure, Stash
from fdg_keras.links import Link
from fdg_keras.objective import Objective
from fdg_keras.placement import host_of
from fdg_keras.slicing import Slice
from fdg_keras.transforms import GradientTransformer


@dataclass(frozen=True)
class Boundary:
    """What travels over a cut, in this order.

    Attributes:
        values: Values of the graph, `[B, ...]` each.
        masked: Those of them whose mask travels along.
        has_loss: Whether a scalar follows: the sum of the losses that layers
            of the stages so far have added, for the last stage to report.
        specs: Shapes and dtypes of all that.
    """

    values: tuple[int, ...] = ()
    masked: tuple[int, ...] = ()
    has_loss: bool = False
    specs: tuple[tf.TensorSpec, ...] = ()


@dataclass
class Ports:
    """The links of one stage; `None` where there is none.

    Attributes:
        feeds: Producer: the feeder. Model inputs this stage uses.
        targets: Producer: the feeder. Last stage only, see `Objective`.
        activations_in: Producer: the stage before.
        activations_out: Consumer: the stage after, or for `predict` the
            caller.
        gradients_in: Producer: the stage after.
        gradients_out: Consumer: the stage before.
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


class Stage:
    """One slice of the model on one device.

    Args:
        index: k, from 0.
        slice_: Its part of the model.
        device: Where it runs; its variables are there already.
        training: Whether layers run in training mode.
    """

    def __init__(self, index: int, slice_: Slice, device: str, training: bool):
        self.index = index
        self.slice = slice_
        self.device = device
        self.training = training
        self.weights = slice_.trainable_variables
        self.state = slice_.state_variables
        self._storages = [
            _keras.get_storage(v) for v in [*self.weights, *self.state]
        ]
        self._linearized: Linearized
        self._cut: Cut
        self.incoming = Boundary()
        self.outgoing = Boundary()

    # -- Building -------------------------------------------------------------

    def trace(
        self, incoming: Boundary, feed_specs: Sequence[tf.TensorSpec]
    ) -> Boundary:
        """Traces the forward.

        Args:
            incoming: What the stage before sends.
            feed_specs: Specs of `slice.feeds`.

        Returns:
            What this stage sends.
        """
        self.incoming = incoming
        masked: list[int] = []

        def pure(weights: list, state: list, inputs: list) -> Pure:
            return self._pure(weights, state, inputs, masked)

        def specs(variables: Sequence[keras.Variable]) -> list[tf.TensorSpec]:
            return [tf.TensorSpec(v.shape, v.dtype) for v in variables]

        received = incoming.specs[: len(incoming.specs) - incoming.has_loss]
        self._linearized = Linearized(
            pure,
            specs(self.weights),
            specs(self.state),
            [*feed_specs, *received],
            self.device,
        )
        own_losses = self._linearized.has_own_loss
        has_loss = incoming.has_loss or own_losses
        loss_spec = [tf.TensorSpec((), keras.config.floatx())] * has_loss
        self.outgoing = Boundary(
            self.slice.sends,
            tuple(masked),
            has_loss,
            (*self._linearized.output_specs, *loss_spec),
        )
        return self.outgoing

    def cut(
        self,
        has_gradient: Sequence[bool],
        stash: Stash,
        input_gradients: bool,
    ) -> list[bool]:
        """Adds the backward, if training, and cuts the two apart.

        Args:
            has_gradient: For each value this stage sends, whether the loss
                has a gradient with respect to it.
            stash: What is kept from a forward to its backward.
            input_gradients: Whether any stage before needs gradients.

        Returns:
            For each value this stage receives, whether the loss has a
            gradient with respect to it.
        """
        values = len(self.incoming.values)
        feeds, masks = len(self.slice.feeds), len(self.incoming.masked)
        if not self.training:
            self._cut = self._linearized.forward_only()
            return [False] * values
        self._cut = self._linearized.cut(
            [*has_gradient, *[False] * len(self.outgoing.masked)],
            [False] * feeds + [input_gradients] * values + [False] * masks,
            stash,
        )
        found = self._cut.input_has_gradient or [False] * (feeds + values)
        return found[feeds : feeds + values]

    @property
    def has_backward(self) -> bool:
        """Whether there is any gradient to compute."""
        return self._cut.backward is not None

    def compile(
        self,
        ports: Ports,
        objective: Objective | None,
        optimizer: keras.optimizers.Optimizer | None,
        transform: GradientTransformer,
        late: int,
        order: Order,
    ) -> None:
        """Traces the loop, in the thread that calls it.

        Args:
            ports: The stage's links.
            objective: The loss and metrics, for the last stage.
            optimizer: Built on this stage's trainable variables; `None` if it
                has none, or if not training.
            transform: Applied to gradients that arrive over a link.
            late: d_k, the delay of this stage in batches.
            order: Whether F or B comes first in a tick.
        """
        self.loop = Loop(
            self, self._cut, ports, objective, optimizer, transform, late, order
        )

    def _pure(
        self, weights: list, state: list, inputs: list, masked: list[int]
    ) -> Pure:
        """The stage as a function; fills `masked` with what carries a mask."""
        variables = [*self.weights, *self.state]
        count = len(self.slice.feeds)
        feeds, received = inputs[:count], inputs[count:]
        values = dict(zip(self.slice.feeds, feeds))
        values.update(zip(self.incoming.values, received))
        masks = received[len(self.incoming.values) :]
        for value, mask in zip(self.incoming.masked, masks):
            _keras.set_mask(values[value], mask)
        scope = keras.StatelessScope(
            list(zip(variables, [*weights, *state])), collect_losses=True
        )
        before = [scope.get_current_value(v) for v in variables]
        known = set(scope.state_mapping)
        with scope:
            self.slice.run(values, self.training)
            losses = [
                _scalar(loss)
                for layer in self.slice.layers
                for loss in layer.losses
            ]
        after = [scope.get_current_value(v) for v in variables]
        self._check_updates(scope, known, before, after)
        sends = [values[v] for v in self.slice.sends]
        found = [
            (v, _keras.get_mask(t)) for v, t in zip(self.slice.sends, sends)
        ]
        masked[:] = [v for v, mask in found if mask is not None]
        outputs = sends + [mask for _, mask in found if mask is not None]
        changes = zip(state, before[len(weights) :], after[len(weights) :])
        new_state = [old if b is a else a for old, b, a in changes]
        return Pure(outputs, losses, new_state)

    def _check_updates(
        self, scope: Any, known: set, before: list, after: list
    ) -> None:
        """Refuses updates that the pure function would lose."""
        if set(scope.state_mapping) - known:
            raise ValueError(
                f"Stage {self.index} ({self.span}) updates a variable that "
                "belongs to none of its layers, so the update would be lost. "
                "Expected layers to own their state: pass a `seed` to random "
                "operations (`keras.random.SeedGenerator` as an attribute of "
                "the layer), and create variables with `add_weight`."
            )
        for variable, b, a in zip(self.weights, before, after):
            if b is not a:
                raise ValueError(
                    f"A layer assigns to its trainable variable "
                    f"{variable.path!r} in `call`. Expected trainable "
                    "variables to be changed by the optimizer alone, because "
                    "a delayed gradient needs their values as they were. "
                    "Make the variable non-trainable, or take the layer out."
                )

    @property
    def span(self) -> str:
        """The first and last layer, for people to read."""
        first, last = self.slice.nodes[0].name, self.slice.nodes[-1].name
        return f"layers {first!r} to {last!r}"


class Loop:
    """The compiled loop of a stage.

    Runs `fill` ticks of a forward, `steady` ticks of a forward and a backward,
    `drain` ticks of a backward, as `delays.turns` counts them. Within a tick
    things happen in sequence, so that a stage that is stopped at a link has
    finished all it did before.
    """

    def __init__(
        self,
        stage: Stage,
        cut: Cut,
        ports: Ports,
        objective: Objective | None,
        optimizer: keras.optimizers.Optimizer | None,
        transform: GradientTransformer,
        late: int,
        order: Order,
    ):
        self._stage = stage
        self._cut = cut
        self._ports = ports
        self._objective = objective
        self._optimizer = optimizer
        self._transform = transform
        self._late = late if stage.has_backward else 0
        self._update_first = order == "update_first" and self._late > 0
        self._host = host_of(stage.device)
        count = len(stage.weights)
        self._weights = stage._storages[:count]
        self._state = stage._storages[count:]
        with tf.device(self._host):
            self._forwards = tf.Variable(0, dtype=tf.int64, trainable=False)
            self._backwards = tf.Variable(0, dtype=tf.int64, trainable=False)
        self._stash = None
        if self._late:
            # Producer and consumer: this stage. `late` batches wait in it,
            # and one more between F and B of one tick. On the device.
            self._stash = Link(
                cut.stash_specs,
                self._late + 1,
                stage.device,
                f"stash_{stage.index}",
            )
        self._function = self._trace()

    def __call__(
        self, fill: int, steady: int, drain: int, learning_rate: float
    ) -> Report:
        """Runs some ticks. Blocks; call it from the stage's own thread."""
        return Report(
            *self._function(
                tf.constant(fill),
                tf.constant(steady),
                tf.constant(drain),
                tf.constant(learning_rate, tf.float32),
            )
        )

    @property
    def links(self) -> list[Link]:
        """All links this loop may wait for."""
        stash = [] if self._stash is None else [self._stash]
        return self._ports.all() + stash

    @property
    def late(self) -> int:
        """How many batches B follows F by, in this loop."""
        return self._late

    def reset(self) -> None:
        """Starts counting batches from 0 again."""
        self._forwards.assign(0)
        self._backwards.assign(0)

    def position(self) -> str:
        """Says which batch is in progress, and in which pass."""
        forwards, backwards = int(self._forwards), int(self._backwards)
        in_backward = forwards - backwards > self._late
        if in_backward and self._stage.has_backward:
            return f"backward or update of batch {backwards}"
        return f"forward of batch {forwards}"

    # -- Tracing --------------------------------------------------------------

    def _trace(self) -> Callable[..., Any]:
        def run(fill, steady, drain, learning_rate):
            with tf.device(self._stage.device):
                self._set_learning_rate(learning_rate)
                waited = [tf.zeros((), tf.float64)] * 2
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
            count, count, count, tf.TensorSpec((), tf.float32)
        )

    def _repeat(
        self, count: tf.Tensor, waited: list, tick: Callable[[], list]
    ) -> list:
        def body(i, for_activations, for_gradients):
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
            return [waited, tf.zeros((), tf.float64)]

    def _backward_only(self) -> list:
        return [tf.zeros((), tf.float64), self._backward(None, [])]

    def _steady(self) -> list:
        if self._update_first:
            for_gradients = self._backward(None, [])
            with tf.control_dependencies([for_gradients]):
                for_activations, _, _ = self._forward()
            return [for_activations, for_gradients]
        for_activations, kept, done = self._forward()
        if not self._stage.has_backward:
            return [for_activations, tf.zeros((), tf.float64)]
        return [for_activations, self._backward(kept, done)]

    def _forward(self) -> tuple[tf.Tensor, tuple, list[tf.Operation]]:
        """Traces F.

        Returns:
            Seconds waited; what B needs if it follows in the same tick (the
            stash and the gradients of the loss); operations to wait for.
        """
        stage, ports = self._stage, self._ports
        sources = [ports.feeds, ports.activations_in, ports.targets]
        waited, (feeds, received, targets) = self._wait_for(sources, [])
        own_loss = []
        if stage.incoming.has_loss:
            *received, loss = received
            own_loss = [loss]
        weights = [w.read_value() for w in self._weights]
        state = [s.read_value() for s in self._state]
        arguments = [*weights, *state, *feeds, *received]
        outputs, own, new_state, made = self._cut.forward(*arguments)
        own_loss = [tf.add_n([*own_loss, *own])] if own_loss or own else []
        for i, value in zip(self._cut.changed_state, new_state):
            self._state[i].assign(value)
        done = []
        if ports.activations_out is not None:
            done += ports.activations_out.enqueue([*outputs, *own_loss])
        gradients: list[tf.Tensor | None] = []
        if self._objective is not None:
            count = len(stage.slice.sends)
            gradients = self._objective.update(
                outputs[:count],
                own_loss[0] if own_loss else None,
                targets,
                stage.training,
            )
        stash = self._cut.stash(arguments, made)
        if self._stash is not None:
            done += self._stash.enqueue(stash)
        with tf.control_dependencies(done + list(outputs)):
            done.append(self._forwards.assign_add(1, read_value=False))
        return waited, (stash, gradients), done

    def _backward(self, kept: tuple | None, after: list) -> tf.Tensor:
        """Traces B and the update.

        Args:
            kept: What `_forward` returned if B follows F of the same batch in
                the same tick.
            after: Operations that must have ended before it waits.

        Returns:
            Seconds waited.
        """
        ports = self._ports
        waited, (gradients,) = self._wait_for([ports.gradients_in], after)
        gradients = list(self._transform(gradients)) if gradients else []
        if self._stash is not None:
            stash = self._stash.dequeue()
        else:
            stash, of_loss = kept
            gradients += [g for g in of_loss if g is not None]
        anew = self._weights if self._cut.needs_weights else []
        by_weights, by_inputs = self._cut.backward(
            *gradients, *stash, *(w.read_value() for w in anew)
        )
        if ports.gradients_out is not None:
            ports.gradients_out.enqueue(by_inputs)
        if self._optimizer is not None and by_weights:
            has_gradient = self._cut.weight_has_gradient
            variables = [
                v for v, g in zip(self._stage.weights, has_gradient) if g
            ]
            self._optimizer.apply(by_weights, variables)
        self._backwards.assign_add(1, read_value=False)
        return waited

    def _wait_for(
        self, links: Sequence[Link | None], after: list
    ) -> tuple[tf.Tensor, list[list[tf.Tensor]]]:
        """Traces a dequeue from each link, and how long that waits.

        Returns:
            Seconds, and for each link its tensors (none for no link).
        """
        if not any(links):
            return tf.zeros((), tf.float64), [[] for _ in links]
        with tf.device(self._host), tf.control_dependencies(after):
            start = tf.timestamp()
        with tf.control_dependencies([start]):
            found = [link.dequeue() if link else [] for link in links]
        tensors = [t for group in found for t in group]
        with tf.device(self._host), tf.control_dependencies(tensors):
            # The wall clock may be set back.
            waited = tf.maximum(tf.timestamp() - start, 0.0)
        return waited, found

    def _set_learning_rate(self, learning_rate: tf.Tensor) -> None:
        if self._optimizer is None:
            return
        source = _keras.learning_rate_of(self._optimizer)
        if isinstance(source, keras.Variable):
            source.assign(learning_rate)


def _scalar(loss: tf.Tensor) -> tf.Tensor:
    """Returns an added loss as Keras adds it: summed, as a float."""
    return tf.reduce_sum(tf.cast(loss, keras.config.floatx()))
