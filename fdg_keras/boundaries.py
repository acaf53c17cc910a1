"""What travels over a cut between two stages."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import tensorflow as tf

from fdg_keras import _keras


@dataclass(frozen=True)
class Boundary:
    """What travels over a cut, in this order.

    Attributes:
        values: Values of the graph, `[B, ...]` each.
        masked: Those of them whose mask travels along.
        scored: Those of them whose logits travel along, because a loss may
            be computed from them; and who made them of those.
        has_loss: Whether a scalar follows: the sum of the losses that layers
            of the stages so far have added, for the last stage to report.
        specs: Shapes and dtypes of all that.
    """

    values: tuple[int, ...] = ()
    masked: tuple[int, ...] = ()
    scored: tuple[tuple[int, str], ...] = ()
    has_loss: bool = False
    specs: tuple[tf.TensorSpec, ...] = ()

    def floating(self, found: Sequence[Any]) -> list[Any]:
        """Returns what belongs to values and logits, without the masks."""
        values, masks = len(self.values), len(self.masked)
        start = values + masks
        return [*found[:values], *found[start : start + len(self.scored)]]

    def attach(self, tensors: Sequence[tf.Tensor]) -> list[tf.Tensor]:
        """Returns the tensors of the values, as Keras' layers hand them out.

        Args:
            tensors: What travels: values, masks, logits.
        """
        count = len(self.values)
        logits = iter(tensors[count + len(self.masked) :])
        masks = iter(tensors[count:])
        makers = dict(self.scored)
        found = []
        # By position: a model may hand out one tensor several times.
        for value, tensor in zip(self.values, tensors):
            if value in makers:
                tensor = _keras.with_logits(tensor, next(logits), makers[value])
            if value in self.masked:
                _keras.set_mask(tensor, next(masks))
            found.append(tensor)
        return found
