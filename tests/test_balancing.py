"""The exact search, against all ways there are."""

import itertools
import math

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from fdg_keras.balancing import best_ends


def all_ends(count, splits):
    for inner in itertools.combinations(range(1, count), splits - 1):
        yield [*inner, count]


def slowest(table, ends):
    edges = itertools.pairwise([0, *ends])
    return max(table[k][a][b] for k, (a, b) in enumerate(edges))


@st.composite
def tables(draw):
    """`table[k][i][j]`: anything, infinite now and then, not only sums."""
    count = draw(st.integers(1, 7))
    splits = draw(st.integers(1, count))
    numbers = st.one_of(st.integers(-20, 20), st.just(math.inf))
    size = splits * (count + 1) ** 2
    values = draw(st.lists(numbers, min_size=size, max_size=size))
    return np.array(values, float).reshape(splits, count + 1, count + 1)


@given(tables())
def test_there_is_no_better_way(table):
    splits, count = len(table), table.shape[1] - 1
    best = min(slowest(table, ends) for ends in all_ends(count, splits))
    found = best_ends(count, splits, lambda k, j: table[k, :j, j])
    if math.isinf(best):
        assert found is None
    else:
        assert len(found) == splits
        assert found == sorted(set(found))
        assert slowest(table, found) == best


def test_devices_of_different_speed():
    """The one that is three times as fast gets three times as much."""
    work = np.arange(9.0)
    speed = [3.0, 1.0]
    found = best_ends(8, 2, lambda k, j: (work[j] - work[:j]) / speed[k])
    assert found == [6, 8]
