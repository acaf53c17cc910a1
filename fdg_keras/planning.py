"""Where to cut: by number, by name or by plan; and the plan of a cut model.

For a number of stages the cuts minimize the cost of the slowest stage, its
sending and receiving included. Costs are estimated here (see `costs`), so the
same model is cut alike everywhere; `planner` measures them.
"""

import math
import numbers
import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from fdg_keras.balancing import best_ends
from fdg_keras.costs import cut_costs, elements, node_cost
from fdg_keras.plans import Plan
from fdg_keras.slicing import Graph, Slice, cut_graph, first_uses
from fdg_keras.stage_plans import StagePlan


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
    counts = _parameters(graph)
    done = 0
    for part, device in zip(slices, devices):
        stop = done + len(part.nodes)
        variables = [*part.trainable_variables, *part.state_variables]
        costs = tuple(node_cost(graph, node) for node in part.nodes)
        stages.append(
            StagePlan(
                device=device,
                layers=tuple(node.name for node in part.nodes),
                parameters=sum(math.prod(v.shape) for v in variables),
                operations=sum(costs),
                sends=sum(elements(graph, v) for v in part.sends),
                costs=costs,
                counts=tuple(counts[done:stop]),
            )
        )
        done = stop
    return Plan(tuple(stages))


def legal_ends(graph: Graph, splits: int) -> np.ndarray:
    """Returns the last node of all that may be a stage's end, in order.

    Raises:
        ValueError: If there are too few for so many stages.
    """
    if not graph.nodes:
        raise ValueError(
            "Expected a model of one layer or more. This one hands its inputs "
            f"out as they are. Received: splits={splits}"
        )
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
    return np.array([*legal, len(graph.nodes) - 1])


def balance(
    ends: np.ndarray,
    nodes: np.ndarray,
    cuts: np.ndarray,
    held: Callable[[int, int], np.ndarray] | None = None,
) -> list[int] | None:
    """Returns the cuts that minimize the cost of the slowest stage.

    Args:
        ends: Positions at which a stage may end, the last node's included.
        nodes: `[K, nodes]`, what each node costs in each stage.
        cuts: `[K, nodes]`, what each of stage k and the one after it pays if
            the cut between them is after a node.
        held: `held(k, j)[i]` tells by how much stage k is over its memory with
            the pieces i <= p < j, of which `ends` are the ends. Default: all
            fits.

    Returns:
        Positions; position p cuts after node p. `None` if nothing fits.
    """
    done = np.pad(np.cumsum(nodes, axis=1)[:, ends], ((0, 0), (1, 0)))
    paid = np.pad(cuts[:, ends], ((1, 0), (1, 0)))  # by the stage behind it

    def cost(k: int, j: int) -> np.ndarray:
        stage = done[k, j] - done[k, :j] + paid[k + 1, j] + paid[k, :j]
        if held is not None:
            stage[held(k, j) > 0] = math.inf
        return stage

    found = best_ends(len(ends), len(nodes), cost)
    return None if found is None else [int(ends[e - 1]) for e in found[:-1]]


