"""The updates of one stage: its optimizer, corrected for staleness."""

import contextlib
import math
from collections.abc import Callable, Sequence

import keras
import tensorflow as tf

from fdg_keras import _keras
from fdg_keras.corrections import Correction


class Update:
    """Makes the updates of a stage, and knows the weights of its forwards.

    Its methods are traced into the stage's compiled loop.

    Args:
        variables: The stage's trainable variables.
        optimizer: Built on them; `None` if not training.
        staleness: How many updates lie between a batch's forward and its own.
        corrections: What to do about that.
        compiled: Makes of a function what is called in its place.
    """

    def __init__(
        self,
        variables: Sequence[keras.Variable],
        optimizer: keras.optimizers.Optimizer | None = None,
        staleness: int = 0,
        corrections: Sequence[Correction] = (),
        compiled: Callable[[Callable], Callable] = lambda function: function,
    ):
        self._variables = list(variables)
        self._storages = [_keras.get_storage(v) for v in variables]
        self._optimizer = optimizer
        #: How many updates lie between a batch's forward and its own.
        self.staleness = staleness
        self._corrections = corrections if staleness else ()
        compares = any(c.compares_weights for c in self._corrections)
        #: Of the forward's weights, if they are to be kept until the update.
        self.kept_specs = [
            tf.TensorSpec(v.shape, v.dtype) for v in variables if compares
        ]
        self._function = compiled(self._apply)

    def set_learning_rate(self, learning_rate: tf.Tensor) -> None:
        """Sets the rate of the updates that follow, but for a schedule's.

        Args:
            learning_rate: float64, the type of the numbers that users give:
                weights may be float64, too.
        """
        if self._optimizer is None:
            return
        source = _keras.learning_rate_of(self._optimizer)
        if isinstance(source, keras.Variable):
            source.assign(tf.cast(learning_rate, source.dtype))

    def learning_rate(self) -> float:
        """Returns the rate of the next update, corrections included."""
        if self._optimizer is None:
            return 0.0
        with self._rated():
            return float(_keras.current_learning_rate(self._optimizer))

    @property
    def is_corrected(self) -> bool:
        """Whether a forward may run with other weights than today's."""
        return bool(self._corrections)

    def weights(self) -> list[tf.Tensor]:
        """Returns the weights of today."""
        return [w.read_value() for w in self._storages]

    def forward_weights(self, batch: tf.Tensor) -> list[tf.Tensor]:
        """Returns the weights to run a forward with.

        Args:
            batch: Its number, from 0 after the stages last drained.
        """
        weights = self.weights()
        if not self._corrections:
            return weights
        # Nothing is late before the first update after a drain.
        staleness = tf.minimum(batch, self.staleness)
        with self._rated():
            for correction in self._corrections:
                assert self._optimizer is not None
                weights = list(
                    correction.weights(
                        weights, self._variables, self._optimizer, staleness
                    )
                )
        return weights

    def _rated(self) -> contextlib.AbstractContextManager:
        """Within, the optimizer has the learning rate of its next update."""
        optimizer = self._optimizer
        if optimizer is None or not self._corrections:
            return contextlib.nullcontext()
        step = tf.convert_to_tensor(optimizer.iterations)
        factors = [c.rate(step, self.staleness) for c in self._corrections]
        return _keras.scaled_learning_rate(optimizer, math.prod(factors))

    def __call__(
        self, gradients: list, then: Sequence[tf.Tensor] = ()
    ) -> tf.Tensor:
        """Makes an update.

        Args:
            gradients: For each variable its gradient, or `None`.
            then: What was kept of the forward's weights.

        Returns:
            A tensor that can be waited for.
        """
        return self._function(gradients, list(then))

    def _apply(self, gradients: list, then: list) -> tf.Tensor:
        has = [i for i, g in enumerate(gradients) if g is not None]
        if self._optimizer is not None and has:
            variables = [self._variables[i] for i in has]
            gradients = [gradients[i] for i in has]
            then = [then[i] for i in has] if then else []
            for correction in self._corrections:
                now = [tf.convert_to_tensor(v) for v in variables]
                gradients = list(correction.gradients(gradients, now, then))
            with self._rated():
                self._optimizer.apply_gradients(zip(gradients, variables))
        # What a function returns waits for what it does.
        return tf.constant(True)
