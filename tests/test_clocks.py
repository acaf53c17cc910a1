"""Clocks of other machines."""

import itertools
import time

import pytest
import tensorflow as tf

from fdg_keras import clocks

THERE = "/job:worker/replica:0/task:1/device:CPU:0"


@pytest.fixture
def clock(monkeypatch):
    """A clock of another machine, which is this one; by default it is right.

    Readings take ten milliseconds both ways, but for one of them.
    """
    state = {"ahead": 0.0}
    delays = itertools.cycle([0.005, 0.005, 0.0005, 0.005])

    def timestamp():
        delay = next(delays)
        time.sleep(delay)
        now = time.time() + state["ahead"]
        time.sleep(delay)
        return tf.constant(now, tf.float64)

    monkeypatch.setattr(clocks.tf, "timestamp", timestamp)
    monkeypatch.setattr(clocks, "host_of", lambda device: "CPU:0")
    return state


@pytest.mark.parametrize("ahead", [-3600.0, -0.25, 0.25, 3600.0])
def test_a_clock_that_is_wrong(clock, ahead):
    clock["ahead"] = ahead
    assert clocks.offset_of(THERE) == pytest.approx(ahead, abs=0.01)


def test_a_clock_that_is_right_as_far_as_can_be_told(clock):
    """So that stages of one machine have one clock."""
    assert clocks.offset_of(THERE) == 0.0


@pytest.mark.parametrize(
    "device", ["CPU:0", "/job:localhost/replica:0/task:0/device:GPU:1"]
)
def test_the_own_clock(clock, device):
    clock["ahead"] = 5.0
    assert clocks.offset_of(device) == 0.0
