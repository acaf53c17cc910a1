"""Parts of a TensorFlow graph, as functions.

Tensors and operations are told apart by name: an operation hands out its
tensors as new Python objects each time. Knows nothing of Keras or of training.
"""

import math
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

# Operations that make a list, of (shape of an element, most elements).
_LISTS = ("EmptyTensorList", "TensorListReserve")
_LOOPS = ("While", "StatelessWhile")

# Types that do not say how much memory they hold.
_UNSIZED = (tf.variant, tf.string, tf.resource)


def extract(
    graph: Any,
    feeds: Sequence[tf.Tensor],
    fetches: Any,
    name: str,
    past: Collection[str] = (),
) -> Callable[..., Any]:
    """Returns the part of a graph from `feeds` to `fetches` as a function.

    The operations are copied. `tf.compat.v1.wrap_function`'s own `prune` would
    keep what lies upstream of the feeds as well, and fails where that reads
    one output of an operation (a `while`, say) of which another output is fed.

    Args:
        graph: A `FuncGraph`. What it captures is captured again.
        feeds: The arguments, tensors of the graph.
        fetches: The results, nested tensors or `tf.IndexedSlices`.
        name: Of the function, shown in profiles.
        past: Names of operations that need not be waited for, only read.
    """
    captures = {inner.name: outer for outer, inner in graph.captures}
    flat = tf.nest.flatten(fetches, expand_composites=True)
    stop = {*captures, *(t.name for t in feeds)}
    _, operations = ancestors(flat, stop, past)
    definition, read = _part(graph.as_graph_def(), operations)

    def part(*tensors: tf.Tensor) -> Any:
        values = {t.name: value for t, value in zip(feeds, tensors)}
        for key in sorted(read & captures.keys()):
            values[key] = tf.identity(captures[key])
        made = [t.name for t in flat if t.name not in values]
        found = tf.graph_util.import_graph_def(
            definition,
            {key: values[key] for key in sorted(read & values.keys())},
            made,
            name="",
        )
        found = values | dict(zip(made, found))
        return tf.nest.pack_sequence_as(
            fetches, [found[t.name] for t in flat], expand_composites=True
        )

    return tf.compat.v1.wrap_function(
        part, [tf.TensorSpec(t.shape, t.dtype) for t in feeds], name
    )


def ancestors(
    tensors: Sequence[tf.Tensor], stop: Collection[str], past: Collection[str]
) -> tuple[list[tf.Tensor], set[str]]:
    """Returns what tensors are made of.

    Args:
        tensors: Of one graph.
        stop: Names of tensors to go no further than.
        past: Names of operations that need not be waited for, only read.

    Returns:
        The tensors of `stop` that were reached, and the names of the
        operations behind them.
    """
    reached: dict[str, tf.Tensor] = {}
    seen: set[str] = set()
    operations: list[tf.Operation] = []

    def visit(needed: Iterable[tf.Tensor]) -> None:
        for tensor in needed:
            if tensor.name in stop:
                reached[tensor.name] = tensor
            else:
                operations.append(tensor.op)

    visit(tensors)
    while operations:
        op = operations.pop()
        if op.name not in seen:
            seen.add(op.name)
            visit(op.inputs)
            # What made a tensor that is fed has run, whatever else it makes.
            # What makes nothing (an assertion, say) has not.
            operations.extend(
                before
                for before in op.control_inputs
                if before.name not in past
                and not any(t.name in stop for t in before.outputs)
            )
    return list(reached.values()), seen


def read_beside_arguments(
    operations: Iterable[tf.Operation], tensors: Sequence[tf.Tensor]
) -> list[bool]:
    """Returns which tensors `tf.custom_gradient`s read that were not given.

    Such a function has a gradient by its arguments, and by variables that it
    reads, and by nothing else.

    Args:
        operations: To look at. All are of one graph.
        tensors: Of the same graph.
    """
    found: set[str] = set()
    custom = [op for op in operations if op.type == "IdentityN"]
    if not custom:
        return [False] * len(tensors)  # They may have no names.
    names = {t.name for t in tensors}
    for op in custom:
        if _has_own_gradient(op):
            # Its inputs are what the function returns, and then its arguments.
            result, *others = op.inputs
            stop = names | {t.name for t in others}
            reached, _ = ancestors([result], stop, ())
            found |= {t.name for t in reached} - {t.name for t in others}
    return [t.name in found for t in tensors]


