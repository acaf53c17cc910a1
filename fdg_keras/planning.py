"""Which layers go where: estimated costs, balanced cuts, the plan as a table.

For an integer `splits` the cuts minimize the cost of the slowest stage, its
sending and receiving included, exactly (dynamic programming). Costs are
estimates from parameter and operation counts.
"""

import math
import numbers
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np

from fdg_keras.slicing import Graph, Node, Slice

# Moving memory costs time too. An element that a layer reads or writes takes
# as long as about this many operations of a convolution: so the two halves of
# a ResNet-20 took equally long on a CPU (120 to 200 give the same halves).
_OPERATIONS_PER_ELEMENT = 150.0

# What goes without saying in a device's name.
_HERE = "/job:localhost/replica:0/task:0/device:"


@dataclass(frozen=True)
class StagePlan:
    """One stage of a plan.

    Attributes:
        device: Full TensorFlow name of the device.
        layers: Names of its layers and operations in order, `outer/inner`
            within nested models.
        parameters: Number of parameters, trainable and not.
        operations: Estimated operations of a forward, for one sample.
        sends: Elements it sends over the cut, for one sample.
    """

    device: str
    layers: tuple[str, ...]
    parameters: int
    operations: float
    sends: int


@dataclass(frozen=True)
class Plan:
    """Which layers are where. `print` it to see a table.

    Attributes:
        stages: In order.
    """

    stages: tuple[StagePlan, ...]

    @property
    def cuts(self) -> tuple[int, ...]:
        """How many layers and operations come before each cut."""
        counts = [len(stage.layers) for stage in self.stages[:-1]]
        return tuple(sum(counts[: i + 1]) for i in range(len(counts)))

    def __str__(self) -> str:
        total = sum(stage.operations for stage in self.stages) or 1.0
        rows = [
            (
                "stage",
                "device",
                "from",
                "to",
                "layers",
                "parameters",
                "work %",
                "sends",
            )
        ]
        for k, stage in enumerate(self.stages):
            rows.append(
                (
                    str(k),
                    stage.device.removeprefix(_HERE),
                    stage.layers[0],
                    stage.layers[-1],
                    str(len(stage.layers)),
                    f"{stage.parameters:,}",
                    f"{100 * stage.operations / total:.0f}",
                    f"{stage.sends:,}" if k < len(self.stages) - 1 else "-",
                )
            )
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        right = {0, 4, 5, 6, 7}
        lines = []
        for row in rows:
            cells = [
                cell.rjust(w) if i in right else cell.ljust(w)
                for i, (cell, w) in enumerate(zip(row, widths))
            ]
            lines.append("  ".join(cells).rstrip())
        return "\n".join(lines)


def choose_cuts(graph: Graph, splits: Any) -> list[int]:
    """Returns the cut positions that `splits` stands for.

    Args:
        graph: The model.
        splits: A number of stages; or names of layers to cut after, in the
            order of the model; or a `Plan` made for the same layers.

    Returns:
        Increasing positions; position p cuts after node p.

    Raises:
        ValueError: If there is no such cut.
    """
    if isinstance(splits, Plan):
        return _cuts_of_plan(graph, splits)
    if isinstance(splits, (bool, str, float)):
        raise ValueError(_bad_splits(splits))
    if isinstance(splits, numbers.Integral):
        return _balanced(graph, int(splits))
    try:
        names = list(splits)
    except TypeError:
        raise ValueError(_bad_splits(splits)) from None
    return _cuts_after(graph, names)


def make_plan(
    graph: Graph, slices: Sequence[Slice], devices: Sequence[str]
) -> Plan:
    """Returns the plan of slices on devices."""
    stages = []
    for part, device in zip(slices, devices):
        variables = [*part.trainable_variables, *part.state_variables]
        stages.append(
            StagePlan(
                device=device,
                layers=tuple(node.name for node in part.nodes),
                parameters=sum(math.prod(v.shape) for v in variables),
                operations=sum(node_cost(graph, n) for n in part.nodes),
                sends=sum(_elements(graph.symbols[v]) for v in part.sends),
            )
        )
    return Plan(tuple(stages))


def node_cost(graph: Graph, node: Node) -> float:
    """Estimates the operations of a node's forward, for one sample.

    A multiplication and an addition for each weight at each position of the
    output (for a convolution, its pixels; for a recurrent layer, its steps),
    plus a share for each element that is read or written.
    """
    made = sum(_elements(graph.symbols[v]) for v in node.outputs)
    read = sum(_elements(graph.symbols[v]) for v in node.inputs)
    moved = _OPERATIONS_PER_ELEMENT * (made + read)
    if isinstance(node.operation, keras.layers.Embedding):
        return moved
    return moved + sum(
        2.0 * math.prod(v.shape) * _positions(graph, node)
        for v in node.variables
        if len(v.shape) > 1
    )


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
            math.prod(d or 1 for d in shape[1:]) // (shape[channels_at] or 1)
            for shape in shapes
            if len(shape) > 1
        ),
        default=1,
    )


