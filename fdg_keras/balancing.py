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
    slowest = np.full(count + 1, math.inf)
    slowest[0] = 0.0
    chosen = []
    for k in range(splits):
        fresh = np.full(count + 1, math.inf)
        origin = np.zeros(count + 1, int)
        # Each stage has a piece, those that follow, too.
        for j in range(k + 1, count - (splits - 1 - k) + 1):
            options = np.maximum(slowest[:j], cost(k, j))
            origin[j] = np.argmin(options)
            fresh[j] = options[origin[j]]
        slowest = fresh
        chosen.append(origin)
    if math.isinf(slowest[count]):
        return None
    ends = [count]
    for origin in reversed(chosen[1:]):
        ends.insert(0, int(origin[ends[0]]))
    return ends
