"""The updates of one stage: its optimizer, corrected for staleness."""

import contextlib
import math
from collections.abc import Sequence

import keras
import tensorflow as tf

from fdg_keras import _keras
from fdg_keras.corrections import Correction
from fdg_keras.stages import Stage


class Update:
    """Makes the updates of a stage, and knows the weights of its forwards.

    Its methods are traced into the stage's compiled loop.

    Args:
        stage: The stage, cut.
        optimizer: Built on its trainable variables; `None` if not training.
        staleness: How many updates lie between a batch's forward and its own.
        corrections: What to do about that.
    """

    def __init__(
        self,
        stage: Stage,
        optimizer: keras.optimizers.Optimizer | None = None,
        staleness: int = 0,
        corrections: Sequence[Correction] = (),
    ):
        has_gradient = stage.pair.weight_has_gradient
        self._has_gradient = has_gradient
        self._all = stage.weights
        self._variables = [v for v, has in zip(self._all, has_gradient) if has]
        self._storages = [_keras.get_storage(v) for v in self._all]
        self._optimizer = optimizer
        self._staleness = staleness if stage.has_backward else 0
        self._corrections = corrections if self._staleness else ()
        compares = any(c.compares_weights for c in self._corrections)
        #: Of the forward's weights, if they are to be kept until the update.
        self.kept_specs = [
            tf.TensorSpec(v.shape, v.dtype) for v in self._all if compares
        ]
        self._function = tf.function(
            self._apply, jit_compile=stage.jit_compile or None, autograph=False
        )

    def set_learning_rate(self, learning_rate: tf.Tensor) -> None:
        """Sets the rate of the updates that follow, but for a schedule's."""
        if self._optimizer is None:
            return
        source = _keras.learning_rate_of(self._optimizer)
        if isinstance(source, keras.Variable):
            source.assign(learning_rate)

    def weights(self) -> list[tf.Tensor]:
        """Returns the weights of today."""
        return [w.read_value() for w in self._storages]

    def forward_weights(self, batch: tf.Tensor) -> list[tf.Tensor]:
        """Returns the weights to run a forward with.

        Args:
            batch: Its number, from 0 at the begin of the epoch.
        """
        weights = self.weights()
        # Nothing is late before the epoch's first update.
        staleness = tf.minimum(batch, self._staleness)
        with self._rated():
            for correction in self._corrections:
                assert self._optimizer is not None
                weights = list(
                    correction.weights(
                        weights, self._all, self._optimizer, staleness
                    )
                )
        return weights

    def _rated(self) -> contextlib.AbstractContextManager:
        """Within, the optimizer has the learning rate of its next update."""
        optimizer = self._optimizer
        if optimizer is None or not self._corrections:
            return contextlib.nullcontext()
        step = tf.convert_to_tensor(optimizer.iterations)
        factors = [c.rate(step, self._staleness) for c in self._corrections]
        return _keras.scaled_learning_rate(optimizer, math.prod(factors))

    def __call__(
        self, gradients: list, then: Sequence[tf.Tensor] = ()
    ) -> tf.Tensor:
        """Makes an update.

        Args:
            gradients: For each variable that has one, its gradient.
            then: What was kept of the forward's weights.

        Returns:
            A tensor that can be waited for.
        """
        return self._function(gradients, list(then))

    def _apply(self, gradients: list, then: list) -> tf.Tensor:
        if self._optimizer is not None and gradients:
            then = [w for w, has in zip(then, self._has_gradient) if has]
            for correction in self._corrections:
                now = [tf.convert_to_tensor(v) for v in self._variables]
                gradients = list(correction.gradients(gradients, now, then))
            with self._rated():
                self._optimizer.apply(gradients, self._variables)
        # What a function returns waits for what it does.
        return tf.constant(True)
