"""Corrections for staleness: what a stage does about its gradients being late.

The gradient of a batch is applied tau updates after the forward that it belongs
to, where tau = `delays.staleness` is a constant of the stage. A correction acts
in every stage with tau > 0, within the compiled loop, at one of three places:
the weights of the forward, the gradients by the weights, the learning rate.
All are off by default; they were proposed for other asynchronous methods, and
combine with gradient shrinking, which acts between stages (`transforms`).
"""

import math
import numbers
from collections.abc import Sequence
from typing import Any

import keras
import tensorflow as tf

from fdg_keras import _keras
from fdg_keras.crossing import OF_THE_FORWARD


class Correction:
    """The interface of a correction, and the one that changes nothing.

    Methods are traced into the compiled loop of a stage, so they are made of
    TensorFlow operations and hold no Python state between calls.

    Attributes:
        compares_weights: Whether `gradients` is given the forward's weights,
            which are then kept for each batch in flight.
    """

    compares_weights = False

    def check(self, optimizer: keras.optimizers.Optimizer) -> None:
        """Raises a `ValueError` if it cannot work with the optimizer."""

    def weights(
        self,
        weights: Sequence[tf.Tensor],
        variables: Sequence[keras.Variable],
        optimizer: keras.optimizers.Optimizer,
        staleness: tf.Tensor,
    ) -> Sequence[tf.Tensor]:
        """Returns the weights to run a forward with, and its backward.

        Args:
            weights: Those of today, as trainable variables have them.
            variables: The variables.
            optimizer: The stage's, built on them.
            staleness: How many updates will be made before that of this
                batch: tau, or less for the first batches after the stages
                drained. An integer scalar.
        """
        return weights

    def gradients(
        self,
        gradients: Sequence[tf.Tensor],
        now: Sequence[tf.Tensor],
        then: Sequence[tf.Tensor],
    ) -> Sequence[tf.Tensor]:
        """Returns the gradients to apply.

        Args:
            gradients: Those of a batch by the weights; for an embedding maybe
                a `tf.IndexedSlices`.
            now: The weights, just before the update.
            then: The weights of the forward of that batch; empty unless
                `compares_weights`.
        """
        return gradients

    def rate(self, step: tf.Tensor, staleness: int) -> Any:
        """Returns a factor for the learning rate.

        Args:
            step: Updates the optimizer has made so far, an integer scalar.
            staleness: tau, in updates.
        """
        return 1.0


class WeightPrediction(Correction):
    """Runs a forward, and its backward, with the weights to be expected then.

    Symbols: `w` are today's weights, `tau` the updates that will be made before
    that of this batch, `s` the step of the optimizer's momentum:

        w_hat = w + tau * s
        SGD:          s = m, the momentum buffer: the last step, unless
                          `nesterov=True` added to it
        Adam, AdamW:  s = -lr * sqrt(1 - beta_2**n) / (1 - beta_1**n)
                          * m / (sqrt(v) + epsilon)

    with the moments `m` and `v` as they are after `n` updates. What weight
    decay will take away is not predicted. The gradient at `w_hat` is then
    applied to the weights of its day. Source: SpecTrain (arXiv 1809.02839) for
    SGD, with its smoothed gradient times the rate in place of `m`; XPipe (arXiv
    1911.04610) for Adam.
    """

    def check(self, optimizer: keras.optimizers.Optimizer) -> None:
        """Raises a `ValueError` if there is no momentum to predict by."""
        _check_one_update_a_batch(self, optimizer)
        if not _keras.has_momentum(optimizer):
            raise ValueError(
                "`WeightPrediction` needs a momentum to predict by. Expected "
                "SGD with `momentum`, or Adam or AdamW without `amsgrad`. "
                f"Received: {optimizer!r}"
            )

    def weights(
        self,
        weights: Sequence[tf.Tensor],
        variables: Sequence[keras.Variable],
        optimizer: keras.optimizers.Optimizer,
        staleness: tf.Tensor,
    ) -> Sequence[tf.Tensor]:
        """Returns `w_hat`."""
        steps = [_keras.momentum_step(optimizer, v) for v in variables]
        return [
            w + tf.cast(staleness, w.dtype) * tf.cast(step, w.dtype)
            for w, step in zip(weights, steps)
        ]

    def __repr__(self) -> str:
        return "WeightPrediction()"