def estimates(graph: Graph, splits: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns estimated costs as `balance` takes them, `nodes` and `cuts`."""
    costs = [node_cost(graph, node) for node in graph.nodes]
    paid = cut_costs(graph)
    return np.tile(costs, (splits, 1)), np.tile(paid, (splits, 1))


def _balanced(graph: Graph, splits: int) -> list[int]:
    found = balance(legal_ends(graph, splits), *estimates(graph, splits))
    assert found is not None  # nothing is too large
    return found


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
        if _uncounted(a) != _uncounted(b):
            raise ValueError(
                "The plan was made for another model: expected layer "
                f"{a!r} at position {position}, received {b!r}."
            )
    if len(planned) != len(actual):
        counts = [n for stage in plan.stages for n in stage.counts]
        layer = _first_that_differs(actual, counts, _parameters(graph))
        raise ValueError(
            f"The plan was made for another model: expected {len(planned)} "
            f"layers and operations, received {len(actual)}.{_named(layer)}"
        )
    cuts = [count - 1 for count in plan.cuts]
    forbidden = graph.forbidden_cuts()
    for k, cut in enumerate(cuts):
        # Layers of the same names and sizes may be shared here, and not there.
        if cut in forbidden:
            raise ValueError(
                "The plan was made for another model: this one cannot be cut "
                f"after {graph.nodes[cut].name!r}, {forbidden[cut]}, and a "
                "variable is trained by one stage. Make a plan of this model. "
                f"Received: a plan that ends stage {k} there."
            )
    ranks = zip(_ranks(planned), _ranks(actual))
    for position, (there, here) in enumerate(ranks):
        if there != here:
            raise ValueError(
                "The plan was made for another model, with layers of one kind "
                f"in another order: expected layer {planned[position]!r} at "
                f"position {position}, received {actual[position]!r}."
            )
    _check_sizes(graph, plan, cuts)
    return cuts


def _check_sizes(graph: Graph, plan: Plan, cuts: Sequence[int]) -> None:
    # A model of open sizes is planned by one like it whose sizes are given.
    sized = not graph.open_symbols()
    devices = [stage.device for stage in plan.stages]
    here = make_plan(graph, cut_graph(graph, cuts), devices)
    for k, (there, one) in enumerate(zip(plan.stages, here.stages)):
        layer = _first_that_differs(one.layers, there.counts, one.counts)
        if layer or there.parameters != one.parameters:
            raise ValueError(
                f"The plan was made for another model: expected stage {k}, "
                f"{there.layers[0]!r} to {there.layers[-1]!r}, to have "
                f"{there.parameters:,} parameters, received {one.parameters:,}."
                f"{_named(layer)}"
            )
        if sized and there.sends != one.sends:
            raise ValueError(
                "The plan was made for another size of inputs: expected stage "
                f"{k} to send {there.sends:,} elements of each sample. Make a "
                "plan of this model. Received: a model in which it sends "
                f"{one.sends:,}"
            )


def _first_that_differs(
    names: Sequence[str], planned: Sequence[int], actual: Sequence[int]
) -> str | None:
    """Returns the first layer that has another number of parameters."""
    for name, a, b in zip(names, planned, actual):
        if a != b:
            return name
    return None


def _named(layer: str | None) -> str:
    return f" The first that differs is {layer!r}." if layer else ""


def _parameters(graph: Graph) -> list[int]:
    """Returns each node's number of parameters that no node has before."""
    uses = first_uses(node.variables for node in graph.nodes)
    return [sum(math.prod(v.shape) for v in new) for new in uses]


def _ranks(names: Sequence[str]) -> list[int]:
    """Returns each name's place among those that differ by numbers only.

    Keras counts on, whatever a process has made before, so that the order of
    the numbers stays.
    """
    alike: dict[str, set[tuple[int, ...]]] = {}
    for name in names:
        alike.setdefault(_uncounted(name), set()).add(_counts(name))
    ranks = {
        (kind, counts): rank
        for kind, found in alike.items()
        for rank, counts in enumerate(sorted(found))
    }
    return [ranks[_uncounted(name), _counts(name)] for name in names]


def _counts(name: str) -> tuple[int, ...]:
    """Returns the numbers that `_uncounted` leaves out; the first has none."""
    found = [re.search(r"_(\d+)$", part) for part in name.split("/")]
    return tuple(int(match[1]) if match else -1 for match in found)


def _uncounted(name: str) -> str:
    """Returns a name without the numbers by which Keras tells layers apart.

    They count all that a process has made so far.
    """
    return re.sub(r"_\d+(?=/|$)", "", name)


def _bad_splits(splits: Any) -> str:
    return (
        "Expected `splits` to be a number of stages, a list of names of "
        f"layers to cut after, or a `Plan`. Received: {splits!r}"
    )


def _shortened(names: Sequence[str]) -> list[str]:
    return list(names) if len(names) <= 40 else [*names[:38], "...", names[-1]]
