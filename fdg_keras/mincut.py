"""What to keep and what to compute again: a minimum cut.

A computation is a list of steps that make tensors of earlier tensors. Some of
its tensors are needed once more later. Each of them is either kept until then
or made again, out of tensors that are kept or made again. Keeping a tensor
costs something, running a step again costs something, and the sum is to be
least. That is a minimum cut between what can only be kept and what is needed:

    source -> step      what it costs to run the step again
    step -> tensor      what it costs to keep the tensor
    tensor -> step      nothing parts a step from what it reads
    tensor -> sink      nor a tensor that is needed from the need

What lies on the sink's side is needed later: a step there is run again, and a
tensor there whose step is on the other side is kept.

Knows nothing of TensorFlow.
"""

from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from scipy import sparse
from scipy.sparse import csgraph

# SciPy's flows are 32-bit integers. No flow is larger than `_LARGEST`, and an
# arc of capacity `_UNBOUNDED` is never full.
_LARGEST, _UNBOUNDED = 2**29, 2**30
_SOURCE, _SINK = 0, 1


class Step(NamedTuple):
    """One step of a computation.

    Attributes:
        reads: Names of the tensors it needs, made by earlier steps.
        makes: Names of the tensors it makes, and what it costs to keep each;
            infinite if that is impossible.
        again: What it costs to run it again; infinite if that is impossible.
    """

    reads: Collection[str]
    makes: Mapping[str, float]
    again: float


class Choice(NamedTuple):
    """What to do with a computation's tensors and steps.

    Attributes:
        kept: Names of the tensors to keep.
        again: Indices of the steps to run again, in order.
    """

    kept: set[str]
    again: list[int]


def cheapest(steps: Sequence[Step], needed: Collection[str]) -> Choice:
    """Returns what is best kept and what is best run again.

    Of choices that cost the same it is the one that runs the fewest steps
    again. Costs are added up to one part in 2**29 of that of keeping all
    `needed`, and are exact if they are integers of no larger sum than 2**29.

    Args:
        steps: In order.
        needed: Names of tensors, none of which costs infinitely much to keep.
    """
    names = [name for step in steps for name in step.makes]
    tensor = {name: 2 + len(steps) + i for i, name in enumerate(names)}
    arcs = [(tensor[name], _SINK, np.inf) for name in needed]
    for node, step in enumerate(steps, start=2):
        arcs.append((_SOURCE, node, step.again))
        arcs += [(node, tensor[n], cost) for n, cost in step.makes.items()]
        arcs += [(tensor[name], node, np.inf) for name in set(step.reads)]
    keep_all = sum(
        cost
        for step in steps
        for name, cost in step.makes.items()
        if name in needed
    )
    later = _sink_side(arcs, 2 + len(steps) + len(names), keep_all)
    return Choice(
        {
            name
            for node, step in enumerate(steps, start=2)
            for name in step.makes
            if node not in later and tensor[name] in later
        },
        [i for i in range(len(steps)) if i + 2 in later],
    )


def _sink_side(
    arcs: Sequence[tuple[int, int, float]], nodes: int, most: float
) -> set[int]:
    """Returns the nodes behind the minimum cut that is nearest to the sink.

    Args:
        arcs: Of different pairs of nodes: from, to, capacity.
        nodes: How many there are.
        most: A capacity that some cut has.
    """
    if not arcs:
        return set()
    tails, heads, capacities = map(np.array, zip(*arcs))
    scale = min(1.0, _LARGEST / most) if most else 1.0
    whole = np.minimum(np.ceil(capacities * scale), _UNBOUNDED)
    network = sparse.csr_matrix(
        (whole.astype(np.int32), (tails, heads)), shape=(nodes, nodes)
    )
    flow = csgraph.maximum_flow(network, _SOURCE, _SINK).flow
    # From where more could flow to the sink, flows back included.
    residual = (network - flow).T.tocsr()
    residual.eliminate_zeros()
    return set(
        csgraph.breadth_first_order(
            residual, _SINK, return_predecessors=False
        ).tolist()
    )
