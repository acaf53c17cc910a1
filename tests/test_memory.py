"""Bytes that stages hold: against stages that were really traced."""

import itertools
import math
import time

import keras
import numpy as np
import pytest
import tensorflow as tf
import zoo
from keras import layers

from fdg_keras import planning
from fdg_keras.loss_bytes import loss_bytes
from fdg_keras.memory import Ledger
from fdg_keras.planning import choose_cuts, legal_ends
from fdg_keras.profiling import Profiler
from fdg_keras.resources import ALLOCATED
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
    return Ledger(Profiler(graph, BATCH, DEVICE), delay, stash, slots)


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


@pytest.mark.parametrize("stash", ["exact", "current", "replay"])
def test_stash_where_rows_are_not_samples(stash):
    """A symbol's first axis is unknown, whatever the batch makes of it."""
    inputs = keras.Input((6, 6, 4))
    h = layers.Dense(4, "relu")(inputs)
    h = keras.ops.reshape(h, (-1, 9, 4))  # four windows of each image
    h = layers.Dense(4, "relu")(h)
    h = keras.ops.concatenate([h, layers.Dense(4, "relu")(h)], 0)
    h = layers.Dense(4, "tanh")(h)
    h = keras.ops.reshape(h, (-1, 72, 4))
    graph = trace_graph(keras.Model(inputs, layers.Dense(2)(h)))
    cuts = choose_cuts(graph, 3)
    ledger = ledger_of(graph, stash)
    edges = [0, *(cut + 1 for cut in cuts), len(graph.nodes)]
    found = [ledger.stashed(a)[b - 1] for a, b in itertools.pairwise(edges)]
    assert found == traced(graph, cuts, stash)
    half = ledger.otherwise(stash, BATCH // 2)
    assert half.sent == pytest.approx(ledger.sent / 2)


def frozen_backbone():
    """Of which only the head is trained, beside a layer in the middle."""
    backbone = [
        layer
        for _ in range(3)
        for layer in (layers.Conv2D(4, 3, padding="same"), layers.ReLU())
    ]
    for layer in backbone:
        layer.trainable = False
    return keras.Sequential(
        [
            keras.Input((8, 8, 3)),
            *backbone,
            layers.Conv2D(4, 3, activation="relu"),
            layers.BatchNormalization(trainable=False),
            layers.GlobalAveragePooling2D(),
            layers.Dense(4, "tanh"),
            layers.Dense(2),
        ]
    )


def skip_into_a_mean():
    """Whose backward reads none of what it is the mean of."""
    inputs = keras.Input((6, 8))
    skip = h = layers.Dense(8)(inputs)
    for _ in range(3):
        h = layers.Add()([h, layers.Dense(8, "relu")(h)])
    gate = layers.Dense(8, "sigmoid")(skip)
    h = layers.Add()([layers.GlobalAveragePooling1D()(v) for v in (skip, h)])
    gate = layers.GlobalAveragePooling1D()(layers.Multiply()([gate, skip]))
    return keras.Model(inputs, layers.Dense(2)(layers.Add()([h, gate])))


@pytest.mark.parametrize("make", [frozen_backbone, skip_into_a_mean])
def test_replay_keeps_only_inputs_that_are_read(make):
    """By a backward of the stage, or to make what one of them reads."""
    graph = trace_graph(make())
    ledger = ledger_of(graph, "replay")
    count, spared = len(graph.nodes), 0
    for cuts in itertools.combinations(range(0, count - 1, 2), 2):
        edges = [0, *(cut + 1 for cut in cuts), count]
        found = [ledger.stashed(a)[b - 1] for a, b in itertools.pairwise(edges)]
        assert found == traced(graph, cuts, "replay")
        spared += found.count(0)
    assert spared


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
        weights * (1 + 1 + 1 + 1)  # themselves, slot, gradient, update
        + late * kernel  # copies; no backward reads a bias
        + (late + 1) * value  # its input
        + 3 * value
        + 3 * value  # links: activations, gradients
        + 2 * value  # gradients of its output and input
    )
    # It reads no input of the model, however many wait.
    assert ledger.peak(1, late, ahead=4)[1] == ALLOCATED * expected


def test_peak_of_replay_by_hand():
    """Its backward has the activations of one batch, the last stage's, too."""
    inputs = h = keras.Input((4,))
    for _ in range(3):
        h = layers.Dense(4, "relu")(h)
    ledger = ledger_of(trace_graph(keras.Model(inputs, h)), "replay")
    weights, value = 4 * (16 + 4), 4 * BATCH * 4
    for late in (0, 4):
        there = (
            3 * weights * 4  # of three layers; slots, gradients, updates
            + (late + 1) * value  # inputs
            + 3 * value  # outputs, which relu's backward and the next read
            + 3 * value  # gradients of a layer's output, sum and input
            + 2 * value  # inputs that wait
        )
        assert ledger.peak(0, late, ahead=2)[2] == ALLOCATED * there


