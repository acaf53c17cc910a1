"""Bytes that stages hold: against stages that were really traced."""

import itertools
import math

import keras
import numpy as np
import pytest
import zoo
from keras import layers

from fdg_keras.memory import Ledger
from fdg_keras.planning import choose_cuts, legal_ends
from fdg_keras.profiling import profile
from fdg_keras.room import Room
from fdg_keras.slicing import cut_graph, trace_graph
from fdg_keras.stashes import traced_stashes
from trainers import models

DEVICE = "/job:localhost/replica:0/task:0/device:CPU:0"
BATCH = 8


def traced(graph, cuts, stash):
    """The bytes that each stage keeps of a batch, weights apart."""
    found = traced_stashes(graph, cut_graph(graph, cuts), DEVICE, BATCH, stash)
    return [size.batch for size in found]


def ledger_of(graph, stash="exact", delay=2, slots=1.0):
    profiles = profile(graph, BATCH, DEVICE, measure=False)
    return Ledger(graph, profiles, BATCH, delay, stash, slots)


@pytest.mark.parametrize("stash", ["exact", "current", "replay"])
@pytest.mark.parametrize(
    "name", ["plain_mlp", "conv", "lstm", "unet", "raw_operations"]
)
def test_stash_is_that_of_the_stages(name, stash):
    graph = trace_graph(zoo.ZOO[name]().model)
    cuts = choose_cuts(graph, 3)
    ledger = ledger_of(graph, stash)
    edges = [0, *(cut + 1 for cut in cuts), len(graph.nodes)]
    found = [ledger.stashed(a)[b - 1] for a, b in itertools.pairwise(edges)]
    assert found == traced(graph, cuts, stash)


def test_stash_of_a_residual_network():
    graph = trace_graph(models.build("resnet20"))
    cuts = choose_cuts(graph, 4)
    ledger = ledger_of(graph)
    edges = [0, *(cut + 1 for cut in cuts), len(graph.nodes)]
    found = [ledger.stashed(a)[b - 1] for a, b in itertools.pairwise(edges)]
    assert found == traced(graph, cuts, "exact")


def chain():
    model = keras.Sequential(
        [keras.Input((4,)), *(layers.Dense(4, name=f"d{i}") for i in range(3))]
    )
    return trace_graph(model)


def test_peak_by_hand():
    """The middle one of three layers, three stages, delay 2, momentum."""
    ledger = ledger_of(chain())
    kernel, weights, value = 4 * 16, 4 * (16 + 4), 4 * BATCH * 4
    late = 2
    expected = (
        weights * (1 + 1 + 1)  # themselves, slot, gradient
        + late * kernel  # copies; no backward reads a bias
        + (late + 1) * value  # its input
        + 3 * value
        + 3 * value  # links: activations, gradients
        + 4 * value  # input, output and the gradient of both
    )
    assert ledger.peak(1, late)[1] == expected


def test_no_limit_is_no_limit():
    graph = chain()
    room = Room(ledger_of(graph), legal_ends(graph, 2), 2, None)
    assert room.excess is None


def test_excess():
    graph = chain()
    ledger = ledger_of(graph)
    room = Room(ledger, legal_ends(graph, 2), 2, [1000, 2000])
    for k, late, limit in ((0, 2, 1000), (1, 0, 2000)):
        for stop in (1, 2, 3):
            found = room.excess(k, stop)
            expected = [
                ledger.peak(a, late)[stop - 1] - limit for a in range(stop)
            ]
            np.testing.assert_allclose(found, expected)


def test_a_refusal_says_what_would_fit():
    """And what it says is so."""
    graph = trace_graph(zoo.ZOO["conv"]().model)
    ledger = ledger_of(graph)
    ends = legal_ends(graph, 2)
    least = min(
        max(ledger.peak(0, 2)[a], ledger.peak(a + 1, 0)[-1]) for a in ends[:-1]
    )
    text = Room(ledger, ends, 2, 0.9 * least).refusal()
    assert "stage" in text
    assert "more than its limit" in text
    assert f"{math.ceil(0.1 * least):,} bytes more" in text
    assert "batch_size=4" in text
    half = ledger.otherwise("exact", 2)
    assert half.batch_size == BATCH // 2
    assert (
        min(max(half.peak(0, 2)[a], half.peak(a + 1, 0)[-1]) for a in ends[:-1])
        < 0.9 * least
    )


@pytest.mark.parametrize("limit", [0, -5, "x", [1, 2, 3], [1, None]])
def test_limits_that_are_none(limit):
    graph = chain()
    with pytest.raises(ValueError, match=r"`memory_limit`.*Received"):
        Room(ledger_of(graph), legal_ends(graph, 2), 2, limit)
