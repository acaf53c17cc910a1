"""The best cuts: an exact search over all of them, by dynamic programming.

Knows nothing of Keras or TensorFlow.
"""

import math
from collections.abc import Callable

import numpy as np


def best_ends(
    count: int, splits: int, cost: Callable[[int, int], np.ndarray]
) -> list[int] | None:
    """Cuts a sequence of pieces so that the slowest stage is fastest.

    Every way to cut is considered, so there is no better one: the fastest
    slowest stage of the first j pieces in k + 1 stages is the minimum over i
    of the larger of that of the first i pieces in k stages and the cost of the
    pieces i to j as stage k. That takes `splits * count` calls of `cost`.

    Args:
        count: Number of pieces, at least `splits`.
        splits: Number of stages K.
        cost: `cost(k, j)[i]` is what stage k costs with the pieces i <= p < j,
            for all i < j; infinite where that cannot be.

    Returns:
        How many pieces precede the end of each stage, K increasing numbers of
        which the last is `count`. `None` if all ways are infinite.
    """
    slowest = np.full((splits + 1, count + 1), math.inf)
    slowest[0, 0] = -math.inf
    origin = np.zeros((splits, count + 1), int)
    # By the end of a stage first: so costs of the same pieces are asked for
    # one after the other, and what they have in common is found once.
    for j in range(1, count + 1):
        for k in range(splits):
            # Each stage has a piece, those that follow, too.
            if not k < j <= count - (splits - 1 - k):
                continue
            options = np.maximum(slowest[k, :j], cost(k, j))
            origin[k, j] = np.argmin(options)
            slowest[k + 1, j] = options[origin[k, j]]
    if np.isposinf(slowest[splits, count]):
        return None
    ends = [count]
    for k in reversed(range(1, splits)):
        ends.insert(0, int(origin[k, ends[0]]))
    return ends