@pytest.mark.parametrize("name", ["conv", "unet", "attention", "lstm"])
def test_one_stage_saves_nothing_by_replay(name):
    """The backward follows the forward at once."""
    graph = trace_graph(zoo.ZOO[name]().model)
    exact, replay = ledger_of(graph), ledger_of(graph, "replay")
    assert replay.peak(0, 0, 2)[-1] >= exact.peak(0, 0, 2)[-1]


@pytest.mark.parametrize("stash", ["exact", "selective", "current", "replay"])
@pytest.mark.parametrize(
    "name", ["unet", "attention", "shared", "two_inputs", "skip_into_a_mean"]
)
def test_columns_are_peaks(name, stash):
    """By the last node, the same as by the first."""
    own = skip_into_a_mean if name == "skip_into_a_mean" else None
    graph = trace_graph(own() if own else zoo.ZOO[name]().model)
    ledger = ledger_of(graph, stash)
    count = len(graph.nodes)
    starts, stops = np.arange(count), range(1, count, 2)
    columns = ledger.columns(starts, stops)
    for stop, (there, each, fed) in zip(stops, columns):
        for late, ahead in ((0, 2), (3, 5)):
            np.testing.assert_allclose(
                (there + late * each + ahead * fed)[: stop + 1],
                [ledger.peak(a, late, ahead)[stop] for a in range(stop + 1)],
            )


def test_sized_is_the_peak():
    graph = trace_graph(zoo.ZOO["unet"]().model)
    for stash in ("exact", "selective", "replay"):
        ledger = ledger_of(graph, stash)
        for a in (0, 2):
            size = ledger.sized(a, 6)
            assert size.peak(4, 3) == int(ledger.peak(a, 4, 3)[5])
        assert size.stash(4) == (5 * size.batch + 4 * size.copies)


def test_each_use_of_a_layer_makes_a_gradient():
    """They are all there until they are added up."""
    inputs = h = keras.Input((4,))
    layer = layers.Dense(4)
    for _ in range(3):
        h = layer(h)
    ledger = ledger_of(trace_graph(keras.Model(inputs, h)))
    weights = 4 * (16 + 4)
    size = ledger.sized(0, 3)
    assert (size.weights, size.gradients) == (weights, 3 * weights)
    value = 4 * BATCH * 4
    # What the calls read, and gradients of an output and an input.
    there = weights * (1 + 1 + 1 + 3) + 3 * value + 2 * value
    assert size.peak(0, 0) == int(ALLOCATED * there)


def test_what_a_forward_needs_by_itself_is_counted():
    """And no backward reads."""
    inputs = keras.Input((4,))
    h = layers.Dense(4)(inputs)
    h = layers.Lambda(_quantize, output_shape=(4,))(h)
    ledger = ledger_of(trace_graph(keras.Model(inputs, layers.Dense(4)(h))))
    assert ledger.sized(1, 2).running >= 4 * BATCH * 4 * 512


def _quantize(x):
    """Straight through, as vector quantizers have it."""
    wide = keras.ops.sin(keras.ops.tile(keras.ops.stop_gradient(x), (1, 512)))
    return x + keras.ops.max(wide, axis=-1, keepdims=True)


