"""How long windows and parts are. What is fed, `test_fit.py` shows."""

import keras
import numpy as np
import pytest

import fdg_keras
from fdg_keras import feeding
from fdg_keras.feeding import Pace
from fdg_keras.feeds import Feed


@pytest.fixture
def clock(monkeypatch):
    """A clock that is set by hand."""

    class Clock:
        now = 100.0

        def perf_counter(self):
            return self.now

    clock = Clock()
    monkeypatch.setattr(feeding, "time", clock)
    return clock


def parts(clock, pace, seconds_per_tick, count, far_away=False):
    """The lengths of `count` parts, each measured."""
    pace.start(far_away)
    found = []
    for _ in range(count):
        found.append(pace.part)
        clock.now += pace.part * seconds_per_tick
        pace.measure(pace.part)
    return found


def test_what_the_user_asked_for_stays(clock):
    pace = Pace(3)
    assert parts(clock, pace, 1e-6, 4) == [1, 2, 3, 3]
    assert pace.window == 3


def test_without_a_wish_every_part_is_a_window(clock):
    pace = Pace()
    parts(clock, pace, 1e-6, 4)
    assert pace.window == pace.part == 16


def test_a_part_grows_until_it_lasts_a_tenth_of_a_second(clock):
    assert parts(clock, Pace(), 0.00999, 7) == [1, 2, 4, 8, 10, 10, 10]
    assert parts(clock, Pace(1000), 0.00999, 7) == [1, 2, 4, 8, 10, 10, 10]


def test_parts_are_longer_where_a_call_is(clock):
    found = parts(clock, Pace(), 0.09999, 6, far_away=True)
    assert found == [1, 2, 4, 8, 10, 10]


def test_a_part_shrinks_when_ticks_get_slower(clock):
    pace = Pace()
    assert parts(clock, pace, 1e-6, 7)[-1] == 64
    assert parts(clock, pace, 0.05001, 2) == [128, 1]
    assert parts(clock, pace, 10.0, 2) == [1, 1]


def test_a_part_has_a_longest(clock):
    lengths = parts(clock, Pace(), 1e-9, 16)
    assert lengths[-3:] == [4096] * 3


def test_an_empty_part_says_nothing(clock):
    pace = Pace()
    pace.start()
    pace.measure(0)
    assert pace.part == 1


def test_large_batches_wait_one_by_one(monkeypatch):
    """However short a tick is: a part has so many bytes at most."""
    x, y = np.zeros((64, 100), "float32"), np.zeros((64, 1), "float32")
    model = keras.Sequential(
        [keras.Input((100,)), *map(keras.layers.Dense, (4, 1))]
    )
    model.compile("sgd", "mse")
    asked = []

    def feed(self, iterator, count, real=Feed.__call__):
        asked.append(count)
        return real(self, iterator, count)

    monkeypatch.setattr(Feed, "__call__", feed)
    trainer = fdg_keras.Trainer(model, 2)
    trainer.fit(x, y, batch_size=2, epochs=2, verbose=0)
    assert asked[0] == 1
    assert max(asked) > 3
    trainer = fdg_keras.Trainer(model, 2)
    # Three batches of two samples.
    size = 2 * 4 * (100 + 1)
    monkeypatch.setattr(feeding, "_PART_BYTES", 4 * size - 1)
    asked.clear()
    trainer.fit(x, y, batch_size=2, epochs=2, verbose=0)
    assert max(asked) == 3
    monkeypatch.setattr(feeding, "_PART_BYTES", 1)
    asked.clear()
    trainer.fit(x, y, batch_size=2, verbose=0)
    assert set(asked) == {1}
