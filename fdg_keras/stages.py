"""One stage: a slice of the model as a pure function, cut in two.

Shapes flow forward and gradients flow back, so a stage is built in two steps:
`Stage.trace`, from the first stage to the last, and `Stage.cut`, from the last
to the first.
"""

from collections.abc import Sequence
from typing import Any

import keras
import tensorflow as tf

from fdg_keras import _keras
from fdg_keras.boundaries import Boundary
from fdg_keras.crossing import Kept, Stash, StashBytes
from fdg_keras.cuts import Cut
from fdg_keras.linearize import Linearized, Pure
from fdg_keras.slicing import Slice
from fdg_keras.threads import warn


class Stage:
    """One slice of the model on one device.

    Args:
        index: k, from 0.
        slice_: Its part of the model.
        device: Where it runs; its variables are there already.
        training: Whether layers run in training mode.
        jit_compile: Whether XLA compiles forward, backward and update.
        scored: Whether logits travel with what was made of them.

    Attributes:
        weights: The trainable variables.
        state: All others.
        incoming: What travels over the cut before it.
        outgoing: What travels over the cut after it.
        pair: The forward and the backward, once it was cut.
    """

    def __init__(
        self,
        index: int,
        slice_: Slice,
        device: str,
        training: bool,
        jit_compile: bool,
        scored: bool = False,
    ):
        self.index = index
        self.slice = slice_
        self.device = device
        self.training = training
        self.jit_compile = jit_compile
        self.weights = slice_.trainable_variables
        self.state = slice_.state_variables
        self._whole = _Whole(slice_.layers)
        self._scored = scored
        self._linearized: Linearized
        self.pair: Cut
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
        scored: list[tuple[int, str]] = []

        def pure(weights: list, state: list, inputs: list) -> Pure:
            return self.pure(weights, state, inputs, masked, scored)

        def specs(variables: Sequence[keras.Variable]) -> list[tf.TensorSpec]:
            return [tf.TensorSpec(v.shape, v.dtype) for v in variables]

        received = incoming.specs[: len(incoming.specs) - incoming.has_loss]
        self._linearized = Linearized(
            pure,
            specs(self.weights),
            specs(self.state),
            [*feed_specs, *received],
            self.device,
            self.jit_compile,
        )
        if self.training:
            self.check_gradients_of(self._linearized.read_beside_arguments)
        own_losses = self._linearized.has_own_loss
        has_loss = incoming.has_loss or own_losses
        loss_spec = [tf.TensorSpec((), keras.config.floatx())] * has_loss
        self.outgoing = Boundary(
            self.slice.sends,
            tuple(masked),
            tuple(scored),
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
            has_gradient: For each value this stage sends, and for the logits
                that it sends, whether the loss has a gradient with respect to
                it.
            stash: What is kept from a forward to its backward.
            input_gradients: Whether any stage before needs gradients.

        Returns:
            The same for what it receives.
        """
        incoming = self.incoming
        values, masks, logits = (
            len(part)
            for part in (incoming.values, incoming.masked, incoming.scored)
        )
        feeds = len(self.slice.feeds)
        if not self.training:
            self.pair = self._linearized.forward_only()
            return [False] * (values + logits)
        sent = len(self.outgoing.values)
        self.pair = self._linearized.cut(
            [
                *has_gradient[:sent],
                *[False] * len(self.outgoing.masked),
                *has_gradient[sent:],
            ],
            [
                *[False] * feeds,
                *[input_gradients] * values,
                *[False] * masks,
                *[input_gradients] * logits,
            ],
            stash,
        )
        if self.jit_compile and not self._linearized.jit_compile:
            warn(
                f"Stage {self.index} ({self.span}) runs without XLA, though "
                "the model was compiled with `jit_compile`: XLA cannot hand "
                "out what a loop in it keeps for its gradient. With "
                "`emulate=True` it need not."
            )
        total = feeds + values + masks + logits
        found = self.pair.input_has_gradient or [False] * total
        return incoming.floating(found[feeds:])

    def stash_bytes(self, stash: Stash, batch_size: int) -> StashBytes:
        """Returns how many bytes the stash of any mode takes, after `cut`.

        Args:
            stash: What is kept; it need not be what the stage was cut for.
            batch_size: Samples of a batch.
        """
        return self._linearized.stash_bytes(stash, batch_size)

    def kept(self, stash: Stash, batch_size: int) -> Kept:
        """Returns what is kept, and where it is, after `cut`.

        Arguments as of `stash_bytes`.
        """
        return self._linearized.kept(stash, batch_size)

    def running_bytes(self, batch_size: int) -> int:
        """Returns the most bytes that passes have at once, after `cut`.

        What is kept for the backward, weights and their gradients aside.
        """
        return self._linearized.running_bytes(batch_size)

    @property
    def read(self) -> list[tf.Variable]:
        """What the forward reads of variables that are not handed to it."""
        return self._linearized.read

    @property
    def has_backward(self) -> bool:
        """Whether there is any gradient to compute."""
        return self.pair.backward is not None

    def pure(
        self,
        weights: list,
        state: list,
        inputs: list,
        masked: list[int],
        scored: list[tuple[int, str]],
    ) -> Pure:
        """The stage as a function.

        Fills `masked` with what it sends with a mask, `scored` with what it
        sends with logits.
        """
        variables = [*self.weights, *self.state]
        count = len(self.slice.feeds)
        feeds, received = inputs[:count], inputs[count:]
        values = dict(zip(self.slice.feeds, feeds))
        values.update(zip(self.incoming.values, self.incoming.attach(received)))
        scope = _Scope(
            list(zip(variables, [*weights, *state])), collect_losses=True
        )
        before = [scope.get_current_value(v) for v in variables]
        known = set(scope.state_mapping)
        with scope:
            with _keras.one_call(self._whole, self.training):
                self.slice.run(values, self.training)
            losses = [_scalar(loss) for loss in self._whole.losses]
        after = [scope.get_current_value(v) for v in variables]
        self._check_updates(scope, known, before, after)
        sends = [values[v] for v in self.slice.sends]
        masks = [(v, _keras.get_mask(values[v])) for v in self.slice.sends]
        masks = [(v, mask) for v, mask in masks if mask is not None]
        masked[:] = [v for v, _ in masks]
        logits = [(v, *_keras.get_logits(values[v])) for v in self.slice.sends]
        logits = [found for found in logits if found[1] is not None]
        logits = logits if self._scored else []
        scored[:] = [(v, by) for v, _, by in logits]
        outputs = [
            *sends,
            *(mask for _, mask in masks),
            *(t for _, t, _ in logits),
        ]
        changes = zip(state, before[len(weights) :], after[len(weights) :])
        new_state = [old if b is a else a for old, b, a in changes]
        return Pure(outputs, losses, new_state)

    def check_gradients_of(self, lost: Sequence[bool]) -> None:
        """Refuses weights the gradients by which are lost.

        Args:
            lost: For each weight whether it is read by a `tf.custom_gradient`
                that was not given it as an argument.
        """
        paths = [v.path for v, is_lost in zip(self.weights, lost) if is_lost]
        if paths:
            raise ValueError(
                f"Stage {self.index} ({self.span}) reads weights in a "
                "`tf.recompute_grad` or `tf.custom_gradient`, and the gradient "
                "by them would be lost. Expected what to compute again to be "
                'left to `stash="selective"` or `"replay"`, and weights to be '
                "arguments of a function that has a gradient of its own. "
                f"Received: weights {paths[:5]} that are not"
            )

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
                raise ValueError(self._assigned(variable))

    def _assigned(self, variable: keras.Variable) -> str:
        """What to say of a layer that changes its trainable variable."""
        owner = next(
            layer
            for layer in self.slice.layers
            if any(v is variable for v in layer.variables)
        )
        kind = type(owner)
        advice = "Make the variable non-trainable, or take the layer out."
        if kind.__module__.startswith("keras."):
            advice = "Take the layer out."
        return (
            f"Layer {owner.name!r} assigns to its trainable variable "
            f"{variable.path!r} in `call`. Expected trainable variables to be "
            "changed by the optimizer alone, because a delayed gradient needs "
            f"their values as they were. {advice} Received: a layer of type "
            f"{kind.__name__}"
        )

    @property
    def span(self) -> str:
        """The first and last layer, for people to read."""
        first, last = self.slice.nodes[0].name, self.slice.nodes[-1].name
        return f"layers {first!r} to {last!r}"


class _Whole(keras.layers.Layer):
    """Holds layers, so that Keras knows of the losses of all of them.

    That is of each call its own, and of each variable its regularizer's once,
    whichever layers have it.
    """

    def __init__(self, layers: Sequence[keras.layers.Layer]):
        super().__init__()
        self._held = list(layers)


class _Scope(keras.StatelessScope):
    """A scope in which assigning to a variable cuts off the gradient.

    As in TensorFlow, where a variable that is read has forgotten what its
    value was computed from.
    """

    def add_update(self, update: tuple) -> None:
        variable, value = update
        # That of a weight is refused if it changes the weight.
        if not variable.trainable:
            value = tf.stop_gradient(value)
        super().add_update((variable, value))


def _scalar(loss: tf.Tensor) -> tf.Tensor:
    """Returns an added loss as Keras adds it: summed, as a float."""
    return tf.reduce_sum(tf.cast(loss, keras.config.floatx()))