class DelayCompensation(Correction):
    """Corrects a late gradient by how far the weights have moved since.

    Symbols: `g` is the gradient, `w_then` the weights it was computed with,
    `w_now` those it is applied to, `lambda` the argument `strength`.

        g' = g + lambda * g * g * (w_now - w_then)        (elementwise)

    A first-order Taylor expansion with the diagonal of the outer product in
    place of the Hessian. Source: DC-ASGD (arXiv 1609.08326), equation 10.
    Keeps the weights of each batch in flight; needs a `stash` that
    keeps them, `"exact"` or `"selective"`.

    Args:
        strength: lambda, not negative. The best value depends on the
            problem: it is to be found.

    Raises:
        ValueError: If `strength` is not a finite number of at least 0.
    """

    compares_weights = True

    def __init__(self, strength: float = 0.04):
        self.strength = _number("strength", strength)

    def gradients(
        self,
        gradients: Sequence[tf.Tensor],
        now: Sequence[tf.Tensor],
        then: Sequence[tf.Tensor],
    ) -> Sequence[tf.Tensor]:
        """Returns `g'`; a sparse gradient comes out dense."""
        found = []
        for sparse, a, b in zip(gradients, now, then):
            g = tf.convert_to_tensor(sparse)
            moved = tf.cast(a - b, g.dtype)
            found.append(g + tf.cast(self.strength, g.dtype) * g * g * moved)
        return found

    def __repr__(self) -> str:
        return f"DelayCompensation(strength={self.strength:g})"


class LearningRateRescheduling(Correction):
    """Lowers the learning rate of stale stages while training is young.

    Symbols: `tau` is the staleness in updates, `t` the updates made so far,
    `T` the argument `steps`.

        lr_k = lr * tau ** -(1 - min(t / T, 1))

    Source: PipeMare (arXiv 1910.05124), technique T1.

    Args:
        steps: T, updates until the rate is that of all other stages.

    Raises:
        ValueError: If `steps` is not a finite number above 0.
    """

    def __init__(self, steps: float):
        self.steps = _number("steps", steps)
        if not self.steps:
            raise ValueError(
                "Expected `steps` to be a number of updates above 0. "
                f"Received: {steps!r}"
            )

    def check(self, optimizer: keras.optimizers.Optimizer) -> None:
        """Raises a `ValueError` if updates are not one for each batch."""
        _check_one_update_a_batch(self, optimizer)

    def rate(self, step: tf.Tensor, staleness: int) -> Any:
        """Returns `tau ** -(1 - min(t / T, 1))`."""
        passed = tf.minimum(tf.cast(step, tf.float32) / self.steps, 1.0)
        return tf.constant(float(staleness)) ** (passed - 1.0)

    def __repr__(self) -> str:
        return f"LearningRateRescheduling(steps={self.steps:g})"


def check_corrections(
    corrections: Any, optimizer: keras.optimizers.Optimizer, stash: str
) -> tuple[Correction, ...]:
    """Returns corrections as a tuple, checked.

    Raises:
        ValueError: If they are none, or cannot work with optimizer or stash.
    """
    if isinstance(corrections, Correction):
        corrections = [corrections]
    found = tuple(corrections)
    for correction in found:
        if not isinstance(correction, Correction):
            raise ValueError(
                "Expected `corrections` to be a list of "
                "`fdg_keras.WeightPrediction()` and the like. Received: "
                f"{correction!r}"
            )
        if stash not in OF_THE_FORWARD:
            raise ValueError(
                f"{correction!r} is about the weights of a batch's forward, "
                'which only `stash="exact"` and `"selective"` keep. Received: '
                f"stash={stash!r}"
            )
        correction.check(optimizer)
    return found


def _check_one_update_a_batch(
    correction: Correction, optimizer: keras.optimizers.Optimizer
) -> None:
    if optimizer.gradient_accumulation_steps:
        raise ValueError(
            f"`{correction!r}` counts staleness in updates, one for each "
            "batch. Expected an optimizer without "
            "`gradient_accumulation_steps`. Received: "
            f"{optimizer.gradient_accumulation_steps}"
        )


def _number(name: str, value: Any) -> float:
    if (
        isinstance(value, bool)
        or not isinstance(value, numbers.Real)
        or not math.isfinite(value)
        or value < 0
    ):
        raise ValueError(
            f"Expected `{name}` to be a finite number of at least 0. Received: "
            f"{value!r}"
        )
    return float(value)
