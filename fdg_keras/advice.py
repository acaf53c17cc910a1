"""Measured beside expected: a plan after training, and which cut to move."""

import dataclasses
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fdg_keras.crossing import Stash
from fdg_keras.planning import balance, legal_ends
from fdg_keras.plans import Plan
from fdg_keras.profiling import description
from fdg_keras.slicing import Graph

# Advice that promises less than this part of a tick is not given.
_WORTH_MOVING = 0.05

# Nor is any that rests on fewer ticks: the first ones are slower, and single
# ones are whatever else the machine did.
_TICKS = 100


@dataclass(frozen=True)
class Measured:
    """What stages did in the epochs of a `fit`.

    Attributes:
        computed_s: Seconds that each stage computed in a tick, on average.
        step_s: Seconds from tick to tick, waiting included.
        ticks: Of how many that is the average.
    """

    computed_s: Sequence[float]
    step_s: float
    ticks: int


def with_measured(graph: Graph, plan: Plan, measured: Measured) -> Plan:
    """Returns a plan with what its stages were seen to do, and advice.

    What a stage took, over what was expected, scales the costs of its layers;
    cuts that balance the scaled costs are the advice. It rests on layers that
    take as long in another stage: if devices are of several kinds, there is
    none. Neither memory nor handing over is looked at.

    Args:
        graph: The model.
        plan: What was expected.
        measured: What was seen.
    """
    seconds = measured.computed_s
    stages = tuple(
        dataclasses.replace(stage, measured_s=one)
        for stage, one in zip(plan.stages, seconds)
    )
    plan = dataclasses.replace(
        plan, stages=stages, measured_step_s=measured.step_s
    )
    known = all(len(stage.costs) == len(stage.layers) for stage in stages)
    if not all(seconds) or len(stages) < 2 or not known:
        return plan
    return _advised(plan, _advice(graph, plan, measured))


def without_measured(plan: Plan) -> Plan:
    """Returns a plan without what an earlier run has measured and advised."""
    stages = tuple(
        dataclasses.replace(stage, measured_s=None) for stage in plan.stages
    )
    return dataclasses.replace(
        plan, stages=stages, measured_step_s=None, advice=None
    )


def with_held(
    plan: Plan,
    held: Sequence[tuple[int, int]],
    batch_size: int | None,
    delay: int,
    stash: Stash,
) -> Plan:
    """Returns a plan with the bytes that stages hold, if it had none.

    Args:
        plan: Of stages that were not sized.
        held: What each sends of a batch, and stashes at most; or nothing.
        batch_size: Of what batches.
        delay: With what delay.
        stash: With what stash mode.
    """
    if not held or plan.stages[0].stash_bytes is not None:
        return plan
    stages = tuple(
        dataclasses.replace(stage, sends_bytes=sent, stash_bytes=stash)
        for stage, (sent, stash) in zip(plan.stages, held)
    )
    return dataclasses.replace(
        plan, stages=stages, batch_size=batch_size, delay=delay, stash=stash
    )


def with_settings(
    plan: Plan, batch_size: int | None, delay: int, stash: str
) -> Plan:
    """Returns a plan that says so, if it was made for other settings.

    Args:
        plan: Of which some settings may not be known.
        batch_size: That is trained with, if it is known.
        delay: Likewise.
        stash: Likewise.
    """
    pairs = [
        ("batch_size", plan.batch_size, batch_size),
        ("delay", plan.delay, delay),
        ("stash", plan.stash, stash),
    ]
    others = [
        (f"{name}={planned!r}", f"{name}={actual!r}")
        for name, planned, actual in pairs
        if None not in (planned, actual) and planned != actual
    ]
    if not others:
        return plan
    planned, actual = (", ".join(each) for each in zip(*others))
    return _advised(
        plan,
        f"What is expected here is of {planned}, but training is with {actual}:"
        " make a plan of that to compare.",
    )


def _advised(plan: Plan, advice: str) -> Plan:
    lines = [plan.advice, advice] if plan.advice else [advice]
    return dataclasses.replace(plan, advice="\n".join(lines))


def _advice(graph: Graph, plan: Plan, measured: Measured) -> str:
    """Returns which cut to move, by what stages compute.

    Cuts cost nothing here: what is handed over was not measured.
    """
    seconds = measured.computed_s
    costs = np.concatenate(
        [
            np.array(stage.costs) * one / (sum(stage.costs) or 1.0)
            for stage, one in zip(plan.stages, seconds)
        ]
    )
    slowest = int(np.argmax(seconds))
    took = (
        f"Measured: stage {slowest} is the slowest, it computes "
        f"{1e3 * seconds[slowest]:.3g} ms a tick, on average of "
        f"{measured.ticks} ticks"
    )
    if measured.ticks < _TICKS:
        return (
            f"{took}. After {_TICKS} in one epoch, or in all but the first of "
            "one `fit`, it will be said which cut to move."
        )
    if len({description(stage.device) for stage in plan.stages}) > 1:
        return (
            f"{took}. Devices are of several kinds: `fdg_keras.plan` measures "
            "layers on each, and finds the cuts."
        )
    splits = len(seconds)
    nodes = np.tile(costs, (splits, 1))
    found = balance(legal_ends(graph, splits), nodes, np.zeros(nodes.shape))
    assert found is not None  # nothing is too large
    edges = [0, *(cut + 1 for cut in found), len(costs)]
    best = max(costs[a:b].sum() for a, b in itertools.pairwise(edges))
    now = [count - 1 for count in plan.cuts]
    if best > (1 - _WORTH_MOVING) * seconds[slowest]:
        return f"{took}; no cut is worth moving."
    moves = ", ".join(
        f"after {graph.nodes[new].name!r} instead of {graph.nodes[old].name!r}"
        for old, new in zip(now, found)
        if old != new
    )
    return (
        f"{took}. Cut {moves}: then it should be {1e3 * best:.3g} ms. Whether "
        "that fits in memory, and what handing over takes, `fdg_keras.plan` "
        "knows."
    )
