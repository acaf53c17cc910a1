"""Who runs what in which order, against literal tables."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fdg_keras import delays
from fdg_keras.schedules import FLUSHES, Delayed, Flushed


def names(schedule, splits, ticks=1):
    """Returns for each stage its passes, as text."""
    return [
        " ".join(
            f"{kind}{unit}"
            for tick in range(ticks)
            for kind, unit in schedule.tick(stage, splits, tick)
        )
        for stage in range(splits)
    ]


def in_flight(passes):
    """Counts of how many units at most the backward was to come."""
    count = most = 0
    for kind, _ in passes:
        count += 1 if kind == "F" else -1
        most = max(most, count)
    return most


schedules = st.one_of(
    st.builds(Delayed, st.integers(0, 3), st.sampled_from(delays.ORDERS)),
    st.builds(Flushed, st.integers(1, 6), st.sampled_from(FLUSHES)),
)


@given(st.integers(1, 5), st.integers(0, 3), st.sampled_from(delays.ORDERS))
def test_delayed_is_the_timeline(splits, delay, order):
    ticks = 12
    found = names(Delayed(delay, order), splits, ticks)
    rows = delays.timeline(splits, delay, ticks, order)
    assert found == [" ".join(row[k] for row in rows) for k in range(splits)]


def test_gpipe():
    assert (
        names(Flushed(3), 2, ticks=2)
        == ["F0 F1 F2 B0 B1 B2 F3 F4 F5 B3 B4 B5"] * 2
    )


def test_1f1b():
    """Figure 4 of Narayanan et al. 2021 (arXiv 2104.04473), with M=8."""
    assert names(Flushed(8, "1f1b"), 4) == [
        "F0 F1 F2 F3 B0 F4 B1 F5 B2 F6 B3 F7 B4 B5 B6 B7",
        "F0 F1 F2 B0 F3 B1 F4 B2 F5 B3 F6 B4 F7 B5 B6 B7",
        "F0 F1 B0 F2 B1 F3 B2 F4 B3 F5 B4 F6 B5 F7 B6 B7",
        "F0 B0 F1 B1 F2 B2 F3 B3 F4 B4 F5 B5 F6 B6 F7 B7",
    ]


def test_1f1b_with_fewer_micro_batches_than_stages_is_gpipe_at_first():
    assert names(Flushed(2, "1f1b"), 3) == [
        "F0 F1 B0 B1",
        "F0 F1 B0 B1",
        "F0 B0 F1 B1",
    ]


@given(schedules, st.integers(1, 5))
def test_units_come_in_order_and_all_of_them(schedule, splits):
    for stage in range(splits):
        for kind in "FB":
            units = [
                unit
                for tick in range(16)
                for each, unit in schedule.tick(stage, splits, tick)
                if each == kind
            ]
            assert units == list(range(len(units)))


@given(schedules, st.integers(1, 5))
def test_what_is_in_flight_is_counted_right(schedule, splits):
    ticks = schedule.fill(splits) + 2
    for stage in range(splits):
        passes = [
            one
            for tick in range(ticks)
            for one in schedule.tick(stage, splits, tick)
        ]
        assert schedule.in_flight(stage, splits) == in_flight(passes)


def test_versions():
    assert [Delayed(2).versions(k, 3) for k in range(3)] == [5, 3, 1]
    late = Delayed(2, "update_first")
    assert [late.versions(k, 3) for k in range(3)] == [4, 2, 1]
    assert [Flushed(8).versions(k, 3) for k in range(3)] == [1, 1, 1]


@pytest.mark.parametrize("delay", [-1, 1.5, True, None])
def test_bad_delay(delay):
    message = r"Expected `delay` to be .* from 0 on\. Received: delay="
    with pytest.raises(ValueError, match=message):
        Delayed(delay)


@pytest.mark.parametrize("count", [0, "8"])
def test_bad_micro_batches(count):
    message = r"Expected `micro_batches` to be .* Received: micro_batches="
    with pytest.raises(ValueError, match=message):
        Flushed(count)


@pytest.mark.parametrize("make", [Delayed, Flushed])
def test_bad_order(make):
    message = r"Expected `order` to be one of .* Received: order='other'"
    with pytest.raises(ValueError, match=message):
        make(2, "other")
