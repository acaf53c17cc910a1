"""From a Keras model to stages: an ordered graph, cut where it is told to.

A Functional or Sequential model is flattened to one list of recorded calls
("nodes") in Keras' own execution order, nested models inlined. Any prefix of
that order is a legal first part of the model, so a cut is a position in the
list. What a part needs from the parts before it and does not find among the
model's inputs crosses the cut, hop by hop; model inputs go straight to the
stages that use them.

Running the nodes, instead of building sub-models out of intermediate tensors,
keeps skips, shared layers, masks and several inputs exact and leaves the
user's model untouched.
"""

import functools
import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import keras

from fdg_keras import _keras


@dataclass(frozen=True)
class Node:
    """One recorded call of a layer or operation.

    Attributes:
        name: The layer's name; within inlined models `outer/inner`.
        operation: The layer or operation.
        call: Keras' record of the call.
        bindings: Pairs of the `id` of a symbolic argument and the value that
            stands for it.
        outputs: The values this call computes.
    """

    name: str
    operation: Any
    call: Any
    bindings: tuple[tuple[int, int], ...]
    outputs: tuple[int, ...]

    @property
    def inputs(self) -> tuple[int, ...]:
        """The values this call reads."""
        return tuple(value for _, value in self.bindings)

    @property
    def variables(self) -> list[keras.Variable]:
        """All variables it uses: weights, seeds, metrics, states, arguments.

        An operation may be given a weight of some layer as an argument.
        """
        layer, arguments = self.operation, self.call.arguments
        given = [
            v
            for v in keras.tree.flatten((arguments.args, arguments.kwargs))
            if isinstance(v, keras.Variable)
        ]
        if not isinstance(layer, keras.layers.Layer):
            return given
        metrics = [v for m in layer.metrics for v in m.variables]
        # Keras does not count the states of a stateful RNN as its variables.
        states = getattr(layer, "states", None) or []
        stateful = getattr(layer, "stateful", False)
        kept = keras.tree.flatten(states) if stateful else []
        return [*layer.variables, *metrics, *kept, *given]

    @property
    def trainable_variables(self) -> list[keras.Variable]:
        """Those that an optimizer updates, each once."""
        return _unique(v for v in self.variables if v.trainable)


def first_uses(
    variables: Iterable[Iterable[keras.Variable]],
) -> list[list[keras.Variable]]:
    """Returns of the variables of each node those that none has before."""
    seen: set[int] = set()
    found = []
    for mine in variables:
        found.append([v for v in _unique(mine) if id(v) not in seen])
        seen.update(map(id, found[-1]))
    return found


@dataclass
class Graph:
    """A model as an ordered list of nodes.

    Values are numbered; `symbols[value]` is the `KerasTensor` with its shape
    `[B, ...]` and dtype.

    Attributes:
        functional: The Keras graph it was made of.
        nodes: In execution order.
        inputs: Values of the model's inputs, in the model's order.
        outputs: Values of the model's outputs, in the model's order.
        symbols: Shapes and dtypes of all values.
        nested: Models within it, and the Keras graph of each.
    """

    functional: Any
    nodes: list[Node] = field(default_factory=list)
    inputs: tuple[int, ...] = ()
    outputs: tuple[int, ...] = ()
    symbols: list[Any] = field(default_factory=list)
    nested: list[tuple[Any, Any]] = field(default_factory=list)

    def add_value(self, symbol: Any) -> int:
        """Adds a value of the shape and dtype of `symbol`; returns it."""
        self.symbols.append(symbol)
        return len(self.symbols) - 1

    def open_symbols(self) -> list[Any]:
        """Returns the symbols of which more than the batch size is open."""
        return [s for s in self.symbols if s.shape and None in s.shape[1:]]

    @functools.cached_property
    def rows(self) -> list[float]:
        """How many rows, along the axis of the batch, a sample has in a value.

        One, but where a reshape has put other dimensions there (windows,
        patches): it leaves the number of elements as it was.
        """
        found = [1.0] * len(self.symbols)
        for node in self.nodes:
            rows = max((found[v] for v in node.inputs), default=1.0)
            for value in node.outputs:
                found[value] = rows
            if type(node.operation).__name__ == "Reshape" and node.inputs:
                (given,), (made,) = node.inputs[:1], node.outputs
                sizes = [
                    math.prod(d or 1 for d in self.symbols[v].shape[1:])
                    for v in (given, made)
                ]
                found[made] = found[given] * sizes[0] / max(sizes[1], 1)
        return found

    def forbidden_cuts(self) -> dict[int, str]:
        """Returns the cuts that would share a variable between stages.

        A variable is trained by one stage, so all nodes that use it must be
        on one side of each cut.

        Returns:
            For each forbidden cut position the reason. Position p is the cut
            between nodes p and p + 1.
        """
        first: dict[int, int] = {}
        forbidden: dict[int, str] = {}
        for position, node in enumerate(self.nodes):
            for variable in node.variables:
                start = first.setdefault(id(variable), position)
                for between in range(start, position):
                    forbidden.setdefault(
                        between,
                        f"{variable.path!r} is used on both sides, by "
                        f"{self.nodes[start].name!r} and by {node.name!r}",
                    )
        return forbidden

    def legal_cuts(self) -> list[int]:
        """Returns the positions at which the model may be cut."""
        forbidden = self.forbidden_cuts()
        return [p for p in range(len(self.nodes) - 1) if p not in forbidden]


