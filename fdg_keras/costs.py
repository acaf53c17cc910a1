"""What a model's nodes cost, estimated from shapes alone.

Costs are for one sample: operations of a forward, elements of a tensor.
"""

import math
from collections.abc import Sequence

import keras
import numpy as np

from fdg_keras.slicing import Graph, Node

# Moving memory costs time too. An element that a layer reads or writes takes
# as long as about this many operations of a convolution: so the two halves of
# a ResNet-20 took equally long on a CPU (120 to 200 give the same halves).
_OPERATIONS_PER_ELEMENT = 150.0


def node_cost(graph: Graph, node: Node) -> float:
    """Estimates the operations of a node's forward, for one sample.

    A multiplication and an addition for each weight at each position of the
    output (for a convolution, its pixels; for a recurrent layer, its steps),
    plus a share for each element that is read or written.
    """
    made = sum(elements(graph, v) for v in node.outputs)
    read = sum(elements(graph, v) for v in node.inputs)
    moved = _OPERATIONS_PER_ELEMENT * (made + read)
    if isinstance(node.operation, keras.layers.Embedding):
        return moved
    return moved + sum(
        2.0 * math.prod(v.shape) * _positions(graph, node)
        for v in node.variables
        if len(v.shape) > 1
    )


def cut_costs(graph: Graph) -> np.ndarray:
    """Estimates what a cut after each node costs the stage on either side."""
    sizes = [elements(graph, value) for value in range(len(graph.symbols))]
    return _OPERATIONS_PER_ELEMENT * crossing(graph, sizes)


def _positions(graph: Graph, node: Node) -> int:
    """Returns how often each weight of a node is used for one sample."""
    # A convolution uses its kernel at each pixel of the output, other layers
    # at each position of the input.
    convolves = hasattr(node.operation, "kernel_size")
    values = node.outputs if convolves else node.inputs
    data_format = getattr(node.operation, "data_format", None)
    channels_at = 1 if data_format == "channels_first" else -1
    shapes = [graph.symbols[value].shape for value in values]
    return max(
        (
            elements(graph, value) // (shape[channels_at] or 1)
            for value, shape in zip(values, shapes)
            if len(shape) > 1
        ),
        default=1,
    )


def elements(graph: Graph, value: int) -> int:
    """Returns the elements of a value for one sample; unknown sizes are 1.

    A sample may have several rows, where a reshape has put other dimensions
    into that of the batch (windows, patches).
    """
    shape = graph.symbols[value].shape[1:]
    return round(graph.rows[value] * math.prod(d or 1 for d in shape))


def crossing(graph: Graph, sizes: Sequence[int]) -> np.ndarray:
    """Returns for each cut position the sum of what crosses there.

    Nothing crosses after the last node: there the model ends.

    Args:
        graph: The model.
        sizes: Of each value.
    """
    found = np.zeros(len(graph.nodes))
    for value, (made, used) in _lifetimes(graph).items():
        found[made:used] += sizes[value]
    return found


def passing(graph: Graph, sizes: Sequence[int]) -> np.ndarray:
    """Returns for each node the sum of what is made before and used after it.

    Arguments as of `crossing`.
    """
    found = np.zeros(len(graph.nodes))
    for value, (made, used) in _lifetimes(graph).items():
        found[made + 1 : used] += sizes[value]
    return found


def _lifetimes(graph: Graph) -> dict[int, tuple[int, int]]:
    """Returns who makes a value, and who uses it last, by position."""
    end = len(graph.nodes) - 1
    last_use: dict[int, int] = {}
    for position, node in enumerate(graph.nodes):
        last_use.update((value, position) for value in node.inputs)
    last_use.update((value, end) for value in graph.outputs)
    return {
        value: (position, last_use.get(value, position))
        for position, node in enumerate(graph.nodes)
        for value in node.outputs
    }
