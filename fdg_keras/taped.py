"""A stage's forward on a gradient tape, and the backward that belongs to it."""

import tensorflow as tf

from fdg_keras import _keras
from fdg_keras.boundaries import Boundary
from fdg_keras.linearize import is_float
from fdg_keras.stages import Stage
from fdg_keras.subgraphs import read_beside_arguments
from fdg_keras.updates import Update


class Pass:
    """The forward of a stage, and the backward that belongs to it.

    Args:
        stage: The stage, whose `incoming` is set.
        update: Its, which knows the weights that the forward is to use.
        batch: The batch's number.
        feeds: What the stage reads of the batch.
        received: What the stage before sends.

    Attributes:
        stage: As given.
        outputs: What it sends.
        outgoing: The boundary that they cross.
        own_losses: What its layers have added to the loss.
        then: What is kept of the weights until the update.
        lost: For each weight whether the gradient by it is lost.
        watched: Trainable variables that were read beside the weights.
    """

    def __init__(
        self,
        stage: Stage,
        update: Update,
        batch: tf.Tensor,
        feeds: list[tf.Tensor],
        received: list[tf.Tensor],
    ):
        self.stage = stage
        self._weights = update.forward_weights(batch)
        self._received = stage.incoming.floating(received)
        self.then = self._weights if update.kept_specs else []
        masked: list[int] = []
        scored: list[tuple[int, str]] = []
        state = [_keras.get_storage(v) for v in stage.state]
        before = [s.read_value() for s in state]
        earlier = len(_operations())
        with tf.device(stage.device), tf.GradientTape() as self._tape:
            watched = [*self._weights, *self._received]
            self._tape.watch([t for t in watched if is_float(t)])
            result = stage.pure(
                self._weights, before, [*feeds, *received], masked, scored
            )
            self.outputs = [tf.identity(t) for t in result.outputs]
        self.lost = read_beside_arguments(
            _operations()[earlier:], self._weights
        )
        self.watched = self._tape.watched_variables()
        self.outgoing = Boundary(
            stage.slice.sends, tuple(masked), tuple(scored)
        )
        self.own_losses = result.own_losses
        for variable, old, new in zip(state, before, result.new_state):
            if new is not old:
                variable.assign(new)

    def backward(self, gradients: list) -> tuple[list, list]:
        """Returns gradients by the weights and by what was received.

        Args:
            gradients: By what it sends, values and then logits, each of its
                shape; `None` where there is none.
        """
        outputs = self.outgoing.floating(self.outputs)
        targets = [
            (t, g) for t, g in zip(outputs, gradients) if g is not None
        ] + [(t, tf.ones_like(t)) for t in self.own_losses]
        if not targets:
            return [None] * len(self._weights), [None] * len(self._received)
        sources = [*self._weights, *(r for r in self._received if is_float(r))]
        with tf.device(self.stage.device):
            found = self._tape.gradient(
                [t for t, _ in targets],
                sources,
                output_gradients=[g for _, g in targets],
            )
        by_inputs = iter(found[len(self._weights) :])
        return found[: len(self._weights)], [
            next(by_inputs) if is_float(r) else None for r in self._received
        ]


def _operations() -> list[tf.Operation]:
    """Returns those of the graph that is being traced, if there is one."""
    if tf.executing_eagerly():
        return []
    return tf.compat.v1.get_default_graph().get_operations()