def _has_own_gradient(op: tf.Operation) -> bool:
    try:
        return op.get_attr("_gradient_op_type").startswith(b"CustomGradient")
    except ValueError:
        return False


def tensor_bytes(
    graph: Any,
    feeds: Sequence[tf.Tensor],
    operations: Sequence[tf.Operation],
    batch_size: int,
) -> dict[str, int | None]:
    """Returns how many bytes the tensors take that operations make.

    Shapes are inferred anew, for feeds of a known size. Dimensions that are
    still unknown, as those that a `while` says its results have, are taken for
    the batch's. A list of tensors, as a `while` keeps for its gradient, takes
    what its elements take, if their shape and the number of turns are known.

    Args:
        graph: A `FuncGraph`.
        feeds: Arguments, tensors of the graph.
        operations: Of the graph. What they are made of is sized, too.
        batch_size: For unknown dimensions.

    Returns:
        Bytes by the tensor's name; `None` where the rank is unknown, or for
        types that do not say what they hold (other `variant`, strings,
        resources).
    """
    outputs = [t for op in operations for t in op.outputs]
    _, behind = ancestors(outputs, {t.name for t in feeds}, ())
    definition, read = _part(graph.as_graph_def(), behind)
    with tf.Graph().as_default() as sized:
        # By names of their own: that of one may be the scope of an operation.
        given = {
            t.name: tf.compat.v1.placeholder(
                t.dtype, _filled(t.shape, batch_size), f"fdg_feed_{i}"
            )
            for i, t in enumerate(feeds)
        }
        known = {name: t for name, t in given.items() if name in read}
        tf.graph_util.import_graph_def(definition, known, name="")
    made = {t.name: t for op in sized.get_operations() for t in op.outputs}
    return {name: _bytes(t, batch_size) for name, t in (made | given).items()}


def _bytes(tensor: tf.Tensor, batch_size: int) -> int | None:
    if tensor.dtype == tf.variant:
        return _list_bytes(tensor, batch_size)
    if tensor.dtype in _UNSIZED or tensor.shape.rank is None:
        return None
    shape = _filled(tensor.shape, batch_size)
    return shape.num_elements() * tensor.dtype.size


def _list_bytes(tensor: tf.Tensor, batch_size: int) -> int | None:
    """Returns the bytes of a list's elements, `None` if that is unknown."""
    op = tensor.op
    if op.type in _LOOPS:
        # What comes out of a loop is what went in, as long as it may become.
        tensor = op.inputs[tensor.value_index]
        op = tensor.op
    if op.type == "TensorListFromTensor":
        return _bytes(op.inputs[0], batch_size)
    if op.type not in _LISTS:
        return None
    shape, most = map(_static, op.inputs)
    dtype = op.get_attr("element_dtype")
    # A shape of unknown rank is the number -1.
    known = shape is not None and np.ndim(shape) == 1 and most is not None
    if not known or most < 0 or dtype in _UNSIZED:
        return None
    element = math.prod(batch_size if d < 0 else int(d) for d in shape)
    return int(most) * element * dtype.size


def _static(tensor: tf.Tensor) -> Any:
    """Returns the value of a constant, also of the largest number in one."""
    if tensor.op.type == "Max":  # so Keras asks for the number of turns
        found = tf.get_static_value(tensor.op.inputs[0])
        return None if found is None else np.max(found)
    return tf.get_static_value(tensor)


def _filled(shape: tf.TensorShape, batch_size: int) -> tf.TensorShape:
    """Returns a shape with a size in place of what is unknown."""
    if shape.rank is None:
        return shape
    return tf.TensorShape([batch_size if d is None else d for d in shape])


def _part(definition: Any, operations: Collection[str]) -> tuple[Any, set[str]]:
    """Returns some operations of a graph, and what they read.

    Args:
        definition: A `GraphDef`; it is changed.
        operations: Names of those to keep.
    """
    nodes = [node for node in definition.node if node.name in operations]
    read = set()
    for node in nodes:
        inputs = [i for i in node.input if i[0] != "^" or i[1:] in operations]
        node.input[:] = inputs
        # Where an operation runs is said by its device; what it was to be
        # next to may be in the other part.
        node.attr.pop("_class", None)
        read |= {i if ":" in i else f"{i}:0" for i in inputs if i[0] != "^"}
    del definition.node[:]
    definition.node.extend(nodes)
    return definition, read
