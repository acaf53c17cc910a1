"""How long windows and parts are, and the loop that fills them.

What is fed in a `fit`, `test_fit.py` shows.
"""

import keras
import numpy as np
import pytest
import tensorflow as tf
from google.protobuf import json_format

import fdg_keras
from fdg_keras import feeding
from fdg_keras.feeding import Pace
from fdg_keras.feeds import Feed
from fdg_keras.links import Link


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


def make_feed(batches, devices=("CPU:0", "CPU:0"), bad=None):
    """A feed of so many batches, its iterator, and what was drawn of it."""
    drawn = []

    def draw(i):
        drawn.append(int(i))
        if i == bad:
            raise ValueError("bad batch")
        return np.float32(i)

    def load(i):
        x = tf.reshape(tf.numpy_function(draw, [i], tf.float32), (1, 1))
        return (x,), (tf.cast(i + 1, tf.int32),)  # the number of its rows

    options = tf.data.Options()
    options.autotune.enabled = False  # as the engine reads data
    data = tf.data.Dataset.range(batches).map(load).with_options(options)
    places = [f"/job:localhost/replica:0/task:0/device:{d}" for d in devices]
    specs = tf.TensorSpec((None, 1)), tf.TensorSpec((), tf.int32)
    inputs, targets = (
        Link([spec], 9, place, "test") for spec, place in zip(specs, places)
    )
    return Feed([(inputs, [0])], targets), iter(data), drawn, (inputs, targets)


def test_a_feed_draws_what_is_asked_for():
    feed, iterator, drawn, (inputs, targets) = make_feed(5)
    for count, fed in (0, 0), (1, 1), (3, 3), (4, 1), (2, 0):
        before = len(drawn)
        assert feed(iterator, count) == fed
        assert len(drawn) - before == fed
        assert feed.moved() == fed
    assert drawn == [0, 1, 2, 3, 4]
    assert feed.batch_bytes == 4  # of the first, which says that it has a row
    assert [int(inputs.dequeue()[0][0, 0]) for _ in drawn] == drawn
    assert [int(targets.dequeue()[0]) - 1 for _ in drawn] == drawn


def test_a_feed_tells_what_was_moved_before_a_failure():
    feed, iterator, drawn, (inputs, _) = make_feed(5, bad=2)
    with pytest.raises(tf.errors.OpError, match="bad batch"):
        feed(iterator, 4)
    assert drawn == [0, 1, 2]
    assert feed.moved() == 2
    assert [int(inputs.dequeue()[0][0, 0]) for _ in range(2)] == [0, 1]


def test_a_link_gets_one_message_for_each_batch():
    """Beside whether the loop goes on: it may be on another machine."""
    feed, iterator, _, _ = make_feed(5, ("CPU:1", "CPU:2"))
    assert feed(iterator, 2) == 2
    ((_, function),) = feed._loops.values()
    graph = json_format.MessageToDict(function.graph.as_graph_def())
    loop = {
        attribute["func"]["name"]
        for node in graph["node"]
        if node["op"] == "While"
        for attribute in node["attr"].values()
        if "func" in attribute
    }
    pushing = {
        one["signature"]["name"]
        for one in graph["library"]["function"]
        if any(node["op"] == "QueueEnqueueV2" for node in one["nodeDef"])
    }
    # In the loop's body, not in a branch: whose machine would be asked, too.
    assert len(pushing) == 1
    assert pushing < loop