def _elements(symbol: Any) -> int:
    """Returns the elements of a tensor for one sample; unknown sizes are 1."""
    return math.prod(d or 1 for d in symbol.shape[1:])


def _balanced(graph: Graph, splits: int) -> list[int]:
    legal = graph.legal_cuts()
    if not 1 <= splits <= len(legal) + 1:
        shared = len(graph.nodes) - 1 - len(legal)
        why = (
            f", and {shared} of the places between them would split a shared "
            "layer"
            if shared
            else ""
        )
        raise ValueError(
            f"This model can be cut into 1 to {len(legal) + 1} stages: it has "
            f"{len(graph.nodes)} layers and operations{why}. Ask for as many, "
            "or split layers that do much into several. Received: "
            f"splits={splits}"
        )
    ends = np.array([*legal, len(graph.nodes) - 1])
    costs = [node_cost(graph, node) for node in graph.nodes]
    done = np.cumsum(costs)[ends]  # by the nodes up to each end
    sent = _OPERATIONS_PER_ELEMENT * _crossing_elements(graph)[ends]

    # slowest[i]: the cost of the slowest stage of the nodes up to ends[i], cut
    # into as many stages as the round says; chosen[round][i]: the end before.
    slowest = done + sent
    chosen = []
    for _ in range(splits - 1):
        fresh = np.full(len(ends), np.inf)
        origin = np.zeros(len(ends), int)
        for i in range(1, len(ends)):
            stage = done[i] + sent[i] - done[:i] + sent[:i]
            options = np.maximum(slowest[:i], stage)
            origin[i] = np.argmin(options)
            fresh[i] = options[origin[i]]
        slowest = fresh
        chosen.append(origin)
    cuts: list[int] = []
    at = len(ends) - 1
    for origin in reversed(chosen):
        at = origin[at]
        cuts.insert(0, int(ends[at]))
    return cuts


def _crossing_elements(graph: Graph) -> np.ndarray:
    """Returns for each cut position how many elements cross there.

    Nothing crosses after the last node: there the model ends.
    """
    end = len(graph.nodes) - 1
    last_use: dict[int, int] = {}
    for position, node in enumerate(graph.nodes):
        last_use.update((value, position) for value in node.inputs)
    last_use.update((value, end) for value in graph.outputs)
    crossing = np.zeros(len(graph.nodes))
    for position, node in enumerate(graph.nodes):
        for value in node.outputs:
            until = last_use.get(value, position)
            crossing[position:until] += _elements(graph.symbols[value])
    return crossing


def _cuts_after(graph: Graph, names: Sequence[Any]) -> list[int]:
    forbidden = graph.forbidden_cuts()
    cuts: list[int] = []
    for name in names:
        position = _position_of(graph, name)
        if position == len(graph.nodes) - 1:
            raise ValueError(
                f"{name!r} ends the model, so there is nothing to cut after "
                f"it. Expected names of earlier layers. Received: {names!r}"
            )
        if position in forbidden:
            raise ValueError(
                f"The model cannot be cut after {name!r}: "
                f"{forbidden[position]}, and a variable is trained by one "
                "stage. Cut before or after all layers that share it. "
                f"Received: {names!r}"
            )
        if cuts and position <= cuts[-1]:
            raise ValueError(
                "Expected names of layers to cut after in the order in which "
                f"the model runs them, each once; {name!r} is out of order. "
                f"Received: {names!r}"
            )
        cuts.append(position)
    return cuts


def _position_of(graph: Graph, name: Any) -> int:
    """Returns the last node of the layer or nested model called `name`."""
    found = [
        position
        for position, node in enumerate(graph.nodes)
        if node.name == name or node.name.startswith(f"{name}/")
    ]
    if found:
        return found[-1]
    inner = [n.name for n in graph.nodes if n.name.endswith(f"/{name}")]
    hint = f"Did you mean one of {inner}? " if inner else ""
    raise ValueError(
        f"No layer is called {name!r}. {hint}Expected names among "
        f"{_shortened([node.name for node in graph.nodes])}. Received: {name!r}"
    )


def _cuts_of_plan(graph: Graph, plan: Plan) -> list[int]:
    planned = [name for stage in plan.stages for name in stage.layers]
    actual = [node.name for node in graph.nodes]
    for position, (a, b) in enumerate(zip(planned, actual)):
        if a != b:
            raise ValueError(
                "The plan was made for another model: expected layer "
                f"{a!r} at position {position}, received {b!r}."
            )
    if len(planned) != len(actual):
        raise ValueError(
            f"The plan was made for another model: expected {len(planned)} "
            f"layers and operations, received {len(actual)}."
        )
    return [count - 1 for count in plan.cuts]


def _bad_splits(splits: Any) -> str:
    return (
        "Expected `splits` to be a number of stages, a list of names of "
        f"layers to cut after, or a `Plan`. Received: {splits!r}"
    )


def _shortened(names: Sequence[str]) -> list[str]:
    return list(names) if len(names) <= 40 else [*names[:38], "...", names[-1]]