@dataclass(frozen=True)
class Slice:
    """The nodes of one stage and the values at its boundary.

    Attributes:
        nodes: In execution order.
        feeds: Model inputs it uses, straight from the data.
        receives: Values it gets from the slice before.
        sends: Values it hands to the slice after; for the last slice the
            model's outputs. Some may only pass through.
    """

    nodes: tuple[Node, ...]
    feeds: tuple[int, ...]
    receives: tuple[int, ...]
    sends: tuple[int, ...]

    @property
    def layers(self) -> list[keras.layers.Layer]:
        """The layers it holds, each once."""
        found = {
            id(node.operation): node.operation
            for node in self.nodes
            if isinstance(node.operation, keras.layers.Layer)
        }
        return list(found.values())

    @property
    def trainable_variables(self) -> list[keras.Variable]:
        """The variables the optimizer updates, each once.

        As Keras, by what a variable itself says: a layer may have been thawed
        within a frozen one.
        """
        return _unique(
            v for layer in self.layers for v in layer.variables if v.trainable
        )

    @property
    def state_variables(self) -> list[keras.Variable]:
        """All other variables: statistics, seeds, frozen weights, metrics."""
        trainable = {id(v) for v in self.trainable_variables}
        return _unique(
            v
            for node in self.nodes
            for v in node.variables
            if id(v) not in trainable
        )

    def run(self, values: dict[int, Any], training: bool) -> None:
        """Runs the nodes, reading and writing tensors in `values`."""
        for node in self.nodes:
            tensors = {symbol: values[v] for symbol, v in node.bindings}
            args, kwargs = _keras.fill_in(node.call, tensors)
            result = _keras.run_operation(
                node.operation, args, kwargs, training
            )
            for value, tensor in zip(node.outputs, _keras.tree.flatten(result)):
                values[value] = tensor


def trace_graph(model: keras.Model) -> Graph:
    """Returns a model as an ordered list of nodes, nested models inlined.

    Args:
        model: A built Functional or Sequential model.

    Raises:
        ValueError: If the model is not built, or is not a graph of layers.
    """
    functional = _keras.functional_of(model)
    if functional is None:
        raise ValueError(_unsliceable(model))
    graph = Graph(functional)
    graph.inputs = tuple(graph.add_value(t) for t in functional.inputs)
    graph.outputs = tuple(_inline(graph, functional, graph.inputs, prefix=""))
    return graph


