"""Shapes, dtypes and bytes of what a batch is on its way through a model."""

from typing import Any

import tensorflow as tf


def batch_spec(symbol: Any, batch_size: int) -> tf.TensorSpec:
    """Returns shape and dtype of a value in a batch; other unknowns are 1.

    Not even how many axes there are need be known; that stays so.
    """
    if tf.TensorShape(symbol.shape).rank is None:
        return tf.TensorSpec(None, symbol.dtype)
    shape = [
        d or (1 if axis else batch_size) for axis, d in enumerate(symbol.shape)
    ]
    return tf.TensorSpec(shape, symbol.dtype)


def shape_of(spec: tf.TensorSpec) -> tuple[int | None, ...] | None:
    """Returns a shape as a tuple, `None` if not even the rank is known."""
    return None if spec.shape.rank is None else tuple(spec.shape.as_list())


def as_traced(
    spec: tf.TensorSpec, shape: tuple[int | None, ...] | None
) -> tf.TensorSpec:
    """Returns a spec with what is known of the shape of a traced tensor."""
    if shape is None or len(shape) != spec.shape.rank:
        return spec
    known = [b if a is None else a for a, b in zip(shape, spec.shape)]
    return tf.TensorSpec(known, spec.dtype)


def size_of(tensor: tf.Tensor | tf.TensorSpec) -> int:
    """Returns the bytes of a tensor; what has no size of its own has none."""
    if not tensor.shape.is_fully_defined() or tensor.dtype == tf.variant:
        return 0
    return int(tensor.shape.num_elements()) * tensor.dtype.size
