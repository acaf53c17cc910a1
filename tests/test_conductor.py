"""How long windows are. What a conductor does, `test_fit.py` shows."""

import pytest

from fdg_keras import conductor
from fdg_keras.conductor import Pace


@pytest.fixture
def clock(monkeypatch):
    """A clock that is set by hand."""

    class Clock:
        now = 100.0

        def perf_counter(self):
            return self.now

    clock = Clock()
    monkeypatch.setattr(conductor, "time", clock)
    return clock


def windows(clock, pace, seconds_per_tick, count):
    """The lengths of `count` windows, each measured."""
    pace.start()
    found = []
    for _ in range(count):
        found.append(pace.window)
        clock.now += pace.window * seconds_per_tick
        pace.measure(pace.window)
    return found


def test_what_the_user_asked_for_stays(clock):
    assert windows(clock, Pace(3, fixed=True), 1e-6, 4) == [3] * 4


def test_a_window_grows_until_it_lasts_a_tenth_of_a_second(clock):
    pace = Pace(fixed=False)
    assert windows(clock, pace, 0.00999, 7) == [1, 2, 4, 8, 10, 10, 10]


def test_a_window_shrinks_when_ticks_get_slower(clock):
    pace = Pace(64, fixed=False)
    assert windows(clock, pace, 0.05001, 2) == [64, 1]
    assert windows(clock, pace, 10.0, 2) == [1, 1]


def test_a_window_has_a_longest(clock):
    lengths = windows(clock, Pace(fixed=False), 1e-9, 16)
    assert lengths[-3:] == [4096] * 3


def test_an_empty_window_is_no_reason_to_fail(clock):
    pace = Pace(fixed=False)
    pace.start()
    pace.measure(0)
    assert pace.window >= 1