def cut_graph(graph: Graph, cuts: Sequence[int]) -> list[Slice]:
    """Cuts a graph into `len(cuts) + 1` slices.

    Args:
        graph: The model.
        cuts: Increasing positions; position p cuts after node p.

    Returns:
        The slices in order, with the values at their boundaries.
    """
    edges = [-1, *cuts, len(graph.nodes) - 1]
    parts = [
        tuple(graph.nodes[a + 1 : b + 1]) for a, b in itertools.pairwise(edges)
    ]
    slices: list[Slice] = []
    needed = list(graph.outputs)  # by the parts after the current one
    sends = tuple(graph.outputs)
    for index in reversed(range(len(parts))):
        nodes = parts[index]
        made = {value for node in nodes for value in node.outputs}
        reads = [value for node in nodes for value in node.inputs]
        needed = _unique_values([*reads, *needed])
        # Only the last slice hands out model inputs that are also outputs.
        used = reads + (list(sends) if index == len(parts) - 1 else [])
        feeds = tuple(v for v in graph.inputs if v in set(used))
        received = [
            v for v in needed if v not in made and v not in set(graph.inputs)
        ]
        receives = tuple(sorted(received))
        slices.insert(0, Slice(nodes, feeds, receives, sends))
        needed, sends = received, receives
    return slices


def _inline(
    graph: Graph, functional: Any, inputs: Sequence[int], prefix: str
) -> list[int]:
    """Appends the nodes of `functional`; returns the values of its outputs."""
    value_of = {id(t): v for t, v in zip(functional.inputs, inputs)}
    for call in _keras.calls_in_order(functional):
        bindings = tuple(
            (id(t), value_of[id(t)])
            for t in call.input_tensors
            if id(t) in value_of
        )
        if len(bindings) < len(call.input_tensors):
            continue  # Keras skips what it cannot compute, too.
        name = prefix + call.operation.name
        inner = _inlinable(graph, call, bindings)
        if inner is not None:
            arguments = [value for _, value in bindings]
            outputs = _inline(graph, inner, arguments, name + "/")
        else:
            outputs = [graph.add_value(t) for t in call.outputs]
            graph.nodes.append(
                Node(name, call.operation, call, bindings, tuple(outputs))
            )
        value_of.update((id(t), v) for t, v in zip(call.outputs, outputs))
    return [value_of[id(t)] for t in functional.outputs]


def _inlinable(graph: Graph, call: Any, bindings: Any) -> Any:
    """Returns the graph behind a recorded call of a nested model, if exact.

    A nested model that would convert its inputs on the way in, or that is
    called with more than tensors in order, stays one opaque node.
    """
    inner = _keras.functional_of(call.operation)
    if inner is None:
        return None
    graph.nested.append((call.operation, inner))
    # Keras adds `mask`, and overrides `training`.
    kwargs = dict(call.arguments.kwargs)
    masks = _keras.tree.flatten(kwargs.pop("mask", None))
    if kwargs.keys() - {"training"} or any(m is not None for m in masks):
        return None
    outer = [graph.symbols[value] for _, value in bindings]
    same = len(outer) == len(inner.inputs) and all(
        a.dtype == b.dtype and len(a.shape) == len(b.shape)
        for a, b in zip(outer, inner.inputs)
    )
    in_order = not isinstance(call.arguments.args[0], dict)
    own_loss = getattr(call.operation, "activity_regularizer", None)
    return inner if same and in_order and own_loss is None else None


def _unsliceable(model: Any) -> str:
    received = f"Received: {model!r} of type {type(model).__name__}."
    if not isinstance(model, keras.Model):
        return f"Expected a `keras.Model`. {received}"
    if isinstance(model, keras.Sequential) and not model.built:
        return (
            "The model has no input shape yet, so it cannot be sliced. Build "
            "it first: start it with a `keras.Input(shape)`, or call "
            f"`model.build(input_shape)`. {received}"
        )
    return (
        "Only Functional and Sequential models whose `call` is Keras' own can "
        "be sliced: other models do not tell which layer follows which. Make "
        "it functional: call its layers on `keras.Input(shape)`, and return "
        "`keras.Model(inputs, outputs)`. If `call` uses only layers and "
        "`keras.ops`, `keras.Model(inputs, model.call(inputs))` is enough, "
        f"and keeps the variables. {received}"
    )


def _unique(variables: Iterable[keras.Variable]) -> list[keras.Variable]:
    return list({id(v): v for v in variables}.values())


def _unique_values(values: Iterable[int]) -> list[int]:
    return list(dict.fromkeys(values))