def test_the_loss_is_counted():
    """Scores and their gradient, where a layer has less."""
    inputs = keras.Input((4,))
    model = keras.Model(inputs, layers.Dense(1000)(inputs))
    scores = tf.TensorSpec([BATCH, 1000])
    size = 4 * BATCH * 1000
    assert loss_bytes(model, [scores]) == 0  # It has none yet.
    for loss in ("sparse_categorical_crossentropy", "mse"):
        model.compile("sgd", loss)
        assert 2 * size <= loss_bytes(model, [scores]) < 6 * size
    from_logits = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile("sgd", from_logits)
    found = loss_bytes(model, [scores])
    assert found == pytest.approx(2 * size, rel=0.01)
    graph = trace_graph(model)
    profiler = Profiler(graph, BATCH, DEVICE)
    ledger = Ledger(profiler, 2, "exact", 1.0, of_loss=found / BATCH)
    assert ledger.sized(0, 1).running == found
    half = ledger.otherwise("exact", BATCH // 2)
    assert half.sized(0, 1).running == found // 2


def test_losses_of_several_outputs():
    inputs = keras.Input((4,))
    outputs = [layers.Dense(n, name=f"d{n}")(inputs) for n in (10, 1000)]
    model = keras.Model(inputs, outputs)
    specs = [tf.TensorSpec([BATCH, n]) for n in (10, 1000)]
    small, large = 4 * BATCH * 10, 4 * BATCH * 1000

    def found(loss):
        model.compile("sgd", loss)
        return loss_bytes(model, specs)

    assert found({"d10": "mse"}) < 10 * small
    assert found([None, "mse"]) == found({"d1000": "mse"}) > large
    assert found(["mse", "mse"]) > found([None, "mse"])


def test_a_loss_may_read_variables():
    weights = keras.Variable(np.ones(1000, "float32"))

    def loss(target, output):
        return keras.ops.mean(weights * (target - output) ** 2, -1)

    inputs = keras.Input((4,))
    model = keras.Model(inputs, layers.Dense(1000)(inputs))
    model.compile("sgd", loss)
    found = loss_bytes(model, [tf.TensorSpec([BATCH, 1000])])
    assert 4 * BATCH * 1000 < found < 10 * 4 * BATCH * 1000


def test_a_loss_for_other_targets_is_not_counted():
    def peculiar(target, output):
        raise KeyError("words")

    inputs = keras.Input((4,))
    model = keras.Model(inputs, layers.Dense(8)(inputs))
    for loss in (peculiar, {"no_output": "mse"}, [["mse", "mae"]]):
        model.compile("sgd", loss)
        assert loss_bytes(model, [tf.TensorSpec([BATCH, 8])]) == 0


def test_inputs_that_wait_are_counted():
    """By each stage that reads them."""
    a, b = keras.Input((4,)), keras.Input((300,))
    h = layers.Dense(4)(a)
    h = layers.Concatenate()([layers.Dense(4)(h), b])
    h = layers.Concatenate()([layers.Dense(4)(h), b])
    graph = trace_graph(keras.Model([a, b], layers.Dense(2)(h)))
    ledger = ledger_of(graph)
    small, large = 4 * BATCH * 4, 4 * BATCH * 300
    count = len(graph.nodes)
    last = [i for i, n in enumerate(graph.nodes) if graph.inputs[1] in n.inputs]
    assert ledger.sized(0, last[0]).fed == small
    assert ledger.sized(0, count).fed == small + large  # for both at once
    assert ledger.sized(1, last[1]).fed == large
    assert ledger.sized(last[1], count).fed == large
    assert ledger.sized(last[1] + 1, count).fed == 0
    late = ledger.peak(last[1], 0, 7) - ledger.peak(last[1], 0, 4)
    assert late[-1] == pytest.approx(ALLOCATED * 3 * large)


@pytest.mark.parametrize(
    ("name", "most"),
    [("conv", 1), ("unet", 1), ("integers", 1), ("attention", 2.2)],
)
def test_what_selective_keeps_is_counted_by_layers(name, most):
    """About as of whole stages, and no more than `"exact"`."""
    graph = trace_graph(zoo.ZOO[name]().model)
    counted, exact = (ledger_of(graph, s) for s in ("selective", "exact"))
    less = 0
    for splits in (1, 2, 3):
        cuts = choose_cuts(graph, splits)
        edges = [0, *(cut + 1 for cut in cuts), len(graph.nodes)]
        kept = traced(graph, cuts, "selective")
        for (a, b), true in zip(itertools.pairwise(edges), kept):
            found = counted.stashed(a)[b - 1]
            whole = exact.stashed(a)[b - 1]
            assert 0.95 * true <= found <= min(whole, most * true)
            assert counted.sized(a, b).again == whole - found
            less += found < 0.8 * whole
    assert less


def test_no_limit_is_no_limit():
    graph = chain()
    room = Room(ledger_of(graph), legal_ends(graph, 2), 2, None)
    assert room.excess is None


def test_excess():
    graph = chain()
    ledger = ledger_of(graph)
    room = Room(ledger, legal_ends(graph, 2), 2, [1000, 2000])
    for k, late, ahead, limit in ((0, 2, 2, 1000), (1, 0, 4, 2000)):
        for stop in (1, 2, 3):
            found = room.excess(k, stop)
            expected = [
                ledger.peak(a, late, ahead)[stop - 1] - limit
                for a in range(stop)
            ]
            np.testing.assert_allclose(found, expected)


def test_a_refusal_says_what_would_fit():
    """And what it says is so."""
    graph = trace_graph(zoo.ZOO["conv"]().model)
    ledger = ledger_of(graph)
    ends = legal_ends(graph, 2)
    least = min(
        max(ledger.peak(0, 2, 2)[a], ledger.peak(a + 1, 0, 4)[-1])
        for a in ends[:-1]
    )
    text = Room(ledger, ends, 2, 0.9 * least).refusal()
    assert "stage" in text
    assert "more than its limit" in text
    assert f"{math.ceil(0.1 * least):,} bytes more" in text
    assert "batch_size=4" in text
    half = ledger.otherwise("exact", BATCH // 2)
    assert half.batch_size == BATCH // 2
    assert (
        min(
            max(half.peak(0, 2, 2)[a], half.peak(a + 1, 0, 4)[-1])
            for a in ends[:-1]
        )
        < 0.9 * least
    )


def fits(ledger, ends, splits, limit):
    """Whether there are cuts within a limit."""
    alike = np.ones([splits, ends[-1] + 1])
    excess = Room(ledger, ends, splits, limit).excess
    return planning.balance(ends, alike, 0 * alike, excess) is not None


def test_what_is_proposed_fits():
    """With any mode and limit."""
    wide = [layers.Dense(64) for _ in range(8)]
    proposed = set()
    for model in (
        keras.Sequential([keras.Input((64,)), *wide]),
        zoo.ZOO["conv"]().model,
        zoo.ZOO["unet"]().model,
    ):
        graph = trace_graph(model)
        ends = legal_ends(graph, 2)
        for stash in ("exact", "current", "replay"):
            ledger = ledger_of(graph, stash)
            at_least = Room(ledger, ends, 2, 1)._smallest(ledger, [0, 0])[0]
            assert fits(ledger, ends, 2, at_least + 1)
            for limit in (0.97 * at_least, 0.6 * at_least, 0.3 * at_least):
                text = Room(ledger, ends, 2, limit).refusal()
                _, _, ways = text.partition("What would fit: ")
                for way in ways.partition(". Received")[0].split("; "):
                    if way.startswith("nothing that was tried"):
                        proposed.add("nothing")
                        break
                    other, splits = ledger, 2
                    for change in way.split(" and "):
                        key, _, value = change.partition("=")
                        proposed.add(change if key == "stash" else key)
                        if key == "stash":
                            other = other.otherwise(value.strip('"'))
                        elif key == "batch_size":
                            other = other.otherwise(other.stash, int(value))
                        else:
                            assert key == "splits"
                            splits = int(value.split()[0])
                    proposed.add(way.count(" and "))
                    assert fits(other, ends, splits, limit)
    assert proposed >= {
        'stash="current"',
        'stash="replay"',
        "batch_size",
        "splits",
        1,  # two changes at once
        "nothing",
    }


def test_stages_of_one_device_share_its_limit():
    graph = chain()
    ledger, ends = ledger_of(graph), legal_ends(graph, 3)
    shared = Room(ledger, ends, 3, 6000, ["b", "a", "a"])
    apart = Room(ledger, ends, 3, [6000, 3000, 3000])
    for k in range(3):
        np.testing.assert_array_equal(shared.excess(k, 3), apart.excess(k, 3))
    text = Room(ledger, ends, 3, 60, ["b", "a", "a"]).refusal()
    assert "each of 2 stages of its device" in text
    assert "splits=" not in text


def test_one_limit_among_others():
    """That of the other stage is none."""
    graph = chain()
    ledger, ends = ledger_of(graph), legal_ends(graph, 2)
    for limit in ([1000, np.inf], [np.inf, 10]):
        text = Room(ledger, ends, 2, limit).refusal()
        k = int(limit[0] == np.inf)
        assert f"stage {k} of 2 needs" in text
        assert f"limit of {min(limit):,} bytes" in text


def test_a_deep_network_is_refused_soon():
    """A search takes about as many steps as there are pairs of layers."""
    graph = trace_graph(models.build("resnet110"))
    ledger = ledger_of(graph)
    room = Room(ledger, legal_ends(graph, 8), 8, 1000)
    start = time.process_time()
    room.refusal()
    assert time.process_time() - start < 10


@pytest.mark.parametrize(
    "limit",
    [
        0,
        -5,
        "x",
        "88",
        True,
        np.nan,
        {},
        {1: 2, 3: 4},
        [1, 2, 3],
        [1, None],
        [1, "2"],
    ],
)
def test_limits_that_are_none(limit):
    graph = chain()
    with pytest.raises(ValueError, match=r"`memory_limit`.*Received"):
        Room(ledger_of(graph), legal_ends(graph, 2), 2, limit)
