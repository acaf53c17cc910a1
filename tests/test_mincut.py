"""The minimum cut against all choices there are."""

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fdg_keras.mincut import Step, cheapest

NEVER = math.inf


@st.composite
def computations(draw):
    """Up to seven steps, and what is needed of what they make."""
    steps, names = [], []
    for i in range(draw(st.integers(1, 7))):
        reads = draw(st.sets(st.sampled_from(names), max_size=3)) if i else ()
        costs = st.sampled_from([0, 1, 2, 5, 9])
        makes = {
            f"{i}:{j}": draw(costs) for j in range(draw(st.integers(1, 2)))
        }
        again = draw(st.sampled_from([0, 1, 3, NEVER]))
        steps.append(Step(reads, makes, again))
        names += makes
    return steps, draw(st.sets(st.sampled_from(names)))


def kept_for(steps, needed, again):
    """What must be kept if these steps are run again."""
    maker = {name: i for i, step in enumerate(steps) for name in step.makes}
    wanted = set(needed).union(*(steps[i].reads for i in again))
    return {name for name in wanted if maker[name] not in again}


def cost(steps, kept, again):
    keeping = {n: c for step in steps for n, c in step.makes.items()}
    return sum(keeping[n] for n in kept) + sum(steps[i].again for i in again)


@given(computations())
def test_no_choice_is_cheaper(computation):
    steps, needed = computation
    found = cheapest(steps, needed)
    assert found.kept == kept_for(steps, needed, found.again)
    choices = itertools.chain.from_iterable(
        itertools.combinations(range(len(steps)), n)
        for n in range(len(steps) + 1)
    )
    assert cost(steps, *found) == min(
        cost(steps, kept_for(steps, needed, again), again) for again in choices
    )


def test_what_is_cheap_is_made_of_what_is_expensive():
    steps = [
        Step((), {"product": 10}, NEVER),
        Step({"product"}, {"sum": 10}, 1),
        Step({"sum"}, {"activation": 10}, 1),
        Step({"activation"}, {"next": 10}, NEVER),
    ]
    found = cheapest(steps, {"product", "activation", "next"})
    assert found == ({"product", "next"}, [1, 2])


def test_what_does_not_pay_is_kept():
    steps = [Step((), {"a": 10}, NEVER), Step({"a"}, {"b": 10}, 11)]
    assert cheapest(steps, {"a", "b"}) == ({"a", "b"}, [])


def test_of_equal_choices_the_one_that_runs_least_again():
    steps = [Step((), {"a": 10}, NEVER), Step({"a"}, {"b": 10}, 0)]
    assert cheapest(steps, {"b"}) == ({"b"}, [])


def test_what_cannot_be_kept_is_made_again():
    steps = [Step((), {"a": 10}, NEVER), Step({"a"}, {"b": 1, "c": NEVER}, 99)]
    assert cheapest(steps, {"b"}) == ({"b"}, [])
    steps.append(Step({"c"}, {"d": 200}, 1))
    assert cheapest(steps, {"d"}) == ({"a"}, [1, 2])


@pytest.mark.parametrize("size", [2**33, 3e15])
def test_costs_beyond_32_bits(size):
    steps = [
        Step((), {"a": size}, NEVER),
        Step({"a"}, {"b": size}, size / 2),
        Step({"b"}, {"c": 3 * size}, 4 * size),
    ]
    assert cheapest(steps, {"a", "b", "c"}) == ({"a", "c"}, [1])


def test_nothing_is_needed():
    assert cheapest([], set()) == (set(), [])
    assert cheapest([Step((), {"a": 1}, 0)], set()) == (set(), [])


def test_ten_thousand_steps_take_no_time():
    """As many as a quarter of ResNet-1202 has; a second would be noticed."""
    steps = [Step((), {"0": 8}, NEVER)]
    for i in range(1, 10_000):
        again = NEVER if i % 5 == 0 else 1
        skip = {str(max(i - 10, 0))} if i % 10 == 0 else set()
        steps.append(Step({str(i - 1)} | skip, {str(i): 8}, again))
    found = cheapest(steps, {str(i) for i in range(10_000)})
    assert found.kept == {str(i) for i in range(0, 10_000, 5)}
