"""A forward and a backward, as a stage calls them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import tensorflow as tf


@dataclass
class Cut:
    """A forward and a backward, as functions of tensors.

    Attributes:
        forward: `(*weights, *state, *inputs) -> outputs, own_loss, new_state,
            made`: lists; `own_loss` holds the sum of the own losses or
            nothing, `new_state` only the state that changes.
        changed_state: Which state that is.
        backward: `(*output_gradients, *stash, *weights if needs_weights) ->
            weight_gradients, input_gradients`, those that exist. The gradient
            by a weight may be a `tf.IndexedSlices`. `None` if there is none.
        stash_specs: What the stash of one batch holds.
        stash_arguments: For each stashed tensor the position among `(*weights,
            *state, *inputs)` if it is an argument, or `None` if it is the
            next one of `made`.
        needs_weights: Whether the backward is fed today's weights.
        calls_back: Whether the backward differentiates a `tf.py_function`,
            which keeps in Python what its last forward was.
        weight_has_gradient: For each weight.
        input_has_gradient: For each input.
    """

    forward: Callable[..., Any]
    changed_state: list[int]
    backward: Callable[..., Any] | None = None
    stash_specs: list[tf.TensorSpec] = field(default_factory=list)
    stash_arguments: list[int | None] = field(default_factory=list)
    needs_weights: bool = False
    calls_back: bool = False
    weight_has_gradient: list[bool] = field(default_factory=list)
    input_has_gradient: list[bool] = field(default_factory=list)

    def stash(
        self, arguments: Sequence[tf.Tensor], made: Sequence[tf.Tensor]
    ) -> list[tf.Tensor]:
        """Returns a batch's stash, from what its forward got and made."""
        rest = iter(made)
        return [
            next(rest) if position is None else arguments[position]
            for position in self.stash_arguments
        ]
